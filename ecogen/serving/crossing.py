"""A text-image generator that is asked over a link: in tokens, where its modules are with those who ask, or in text and
pictures, where they are with it. The answer is the same, bit for bit; what crosses the link is not.

Both ways are the same two calls of `PictureModules`, at one end or at the other. Who asks in tokens says of which
modules they are; tokens of others are refused.

Shapes: T codes of an image.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, TypeVar

import msgspec
import torch

from ecogen.errors import CheckpointError, ProtocolError
from ecogen.models.pair_model import PairModel
from ecogen.models.pair_tokens import TEMPERATURE
from ecogen.models.picture_modules import PictureModules
from ecogen.records import Crossing, CrossingRecord, PictureTask
from ecogen.runtime.worker import Worker
from ecogen.topology import Link
from ecogen.transport.base import Message, Transport
from ecogen.transport.codec import encode_prefix
from ecogen.transport.framing import Framing

CROSS = "cross"

_MOST_TOKENS, _LONGEST_TEXT, _MOST_BYTES = 4096, 1024, 4 * 2**20
_FRAMING = Framing(tls=True)

Number = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
R = TypeVar("R")


class Told(msgspec.Struct, frozen=True, omit_defaults=True):
    """A caption or a picture, in one of two ways.

    Attributes:
        tokens: a caption's, or a picture's codes.
        text: the caption.
        picture: as a file.
    """

    tokens: Annotated[tuple[Number, ...], msgspec.Meta(max_length=_MOST_TOKENS)] | None = None
    text: Annotated[str, msgspec.Meta(max_length=_LONGEST_TEXT)] | None = None
    picture: Annotated[bytes, msgspec.Meta(max_length=_MOST_BYTES)] | None = None


class Order(msgspec.Struct, frozen=True, omit_defaults=True):
    """To whoever has the generator: draw this caption, or describe this picture.

    Attributes:
        seed: of what is drawn.
        modules: the digest of those whose tokens these are, and which the answer is to be in; empty where those of the
            generator's node are to read and make text and pictures.
    """

    task: PictureTask
    told: Told
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**62)] = 0
    modules: str = ""


class Reply(msgspec.Struct, frozen=True, omit_defaults=True):
    """The picture, or what it shows.

    Attributes:
        generate_s: from tokens to tokens.
        held_s: from the order's arrival to this answer, waiting for a turn included.
        encode_s, decode_s: before and behind the generator, where its own modules were asked.
    """

    told: Told
    generate_s: float
    held_s: float
    encode_s: float = 0.0
    decode_s: float = 0.0


class AskedGenerator:
    """Answers orders with the generator that a node holds.

    Args:
        model: the whole generator; `begin` readies it, on the compute thread.
        length: tokens of a passage at most.
        count: takes how many pictures were drawn or described, for the books.
    """

    def __init__(
        self,
        modules: PictureModules,
        model: PairModel,
        worker: Worker,
        *,
        length: int,
        begin: Callable[[], None],
        count: Callable[[int], None],
    ) -> None:
        self._modules, self._model, self._worker = modules, model, worker
        self._length, self._begin, self._count = length, begin, count

    async def answer(self, message: Message) -> Message:
        """What is asked for.

        Raises:
            ProtocolError: if the order cannot be read, or is no caption or picture.
            CheckpointError: if its tokens are of other modules.
            DataError: if its picture cannot be read.
        """
        arrived_s, order = time.perf_counter(), message.read(Order)
        if order.modules and order.modules != self._modules.digest:
            raise CheckpointError(
                f"tokens of the modules {order.modules} mean nothing to this generator, whose modules are "
                f"{self._modules.digest}; get those where the generator is, or send text and pictures"
            )
        reply = await self._worker.compute(self._answered, order)
        reply = msgspec.structs.replace(reply, held_s=time.perf_counter() - arrived_s)
        return Message.of(CROSS, reply, kind="samples" if order.task == "draw" else "control")

    def _answered(self, order: Order) -> Reply:
        given, encode_s = timed(lambda: self._tokens(order))
        self._check(order.task, given)
        self._begin()
        made, generate_s = timed(lambda: self._generated(order, given))
        self._count(1)
        told, decode_s = timed(lambda: self._told(order, made))
        return Reply(told, generate_s, 0.0, encode_s, decode_s)

    def _tokens(self, order: Order) -> tuple[int, ...]:
        """What the order tells, in tokens."""
        told = order.told
        held = [name for name in told.__struct_fields__ if getattr(told, name) is not None]
        wanted = "tokens" if order.modules else "text" if order.task == "draw" else "picture"
        if held != [wanted]:
            raise ProtocolError(f"an order to {order.task} has {' and '.join(held) or 'nothing'}; send {wanted}")
        if told.tokens is not None:
            return told.tokens
        return tuple(encoded(self._modules, order.task, told))

    def _check(self, task: PictureTask, given: tuple[int, ...]) -> None:
        tokens, room = self._modules.tokens, self._length - self._modules.tokens.length - 2
        if task == "describe":
            if len(given) != tokens.length or max(given) >= tokens.num_codes:
                raise ProtocolError(f"{len(given)} codes; a picture is {tokens.length}, below {tokens.num_codes}")
        elif not 0 < len(given) <= room:
            raise ProtocolError(f"{len(given)} tokens are no caption; 1 to {room} have room beside a picture")
        elif max(given) >= (known := len(self._modules.tokenizer)) or not set(given).isdisjoint(tokens.codes):
            raise ProtocolError(f"tokens {list(given)} are not all of text; this model has {known}")

    def _generated(self, order: Order, given: tuple[int, ...]) -> list[int]:
        """From tokens to tokens."""
        if order.task == "describe":
            return self._model.caption_tokens(torch.tensor([given]))[0]
        generator = torch.Generator().manual_seed(order.seed)
        codes: list[int] = self._model.draw_codes([given], generator, TEMPERATURE)[0][0].tolist()
        return codes

    def _told(self, order: Order, made: list[int]) -> Told:
        return Told(tokens=tuple(made)) if order.modules else decoded(self._modules, order.task, made)


def encoded(modules: PictureModules, task: PictureTask, told: Told) -> list[int]:
    """The tokens of a caption that is to be drawn, or the codes of a picture that is to be described."""
    return modules.prompt_of(told.text or "") if task == "draw" else modules.codes_of(told.picture or b"")


def decoded(modules: PictureModules, task: PictureTask, made: list[int]) -> Told:
    """The picture that codes are, or the caption that tokens are."""
    return Told(picture=modules.picture_of(made)) if task == "draw" else Told(text=modules.caption_of(made))


@dataclass(frozen=True)
class Front:
    """Asks a generator at another node, with modules here or there, and notes what crosses the link.

    Args:
        link: to the generator, whose time is modelled.
    """

    node_id: str
    generator_id: str
    modules: PictureModules
    worker: Worker
    transport: Transport
    link: Link

    async def ask(
        self, request_id: str, task: PictureTask, told: Told, seed: int, crossing: Crossing
    ) -> tuple[Told, CrossingRecord]:
        """A picture for a caption, or a caption for a picture.

        Args:
            crossing: tokens, with the modules here; or text and pictures, with those that the generator has.

        Raises:
            ProtocolError: if the answer is none.
            NodeLostError, CheckpointError, DataError: as `AskedGenerator.answer` and `Transport.call`.
        """
        is_here, encode_s, decode_s = crossing == "tokens", 0.0, 0.0
        order = Order(task, told, seed)
        if is_here:
            tokens, encode_s = await self._timed(lambda: encoded(self.modules, task, told))
            order = Order(task, Told(tokens=tuple(tokens)), seed, self.modules.digest)
        message = Message.of(CROSS, order, kind="samples" if task == "describe" else "control")
        began_s = time.perf_counter()
        answer = await self.transport.call(self.generator_id, message)
        there_and_back_s, reply = time.perf_counter() - began_s, answer.read(Reply)
        made = reply.told
        if is_here:
            codes = self._codes(task, made)
            made, decode_s = await self._timed(lambda: decoded(self.modules, task, codes))
        sent, received = (
            encode_prefix(one, sender).total_bytes
            for one, sender in ((message, self.node_id), (answer, self.generator_id))
        )
        up, down = _FRAMING.request(sent), _FRAMING.reply(received)
        return made, CrossingRecord(
            request_id=request_id,
            node_id=self.node_id,
            generator_id=self.generator_id,
            task=task,
            crossing=crossing,
            sent_bytes=sent,
            received_bytes=received,
            framing_bytes=up + down,
            encode_s=encode_s + reply.encode_s,
            generate_s=reply.generate_s,
            decode_s=decode_s + reply.decode_s,
            transfer_s=max(0.0, there_and_back_s - reply.held_s),
            link_s=self.link.seconds(sent + up) + self.link.seconds(received + down),
            answer=answer_digest(made),
            modules_bytes=self.modules.nbytes,
            time_s=time.time(),
        )

    def _codes(self, task: PictureTask, made: Told) -> list[int]:
        """The tokens of an answer, which the modules here can read."""
        tokens, known = made.tokens or (), self.modules.tokens
        is_picture = len(tokens) == known.length and max(tokens) < known.num_codes
        if not (is_picture if task == "draw" else made.tokens is not None):
            raise ProtocolError(f"{self.generator_id} answered {task} with what is no {known.length} codes or text")
        return list(tokens)

    async def _timed(self, work: Callable[[], R]) -> tuple[R, float]:
        """On the compute thread, without the time that it waits for its turn."""
        return await self.worker.compute(timed, work)


def timed(work: Callable[[], R]) -> tuple[R, float]:
    """What a function gives, and the seconds that it took."""
    began_s = time.perf_counter()
    return work(), time.perf_counter() - began_s


def answer_digest(made: Told) -> str:
    """A fingerprint of a picture or a caption."""
    return hashlib.sha256(msgspec.msgpack.encode(made)).hexdigest()[:16]
