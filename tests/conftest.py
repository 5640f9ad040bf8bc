"""What several folders of tests share. Nothing here imports torch before a test asks for it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

# Virtual machines may name AMX among the CPU's flags and then trap it: bfloat16 would end the process.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported: tiny tensors, shared cores

settings.register_profile(
    "ecogen",
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # shrinking runs a federation hundreds of times
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("ecogen")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as of a script's background job: what tests start would too
    signal.signal(signal.SIGINT, signal.default_int_handler)


_LONGEST = ("engines", "test_cli", "serving", "node")
"""Folders and files whose tests start most processes: they come first, so that no process is left with one of them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, for those who run several at a time without reordering."""

    def rank(item: pytest.Item) -> int:
        name = item.path.relative_to(Path(__file__).parent).as_posix()
        return next((place for place, prefix in enumerate(_LONGEST) if name.startswith(prefix)), len(_LONGEST))

    items.sort(key=rank)


@pytest.fixture(scope="session")
def foundation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny foundation model of three blocks, written by `save_pretrained`."""
    from tests.tiny import save_foundation

    return save_foundation(tmp_path_factory.mktemp("foundation"))


@pytest.fixture
def recipe_of(foundation: Path) -> Callable[..., Any]:
    """Makes tiny recipes on that foundation: `recipe_of(tuning={"rounds": 1})`."""
    from tests.tiny import tiny_recipe

    return lambda **sections: tiny_recipe(foundation, **sections)


@pytest.fixture
def agree(record_property: Callable[[str, object], None]) -> Any:
    """Asserts that an answer is the one that transformers gives greedily; see `tests.greedy`."""
    from tests.greedy import agree_and_record

    return agree_and_record(record_property)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how many greedy answers differ from transformers' at a near tie, whichever process compared them."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, ())]
    properties = [each for report in reports if report.when == "call" for each in report.user_properties]
    if recorded := [value for name, value in properties if name == "greedy answers"]:
        from tests.greedy import summary

        terminalreporter.write_line(summary(recorded))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many torch threads as a node has."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def ecogen(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Calls the command line in this process: `ecogen("status", folder).out`."""
    from tests.command import call

    return lambda *arguments: call(arguments, capsys, monkeypatch)
