"""API keys: who may ask, and for which tenant.

Kept as digests keyed with a salt of this process, so neither its memory nor the time of a look-up tells a key.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ecogen.errors import ConfigError
from ecogen.serving.openai.refusals import Refusal

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks.

    Attributes:
        key_id: stands for the key in counts of requests; None where there are no keys.
    """

    key_id: bytes | None = None
    tenant: str | None = None


class Keys:
    """Which keys are good.

    Args:
        tenants: each key's tenant; none at all lets everybody in.
    """

    def __init__(self, tenants: Mapping[str, str] | None = None) -> None:
        self._salt = secrets.token_bytes(32)
        self._callers = {}
        for key, tenant in (tenants or {}).items():
            key_id = self._digest(key)
            self._callers[key_id] = Caller(key_id, tenant)

    def __len__(self) -> int:
        return len(self._callers)

    def caller(self, authorization: str | None) -> Caller:
        """Whose request has this header.

        Raises:
            Refusal: 401, if there are keys and this is none of them.
        """
        if not self._callers:
            return Caller()
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise _refused("No API key was given; send the header 'Authorization: Bearer KEY'")
        caller = self._callers.get(self._digest(key.strip()))
        if caller is None:
            raise _refused("This API key is not known here; ask whoever runs this server for one")
        return caller

    def _digest(self, key: str) -> bytes:
        return hashlib.blake2b(key.encode(), key=self._salt, digest_size=32).digest()


def read_keys(path: Path) -> Keys:
    """Keys from a TOML file, `tenant = "key"` or `tenant = ["key", "another"]` a line.

    Raises:
        ConfigError: if the file cannot be used.
    """
    try:
        table = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as problem:
        raise ConfigError([f"cannot be read: {problem}"], str(path)) from problem
    if path.stat().st_mode & 0o077:
        logger.warning("%s can be read by others on this machine; chmod 600 keeps the keys in it yours", path)
    tenants: dict[str, str] = {}
    problems = [problem for tenant, keys in table.items() for problem in _add(tenants, tenant, keys)]
    if problems or not tenants:
        raise ConfigError(problems or ['has no keys; write tenant = "key"'], str(path))
    return Keys(tenants)


def _add(tenants: dict[str, str], tenant: str, keys: object) -> list[str]:
    """Enter a tenant's keys; what is wrong with them, without saying one."""
    problems = []
    for key in keys if isinstance(keys, list) else [keys]:
        if not isinstance(key, str) or not key or key != "".join(key.split()):
            problems.append(f'{tenant}: a key is text without blanks; write {tenant} = "key"')
        elif key in tenants:
            problems.append(f"{tenant}: has a key of {tenants[key]}; give each its own")
        else:
            tenants[key] = tenant
    return problems


def _refused(message: str) -> Refusal:
    return Refusal(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
