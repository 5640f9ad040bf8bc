"""What a recipe says of the tunables: of the whole run, of blocks and of clusters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import field, replace
from typing import TypeVar

from pydantic.dataclasses import dataclass

from ecogen.config.types import (
    STRICT,
    Backbone,
    BlockRange,
    Count,
    LoraKind,
    LoraTarget,
    Natural,
    Positive,
    PromptDepth,
)

Value = TypeVar("Value")


@dataclass(frozen=True, config=STRICT)
class BlockTunables:
    """What trains in some blocks, where it is not what the run says; what is left out is as in the run."""

    prompts: Natural | None = None
    lora_rank: Natural | None = None
    ia3: bool | None = None
    bottleneck: Natural | None = None
    backbone: Backbone | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class TunedBlock:
    """What trains in one block, all of it said.

    Attributes:
        prompts: that enter before this block.
        lora_targets: what LoRA is added to, where there is a rank.
        has_magnitudes: DoRA's, one an output of each LoRA target.
    """

    prompts: int = 0
    lora_rank: int = 0
    lora_targets: tuple[LoraTarget, ...] = ()
    has_magnitudes: bool = False
    ia3: bool = False
    bottleneck: int = 0
    backbone: Backbone = "frozen"

    @property
    def is_tuned(self) -> bool:
        """Whether anything trains in it."""
        return bool(self.prompts or self.lora_rank or self.ia3 or self.bottleneck or self.backbone != "frozen")


@dataclass(frozen=True, config=STRICT)
class Tunables:
    """What trains and travels; `docs/tunables.md` says which when."""

    prompts: Natural = 4  # images: visual prompts: of each block, or all of them (VPT, Jia et al. 2022)
    prompt_depth: PromptDepth = "deep"  # shallow: they enter once, stay and cross the cuts above
    lora_rank: Natural = 4
    lora_alpha: Positive = 8.0
    lora_kind: LoraKind = "lora"  # rslora: scaled by alpha / sqrt(rank); dora: a magnitude of its own a row
    # Of each block, of images attention projections, of text any linear layer by its name, "attention" or "mlp".
    lora_targets: tuple[LoraTarget, ...] = ("q_proj", "v_proj")
    ia3: bool = False  # factors on keys, values and the MLP's inner activations (Liu et al. 2022); instead of LoRA
    bottleneck: Natural = 0  # inner size of an adapter after each MLP (Houlsby et al. 2019)
    head: bool = True  # images: of the classes
    backbone: Backbone = "frozen"  # what of the foundation model trains too
    first_block: Natural = 0  # all of it from this block upwards; no gradient flows below the lowest tunable
    blocks: Mapping[BlockRange, BlockTunables] = field(default_factory=dict)  # "0..2": what is different in 0 and 1
    cluster_ranks: Mapping[str, Count] = field(default_factory=dict)  # by cluster: at most this LoRA rank there

    def of_block(self, index: int) -> TunedBlock:
        """What trains in one block."""
        if index < self.first_block:
            return TunedBlock()
        own = next((own for blocks, own in self.blocks.items() if index in block_range(blocks)), BlockTunables())
        has_prompts = self.prompt_depth == "deep" or index == self.first_block
        rank = _first_of(own.lora_rank, self.lora_rank)
        return TunedBlock(
            prompts=_first_of(own.prompts, self.prompts) if has_prompts else 0,
            lora_rank=rank,
            lora_targets=self.lora_targets if rank else (),
            has_magnitudes=bool(rank) and self.lora_kind == "dora",
            ia3=_first_of(own.ia3, self.ia3),
            bottleneck=_first_of(own.bottleneck, self.bottleneck),
            backbone=_first_of(own.backbone, self.backbone),
        )

    def of_cluster(self, cluster_id: str) -> Tunables:
        """What trains in one cluster: of its own LoRA rank, where the recipe says one."""
        most = self.cluster_ranks.get(cluster_id)
        if most is None:
            return replace(self, cluster_ranks={})
        blocks = {
            name: replace(own, lora_rank=None if own.lora_rank is None else min(own.lora_rank, most))
            for name, own in self.blocks.items()
        }
        return replace(self, lora_rank=min(self.lora_rank, most), blocks=blocks, cluster_ranks={})


def block_range(text: str) -> range:
    """The blocks of "2..4": 2 and 3."""
    start, _, stop = text.partition("..")
    return range(int(start), int(stop))


def _first_of(own: Value | None, default: Value) -> Value:
    return default if own is None else own
