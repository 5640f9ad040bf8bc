"""A generator on one node: how sure it is of captions."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from ecogen.models.pair_model import PairModel
from ecogen.tuning.captions import digit_caption
from tests.pictures import SIZES, save_pair_foundation


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PairModel:
    folder = save_pair_foundation(tmp_path_factory.mktemp("pairs"))
    return PairModel.of(AutoModelForCausalLM.from_pretrained(folder).eval(), folder)


CODES = torch.arange(12).view(3, 4) % SIZES.codebook_size


def test_it_is_sure_of_what_it_says_itself(model: PairModel) -> None:
    assert model.confidence(CODES, model.describe_codes(CODES)).tolist() == [1, 1, 1]


def test_another_caption_is_held_against_its_own(model: PairModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """However little of all probability both have: a word that a model rarely says is not a wrong one."""
    three, four = digit_caption(3), digit_caption(4)
    with torch.no_grad():
        ours, theirs = (model._caption_log_likelihood(CODES, [caption] * 3).exp() for caption in (three, four))
    assert float((ours + theirs).max()) < 1e-3
    monkeypatch.setattr(model, "describe_codes", lambda codes: [four] * len(codes))
    torch.testing.assert_close(model.confidence(CODES, [three] * 3), ours / (ours + theirs))
    assert model.confidence(CODES, [three, four, three])[1] == 1


def test_of_nothing_it_says_nothing(model: PairModel) -> None:
    assert model.confidence(CODES[:0], []).shape == (0,)
