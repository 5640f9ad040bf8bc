"""Packed matrices give the same products, and look as they did to everything else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from ecogen.models.decoder import SegmentedDecoder, load_decoder
from ecogen.models.mixed_lora import MixedLora, open_adapter
from ecogen.models.packed import IntegerWeight, PackedWeight, _held, pack_weights
from ecogen.models.quantize import _nbytes as nbytes_of
from ecogen.models.quantize import held_bytes
from ecogen.placement import Segment
from ecogen.serving.decoder_stage import DecoderStage
from ecogen.serving.scheduler import Step
from tests.models.decoders import save_decoder
from tests.models.test_mixed_lora import save_adapter

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")

WHOLE = Segment(0, 6, has_embedding=True, has_head=True)


def plain_and_packed(kind: str, folder: Path) -> list[SegmentedDecoder]:
    save_decoder(kind, folder)
    plain, packed = [load_decoder(folder, [WHOLE]) for _ in range(2)]
    pack_weights(packed, worth=1)
    return [plain, packed]


def step(rows: int, length: int) -> Step:
    tokens = torch.randint(3, 99, (rows, length), generator=torch.Generator().manual_seed(rows)).tolist()
    names = tuple(str(row) for row in range(rows))
    return Step(0, (), 0, tuple(map(tuple, tokens)), (0,) * rows, names, rows)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen2", "deepseek_v3", "mixtral", "qwen3_next"])
def test_any_number_of_rows_gives_what_plain_matrices_give(kind: str, tmp_path: Path) -> None:
    models = plain_and_packed(kind, tmp_path / "tiny")
    stages = [DecoderStage(model, WHOLE, 1, 9, 8) for model in models]
    for rows, length in ((1, 1), (1, 2), (3, 1), (4, 1), (9, 1), (2, 8)):
        plain, packed = [stage.run(step(rows, length)) for stage in stages]
        assert isinstance(plain, torch.Tensor)
        torch.testing.assert_close(packed, plain, rtol=1e-4, atol=1e-5)


def test_an_adapter_lies_on_packed_matrices_too(tmp_path: Path) -> None:
    models = plain_and_packed("llama", tmp_path / "tiny")
    adapter = open_adapter(save_adapter(tmp_path / "tiny", tmp_path / "adapter", 1))
    given = []
    for model in models:
        lora = MixedLora(model)
        lora.hold("tuned", adapter)
        given.append(DecoderStage(model, WHOLE, 1, 4, 8, lora).run(step(2, 3), adapters=["tuned", ""]))
    torch.testing.assert_close(*given, rtol=1e-4, atol=1e-5)
    untuned = DecoderStage(models[0], WHOLE, 1, 4, 8).run(step(2, 3))
    assert isinstance(untuned, torch.Tensor)
    assert not torch.allclose(untuned[0], given[0][0], atol=1e-3)


def test_others_see_the_matrix(tmp_path: Path) -> None:
    plain, packed = plain_and_packed("llama", tmp_path / "tiny")
    assert held_bytes(packed) == held_bytes(plain)
    weights = dict(plain.named_parameters())
    changed = {name: weight for name, weight in packed.named_parameters() if isinstance(weight, PackedWeight)}
    assert len(changed) == 6 * 7  # and not the head, which is the embedding too
    for name, weight in changed.items():
        assert torch.equal(weight + 0, weights[name])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_integers_are_multiplied_as_torchao_does(dtype: torch.dtype, bias: bool) -> None:
    """But for rounding a few rows to bfloat16, and what comes of them."""
    quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    layer = nn.Linear(48, 33, bias=bias, dtype=dtype)
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    matrix = layer.weight.dequantize()
    for rows in (1, 3, 8, 9, 40):
        inputs = torch.randn(rows, 2, 48, dtype=dtype) if rows > 8 else torch.randn(rows, 48, dtype=dtype)
        with torch.no_grad():
            wanted = nn.functional.linear(inputs, matrix, layer.bias)
            held = IntegerWeight(layer.weight.qdata, layer.weight.scale.flatten(), dtype)
            given = nn.functional.linear(inputs, held, layer.bias)
        assert given.dtype == dtype
        torch.testing.assert_close(given, wanted, rtol=0.02, atol=0.02)
    assert torch.equal(held.detach() + 0, matrix)


@pytest.mark.parametrize("width", [64, 40])
def test_integers_of_any_width_are_multiplied_and_counted(width: int) -> None:
    """Those that the kernel cannot take stay torchao's: it would read beyond them."""
    quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    layer = nn.Linear(width, 33, bias=False)
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    held = _held(layer.weight.detach())
    assert (held is None) == bool(width % 16)
    if held is not None:
        assert nbytes_of(held) == 33 * width + 33 * 4
        assert held.product(torch.zeros(0, 1, width)).shape == (0, 1, 33)


def test_small_matrices_stay(tmp_path: Path) -> None:
    save_decoder("llama", tmp_path / "tiny")
    model = load_decoder(tmp_path / "tiny", [WHOLE])
    pack_weights(model)
    assert not any(isinstance(weight, PackedWeight) for weight in model.parameters())


def test_without_a_bias_and_with_one() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(2, 3, 20)
    for bias in (False, True):
        layer = nn.Linear(20, 30, bias=bias)
        with torch.no_grad():
            wanted = layer(inputs)
            layer.weight = nn.Parameter(PackedWeight.of(layer.weight.detach()), requires_grad=False)
            torch.testing.assert_close(layer(inputs), wanted)
