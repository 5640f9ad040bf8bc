"""The command line. It prints; everything else logs or returns."""

from ecogen.cli import runs, students, versions, serving, nodes, certs  # noqa: F401, I001 - in the order that the help lists their verbs
from ecogen.cli.application import app, main

__all__ = ["app", "main"]
