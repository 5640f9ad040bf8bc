"""Errors on the wire: what a service raises travels as a message and is raised as the same class at the caller."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import msgspec

from ecogen.errors import EcoGenError, ProtocolError, TransportError
from ecogen.transport.base import Message, Peer, Service

logger = logging.getLogger(__name__)

# No service may use it: a method that is not an identifier.
FAILURE_METHOD = "failure!"


class Failure(msgspec.Struct, frozen=True):
    """An EcoGenError as a value.

    Attributes:
        classes: its class and those above it, nearest first: a node that lacks the first takes the next.
    """

    classes: tuple[str, ...]
    message: str
    node_id: str | None = None
    problems: tuple[str, ...] | None = None


async def answer(service: Service, peer: Peer, message: Message) -> Message:
    """What the service answers; an error becomes a failure message, told in full only if it is an EcoGenError."""
    try:
        return await service.handle(peer, message)
    except EcoGenError as error:
        return failure_message(error, counted=message.counted)
    except Exception:
        logger.exception("%s from %s failed", message.method, peer.node_id)
        return failure_message(internal_error(message.method), counted=message.counted)


def internal_error(what: str) -> TransportError:
    """What a caller learns of an unexpected exception: where to look, not what it said."""
    return TransportError(f"{what} failed for an unexpected reason at the other node; its log has the details")


def failure_message(error: EcoGenError, *, counted: bool = True) -> Message:
    """The error as a message."""
    return Message.of(FAILURE_METHOD, failure_of(error), counted=counted)


def failure_of(error: EcoGenError) -> Failure:
    """The error as a value."""
    classes = tuple(cls.__name__ for cls in type(error).__mro__ if issubclass(cls, EcoGenError))
    problems = getattr(error, "problems", None)
    return Failure(classes, str(error), getattr(error, "node_id", None), None if problems is None else tuple(problems))


def raise_failure(message: Message) -> Message:
    """The message itself, unless it is a failure: then the error is raised."""
    if message.method == FAILURE_METHOD:
        raise rebuild(message.read(Failure))
    return message


def rebuild(failure: Failure) -> EcoGenError:
    """The error that was made a value."""
    known = {cls.__name__: cls for cls in _tree(EcoGenError)}
    cls = next((known[name] for name in failure.classes if name in known), TransportError)
    # Not by the constructor, since it takes the parts of the message and the message is all we have.
    error = cls.__new__(cls, failure.message)
    if failure.node_id is not None:
        error.__dict__["node_id"] = failure.node_id
    if failure.problems is not None:
        error.__dict__["problems"] = list(failure.problems)
    return error


def _tree(root: type[EcoGenError]) -> Iterator[type[EcoGenError]]:
    yield root
    for child in root.__subclasses__():
        yield from _tree(child)


def check_sender(claimed_id: str, node_id: str) -> None:
    """Nothing, if a message names as its sender the node that sent it.

    Raises:
        ProtocolError: if it names another.
    """
    if claimed_id != node_id:
        raise ProtocolError(f"a message from node {node_id!r} says it comes from {claimed_id!r}; it was refused")
