"""What is taken of the adapter_config.json that comes with a LoRA adapter: by how much each product of its tensors
counts.

Whoever brings it may be anybody. Nothing of it reaches PEFT: ranks are those of the tensors, and what PEFT would take
for a regular expression is taken for a name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from peft import LoraConfig

from ecogen.errors import CheckpointError

_NAME = re.compile(r"(?:\w|\\?\.)+", re.ASCII)  # with escaped dots: to PEFT, it is an expression

_Rank = Annotated[int, Meta(ge=1)]

_DESCRIBE = {
    # whose it is, and which library wrote it
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "revision",
    "peft_version",
    "auto_mapping",
    "inference_mode",
    "runtime_config",
    # which modules it is for, as the names of its tensors say too
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    # how it was trained
    "lora_dropout",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "loftq_config",
}
"""Fields that no output depends on. Configurations of beginnings are among them, since a converted adapter has its
own still; `init_lora_weights` says whether it was converted."""

_KEEP_BACKBONE = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""Beginnings that leave the backbone as it was (PEFT 0.21, `LoraLayer.update_layer`)."""


class LoraSettings(msgspec.Struct, frozen=True):
    """What outputs depend on, as PEFT saves it.

    Attributes:
        rank_pattern, alpha_pattern: of modules by their name or the end of it; the first that fits counts.
        fan_in_fan_out: how the backbone's matrices lie, which the model knows itself.
    """

    r: _Rank = 8
    lora_alpha: float = 8.0
    use_rslora: bool = False
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, float] | None = None
    fan_in_fan_out: bool = False

    def scalings(self, ranks: Mapping[str, int]) -> dict[str, float]:
        """By how much each module's product counts.

        Args:
            ranks: of each module's tensors, at least one.

        Raises:
            CheckpointError: if it says that a module has another rank.
        """
        rank_of, alpha_of = _by_name(self.rank_pattern, self.r), _by_name(self.alpha_pattern, self.lora_alpha)
        for module, rank in ranks.items():
            if (said := rank_of(module)) != rank:
                raise CheckpointError(f"adapter_config.json says rank {said} of {module!r}, its tensors have {rank}")
        root = math.sqrt if self.use_rslora else float
        return {module: alpha_of(module) / root(rank) for module, rank in ranks.items()}


def read_settings(content: bytes) -> LoraSettings:
    """What an adapter_config.json says.

    Raises:
        CheckpointError: if it cannot be read, a field has another type than it should have, or one asks for what
            cannot share a batch with others.
    """
    try:
        table = json.loads(content)
    except (ValueError, RecursionError) as problem:
        raise CheckpointError(f"adapter_config.json cannot be read ({problem})") from problem
    if not isinstance(table, dict):
        raise CheckpointError("adapter_config.json holds no object")
    if reason := _refusal(table):
        raise CheckpointError(f"{reason}; merge it into its model and serve that")
    _check_beginning(table.get("init_lora_weights"))
    try:
        settings = msgspec.convert(table, LoraSettings)
    except (msgspec.ValidationError, OverflowError) as problem:
        raise CheckpointError(f"adapter_config.json: {problem}") from problem
    _check_values(settings)
    return settings


def _refusal(table: Mapping[str, Any]) -> str | None:
    """Why an adapter cannot share a batch with others; None where it can."""
    if (kind := table.get("peft_type")) != "LORA":
        return f"it is {_short(kind)}, and only LoRA can share a batch with others"
    taken = _DESCRIBE | set(LoraSettings.__struct_fields__) | {"init_lora_weights"}
    for name in sorted(table.keys() - taken):
        if not _asks_for_nothing(name, table[name]):
            return f"{name[:80]} is {_short(table[name])}, which cannot share a batch with others"
    return None


def _asks_for_nothing(name: str, value: Any) -> bool:
    """Whether a field has PEFT's default, or one that is off in any field."""
    defaults = {field.name: field.default for field in fields(LoraConfig) if field.default is not MISSING}
    return value in (None, False, "", []) or (name in defaults and bool(value == defaults[name]))


def _check_beginning(value: Any) -> None:
    """Refuse what was trained beside a backbone that its beginning had changed, as PiSSA, OLoRA and others do."""
    if not any(value is known or (isinstance(value, str) and value == known) for known in _KEEP_BACKBONE):
        raise CheckpointError(
            f"init_lora_weights is {_short(value)}: its tensors belong to a backbone that was changed with it; convert "
            "it with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )


def _check_values(settings: LoraSettings) -> None:
    """What types do not say.

    Raises:
        CheckpointError: if a pattern is no name, or a number is none.
    """
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(settings, field) or {}:
            if not _NAME.fullmatch(key):
                raise CheckpointError(
                    f"adapter_config.json: {field} has {_short(key)}, which is no name of a module; write plain names"
                )
    alphas = [settings.lora_alpha, *(settings.alpha_pattern or {}).values()]
    if not all(math.isfinite(alpha) for alpha in alphas):
        raise CheckpointError("adapter_config.json: lora_alpha and alpha_pattern must be finite numbers")


def _by_name(patterns: Mapping[str, float] | None, default: float) -> Callable[[str], float]:
    """What finds a module's value: that of the first pattern which is its name, or the end of it after a dot."""
    known = {key.replace("\\.", "."): (place, value) for place, (key, value) in enumerate((patterns or {}).items())}

    def find(module: str) -> float:
        parts = module.split(".")
        ends = (".".join(parts[start:]) for start in range(len(parts)))
        return min((known[end] for end in ends if end in known), key=lambda found: found[0], default=(0, default))[1]

    return find


def _short(value: Any) -> str:
    """A value from outside, in an error; of a deep one its type only."""
    return json.dumps(value)[:80] if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
