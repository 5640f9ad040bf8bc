"""Every error that EcoGen raises for a caller, as one tree.

EcoGenError
├── ConfigError            a recipe is wrong; lists all problems
├── PlacementError         the model does not fit the devices
├── CheckpointError        a checkpoint is missing, corrupt or of another model
├── DataError              a data set or an input file cannot be used
├── RunError               a run folder is missing, busy or of another recipe
├── StorageError           a disk is full or not writable
├── AggregationError       updates cannot be averaged
├── ServingError           a request or a model cannot be served
│   ├── UnknownModelError  there is no such model, or not for this tenant
│   ├── OverloadedError    as many requests wait as may
│   ├── UnavailableError   the devices that are here cannot serve
│   └── StepError          a step through the model failed, by nothing that was asked
└── TransportError         something between two nodes
    ├── NodeLostError      the other node does not answer
    ├── ProtocolError      the other node speaks another version or sent nonsense
    └── AuthenticationError  a certificate is missing, wrong, expired or revoked
"""

from __future__ import annotations

from collections.abc import Sequence


class EcoGenError(Exception):
    """Something a user can act on: the command line prints it and exits with code 2."""


class ConfigError(EcoGenError):
    """A recipe has problems, all of them listed with their place."""

    def __init__(self, problems: Sequence[str], source: str = "recipe") -> None:
        self.problems = list(problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        super().__init__(f"{source}: {count}\n" + "\n".join(f"  {problem}" for problem in self.problems))


class PlacementError(EcoGenError):
    """The model does not fit the devices."""


class CheckpointError(EcoGenError):
    """A checkpoint is missing, corrupt or belongs to another model."""


class DataError(EcoGenError):
    """A data set or an input file cannot be used."""


class RunError(EcoGenError):
    """A run folder is missing, busy or belongs to another recipe."""


class StorageError(EcoGenError):
    """A disk is full or cannot be written."""


class AggregationError(EcoGenError):
    """Updates cannot be averaged."""


class ServingError(EcoGenError):
    """A request or a model cannot be served."""


class UnknownModelError(ServingError):
    """There is no model of that name, or not for this tenant."""


class OverloadedError(ServingError):
    """As many requests wait as may; try again later."""


class UnavailableError(ServingError):
    """The devices that are here cannot serve; others may come, or be started."""


class StepError(ServingError):
    """A step through the model failed, by nothing that was asked; a node's log says why."""


class TransportError(EcoGenError):
    """Something between two nodes failed."""


class NodeLostError(TransportError):
    """A node does not answer any more; a normal event in a federation."""

    def __init__(self, node_id: str, reason: str) -> None:
        self.node_id = node_id
        super().__init__(f"node {node_id!r} is lost: {reason}")


class ProtocolError(TransportError):
    """The other node speaks another protocol version or sent a malformed message."""


class AuthenticationError(TransportError):
    """A certificate is missing, wrong, expired or revoked."""
