"""The unlabelled corpus: what is rendered, and that views are random, bounded and repeatable."""

import pytest
import torch
from torch import Tensor

from ecogen.tuning.glyphs import CHARACTERS, FONTS, INK_SIZE, RENDER_SIZE, Augmentation, augment, render_glyphs

STILL = Augmentation(
    rotation=0,
    shear=0,
    scale=(0.8, 0.8),
    stretch=0,
    shift=0,
    elastic=0,
    threshold=(0.35, 0.35),
    resolution=28,
    contrast=0,
    noise=0,
)


@pytest.fixture(scope="module")
def glyphs() -> Tensor:
    return render_glyphs(FONTS[:2], "08AgijM")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_corpus_is_every_character_in_every_font() -> None:
    corpus = render_glyphs()
    assert corpus.shape == (len(FONTS) * len(CHARACTERS), 1, RENDER_SIZE, RENDER_SIZE)
    assert len(corpus) == 1302


def test_every_glyph_is_different_and_has_ink_away_from_the_border(glyphs: Tensor) -> None:
    assert len({glyph.numpy().tobytes() for glyph in glyphs}) == len(glyphs)
    assert (glyphs.amax(dim=(1, 2, 3)) > 0.3).all()
    margin = (RENDER_SIZE - INK_SIZE) // 2 - 4
    assert glyphs[:, :, :margin].max() < 1e-6
    assert glyphs.min() >= 0
    assert glyphs.max() <= 1 + 1e-6


def test_rendering_twice_gives_the_same_bits(glyphs: Tensor) -> None:
    assert torch.equal(glyphs, render_glyphs(FONTS[:2], "08AgijM"))


@pytest.mark.parametrize("size", [14, 28])
def test_views_have_the_asked_size_and_range(glyphs: Tensor, size: int) -> None:
    views = augment(glyphs, generator=seeded(), size=size)
    assert views.shape == (len(glyphs), 1, size, size)
    assert views.min() >= 0
    assert views.max() <= 1
    assert (views.amax(dim=(1, 2, 3)) > 0.1).all()


def test_views_are_a_function_of_the_generator(glyphs: Tensor) -> None:
    assert torch.equal(augment(glyphs, generator=seeded(3)), augment(glyphs, generator=seeded(3)))
    assert not torch.equal(augment(glyphs, generator=seeded(3)), augment(glyphs, generator=seeded(4)))


def test_two_views_of_one_glyph_differ(glyphs: Tensor) -> None:
    one, other = augment(glyphs[:1].repeat(2, 1, 1, 1), generator=seeded())
    assert (one - other).abs().mean() > 0.01


def test_without_any_amount_a_view_is_the_glyph_itself(glyphs: Tensor) -> None:
    views = augment(glyphs, generator=seeded(0), amounts=STILL)
    assert torch.equal(views, augment(glyphs, generator=seeded(1), amounts=STILL))
    rows = views[0, 0].amax(dim=1) > 0.5
    assert abs(int(rows.sum()) - 0.8 * 28) <= 2


def test_a_low_threshold_thickens_the_stroke(glyphs: Tensor) -> None:
    thin, thick = (
        augment(glyphs, generator=seeded(), amounts=Augmentation(threshold=(level, level), noise=0)).mean()
        for level in (0.5, 0.2)
    )
    assert thick > 1.1 * thin


def test_lost_resolution_removes_the_finest_detail(glyphs: Tensor) -> None:
    def roughness(resolution: int) -> float:
        amounts = Augmentation(resolution=resolution, noise=0, contrast=0)
        return float(augment(glyphs.repeat(20, 1, 1, 1), generator=seeded(), amounts=amounts).diff(dim=-1).abs().mean())

    assert roughness(7) < 0.9 * roughness(28)
