"""A node of a machine that traps what it lists computes without it; a setting that is there stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from ecogen.runtime import cpu


def test_a_trapped_instruction_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "")  # or nothing would be restored
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    monkeypatch.setattr(cpu.torch.nn.functional, "linear", lambda *_: os.kill(os.getpid(), signal.SIGILL))
    cpu.avoid_trapped_instructions.__wrapped__()
    assert os.environ["ONEDNN_MAX_CPU_ISA"] == "AVX512_CORE_FP16"


def test_a_setting_that_is_there_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    monkeypatch.setattr(cpu, "_signal_of_a_product", lambda: signal.SIGILL)
    cpu.avoid_trapped_instructions.__wrapped__()
    assert os.environ["ONEDNN_MAX_CPU_ISA"] == "SSE41"


def test_bfloat16_products_work_on_this_machine_as_it_is() -> None:
    program = (
        "from ecogen.runtime.cpu import avoid_trapped_instructions as a; import torch; a();"
        "x = torch.ones(64, 64, dtype=torch.bfloat16); print(float(torch.nn.functional.linear(x, x)[0, 0]))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "ONEDNN_MAX_CPU_ISA"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout.strip()) == (0, "64.0"), done.stderr
