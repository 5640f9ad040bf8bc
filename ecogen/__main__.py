"""`python -m ecogen`: the command line."""

from ecogen.cli import main

main()
