"""Truths about inversion attacks: they find what is there, nothing where there is nothing, and the same every time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from ecogen.config import Tunables
from ecogen.measurements import EXACT_DB, InversionAttack
from ecogen.models.adapters import classification_config, load_whole
from ecogen.models.checkpoint import open_foundation
from ecogen.models.tunables import get_tunables
from ecogen.placement import Segment
from ecogen.tuning.data import load_splits
from ecogen.tuning.inversion import (
    FEWEST_OWN,
    Effort,
    Known,
    Pairs,
    attack_first_cut,
    blend,
    fit_least_squares,
    learn_from,
    optimise,
    own_images,
    psnr_db,
    ssim,
    train_decoder,
)
from tests.tiny import IMAGE, PATCH, tiny_recipe

pytestmark = pytest.mark.usefixtures("one_thread")
LITTLE = Effort(blends=300, decoder_steps=10, optimiser_steps=60)
HIDDEN, TOKENS = 24, (IMAGE // PATCH) ** 2


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 1, IMAGE, IMAGE, generator=seeded(seed)) * 2 - 1


def linear_map(images: Tensor) -> Tensor:
    """Each patch through one invertible linear map, behind a CLS token: an embedding."""
    weight = torch.randn(PATCH * PATCH, HIDDEN, generator=seeded(1))
    tokens = torch.nn.functional.unfold(images, PATCH, stride=PATCH).transpose(1, 2) @ weight
    return torch.cat([torch.ones(len(images), 1, HIDDEN), tokens], 1)


def noise(images: Tensor) -> Tensor:
    """Nothing of the images."""
    return torch.randn(len(images), 1 + TOKENS, HIDDEN, generator=seeded(len(images)))


def tiny_attack(recipe: Any, foundation: Path, effort: Effort = LITTLE) -> tuple[InversionAttack, ...]:
    opened = open_foundation(foundation)
    model = load_whole(opened, classification_config(opened, 10), recipe.tunables, seed=5)
    return attack_first_cut(opened, recipe, get_tunables(model), effort=effort)


@pytest.fixture(scope="module")
def attacks(foundation: Path) -> tuple[InversionAttack, ...]:
    """All attackers on a tiny model; they own 200 digits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    attacks = tiny_attack(tiny_recipe(foundation, data={"train": 300, "validation": 200}), foundation)
    torch.set_num_threads(threads)
    return attacks


def test_an_invertible_linear_map_hides_nothing() -> None:
    images = random_images(50, seed=2)
    known = learn_from(linear_map, random_images(100), PATCH, seeded())
    least_squares = fit_least_squares(known)
    decoder = train_decoder(known, least_squares, seeded(), steps=20)
    assert psnr_db(least_squares(linear_map(images)), images) > EXACT_DB - 1
    assert psnr_db(decoder(linear_map(images)), images) > EXACT_DB - 1
    begin = torch.zeros_like(images[:5])
    assert psnr_db(optimise(linear_map, linear_map(images[:5]), begin), images[:5]) > EXACT_DB - 1


def test_noise_gives_nothing_away() -> None:
    images, own = random_images(50, seed=2), random_images(400)
    known = learn_from(noise, own, PATCH, seeded())
    nothing = psnr_db(own.mean(0).expand_as(images), images)
    least_squares = fit_least_squares(known)
    assert psnr_db(least_squares(noise(images)), images) == pytest.approx(nothing, abs=0.1)
    assert psnr_db(train_decoder(known, least_squares, seeded(), steps=20)(noise(images)), images) < nothing + 0.1


def test_a_decoder_finds_what_a_linear_map_cannot() -> None:
    """Pixels cubed can be read, but not by a line."""
    cubed = lambda images: linear_map(images) ** 3  # noqa: E731
    images = random_images(50, seed=2)
    known = learn_from(cubed, random_images(2000), PATCH, seeded())
    least_squares = fit_least_squares(known)
    decoder = train_decoder(known, least_squares, seeded())
    seen = cubed(images)
    assert psnr_db(decoder(seen), images) > psnr_db(least_squares(seen), images) + 0.5


