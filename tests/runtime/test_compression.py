"""What travels in fewer bytes comes back within half a step, and is refused where its parts do not fit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ecogen.errors import ProtocolError
from ecogen.runtime.compression import compress, restore


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
