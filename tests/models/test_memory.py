"""A node that holds a quarter of the blocks needs about a quarter of the memory, at its peak."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

BLOCKS = 8
LOAD = r"""
import re, sys
from pathlib import Path
import torch
from ecogen.models.decoder import load_decoder
from ecogen.placement import Segment
def peak():  # of this program; getrusage would tell of the one that started it too
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
def load(folder, segment, width):
    model = load_decoder(Path(folder), [segment])
    with torch.no_grad():
        model(torch.zeros(1, 2, width), segment)
    return model
load(sys.argv[1], Segment(1, 2), 16)  # what is imported for the first model is none of the second one's
before = peak()
model = load(sys.argv[2], Segment(*map(int, sys.argv[3:])), 640)
print(peak() - before)
"""


def peak_kib(tiny: Path, folder: Path, start: int, stop: int) -> int:
    """What loading and running a segment adds to a process that has done so before."""
    command = [sys.executable, "-c", LOAD, str(tiny), str(folder), str(start), str(stop)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return int(subprocess.run(command, check=True, capture_output=True, env=environment, text=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a program's own peak")
def test_a_quarter_of_the_blocks_needs_a_quarter_of_the_memory(tmp_path: Path) -> None:
    tiny = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=9)
    LlamaForCausalLM(tiny).save_pretrained(tmp_path / "tiny")
    sizes = {"hidden_size": 640, "intermediate_size": 2560, "num_hidden_layers": BLOCKS, "vocab_size": 100}
    config = LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=8)
    model = LlamaForCausalLM(config).to(torch.float32)
    bytes_of_blocks = sum(parameter.nbytes for parameter in model.model.layers.parameters())
    model.save_pretrained(tmp_path / "large", max_shard_size="8MB")
    whole, quarter = [peak_kib(tmp_path / "tiny", tmp_path / "large", *of) for of in ((0, BLOCKS), (2, 4))]
    assert whole * 1024 > 0.9 * bytes_of_blocks
    assert 0.2 < quarter / whole < 0.3
