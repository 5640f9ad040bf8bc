"""The canary: in a U-shape neither inputs nor labels cross a link, in any of the forms that we know to look for.

It shows what is not sent as such. It does not show that nothing can be inferred from what is sent: activations leak.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ecogen.config import Recipe
from ecogen.transport.base import Message
from ecogen.tuning.data import Examples, load_splits
from tests.engines.test_inproc import batches
from tests.runs import run
from tests.tiny import RecordingNetwork, Sent, tiny_recipe

LOOKALIKE = 0.999  # correlation of 64 numbers with an image, which chance does not reach


def image_forms(image: Tensor) -> Iterator[bytes]:
    """The bytes of an image [C, H, W] in [-1, 1] under the scalings and types that people use."""
    for scaled in (image, (image + 1) / 2, (image + 1) * 8, (image + 1) * 127.5):
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            yield raw(scaled.to(dtype))
    for top in (1, 16, 255):
        for rounded in ((image + 1) / 2 * top, ((image + 1) / 2 * top).round()):
            yield from (raw(rounded.to(dtype)) for dtype in (torch.uint8, torch.int32, torch.int64))


def label_forms(labels: Tensor) -> Iterator[bytes]:
    """The bytes of some labels [N], as class indices or one-hot, in every type."""
    one_hot = torch.nn.functional.one_hot(labels, 10)
    types = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.float32, torch.float64, torch.float16)
    for dtype in (*types, torch.bfloat16):
        yield raw(labels.to(dtype))
        yield raw(one_hot.to(dtype))
    yield "".join(str(int(label)) for label in labels).encode()
    yield ",".join(str(int(label)) for label in labels).encode()


def raw(tensor: Tensor) -> bytes:
    flat = tensor.contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes()


def found(forms: Iterable[bytes], haystack: bytes) -> bool:
    return any(form in haystack for form in forms)


def looks_like_an_image(sent: Sent, images: Tensor) -> bool:
    """Whether a stretch of a tensor is an image under some factor and offset, row by row or patch by patch.

    Args:
        images: [N, C, H, W].
    """
    patches = torch.nn.functional.unfold(images, 4, stride=4).transpose(1, 2)
    references = torch.cat([images.flatten(1), patches.flatten(1)]).double()
    tensors = [t.detach().double().flatten() for t in sent.message.tensors.values() if t.dtype != torch.bool]
    return any(correlates(tensor, references) for tensor in tensors if len(tensor) >= references.shape[1])


def correlates(numbers: Tensor, references: Tensor) -> bool:
    windows = standardised(numbers.unfold(0, references.shape[1], 1))
    return bool(((windows @ standardised(references).T).abs() > LOOKALIKE).any())


def standardised(rows: Tensor) -> Tensor:
    centred = rows - rows.mean(1, keepdim=True)
    return centred / centred.norm(dim=1, keepdim=True).clamp_min(1e-12)


@pytest.fixture(scope="module")
def examples(foundation: Path) -> Examples:
    return load_splits(tiny_recipe(foundation).data, 8, 3).train


def listen(foundation: Path, folder: Path, labels: str) -> tuple[Recipe, list[Sent]]:
    """Everything that crossed a link in a whole run."""
    recipe = tiny_recipe(
        foundation,
        placement={"labels": labels},
        topology={"clusters_per_edge": 1, "devices_per_cluster": 3},
        tuning={"rounds": 1, "microbatches": 1},
        tunables={"prompts": 1, "lora_rank": 1},
    )
    network = RecordingNetwork()
    asyncio.run(run(recipe, folder, network))
    return recipe, network.sent


@pytest.fixture(scope="module")
def u_shape(foundation: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, list[Sent]]:
    return listen(foundation, tmp_path_factory.mktemp("start"), "start")


@pytest.fixture(scope="module")
def labels_at_the_end(foundation: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, list[Sent]]:
    return listen(foundation, tmp_path_factory.mktemp("end"), "end")


Heard = tuple[Recipe, list[Sent]]


def senders_of(forms: Sequence[bytes], sent: list[Sent]) -> set[tuple[str, str]]:
    return {(s.method, s.sender_id) for s in sent if found(forms, s.data)}


def all_labels(heard: Heard, examples: Examples) -> list[bytes]:
    """Every batch's labels in the order of the round, the whole partition's, and of every request."""
    recipe, _ = heard
    orders = [labels for _, labels in batches(recipe, examples, 0, 0)]
    return [form for labels in [*orders, examples.labels] for form in label_forms(labels)]


def test_the_run_sent_something_to_search(u_shape: Heard) -> None:
    methods = {sent.method for sent in u_shape[1]}
    assert {"tune", "forward", "backward", "infer", "fetch", "publish"} <= methods
    assert "labels" not in methods


def test_in_a_u_shape_no_image_crosses_a_link(u_shape: Heard, examples: Examples) -> None:
    forms = [form for image in examples.images for form in image_forms(image)]
    assert senders_of(forms, u_shape[1]) == set()


def test_in_a_u_shape_no_tensor_on_a_link_is_a_rescaled_image(u_shape: Heard, examples: Examples) -> None:
    assert not [sent.method for sent in u_shape[1] if looks_like_an_image(sent, examples.images)]


def test_in_a_u_shape_no_labels_cross_a_link(u_shape: Heard, examples: Examples) -> None:
    assert senders_of(all_labels(u_shape, examples), u_shape[1]) == set()


def test_requests_keep_their_pictures_too(u_shape: Heard) -> None:
    recipe, sent = u_shape
    asked = load_splits(recipe.data, 8, recipe.seed).test[[0, 1]]
    forms = [form for image in asked.images for form in image_forms(image)]
    assert senders_of(forms, sent) == set()
    assert not [s.method for s in sent if s.method == "infer" and looks_like_an_image(s, asked.images)]


def test_the_canary_finds_labels_where_they_are_sent(labels_at_the_end: Heard, examples: Examples) -> None:
    found_at = senders_of(all_labels(labels_at_the_end, examples), labels_at_the_end[1])
    assert found_at == {("labels", "edge-0.cluster-0.device-0")}


def test_even_then_images_stay(labels_at_the_end: Heard, examples: Examples) -> None:
    _, sent = labels_at_the_end
    forms = [form for image in examples.images for form in image_forms(image)]
    assert senders_of(forms, sent) == set()
    assert not [s.method for s in sent if looks_like_an_image(s, examples.images)]


@pytest.mark.parametrize(
    "leak",
    [
        lambda image: image,
        lambda image: (image + 1) / 2,
        lambda image: ((image + 1) * 127.5).to(torch.uint8),
        lambda image: torch.cat([torch.ones(3), -0.37 * image.flatten() + 5, torch.zeros(9)]),
        lambda image: torch.nn.functional.unfold(image[None], 4, stride=4).mT.flatten() * 2,
        lambda image: image.to(torch.bfloat16),
    ],
    ids=["as it is", "in [0, 1]", "as bytes", "rescaled within a tensor", "in patches", "in bfloat16"],
)
def test_the_canary_finds_an_image_that_is_sent(leak: Callable[[Tensor], Tensor], examples: Examples) -> None:
    image = examples.images[7]
    message = Message.of("forward", kind="activations", tensors={"tensor": leak(image)})
    sent = Sent("device-0", "device-1", message, 0, 0)
    assert found(image_forms(image), sent.data) or looks_like_an_image(sent, examples.images)


def test_the_canary_is_silent_on_noise(examples: Examples) -> None:
    noise = torch.from_numpy(np.random.default_rng(0).normal(size=20_000).astype(np.float32))
    sent = Sent("device-0", "device-1", Message.of("forward", tensors={"tensor": noise}), 0, 0)
    assert not looks_like_an_image(sent, examples.images)
    assert not found((form for image in examples.images for form in image_forms(image)), sent.data)