def test_known_weights_recover_more_than_a_line(foundation: Path) -> None:
    opened = open_foundation(foundation)
    model = load_whole(opened, classification_config(opened, 10), Tunables(prompts=2), seed=0).requires_grad_(False)
    segment = Segment(0, 1, has_embedding=True)
    encode: Callable[[Tensor], Tensor] = lambda images: model(images, segment)  # noqa: E731
    images = random_images(4, seed=2)
    begin = fit_least_squares(learn_from(encode, random_images(100), PATCH, seeded()))(encode(images))
    assert psnr_db(optimise(encode, encode(images), begin), images) > psnr_db(begin, images) + 3


def test_every_attacker_is_told_at_every_depth(attacks: tuple[InversionAttack, ...]) -> None:
    assert [attack.attacker for attack in attacks] == ["least squares", "trained decoder", "optimisation"]
    for attack in attacks:
        assert [result.blocks_before for result in attack.results] == [0, 1, 2]
        assert all(len(result.reconstructions) == len(attack.originals) for result in attack.results)
        assert "200 digits of its own" in attack.description


def test_the_embedding_alone_hides_nothing_and_blocks_hide_something(attacks: tuple[InversionAttack, ...]) -> None:
    for attack in attacks:
        after_0, after_1, after_2 = (result.psnr_db for result in attack.results)
        assert after_0 > EXACT_DB - 2
        assert after_0 > after_1 > after_2
        assert all(result.psnr_db > result.baseline_psnr_db for result in attack.results)
    embedding = attacks[0].results[0]
    assert embedding.label_accuracy == attacks[0].original_label_accuracy
    assert embedding.ssim == pytest.approx(1, abs=1e-3)


def test_the_same_seed_gives_the_same_figures(recipe_of: Callable[..., Any], foundation: Path) -> None:
    recipe = recipe_of()
    brief = Effort(blends=50, decoder_steps=3, optimiser_steps=3)
    first = tiny_attack(recipe, foundation, brief)
    assert tiny_attack(recipe, foundation, brief) == first
    assert tiny_attack(replace(recipe, seed=4), foundation, brief) != first
    assert all("rendered glyphs" in attack.description for attack in first)  # it keeps only 20 validation images


def test_tokens_of_shallow_prompts_do_not_disturb_the_attackers(
    recipe_of: Callable[..., Any], foundation: Path
) -> None:
    shallow = recipe_of(tunables={"prompt_depth": "shallow"}, data={"validation": 60})
    (line, *_) = tiny_attack(shallow, foundation)
    assert line.results[0].psnr_db > line.results[0].baseline_psnr_db + 10


def test_attacks_survive_json(attacks: tuple[InversionAttack, ...]) -> None:
    assert msgspec.json.decode(msgspec.json.encode(attacks), type=tuple[InversionAttack, ...]) == attacks


def test_the_attackers_images_are_neither_attacked_nor_tuned_on(recipe_of: Callable[..., Any]) -> None:
    recipe = recipe_of(data={"validation": FEWEST_OWN})
    splits = load_splits(recipe.data, IMAGE, recipe.seed)
    own, _ = own_images(splits, seeded())
    assert torch.equal(own, splits.validation.images)
    others = {image.numpy().tobytes() for image in torch.cat([splits.train.images, splits.test.images])}
    assert not others & {image.numpy().tobytes() for image in own}


def test_no_blend_holds_a_held_out_image() -> None:
    own = torch.eye(10).view(10, 1, 1, 10)
    known = learn_from(lambda images: images.flatten(1)[:, None], own, 1, seeded())
    held = known.held_out.images.flatten(1).argmax(1)
    assert held.tolist() == [4, 9]
    assert known.fitted.images.flatten(1)[:, held].abs().sum() == 0
    assert len(known.all.images) == len(known.fitted.images) + len(held)


def test_blends_lie_between_two_images() -> None:
    low, high = blend(torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1), 500, seeded()).aminmax()
    assert -1 <= low < high <= 1


def test_a_constant_token_is_no_division_by_zero() -> None:
    images = random_images(20)
    pairs = Pairs(images, torch.zeros(20, 1 + TOKENS, HIDDEN))
    decoded = fit_least_squares(Known(pairs, pairs, PATCH))(pairs.activations)
    assert torch.allclose(decoded, images.mean(0).expand_as(images), atol=1e-5)


def test_psnr_and_ssim_of_what_is_known() -> None:
    images = random_images(3)
    assert psnr_db(images, images) == EXACT_DB
    assert psnr_db(images + 0.2, images) == pytest.approx(20)
    assert ssim(images, images) == pytest.approx(1)
    assert ssim(-images, images) < 0 < ssim(images + 0.1, images) < 1
