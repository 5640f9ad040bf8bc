"""`python -m ecogen`: the command line."""

from ecogen.cli import main

if __name__ == "__main__":  # processes that this one starts import it
    main()
