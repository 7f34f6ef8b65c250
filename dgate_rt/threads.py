"""Torch on the caller's thread alone, around stages that compute on threads of their engine.

After a parallel loop OpenMP's threads spin for milliseconds in wait of the next one, on the cores that the engine's
threads need. What torch does between stages is copying for the most part, and hardly gains by threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator

import torch
from torch import nn


@contextlib.contextmanager
def alone(staged: nn.Module) -> Iterator[None]:
    """Let torch's operators run on the caller's thread if ``staged`` has a true ``own_threads``.

    Other threads, those that start meanwhile too, keep their number: `torch.set_num_threads` would change that. Where
    torch does without OpenMP nothing is changed.
    """
    set_threads = _omp_set_num_threads() if getattr(staged, "own_threads", False) else None
    if set_threads is None:
        yield
        return
    before = torch.get_num_threads()
    set_threads(1)
    try:
        yield
    finally:
        set_threads(before)


@functools.cache
def _omp_set_num_threads() -> Callable[[int], object] | None:
    """OpenMP's own, which holds for the thread that calls it."""
    try:
        return ctypes.CDLL(None).omp_set_num_threads
    except (AttributeError, OSError, TypeError):  # none is loaded; Windows takes no None
        return None
