"""Rows come back as they were kept, from memory or disk, and there is room for what was promised."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ecogen.runtime.prefix_cache import PrefixCache, prefix_keys

ROW_BYTES = 4 * 3 * 2


def rows(*numbers: float) -> torch.Tensor:
    return torch.stack([torch.arange(6.0).view(3, 2) + number for number in numbers])


@given(
    in_memory=st.integers(0, 4),
    on_disk=st.integers(0, 4),
    wanted=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    again=st.integers(0, 8),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_what_was_reserved_is_kept(tmp_path: Path, in_memory: int, on_disk: int, wanted: list[int], again: int) -> None:
    cache = PrefixCache(tmp_path / "rows", ROW_BYTES, in_memory * ROW_BYTES, on_disk * ROW_BYTES)
    granted = {f"owner-{i}": cache.reserve(f"owner-{i}", count) for i, count in enumerate(wanted)}
    granted["owner-0"] = cache.reserve("owner-0", again)
    assert sum(granted.values()) <= in_memory + on_disk
    if again + sum(wanted[1:]) <= in_memory + on_disk and sum(wanted) <= in_memory + on_disk:
        assert sum(granted.values()) == again + sum(wanted[1:])
    keys = list(range(100, 100 + sum(granted.values())))
    for key in keys:
        cache.keep([key, key], rows(key, -1))  # the second is there already
    assert cache.keys.tolist() == keys
    assert cache.memory_bytes == min(in_memory, len(keys)) * ROW_BYTES
    if keys:
        backward = keys[::-1]
        assert torch.equal(cache.recall(backward), rows(*backward))
    cache.close()
    assert not (tmp_path / "rows").exists()


def test_a_full_disk_leaves_the_room_that_memory_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    cache = PrefixCache(tmp_path / "rows", ROW_BYTES, 2 * ROW_BYTES, 100 * ROW_BYTES)
    assert cache.reserve("owner", 50) == 2


def test_a_row_that_was_never_kept_is_no_guess(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        PrefixCache(tmp_path / "rows", ROW_BYTES, 100, 0).recall([1])


def test_a_key_is_of_the_pixels_and_the_prefix() -> None:
    images = torch.randn(3, 1, 4, 4)
    keys = prefix_keys(images, "v")
    assert torch.equal(prefix_keys(images.flip(0), "v"), keys.flip(0))
    assert len({*keys.tolist(), *prefix_keys(images, "w").tolist(), *prefix_keys(images + 1e-6, "v").tolist()}) == 9
