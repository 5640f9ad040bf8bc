"""Adapters that tenants bring and take away while the model serves: `PUT` and `DELETE /v1/adapters/NAME`.

The body of a `PUT` is the directory that PEFT saved, as a zip file. Who may do so is known by a key; an adapter is its
tenant's alone.
"""

from __future__ import annotations

import asyncio
import io
import lzma
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from ecogen.serving.openai.keys import Caller, Keys
from ecogen.serving.openai.limits import Gate, Limits
from ecogen.serving.openai.refusals import Refusal, too_many, wrong

_NAME = re.compile(r"[\w][\w.-]{0,63}", re.ASCII)

_FILES = ("adapter_config.json", "adapter_model.safetensors")

_UNREADABLE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, ValueError, EOFError, RuntimeError)
"""What `zipfile` raises of other people's files; RuntimeError for those that are encrypted or packed in a way that it
does not know."""


class AdapterStore(Protocol):
    """What holds adapters of tenants beside a model."""

    def models(self, tenant: str | None = None) -> Sequence[ServedModel]:
        """As `Serving` has it."""

    async def put_adapter(self, name: str, adapter: Adapter, tenant: str | None = None) -> None:
        """Add one, or replace it."""

    async def remove_adapter(self, name: str, tenant: str | None = None) -> None:
        """Take one away."""


class _Names:
    """The names of tenants' adapters, those included that are on their way.

    Args:
        most: that one tenant may have.
        at_once: that it may bring at once, since each is in memory as a whole.
    """

    def __init__(self, store: AdapterStore, most: int, at_once: int) -> None:
        self._store, self._most, self._at_once = store, most, at_once
        self._coming: Counter[tuple[str, str]] = Counter()

    @contextmanager
    def reserved(self, tenant: str, name: str) -> Iterator[None]:
        """While an adapter comes; counted before anything is awaited, so that many at once are no more than may be.

        Raises:
            Refusal: 400 for what is no name; 409, if the tenant has as many as it may; 429, if it brings as many at
                once as it may.
        """
        if not _NAME.fullmatch(name):
            said = "1 to 64 letters, digits, '.', '_' and '-', the first a letter, a digit or '_'"
            raise wrong("name", f"An adapter's name is {said}", "invalid_name")
        if sum(number for (owner, _), number in self._coming.items() if owner == tenant) >= self._at_once:
            raise too_many(f"A tenant brings {self._at_once} adapters at once at most; wait for one to end")
        own = {model.name for model in self._store.models(tenant) if model.tenant == tenant}
        own |= {coming for owner, coming in self._coming if owner == tenant}
        if name not in own and len(own) >= self._most:
            raise Refusal(409, f"A tenant has {self._most} adapters at most; delete one", code="too_many_adapters")
        self._coming[tenant, name] += 1
        try:
            yield
        finally:
            self._coming -= Counter({(tenant, name): 1})


def adapter_routes(store: AdapterStore, keys: Keys, gate: Gate, limits: Limits) -> list[Route]:
    """Where adapters come and go."""
    names = _Names(store, limits.adapters, limits.adapters_at_once)
    sizes = replace(limits, body_bytes=limits.adapter_bytes)

    async def put(request: Request) -> Response:
        caller, tenant = _owner(keys, request)
        name = request.path_params["name"]
        with gate.admitted(caller), names.reserved(tenant, name):
            body = await read_body(request, sizes)
            try:
                adapter = await asyncio.to_thread(unpacked, body, limits.adapter_bytes)
                await store.put_adapter(name, adapter, tenant)
            except CheckpointError as problem:
                raise wrong("body", str(problem), "invalid_adapter") from problem
        backbone = store.models(tenant)[0]
        told = {"id": name, "object": "adapter", "bytes": adapter.nbytes, "backbone_bytes": backbone.nbytes}
        return _json(told | {"parent": backbone.name})

    async def delete(request: Request) -> Response:
        caller, tenant = _owner(keys, request)
        name = request.path_params["name"]
        with gate.admitted(caller):
            await store.remove_adapter(name, tenant)
        return _json({"id": name, "object": "adapter", "deleted": True})

    return [
        Route("/v1/adapters/{name}", put, methods=["PUT"]),
        Route("/v1/adapters/{name}", delete, methods=["DELETE"]),
    ]


def _owner(keys: Keys, request: Request) -> tuple[Caller, str]:
    """Who asks, and the tenant whose adapter it is.

    Raises:
        Refusal: 401 for an unknown key; 403 where there are no keys, and so nobody who could own one.
    """
    caller = keys.caller(request.headers.get("authorization"))
    if caller.tenant is None:
        raise Refusal(403, "Without API keys adapters have no owner; start the server with --keys", code="no_keys")
    return caller, caller.tenant


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
