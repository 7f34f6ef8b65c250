"""What a stage returns is written to memory that is there already, not to fresh pages.

glibc gives every block above 32 MB back to the system as soon as it is freed, and the end of its heap too. The next
block is then made of pages that the kernel has to find and clear, one by one, while the first operator writes to them.
What that costs is in `docs/executors.md`; these fresh pages are why whole batches looked slow beside chunks.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from collections.abc import Callable

_SETTINGS = {-4: 0, -1: -1, -8: 1}  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX of <malloc.h>
_VARIABLES = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
_TUNABLES = ("mmap_max", "mmap_threshold", "trim_threshold")
_state = {"kept": False}


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, for what it allocates next; whether it does now.

    For the whole process, and for good: it does not shrink again. Threads share one heap, for those that glibc gives
    to other threads are small, and go back when they are empty. Nothing is done where glibc is not the allocator, or
    where the environment sets how that gives memory back.
    """
    mallopt = _of_glibc("mallopt")
    if not _state["kept"] and mallopt is not None and not _set_by_the_user():
        _state["kept"] = all(mallopt(parameter, value) for parameter, value in _SETTINGS.items())
    return _state["kept"]


def give_back_freed_memory() -> None:
    """Give what was freed so far back to the system, whatever happens to what is freed later; glibc only."""
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def freed_memory() -> str:
    """Where freed memory goes, for what is measured."""
    if _state["kept"]:
        return "stays with the process"
    if _of_glibc("mallopt") is None:
        return "as this system's allocator does"
    return "as the environment says" if _set_by_the_user() else "goes back to the system"


def _of_glibc(name: str) -> Callable[..., int] | None:
    """A function of glibc's allocator; None on other systems."""
    return getattr(ctypes.CDLL(None), name, None) if _on_glibc() else None


@functools.cache
def _on_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"


def _set_by_the_user() -> bool:
    preloaded = "malloc" in os.environ.get("LD_PRELOAD", "")  # jemalloc, tcmalloc, mimalloc
    tuned = any(f"glibc.malloc.{name}=" in os.environ.get("GLIBC_TUNABLES", "") for name in _TUNABLES)
    return preloaded or tuned or any(name in os.environ for name in _VARIABLES)
