"""What differential privacy of examples contradicts: what trains, and what else looks at gradients."""

from __future__ import annotations

from collections.abc import Iterator

from ecogen.config.contradictions.contradiction import Contradiction
from ecogen.config.schema import Recipe


def of_examples(recipe: Recipe) -> Iterator[Contradiction]:
    """What would break the guarantee for one example, or cannot be told apart by example."""
    for place, is_wrong, said in _wrong(recipe):
        if is_wrong:
            yield Contradiction((place, "privacy.unit", "privacy.noise_multiplier"), f"{place}: {said}")


def _wrong(recipe: Recipe) -> Iterator[tuple[str, bool, str]]:
    """Each place, whether it is wrong there, and what to do."""
    tuning, tunables, data, delta = recipe.tuning, recipe.tunables, recipe.data, recipe.privacy.delta
    if not data.is_text:
        said = "images' gradients are not told apart by example; set privacy.unit = 'cluster', or tune a language model"
        yield "data.name", True, said
        return
    has_ia3 = tunables.ia3 or any(own.ia3 for own in tunables.blocks.values())
    only = "gradients are told apart by example of LoRA's factors only"
    yield "tunables.lora_kind", tunables.lora_kind == "dora", f"{only}, not of DoRA's magnitudes; set 'lora'"
    yield "tunables.ia3", has_ia3, f"{only}, not of IA3; set false, and tunables.lora_rank"
    clipped = "each example's gradient is clipped by privacy.clip_norm, and their noised mean by nothing; set 0"
    yield "tuning.clip_norm", bool(tuning.clip_norm), clipped
    yield "tuning.proximal", bool(tuning.proximal), "is a term of gradients that are not noised; set 0"
    views = "images that come again are by the recipe's seed, and each example is moved in secret; set 0"
    yield "tuning.augmentation_views", bool(tuning.augmentation_views), views
    has_sums = recipe.aggregation.strategy == "scaffold"
    yield "aggregation.strategy", has_sums, "scaffold sends sums of gradients that are not noised; use another"
    changes = any(source.later is not None for source in data.sources.values())
    yield "data.sources", changes, "an edge has pairs of one domain while each is protected; leave 'later' out"
    is_buffered = recipe.aggregation.buffer > 0
    yield "aggregation.buffer", is_buffered, "epsilon counts rounds, and with a buffer some clusters do more; set 0"
    said = f"{delta:g} is not below 1 / data.train = {1 / data.train:g}: telling all about one example in {1 / delta:g}"
    yield "privacy.delta", delta * data.train >= 1, f"{said} would count as private; set a smaller one"
