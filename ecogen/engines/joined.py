"""A gateway to a federation that somebody else started, seen with an operator's certificate: `ecogen serve --join`."""

from __future__ import annotations

import asyncio
import json
import logging
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from ecogen import config as recipes
from ecogen.engines.attached import operator_of
from ecogen.engines.served import Served, name_of
from ecogen.errors import CheckpointError, RunError, TransportError
from ecogen.models.folder import CONFIG, ModelFolder, open_folder, read_text_files, write_text_files
from ecogen.models.picture_modules import digest_of_modules
from ecogen.node.books import hand_in_books
from ecogen.node.context import DESCRIBE, LOCATE, Located, Welcome
from ecogen.serving.gateway import Gateway
from ecogen.serving.generation import ServedModel
from ecogen.serving.language import LanguageModel
from ecogen.storage import write_atomically
from ecogen.transport.base import Message, Transport

logger = logging.getLogger(__name__)

_LOOK_S = 1.0
_ANSWER_S = 10.0


@asynccontextmanager
async def join_serving(
    cloud_id: str, address: str, certificates: Path, found: Served | None = None
) -> AsyncIterator[tuple[Gateway, Served]]:
    """A gateway to the edges of a cloud that is running, and what they serve; leaving stops none of them.

    Edges may come, go and move meanwhile: the cloud is asked where they are.

    Args:
        found: the model as this machine has it, with its name and adapters; None for what the cloud tells.

    Raises:
        RunError: if the federation does not serve.
        CheckpointError: if it serves another model than `found`, or one with other tokenizers.
        AuthenticationError, NodeLostError: as `operator_of`.
    """
    async with operator_of(cloud_id, address, certificates) as (transport, status):
        recipe = recipes.from_table(status.recipe, f"the recipe of {cloud_id}")
        if recipe.task != "serve":
            raise RunError(
                f"{cloud_id} tunes a model; watch it with `ecogen watch`, and serve the run that it ends with"
            )
        reply = await transport.call(cloud_id, Message.of(DESCRIBE, counted=False))
        welcome = reply.read(Welcome)
        if found is not None:
            await asyncio.to_thread(_check_same, found, welcome, cloud_id)
        with tempfile.TemporaryDirectory(prefix="ecogen-") as temporary:
            served = found or _described(welcome, Path(temporary), name_of(Path(recipe.model.source)))
            model = _model(served, welcome, recipe)
            edge_ids = recipes.build_topology(recipe.topology).edge_ids
            gateway = Gateway(transport, edge_ids, model, recipe.serving.patience_s)
            edges = _Edges(transport, cloud_id, edge_ids, gateway)
            edges.note(status.addresses)
            following = asyncio.create_task(edges.follow())
            try:
                yield gateway, served
            finally:
                following.cancel()
                await hand_in_books(transport, edge_ids)
                await gateway.close()


class _Edges:
    """Where the edges are, as the cloud tells it; what it said last holds while it is away."""

    def __init__(self, transport: Transport, cloud_id: str, edge_ids: list[str], gateway: Gateway) -> None:
        self._transport, self._cloud_id, self._edge_ids, self._gateway = transport, cloud_id, edge_ids, gateway
        self._away: set[str] = set()

    def note(self, addresses: dict[str, str]) -> None:
        """Here they are, and the others are away."""
        for edge_id in self._edge_ids:
            if edge_id in addresses:
                self._transport.learn(edge_id, addresses[edge_id])
        away = set(self._edge_ids) - addresses.keys()
        if news := sorted(away - self._away):
            logger.warning("not here: %s", ", ".join(news))
        self._away = away
        self._gateway.note_away(away)

    async def follow(self) -> None:
        """Forever: let the gateway and its transport know."""
        has_cloud = True
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                await self._look()
                has_cloud = True
            except TransportError as problem:
                if has_cloud:
                    logger.warning("%s; the edges go on", problem)
                has_cloud = False

    async def _look(self) -> None:
        ask = Message.of(LOCATE, counted=False)
        reply = await self._transport.call(self._cloud_id, ask, timeout_s=_ANSWER_S)
        self.note(reply.read(Located).addresses)


def _check_same(found: Served, welcome: Welcome, cloud_id: str) -> None:
    digest = open_folder(found.folder).digest
    if digest != welcome.digest:
        raise CheckpointError(
            f"{found.folder} is not the model that {cloud_id} serves: their digests are {digest} and {welcome.digest}; "
            "give that one, or none and its adapters with --adapter NAME=DIR"
        )
    own, theirs = digest_of_modules(read_text_files(found.folder)), digest_of_modules(welcome.files)
    if own != theirs:
        raise CheckpointError(
            f"{found.folder} makes other tokens of text and pictures than {cloud_id} does: its tokenizers have the "
            f"digest {own}, those of {cloud_id} {theirs}; give the folder that it serves, or none and fetch them"
        )


def _described(welcome: Welcome, folder: Path, name: str) -> Served:
    """The model without its weights, which a gateway does not need."""
    write_atomically(folder / CONFIG, json.dumps(welcome.model))
    write_text_files(folder, welcome.files)
    return Served(folder, name)


def _model(served: Served, welcome: Welcome, recipe: recipes.Recipe) -> ServedModel:
    without_weights = LanguageModel(ModelFolder(served.folder, welcome.model, {}, {}))
    max_tokens = without_weights.max_tokens(recipe.serving.max_tokens)
    return ServedModel(served.name, time.time(), max_tokens, nbytes=welcome.nbytes)
