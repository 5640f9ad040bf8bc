"""Pre-training: repeatable, really learns, changes the whole backbone, and its features can be read."""

import pytest
import torch
from torch import Tensor
from transformers import ViTConfig, ViTModel

from ecogen.config import Data, Pretraining, section_table
from ecogen.tuning.corpus import Corpus, open_corpus
from ecogen.tuning.glyphs import Augmentation
from ecogen.tuning.pretrain import (
    OnStep,
    contrast,
    features,
    linear_probe,
    new_model,
    position_embeddings,
    pretrain,
    standardise,
    untrained,
)

Losses = list[float]


def tiny(num_channels: int = 1) -> ViTConfig:
    return ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=28,
        patch_size=7,
        num_channels=num_channels,
    )


def run(recipe: Pretraining, on_step: OnStep = lambda *_: None, *, num_channels: int = 1) -> ViTModel:
    arguments = section_table(recipe)
    for name in ("corpus", "image_steps"):
        del arguments[name]
    return pretrain(tiny(num_channels), open_corpus(recipe, Data()), on_step=on_step, **arguments)


def short_run(seed: int = 0, steps: int = 40) -> tuple[ViTModel, Losses]:
    losses: Losses = []
    model = run(Pretraining(seed, steps, batch_size=32), lambda *report: losses.append(report[3]))
    return model, losses


@pytest.fixture(scope="module")
def trained() -> tuple[ViTModel, Losses]:
    return short_run()


def test_the_same_seed_gives_the_same_bits_whatever_the_global_generator_did(trained: tuple[ViTModel, Losses]) -> None:
    torch.rand(7)
    model, losses = short_run()
    assert losses == trained[1]
    assert all(torch.equal(value, trained[0].state_dict()[name]) for name, value in model.state_dict().items())


def test_pretraining_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    short_run(steps=1)
    assert torch.equal(before, torch.get_rng_state())


def test_another_seed_gives_another_model(trained: tuple[ViTModel, Losses]) -> None:
    assert short_run(seed=1, steps=2)[1] != trained[1][:2]


def test_a_short_run_lowers_the_loss(trained: tuple[ViTModel, Losses]) -> None:
    _, losses = trained
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_every_parameter_of_the_backbone_changes(trained: tuple[ViTModel, Losses]) -> None:
    begun = dict(new_model(tiny(), 0).named_parameters())
    # A key's bias shifts all scores of a query alike, so softmax ignores it and only noise moves it.
    same = [name for name, value in trained[0].named_parameters() if torch.equal(value, begun[name])]
    assert [name for name in same if not name.endswith("k_proj.bias")] == []


def test_progress_is_reported_after_each_step() -> None:
    reports: list[tuple[str, int, int]] = []
    run(Pretraining(steps=3, batch_size=4), lambda *report: reports.append(report[:3]))
    assert reports == [("contrast", step, 3) for step in (1, 2, 3)]


def test_patches_know_their_places_from_the_start() -> None:
    places = new_model(tiny(), 0).embeddings.position_embeddings[0, 1:]
    assert torch.cdist(places, places).fill_diagonal_(1).min() > 0.1
    assert torch.equal(places, position_embeddings(32, 4)[0, 1:])


def test_moving_the_patches_changes_the_features(trained: tuple[ViTModel, Losses]) -> None:
    image = torch.rand(1, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    moved = image.roll(7, dims=3)
    assert (features(trained[0], image) - features(trained[0], moved)).abs().max() > 0.1


def test_colour_models_are_pretrained_too() -> None:
    model = run(Pretraining(steps=1, batch_size=4), num_channels=3)
    assert features(model, torch.zeros(2, 3, 28, 28)).shape == (2, 32)


def test_the_model_is_reloaded_from_its_folder(trained: tuple[ViTModel, Losses], tmp_path: object) -> None:
    trained[0].save_pretrained(str(tmp_path))
    again = ViTModel.from_pretrained(str(tmp_path), add_pooling_layer=False).eval()
    image = torch.zeros(1, 1, 28, 28)
    assert torch.equal(features(again, image), features(trained[0], image))


def test_contrast_is_low_when_views_of_one_glyph_agree() -> None:
    directions = torch.eye(4)
    agree, disagree = torch.cat([directions, directions]), torch.cat([directions, directions.roll(1, 0)])
    assert contrast(agree, 0.1) < 0.01
    assert contrast(disagree, 0.1) > 1


def test_standardised_features_have_zero_mean_and_unit_deviation() -> None:
    model = new_model(tiny(), 0).eval()
    images = torch.rand(300, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    standardise(model, images)
    seen = features(model, images).detach()
    assert torch.allclose(seen.mean(0), torch.zeros(32), atol=1e-3)
    assert torch.allclose(seen.std(0), torch.ones(32), atol=1e-3)


def test_an_untrained_models_features_are_standardised_and_nothing_else_is_changed() -> None:
    images = torch.rand(300, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    corpus = Corpus(images, Augmentation())
    model, begun = untrained(tiny(), corpus, 0), new_model(tiny(), 0)
    views = corpus.views(torch.arange(300), 28, torch.Generator().manual_seed(1))
    seen = features(model, views).detach()
    assert seen.mean(0).abs().max() < 0.4
    assert 0.5 < seen.std(0).min() <= seen.std(0).max() < 2
    assert features(begun, views).std(0).mean() < 0.2  # as it was: a head on it would hardly learn
    same = {name for name, value in begun.state_dict().items() if torch.equal(value, model.state_dict()[name])}
    assert begun.state_dict().keys() - same == {"layernorm.weight", "layernorm.bias"}


def bright_or_dark(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(40) % 2
    noise = torch.randn(40, 1, 28, 28, generator=generator) / 10
    return noise + labels.view(-1, 1, 1, 1), labels


def test_the_probe_separates_what_the_features_separate() -> None:
    model = new_model(tiny(), 0)
    assert linear_probe(model, *bright_or_dark(0), *bright_or_dark(1)) == 1


def test_the_probe_cannot_read_labels_that_are_not_in_the_image() -> None:
    (images, labels), (new_images, _) = bright_or_dark(0), bright_or_dark(1)
    shuffled = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert linear_probe(new_model(tiny(), 0), images, labels, new_images, labels[shuffled]) < 0.8
