"""What is worth keeping between processes, such as times of this machine, in the user's own folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from platformdirs import user_cache_dir

VARIABLE = "DGATE_RT_CACHE"
LIMIT_BYTES = 4 * 2**30
"""What kept folders of files take at most; the least recently used go first. They leave that much of the disk free."""

_CHECKSUMS = "checksums.json"

T = TypeVar("T")


def cache_dir() -> Path:
    """The folder that ``DGATE_RT_CACHE`` in the environment names, else the user's own."""
    return Path(os.environ.get(VARIABLE) or user_cache_dir("dgate_rt"))


def kept_bytes() -> int:
    """What all that is kept takes on the disk."""
    return _bytes(cache_dir())


def recall(name: str) -> Any:
    """What was kept under a name; None if nothing was, or the file is damaged."""
    try:
        return json.loads((cache_dir() / name).read_text())
    except (OSError, ValueError):
        return None


def keep(name: str, value: Any) -> None:
    """Keep ``value``, whole or not at all; where the folder cannot be written, nothing is kept."""
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False) as file:
            json.dump(value, file)
        os.replace(file.name, folder / name)
    except OSError:
        return


def kept_files(kind: str, key: str, write: Callable[[Path], None], read: Callable[[Path], T]) -> tuple[T, bool]:
    """What ``read`` makes of a folder of files, which ``write`` fills if it is not kept from before.

    Where the user's folder cannot be written or the disk is nearly full, the files are temporary. Files that are not as
    they were written are written anew.

    Args:
        kind: of folders that share `LIMIT_BYTES`.
        key: a file name that stands for everything that the files depend on.
        write: puts files into an empty folder.
        read: takes a folder that ``write`` filled, and needs none of its files when it has returned.

    Returns:
        What ``read`` returned, and whether the files were found.
    """
    root = cache_dir() / kind
    place = root / key
    if _unchanged(place):
        with suppress(Exception):  # another process may make room meanwhile, and read() raises what its library does
            found = read(place)
            os.utime(place)
            return found, True
    with _scratch(root) as scratch:
        files = scratch / key
        files.mkdir()
        write(files)
        made = read(files)
        with suppress(OSError):  # not the same disk, or another process was first
            (files / _CHECKSUMS).write_text(json.dumps(_checksums(files)))
            shutil.rmtree(place, ignore_errors=True)
            files.rename(place)
            _make_room(root)
    return made, False


@contextmanager
def _scratch(root: Path) -> Iterator[Path]:
    """A temporary folder, in ``root`` where that can be had."""
    where: Path | None = root
    try:
        root.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(root).free < LIMIT_BYTES or not os.access(root, os.W_OK):
            where = None
    except OSError:
        where = None
    with tempfile.TemporaryDirectory(dir=where, ignore_cleanup_errors=True) as scratch:
        yield Path(scratch)


def _unchanged(folder: Path) -> bool:
    """Whether a folder is there, and its files are as they were written."""
    try:
        return bool(json.loads((folder / _CHECKSUMS).read_text()) == _checksums(folder))
    except (OSError, ValueError):
        return False


def _checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file by name, but for the checksums themselves."""
    return {path.name: _sha256(path) for path in sorted(folder.iterdir()) if path.name != _CHECKSUMS}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _make_room(root: Path) -> None:
    """Delete the least recently used folders, so that the others stay within the limit."""
    newest_first = sorted(root.iterdir(), key=lambda folder: folder.stat().st_mtime, reverse=True)
    taken = 0
    for folder in newest_first:
        taken += _bytes(folder)
        if taken > LIMIT_BYTES:
            shutil.rmtree(folder, ignore_errors=True)


def _bytes(folder: Path) -> int:
    """What the files below a folder take; 0 if there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
