"""Adapters that tenants bring and take away while the model serves: `PUT` and `DELETE /v1/adapters/NAME`.

The body of a `PUT` is the directory that PEFT saved, as a zip file. Who may do so is known by a key; an adapter is its
tenant's alone.
"""

from __future__ import annotations

import asyncio
import io
import lzma
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ecogen.errors import CheckpointError
from ecogen.models.checkpoint import tensors_of
from ecogen.models.mixed_lora import Adapter, adapter_of
from ecogen.serving.generation import ServedModel
from ecogen.serving.openai.connection import read_body
from ecogen.serving.openai.keys import Keys
from ecogen.serving.openai.limits import Limits
from ecogen.serving.openai.refusals import Refusal, too_many, wrong

_FILES = ("adapter_config.json", "adapter_model.safetensors")

_UNREADABLE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, ValueError, EOFError, RuntimeError)
"""What `zipfile` raises of other people's files; RuntimeError, of which NotImplementedError is one, if it is encrypted
or of a kind that it does not know."""


class Shelves(Protocol):
    """What holds adapters of tenants beside a model."""

    def models(self, tenant: str | None = None) -> Sequence[ServedModel]:
        """As `Serving` has it."""

    async def put_adapter(self, name: str, adapter: Adapter, tenant: str | None = None) -> None:
        """Add one, or replace it."""

    async def remove_adapter(self, name: str, tenant: str | None = None) -> None:
        """Take one away."""


def adapter_routes(shelves: Shelves, keys: Keys, limits: Limits) -> list[Route]:
    """Where adapters come and go."""

    async def put(request: Request) -> Response:
        tenant = _tenant(keys, request)
        name = request.path_params["name"]
        own = {model.name for model in shelves.models(tenant) if model.tenant == tenant}
        if name not in own and len(own) >= limits.adapters:
            raise too_many(f"A tenant has {limits.adapters} adapters at most; delete one")
        body = await read_body(request, replace(limits, body_bytes=limits.adapter_bytes))
        try:
            adapter = await asyncio.to_thread(unpacked, body, limits.adapter_bytes)
            await shelves.put_adapter(name, adapter, tenant)
        except CheckpointError as problem:
            raise wrong("body", str(problem), "invalid_adapter") from problem
        backbone = shelves.models(tenant)[0]
        told = {"id": name, "object": "adapter", "bytes": adapter.nbytes, "backbone_bytes": backbone.nbytes}
        return _json(told | {"parent": backbone.name})

    async def delete(request: Request) -> Response:
        tenant, name = _tenant(keys, request), request.path_params["name"]
        await shelves.remove_adapter(name, tenant)
        return _json({"id": name, "object": "adapter", "deleted": True})

    return [
        Route("/v1/adapters/{name}", put, methods=["PUT"]),
        Route("/v1/adapters/{name}", delete, methods=["DELETE"]),
    ]


def _tenant(keys: Keys, request: Request) -> str:
    """Whose adapter it is.

    Raises:
        Refusal: 401 for an unknown key; 403 where there are no keys, and so nobody who could own one.
    """
    tenant = keys.caller(request.headers.get("authorization")).tenant
    if tenant is None:
        raise Refusal(403, "Without API keys adapters have no owner; start the server with --keys", code="no_keys")
    return tenant


def unpacked(body: bytes, most: int) -> Adapter:
    """The adapter in a zip file.

    Raises:
        CheckpointError: if it is none, larger than it may be, or cannot be served.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(body)) as archive:
            found = {name.rpartition("/")[2]: name for name in archive.namelist()}
            config, tensors = (_read(archive, found[name], most) for name in _FILES)
        return adapter_of(config, tensors_of(tensors, "the adapter"), "the adapter")
    except KeyError as problem:
        raise CheckpointError(f"the zip file has no {problem.args[0]}; zip the directory that PEFT saved") from problem
    except _UNREADABLE as problem:
        raise CheckpointError(f"the body is no zip file of an adapter: {problem}") from problem


def _read(archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    """One file, which unpacked may be no larger than a body."""
    with archive.open(name) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise CheckpointError(f"{name} is larger than {most} bytes unpacked")
    return content


def _json(content: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
