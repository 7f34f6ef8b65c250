"""What is worth keeping between processes, such as times of this machine, in the user's own folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from platformdirs import user_cache_dir

VARIABLE = "DGATE_RT_CACHE"
LIMIT_VARIABLE, LIMIT_GIB = "DGATE_RT_CACHE_GIB", 4.0
_CHECKSUMS = "checksums.json"
_DAY_S = 24 * 60 * 60

T = TypeVar("T")


def cache_dir() -> Path:
    """The folder that ``DGATE_RT_CACHE`` in the environment names, else the user's own."""
    return Path(os.environ.get(VARIABLE) or user_cache_dir("dgate_rt"))


def limit_bytes() -> int:
    """What kept folders of files take at most, by ``DGATE_RT_CACHE_GIB`` in the environment; 0 keeps none.

    Raises:
        ValueError: if that is no number, or below 0.
    """
    text = os.environ.get(LIMIT_VARIABLE) or str(LIMIT_GIB)
    try:
        limit = int(float(text) * 2**30)
    except (ValueError, OverflowError):
        limit = -1
    if limit < 0:
        raise ValueError(f"{LIMIT_VARIABLE}: expected a number of GiB, at least 0, got {text!r}")
    return limit


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

    All folders of a kind together stay within `limit_bytes`: the least recently used go first. Where the user's folder
    cannot be written, or the disk has less than that to spare, the files are temporary. Files that are not as they were
    written are written anew. Other users of the machine cannot read them. With a limit of 0 none are kept or found.

    Args:
        kind: of folders that share the limit.
        key: a file name that stands for everything that the files depend on.
        write: puts files into an empty folder.
        read: takes a folder that ``write`` filled. What it returns may have the files mapped: they may go, but do not
            change.

    Returns:
        What ``read`` returned, and whether the files were found.
    """
    root = cache_dir() / kind
    place = root / key
    if limit_bytes() and _unchanged(place):
        with suppress(Exception):  # another process may make room meanwhile, and read() raises what its library does
            found = read(place)
            with suppress(OSError):  # somebody else's folder
                os.utime(place)
            return found, True
    with _scratch(root) as scratch:
        files = scratch / key
        files.mkdir()
        write(files)
        made = read(files)
        if scratch.parent == root and _bytes(files) <= limit_bytes():
            with suppress(OSError):  # what is in its place cannot be removed, say
                (files / _CHECKSUMS).write_text(json.dumps(_checksums(files)))
                if not _unchanged(place):  # else another process was first, and a third may be reading
                    shutil.rmtree(place, ignore_errors=True)
                    files.rename(place)
        with suppress(OSError):
            _make_room(root)
    return made, False


@contextmanager
def _scratch(root: Path) -> Iterator[Path]:
    """A temporary folder: in ``root`` where there is room for it."""
    where: Path | None = root
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not limit_bytes() or shutil.disk_usage(root).free < limit_bytes() or not os.access(root, os.W_OK):
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
    """Delete the least recently used folders, so that the others stay within the limit.

    Those that are not whole are being written; after a day nobody does that any more.
    """
    taken = 0
    for folder in sorted(root.iterdir(), key=_modified, reverse=True):
        if (folder / _CHECKSUMS).exists():
            taken += _bytes(folder)
            left_over = taken > limit_bytes()
        else:
            left_over = time.time() - _modified(folder) > _DAY_S
        if left_over:
            shutil.rmtree(folder, ignore_errors=True)


def _modified(path: Path) -> float:
    with suppress(OSError):  # gone meanwhile
        return path.stat().st_mtime
    return 0.0


def _bytes(folder: Path) -> int:
    """What the files below a folder take; 0 if there is none."""
    taken = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # gone meanwhile
                taken += os.stat(os.path.join(parent, name)).st_size
    return taken
