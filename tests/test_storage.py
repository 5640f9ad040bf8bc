"""Files are whole or not there, also when the disk is full."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ecogen.errors import StorageError
from ecogen.storage import (
    append_line,
    cache_folder,
    copy_folder,
    make_folder,
    put_folder,
    read_lines,
    storage_error,
    write_atomically,
)


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    write_atomically(path, "one")
    write_atomically(path, b"two", mode=0o600)
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(path.parent) == ["file"]


def test_a_folder_is_put_in_place_whole_and_over_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, synced = make_folder(tmp_path / "made"), list[int]()
    (made / "weights").write_text("1")
    (made / "weights").chmod(0o600)
    monkeypatch.setattr(os, "fsync", synced.append)
    put_folder(made, tmp_path / "there")
    assert len(synced) == 1
    assert not made.exists()
    assert (tmp_path / "there" / "weights").stat().st_mode & 0o777 == 0o644
    with pytest.raises(StorageError, match="Directory not empty; choose another folder"):
        put_folder(make_folder(made), tmp_path / "there")
    assert (tmp_path / "there" / "weights").read_text() == "1"


@pytest.mark.parametrize("step", ["fsync", "replace", "chmod"])
def test_a_failure_at_any_step_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, step, full)
    with pytest.raises(StorageError, match=r"file \(3 bytes\): No space left on device; free some space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    made = subprocess.run(mount, capture_output=True, check=False)
    if made.returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_on_a_full_disk_the_old_file_stays_and_the_error_says_so(tiny_disk: Path) -> None:
    path = tiny_disk / "file"
    write_atomically(path, b"old")
    with pytest.raises(StorageError, match="No space left"):
        write_atomically(path, bytes(100_000))
    assert path.read_bytes() == b"old"
    assert os.listdir(tiny_disk) == ["file"]


def test_on_a_full_disk_a_log_keeps_whole_lines(tiny_disk: Path) -> None:
    path, line = tiny_disk / "log", b"x" * 4999 + b"\n"

    def fill() -> None:
        for _ in range(20):
            append_line(path, line)

    with pytest.raises(StorageError, match="--resume"):
        fill()
    assert set(read_lines(path)) == {line}


def test_a_log_gives_back_its_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "log"
    assert read_lines(path) == []
    append_line(path, b"one\n")
    append_line(path, b"two\n")
    assert read_lines(path) == [b"one\n", b"two\n"]


@pytest.mark.parametrize("rest", [b"th", b"three without its newline"])
def test_a_line_that_was_cut_off_is_taken_out_so_that_the_next_is_whole(tmp_path: Path, rest: bytes) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"one\ntwo\n" + rest)
    assert read_lines(path) == [b"one\n", b"two\n"]
    append_line(path, b"three\n")
    assert read_lines(path) == [b"one\n", b"two\n", b"three\n"]


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot make the folder .*: Not a directory; choose another$"):
        make_folder(tmp_path / "file" / "folder")
    with pytest.raises(StorageError, match="cannot write"):
        write_atomically(tmp_path / "file" / "other", "x")
    with pytest.raises(StorageError, match="cannot copy"):
        copy_folder(tmp_path / "missing", tmp_path / "copy")


def test_only_problems_of_the_disk_are_storage_errors() -> None:
    assert isinstance(storage_error(OSError(errno.ENOSPC, "full", "a")), StorageError)
    assert storage_error(OSError(errno.ENOENT, "missing")) is None


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "ecogen"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "ecogen"
