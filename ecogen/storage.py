"""Files that are either whole or not there: atomic writes, and clear errors when a disk is full."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

from ecogen.errors import StorageError


def write_atomically(path: Path, content: bytes | str, *, mode: int = 0o644) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new and nothing between.

    Raises:
        StorageError: if the disk is full or not writable; the old file is untouched.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, data, mode)
    except OSError as problem:
        raise StorageError(
            f"cannot write {path} ({len(data)} bytes): {problem.strerror}; free some space or choose another folder"
        ) from problem


def append_line(path: Path, line: bytes) -> None:
    """Append one line and hand it to the system: the whole of it, or nothing.

    Raises:
        StorageError: if the disk is full or not writable.
    """
    try:
        with path.open("ab", buffering=0) as file:
            begin = file.tell()
            if file.write(line) != len(line):
                file.truncate(begin)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as problem:
        raise StorageError(f"cannot append to {path}: {problem.strerror}; free some space, then --resume") from problem


def read_lines(path: Path) -> list[bytes]:
    """The whole lines of a log, none if there is no log; a last line that a crash cut off is taken out of the file.

    Raises:
        StorageError: if it cannot be read or mended.
    """
    try:
        content = path.read_bytes() if path.exists() else b""
        whole, _, cut_off = content.rpartition(b"\n")
        if cut_off:
            os.truncate(path, len(content) - len(cut_off))  # or the next line would be appended to it
    except OSError as problem:
        raise StorageError(f"cannot read {path}: {problem.strerror}; check its permissions") from problem
    return [line + b"\n" for line in whole.split(b"\n")] if whole else []


def make_folder(path: Path) -> Path:
    """The folder, made if needed.

    Raises:
        StorageError: if it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise StorageError(f"cannot make the folder {path}: {problem.strerror}; choose another") from problem
    return path


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder and all that is in it; files that are there already are overwritten.

    Raises:
        StorageError: if a file cannot be read or written.
    """
    try:
        shutil.copytree(source, target, dirs_exist_ok=True)
    except OSError as problem:  # shutil.Error, which lists them, is one of these
        reason = problem.strerror or "; ".join(sorted({why for *_, why in problem.args[0]}))
        raise StorageError(f"cannot copy {source} to {target}: {reason}; free some space, then --resume") from problem


def put_folder(finished: Path, folder: Path) -> None:
    """Put a folder in place in one step, when all that is in it is on the disk; nothing but an empty one is replaced.

    Raises:
        StorageError: if there is another, or it cannot be written.
    """
    try:
        for path in finished.iterdir():
            path.chmod(0o644)
            with path.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(finished, folder)
    except OSError as problem:
        raise StorageError(f"cannot write {folder}: {problem.strerror}; choose another folder") from problem


def storage_error(problem: OSError) -> StorageError | None:
    """What a full or unwritable disk means for a user; None for a problem of another kind."""
    if problem.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return None
    what = problem.filename or "a file"
    return StorageError(f"cannot write {what}: {problem.strerror}; free some space, then --resume")


def cache_folder() -> Path:
    """Where EcoGen caches what it can make again: `$XDG_CACHE_HOME/ecogen`, or `~/.cache/ecogen`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ecogen"


def _replace(path: Path, data: bytes, mode: int) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
