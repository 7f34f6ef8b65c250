"""What a stage returns is written to memory that is there already, not to fresh pages.

glibc gives every block above 32 MB back to the system as soon as it is freed, and the end of its heap too. The next
block is then made of pages that the kernel has to find and clear, one by one, while the first operator writes to them:
on two cores of an AMD EPYC the first stage of a ResNet-101 took 2.7 times as long for it at a batch of 64 in float32,
and the whole network 1.4 times (`docs/executors.md`). That is why whole batches looked slow beside chunks.
"""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # as in <malloc.h>
_VARIABLES = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
_state = {"kept": False}


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, for what it allocates next; whether it does now.

    For all of the process, and for good: it stays as large as it has been at its largest. Nothing is done where glibc
    is not the allocator, or where the environment sets how that gives memory back.
    """
    if not _state["kept"] and not _set_by_the_user():
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
        _state["kept"] = mallopt is not None and all([mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, -1)])
    return _state["kept"]


def give_back_freed_memory() -> None:
    """Give what was freed so far back to the system, whatever happens to what is freed later; glibc only."""
    if os.name == "posix" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def freed_memory() -> str:
    """Where freed memory goes, for what is measured."""
    if _state["kept"]:
        return "stays with the process"
    return "as the environment says" if _set_by_the_user() else "goes back to the system"


def _set_by_the_user() -> bool:
    preloaded = "malloc" in os.environ.get("LD_PRELOAD", "")  # jemalloc, tcmalloc, mimalloc
    tuned = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    return preloaded or tuned or any(name in os.environ for name in _VARIABLES)
