"""What travels in fewer bytes comes back within half a step, and is refused where its parts do not fit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ecogen.errors import ProtocolError
from ecogen.runtime.compression import compress, compress_all, restore, restore_all


@given(seed=st.integers(0, 2**32), size=st.floats(1e-30, 1e30), rows=st.integers(0, 4))
def test_int8_is_off_by_half_a_step_of_its_token_at_most(seed: int, size: float, rows: int) -> None:
    numbers = torch.randn(rows, 3, 8, generator=torch.Generator().manual_seed(seed)) * size
    sent = compress(numbers, "int8")
    assert (sent["tensor"].dtype, sent["tensor"].nbytes, sent["scale"].nbytes) == (torch.int8, rows * 24, rows * 6)
    step = numbers.abs().amax(dim=-1, keepdim=True) / 127
    assert bool(((restore(sent) - numbers).abs() <= 0.503 * step).all())  # a scale may be rounded by 2^-8


def test_int8_of_a_small_case_is_the_formulas() -> None:
    sent = compress(torch.tensor([[127.0, -63.6, 0.4], [0.0, 0.0, 0.0], [-2.54, 1.0, 0.01]]), "int8")
    assert sent["tensor"].tolist() == [[127, -64, 0], [0, 0, 0], [-127, 50, 0]]
    assert sent["scale"].flatten().tolist() == pytest.approx([1.0, 0.0, 0.02], rel=2**-8)


def test_bfloat16_keeps_eight_bits_and_float32_everything() -> None:
    numbers = torch.randn(2, 3, 8)
    assert restore(compress(numbers, "float32")) is numbers
    back = restore(compress(numbers, "bfloat16"))
    assert back.dtype == torch.float32
    assert bool(((back - numbers).abs() <= numbers.abs() / 256).all())


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"tensor": torch.zeros(2, 3, dtype=torch.int8)}, "int8 without scales"),
        ({"tensor": torch.zeros(2, 3), "scale": torch.ones(2, 1)}, "float32 with scales"),
        ({"tensor": torch.zeros(2, 3, dtype=torch.int8), "scale": torch.ones(3, 1)}, r"scales \(3, 1\) do not fit"),
    ],
)
def test_what_does_not_fit_together_is_refused(tensors: dict[str, torch.Tensor], said: str) -> None:
    with pytest.raises(ProtocolError, match=said):
        restore(tensors)


@given(seed=st.integers(0, 2**32), shape=st.sampled_from([(4, 9), (9, 4), (4, 4), (6,), (2, 3, 8), (1,)]))
def test_tunables_have_a_scale_for_each_vector_along_their_longest_dimension(seed: int, shape: tuple[int, ...]) -> None:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    sent = compress_all({"w": numbers}, "int8")
    vectors = sorted(shape)[:-1]
    assert sent["w"].dtype == torch.int8
    assert sent["scale of w"].numel() == torch.Size(vectors).numel()
    step = numbers.abs().amax(max(range(len(shape)), key=lambda d: (shape[d], d)), keepdim=True) / 127
    assert bool(((restore_all(sent)["w"] - numbers).abs() <= 0.503 * step).all())


def test_tunables_in_float32_travel_as_they_are_and_in_bfloat16_with_eight_bits() -> None:
    tunables = {"w": torch.randn(3, 8), "v": torch.randn(5)}
    assert restore_all(compress_all(tunables, "float32")) == tunables
    back = restore_all(compress_all(tunables, "bfloat16"))
    assert all(bool(((back[name] - t).abs() <= t.abs() / 256).all()) for name, t in tunables.items())


def test_numbers_that_are_not_finite_do_not_become_finite_on_the_way() -> None:
    for wrong in (torch.nan, torch.inf):
        numbers = torch.tensor([[1.0, wrong, 2.0], [1.0, 2.0, 3.0]])
        back = restore_all(compress_all({"w": numbers}, "int8"))["w"]
        assert not bool(back[0].isfinite().all())
        assert bool(back[1].isfinite().all())


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"w": torch.tensor(1.0)}, "'w' is a single number"),
        ({"scale of w": torch.ones(1, 1)}, "scales of 'w', of which there are no numbers"),
        ({"w": torch.zeros(2, 3, dtype=torch.int8)}, "int8 without scales"),
        ({"w": torch.zeros(2, 3, dtype=torch.int8), "scale of w": torch.ones(1, 3)}, r"scales \(1, 3\) do not fit"),
    ],
)
def test_tunables_that_do_not_fit_together_are_refused(tensors: dict[str, torch.Tensor], said: str) -> None:
    with pytest.raises(ProtocolError, match=said):
        restore_all(tensors)
