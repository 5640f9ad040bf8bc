import numpy as np
import torch

from ecogen.models.image_tokenizer import ImageTokenizer, ImageTokens
from ecogen.tuning.captions import digit_caption, digit_of, glyph_caption
from ecogen.tuning.glyphs import CHARACTERS, FONTS, Augmentation, augment, render_glyphs
from ecogen.tuning.pairs import Pairs, PairWriter
from ecogen.tuning.passages import IGNORED
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


def test_chosen_ways() -> None:
    write, pairs = writer(), Pairs(torch.rand(2, 1, 8, 8), [digit_caption(1)] * 2)
    both = write.both(pairs[[0]])
    mixed = write.mixed(pairs[[0, 0]], np.array([False, True]))
    assert torch.equal(mixed.tokens, both.tokens.flip(0))
    assert torch.equal(write.captioned(pairs[[0]]).tokens, both.tokens[:1])


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
