import random
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ecogen.config import Tuning, load
from ecogen.errors import DataError
from ecogen.models.image_tokenizer import ImageTokenizer, ImageTokens
from ecogen.models.pair_tokens import caption_of
from ecogen.tuning.captions import digit_caption, digit_of, glyph_caption
from ecogen.tuning.device import LocalData
from ecogen.tuning.glyphs import CHARACTERS, FONTS, Augmentation, augment, render_glyphs
from ecogen.tuning.making import make_model
from ecogen.tuning.pairs import PairPassages, Pairs, PairWriter
from ecogen.tuning.passages import IGNORED
from ecogen.tuning.pretrain_decoder import Batches
from ecogen.tuning.pretrain_pairs import all_captions, cloud_passages
from ecogen.tuning.quantizer import train_image_tokenizer
from ecogen.tuning.vocabulary import train_tokenizer

SMALL = ImageTokens(image_size=8, patch_size=4, codebook_size=11, hidden_size=8)


def test_captions_say_letter_or_digit_style_and_family() -> None:
    assert glyph_caption("DejaVuSansMono-BoldOblique", "7") == "a bold italic mono digit seven"
    assert glyph_caption("STIXGeneralBolIta", "Q") == "a bold italic serif capital q"
    assert glyph_caption("DejaVuSans-Oblique", "o") == "an italic sans small o"
    assert glyph_caption("cmr10", "a") == "a serif small a"
    assert len({glyph_caption(font, character) for font in FONTS for character in CHARACTERS}) == 62 * 12
    assert [digit_of(digit_caption(digit)) for digit in range(10)] == [*range(10)]
    assert digit_caption(8) == "a handwritten eight"
    assert digit_of("") is digit_of("a serif small a") is None


def writer(length: int = 20) -> PairWriter:
    tokenizer = train_tokenizer([digit_caption(digit) for digit in range(10)], 320, SMALL.codebook_size)
    return PairWriter(tokenizer, ImageTokenizer(SMALL).eval(), length)


def test_a_pair_is_written_both_ways() -> None:
    write, pairs = writer(), Pairs(torch.rand(2, 1, 8, 8), [digit_caption(3), "<|image_1|>"])
    passages = write.both(pairs)
    drawn, said = passages.tokens[0].tolist(), passages.tokens[1].tolist()
    begin = drawn.index(write.tokens.begin)
    image = drawn[begin : begin + 6]
    assert image[-1] == write.tokens.end
    assert said[1:7] == image
    assert drawn[1:begin] == said[7 : 7 + begin - 1]
    assert torch.equal(passages.labels[:, :-1][passages.labels[:, :-1] != IGNORED], labels_of(passages.tokens))
    spoof = passages.tokens[2].tolist()
    assert sum(token in write.tokens.codes for token in spoof) == 4  # the caption is text, whatever it looks like


def labels_of(tokens: torch.Tensor) -> torch.Tensor:
    following = tokens[:, 1:]
    return following[following != 0]


def test_captions_have_room_beside_a_picture() -> None:
    own, said = writer(), digit_caption(8)
    longest = own.both_of([said], torch.zeros(1, 4, dtype=torch.int64)).tokens[0]
    needed = int((longest != own._padding).sum()) - 1  # the last token is only learnt
    writer(needed).check_room([said])
    with pytest.raises(DataError, match="the caption 'a handwritten eight' has "):
        writer(needed - 1).check_room([said])
    with pytest.raises(DataError, match="the caption '' has 0 tokens"):
        own.check_room([said, ""])


def test_chosen_ways() -> None:
    write, pairs = writer(), Pairs(torch.rand(2, 1, 8, 8), [digit_caption(1)] * 2)
    both = write.both(pairs[[0]])
    mixed = write.mixed(pairs[[0, 0]], np.array([False, True]))
    assert torch.equal(mixed.tokens, both.tokens.flip(0))
    assert torch.equal(write.captioned(pairs[[0]]).tokens, both.tokens[:1])


def test_captions_alone_leave_open_what_follows() -> None:
    write = writer()
    both = write.both(Pairs(torch.rand(1, 1, 8, 8), [digit_caption(3)])).tokens[0].tolist()
    length = both.index(write.tokens.begin)
    spoken = write.spoken([digit_caption(3)])
    assert spoken.tokens[0].tolist() == both[:length] + [0] * (20 - length)
    assert spoken.labels[0].tolist() == both[1:length] + [IGNORED] * (21 - length)


def test_some_of_what_the_cloud_learns_are_words_of_what_edges_may_have() -> None:
    tokenizer = train_tokenizer(all_captions(), 640, SMALL.codebook_size)
    write = PairWriter(tokenizer, ImageTokenizer(SMALL).eval(), 40)
    batch = cloud_passages(write, 1, 8)(32, torch.Generator().manual_seed(0))
    has_image = (batch.tokens == write.tokens.begin).any(1)
    assert has_image.tolist() == [False] + [True] * 31
    assert caption_of(tokenizer, batch.tokens[0, 1:].tolist()) == "a handwritten"


def test_the_cloud_is_pre_trained_on_them(monkeypatch: pytest.MonkeyPatch) -> None:
    given = dict[str, Any]()

    def kept(config: object, batches: Batches, **_: object) -> None:
        given["batch"] = batches(64, torch.Generator().manual_seed(0))

    monkeypatch.setattr("ecogen.tuning.making.pretrain_decoder", kept)
    made = make_model(load("pairs", ["pretraining.image_steps=1"]), lambda *_: None)
    assert made.tokenizer is not None
    assert made.images is not None
    begin = PairWriter(made.tokenizer, made.images, 40).tokens.begin
    assert int((given["batch"].tokens == begin).any(1).sum()) == 62


