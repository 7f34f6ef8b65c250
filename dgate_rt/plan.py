"""Which sub-batch sizes to prepare a stage for: the buckets, chosen so that padding costs least.

An executor that cannot run a stage at any size prepares it at a few, the buckets, and runs the smallest that holds the
samples that are left. Which sizes are worth having depends on how many samples arrive and on what the stage costs at
each size::

    E[cost of a stage] = sum over n >= 1 of P(n samples arrive) * cost(smallest bucket >= n)

The best M sizes follow by dynamic programming over the largest bucket used so far; they always include the batch size,
since everybody may stay. A batch of which nobody arrives costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
MOST_BUCKETS = 6


@dataclass(frozen=True)
class StageBuckets:
    """The buckets of one stage, and what they are expected to cost a batch, in the unit of its costs."""

    sizes: tuple[int, ...]  # ascending; the last is the batch size
    expected: float  # with the batch padded to a bucket
    ideal: float  # with a bucket for every size

    @property
    def waste(self) -> float:
        """What padding adds, as a share of the ideal."""
        return self.expected / self.ideal - 1 if self.ideal else 0.0


def choose_buckets(
    arrivals: Floats,  # [B + 1] float64; arrivals[n] is the probability that n samples arrive
    cost: Floats,  # [B + 1] float64; cost[n] of running the stage on n samples; cost[0] is not read
    buckets: int,
) -> StageBuckets:
    """The at most ``buckets`` sizes of one stage that minimise its expected cost.

    Exact: equal to trying all choices. Costs need not grow with the size.

    Raises:
        ValueError: if the lengths differ, there is no size, or fewer than one bucket is asked for.
    """
    if arrivals.shape != cost.shape or arrivals.ndim != 1 or len(cost) < 2:
        raise ValueError(
            f"cost: expected one for each of 0 to B samples, like arrivals {arrivals.shape}, got {cost.shape}"
        )
    if buckets < 1:
        raise ValueError(f"buckets: expected at least 1, got {buckets}")
    batch_size = len(cost) - 1
    mass = np.cumsum(arrivals)  # [B + 1]
    # between[i, j]: probability that n lies in i < n <= j; a bucket of size j below which the next smaller one is i.
    added = np.where(
        np.tri(batch_size + 1, k=-1, dtype=bool).T, (mass[None, :] - mass[:, None]) * cost[None, :], np.inf
    )
    best = np.full(batch_size + 1, np.inf)
    best[0] = 0.0  # nobody arrives: nothing runs
    choices: list[NDArray[np.intp]] = []
    reached = [best]
    for _ in range(min(buckets, batch_size)):
        total = reached[-1][:, None] + added
        choices.append(total.argmin(0))
        reached.append(total.min(0))
    used = int(np.argmin([costs[batch_size] for costs in reached[1:]]))
    sizes, size = [], batch_size
    for choice in reversed(choices[: used + 1]):
        sizes.append(size)
        size = int(choice[size])
    return StageBuckets(tuple(reversed(sizes)), float(reached[used + 1][batch_size]), float(arrivals[1:] @ cost[1:]))


def pad_to(
    arrivals: Floats,  # [B + 1] float64
    cost: Floats,  # [B + 1] float64
    sizes: Sequence[int],
) -> StageBuckets:
    """What given sizes are expected to cost; those above the batch size are left out, and that itself is added."""
    batch_size = len(cost) - 1
    chosen = sorted({batch_size, *(size for size in sizes if size < batch_size)})
    padded = np.array(chosen)[np.searchsorted(chosen, np.arange(1, batch_size + 1))]
    return StageBuckets(tuple(chosen), float(arrivals[1:] @ cost[padded]), float(arrivals[1:] @ cost[1:]))


def binomial_arrivals(batch_size: int, share: float) -> Floats:  # [B + 1]
    """How many of a batch arrive where each sample does with probability ``share``, by itself.

    Raises:
        ValueError: if ``share`` is no probability.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share: expected 0 to 1, got {share}")
    if share in (0.0, 1.0):
        return np.eye(batch_size + 1)[batch_size if share else 0]
    counts = np.arange(batch_size + 1)
    factorials = np.array([math.lgamma(n + 1) for n in counts])
    log_choose = factorials[-1] - factorials - factorials[::-1]
    return np.exp(log_choose + counts * math.log(share) + counts[::-1] * math.log1p(-share))


def expected_buckets(
    batch_size: int,
    shares: Sequence[float],  # [G + 1]; of the samples that leave at each exit
    stage: int,
    sizes: Sequence[int] | Literal["auto"] = "auto",
) -> StageBuckets:
    """The buckets of one stage where samples leave by these shares: those given, or the best few.

    The stage is taken to cost as much as it has samples.
    """
    arrivals, cost = arrivals_at(batch_size, shares, stage), np.arange(batch_size + 1.0)
    return choose_buckets(arrivals, cost, MOST_BUCKETS) if sizes == "auto" else pad_to(arrivals, cost, sizes)


def entry_sizes(batch_size: int, sizes: Sequence[int] | Literal["auto"] = "auto") -> tuple[int, ...]:
    """At which sizes batches of any number of samples enter, ascending: those given, or the powers of four."""
    if sizes == "auto":
        sizes = [4**power for power in range(batch_size.bit_length())]
    return (*sorted({size for size in sizes if size < batch_size}), batch_size)


def refill_sizes(batch_size: int, sizes: Sequence[int] | Literal["auto"] = "auto") -> tuple[int, ...]:
    """Of which `refill` makes up any number of samples: as `entry_sizes`, and half of the batch.

    The half is about what gates leave of a batch by itself.
    """
    few = entry_sizes(batch_size, sizes)
    if sizes == "auto" and len(few) > 1 and few[-2] < batch_size // 2:
        few = (*few[:-1], batch_size // 2, batch_size)
    return few


def likely_sizes(
    batch_size: int,
    shares: Sequence[float],  # [G + 1]; of the samples that leave at each exit
    buckets: int = MOST_BUCKETS,
) -> list[tuple[int, ...]]:
    """For each stage the sizes to prepare where thresholds may move: ascending, the batch size among them.

    The samples that arrive are those of the given shares, but in one batch of ten any number, so that other thresholds
    and smaller batches do not meet the full size alone.
    """
    cost = np.arange(batch_size + 1.0)
    anything = np.full(batch_size + 1, 1 / (batch_size + 1))
    chosen = []
    for stage in range(len(shares)):
        expected = arrivals_at(batch_size, shares, stage)
        chosen.append(choose_buckets(0.9 * expected + 0.1 * anything, cost, buckets).sizes)
    return chosen


def arrivals_at(batch_size: int, shares: Sequence[float], stage: int) -> Floats:  # [B + 1]
    """How many of a batch arrive at a stage where samples leave by ``shares`` [G + 1], each by itself."""
    return binomial_arrivals(batch_size, min(1.0, max(0.0, 1 - sum(shares[:stage]))))
