"""What the tunables of a recipe contradict: each other, the model and how updates are put together."""

from __future__ import annotations

from collections.abc import Iterator

from ecogen.config.contradictions.aggregation import takes_products
from ecogen.config.contradictions.contradiction import Contradiction
from ecogen.config.schema import Recipe
from ecogen.config.tunables import Tunables, block_range

_ALIKE = ("median", "trimmed_mean", "multi_krum", "scaffold")
"""Strategies that need updates of one shape: zeros in the place of what a cluster has not would count as its word."""


def of_tunables(recipe: Recipe) -> Iterator[Contradiction]:
    """What is wrong between the tunables and the rest of the recipe."""
    tunables, num_blocks = recipe.tunables, recipe.model.num_blocks
    yield from _of_blocks(tunables, num_blocks)
    blocks = [tunables.of_block(index) for index in range(num_blocks)]
    if not (any(block.is_tuned for block in blocks) or tunables.head or tunables.backbone != "frozen"):
        names = ("prompts", "lora_rank", "ia3", "bottleneck", "head", "backbone", "blocks", "first_block")
        places = tuple(f"tunables.{name}" for name in names)
        text = "tunables: nothing to tune; set prompts, lora_rank, ia3, bottleneck, head or backbone"
        yield Contradiction(places, text)
    has_lora = any(block.lora_rank for block in blocks)
    if has_lora and len(set(tunables.lora_targets)) != max(1, len(tunables.lora_targets)):
        text = f"tunables.lora_targets: name one projection or more, each once, not {list(tunables.lora_targets)}"
        yield Contradiction(("tunables.lora_targets", "tunables.lora_rank"), text)
    if has_lora and any(block.ia3 for block in blocks):
        text = "tunables.ia3: a PEFT directory holds LoRA or IA3, not both; set lora_rank = 0 or ia3 = false"
        yield Contradiction(("tunables.ia3", "tunables.lora_rank", "tunables.blocks"), text)
    yield from _of_ranks(recipe)


def _of_blocks(tunables: Tunables, num_blocks: int) -> Iterator[Contradiction]:
    """What ranges of blocks contradict: the model's size, the first block, shallow prompts and one another."""
    place, taken = "tunables.blocks", dict[int, str]()
    for name, own in tunables.blocks.items():
        blocks = block_range(name)
        if not blocks or blocks.stop > num_blocks or blocks.start < tunables.first_block:
            least, at = tunables.first_block, f"{place}.{name}"
            text = f"{at}: name blocks from first_block {least} up, at most {least}..{num_blocks} (less its last)"
            yield Contradiction((at, "model.num_blocks", "tunables.first_block"), text)
        if others := {taken[index] for index in blocks if index in taken}:
            yield Contradiction((place,), f"{place}.{name}: has blocks in common with {min(others)!r}; name each once")
        if own.prompts is not None and tunables.prompt_depth == "shallow":
            text = f"{place}.{name}.prompts: shallow prompts enter once, at first_block; leave it out or set 'deep'"
            yield Contradiction((place, "tunables.prompt_depth"), text)
        taken |= dict.fromkeys(blocks, name)


def _of_ranks(recipe: Recipe) -> Iterator[Contradiction]:
    """What LoRA ranks of clusters and the mean of products contradict."""
    tunables, aggregation = recipe.tunables, recipe.aggregation
    place, how = "tunables.cluster_ranks", "aggregation.lora"
    ranks = [tunables.of_block(index).lora_rank for index in range(recipe.model.num_blocks)]
    for name, rank in sorted(tunables.cluster_ranks.items()):
        if rank > max(ranks):
            text = f"{place}.{name}: {rank} is more than the edge's LoRA rank, {max(ranks)}; raise tunables.lora_rank"
            yield Contradiction((place, "tunables.lora_rank", "tunables.blocks"), text)
    if takes_products(recipe) and max(ranks) > recipe.model.hidden_size:
        text = f"tunables.lora_rank: {max(ranks)} is more than model.hidden_size {recipe.model.hidden_size}; set less"
        yield Contradiction(("tunables.lora_rank", "tunables.blocks", "model.hidden_size"), text)
    if tunables.lora_kind == "dora" and (tunables.cluster_ranks or takes_products(recipe)):
        text = "what DoRA learns is no product of its factors: use 'lora' or 'rslora', or one rank and 'factors'"
        yield Contradiction((place, how, "tunables.lora_kind"), f"{place}, {how}: {text}")
    if aggregation.buffer and (tunables.cluster_ranks or takes_products(recipe)):
        text = "aggregation.buffer: clusters that do not wait for each other average factors of one rank; set it to 0"
        yield Contradiction(("aggregation.buffer", place, how), text)
    if tunables.cluster_ranks and aggregation.strategy in _ALIKE:
        text = f"{place}: {aggregation.strategy!r} compares clusters number by number, and those of less rank lack some"
        yield Contradiction((place, "aggregation.strategy"), f"{text}; use fedavg, fedadam or fedyogi, or one rank")
    elif takes_products(recipe) and aggregation.strategy != "fedavg":
        text = f"{how}: products are averaged, {aggregation.strategy!r} works on factors; set {how} = 'factors'"
        yield Contradiction((how, place, "aggregation.strategy"), text)