@pytest.mark.parametrize("count", [2, 16, 48])
def test_batches_of_any_size(count: int) -> None:
    tokenizer = train_tokenizer(all_captions(), 640, SMALL.codebook_size)
    write = PairWriter(tokenizer, ImageTokenizer(SMALL).eval(), 40)
    drawn, begin = cloud_passages(write, 1, 8), write.tokens.begin
    generator = torch.Generator().manual_seed(0)
    batches = [drawn(count, generator) for _ in range(40)]
    assert {len(batch) for batch in batches} == {count}
    num_spoken = sum(int((~(batch.tokens == begin).any(1)).sum()) for batch in batches)
    assert num_spoken == pytest.approx(40 * count / 32, rel=0.4, abs=3)


def moved_data(views: int = 0, strength: float = 0.5) -> tuple[LocalData, Tuning]:
    torch.manual_seed(0)
    tuning = Tuning(local_epochs=2, batch_size=3, augmentation=strength, augmentation_views=views)
    pairs = Pairs(torch.rand(4, 1, 8, 8), [digit_caption(digit) for digit in range(4)])
    write = writer()
    seen = write._images.features(torch.rand(3, 1, 8, 8)).flatten(0, 2)  # so that codes tell images apart
    write._images.codebook.data = seen[: SMALL.codebook_size].detach()
    return LocalData(write.movable(pairs), 0, 0).with_views(tuning, None), tuning


def codes_of(rows: list[list[int]], tokens: range) -> list[tuple[int, ...]]:
    return [tuple(token for token in row if token in tokens) for row in rows]


def rows_of(data: LocalData, tuning: Tuning, draw: int, epoch: int) -> list[list[int]]:
    return sorted(row for batch in data.batches(tuning, draw, epoch) for row in batch.inputs.tolist())


def test_images_of_pairs_are_moved_anew_in_every_epoch_and_their_captions_are_not() -> None:
    (data, tuning), tokens = moved_data(), writer().tokens.codes
    epochs = [rows_of(data, tuning, draw, epoch) for draw in (0, 1) for epoch in (0, 1)]
    still = rows_of(data, replace(tuning, augmentation=0.0), 0, 0)
    assert still == sorted(data.examples.inputs.tolist())
    said = [sorted([token for token in row if token not in tokens] for row in epoch) for epoch in [*epochs, still]]
    assert all(other == said[-1] for other in said)
    assert len({tuple(sorted(codes_of(epoch, tokens))) for epoch in [*epochs, still]}) == 5
    assert epochs[0] == rows_of(data, tuning, 0, 0)


def test_views_of_pairs_come_again() -> None:
    data, tuning = moved_data(views=2)
    first, second, third = (rows_of(data, tuning, draw, epoch) for draw, epoch in ((0, 0), (0, 1), (1, 0)))
    assert first == third != second


def test_a_device_has_the_images_of_its_own_passages() -> None:
    data, _ = moved_data()
    assert isinstance(data.examples, PairPassages)
    own = data.examples.split_examples(2)[1].examples([1])
    assert isinstance(own, PairPassages)
    assert torch.equal(own.tokens, data.examples.tokens[6:])
    assert torch.equal(own.pairs.images, data.examples.pairs.images[[6, 7]])
    assert own.pairs.captions == [digit_caption(3)] * 2
    assert own.rows == own.moved(0.5, torch.Generator().manual_seed(0)).rows == 2
    assert torch.equal(own.writer.mixed(own.pairs, own.is_drawn).tokens, own.tokens)


class Seeds(random.Random):
    """Gives these seeds, and no others."""

    def __init__(self, seeds: Iterable[int]) -> None:
        super().__init__()
        self._seeds = iter(seeds)

    def getrandbits(self, _: int) -> int:
        return next(self._seeds)


def test_moved_apart_an_example_changes_nothing_of_the_others() -> None:
    """Each by its own seed, wherever it stands: with one stream for all, one more moved those behind it otherwise."""
    data, _ = moved_data()
    examples = data.examples
    assert isinstance(examples, PairPassages)
    everybody = examples.moved_apart(0.5, Seeds([7, 8, 9, 10]))
    without = examples.examples([0, 2, 3])
    assert isinstance(without, PairPassages)
    assert torch.equal(without.moved_apart(0.5, Seeds([7, 9, 10])).tokens, everybody.examples([0, 2, 3]).tokens)
    assert (everybody.rows, len(everybody)) == (2, 8)
    assert not torch.equal(everybody.tokens, examples.moved_apart(0.5, Seeds([1, 2, 3, 4])).tokens)
    assert examples.moved_apart(0.0, Seeds([])) is examples


def test_an_image_tokenizer_learns_to_give_images_back() -> None:
    glyphs = render_glyphs(FONTS[:1], CHARACTERS[:10])

    def views(count: int, generator: torch.Generator) -> torch.Tensor:
        chosen = torch.randint(len(glyphs), (count,), generator=generator)
        return augment(glyphs[chosen], generator=generator, amounts=Augmentation(noise=0), size=16)

    config = ImageTokens(image_size=16, patch_size=4, codebook_size=64, hidden_size=32)
    losses: list[float] = []
    arguments = {"steps": 300, "batch_size": 32, "learning_rate": 5e-3, "seed": 0}
    trained = train_image_tokenizer(config, views, on_step=lambda *step: losses.append(step[3]), **arguments)
    again = train_image_tokenizer(config, views, on_step=lambda *_: None, **arguments)
    some = views(64, torch.Generator().manual_seed(1))
    codes = trained.encode(some)
    assert torch.equal(codes, again.encode(some))
    assert len(codes.unique()) > 32
    error = (trained.decode(codes) - some).square().mean()
    assert float(error) < 0.3 * float(some.var())
    assert losses[-1] < 0.7 * losses[0]
