"""Counting FLOPs, two a multiply-add; attention included."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode


@contextmanager
def count_flops() -> Iterator[FlopCounterMode]:
    """`FlopCounterMode`, quiet, with torch's fused attention off: it would count as no work."""
    from torch.utils.flop_counter import FlopCounterMode  # here, because it imports triton

    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
