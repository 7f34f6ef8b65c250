"""At how many samples each stage runs: the chunks, chosen from measured stage times; and how a remainder is cut up.

With a chunk of c samples, a stage that n samples of a batch reach runs ``n // c`` chunks and then the remainder, cut up
in the cheapest way::

    time(n, c) = (n // c) * t(c) + left(n % c),    left(n) = min over 1 <= m <= n of t(m) + left(n - m)

A batch of B by itself ends with such remainders, since how many samples reach a stage is a matter of chance; an endless
stream has none. Both uses count alike, so of a sample that comes in, the stage takes::

    cost(c) = 1/2 * E[time(n, c)] / B + 1/2 * reach * t(c) / c,    n ~ binomial(B, reach)

Where a gate is on, survivors are packed anyway and regrouping is free. At any other cut rows are copied unless the
chunk before is a multiple of the one behind. The chunks that cost least follow by dynamic programming over the stages,
whose state is the chunk of the stage before.

Samples are to wait for each other only where that pays, and times of single stages promise more than a whole network
keeps: one stage clears the caches of the next. So all stages run at one size, unless chunks of their own are expected
to take less by `WORTH`. That size is the whole batch if it is small; the memory of larger ones grows with it, so of
those it is the least that is `ALIKE` the best. With a guess among the times it is the least that is not small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dgate_rt.plan import Floats, binomial_arrivals

WORTH = 0.1
"""The share of the expected time that chunks of their own have to save."""
ALIKE = 0.02
"""What more of it than at the best size the one size of all stages may take, as a share."""
SMALL = 64
"""Samples that are not cut up for the sake of memory."""


@dataclass(frozen=True)
class StageTimes:
    """What every stage was measured to take at some batch sizes, and what regrouping takes at every cut."""

    sizes: tuple[int, ...]  # ascending, from 1
    ms: tuple[tuple[float, ...], ...]  # [S][up to len(sizes)], of a whole batch; shorter where larger did not pay
    regroup: tuple[float, ...]  # [S - 1]; ms to copy one row of what crosses there
    complete: bool = True  # False if the machine was too busy for some sizes, whose times are then guessed

    def at_all_sizes(self) -> StageTimes:
        """Every stage at every size: where larger did not pay, a sample is taken to cost what it cost at the last."""
        whole = []
        for ms in self.ms:
            a_sample = ms[-1] / self.sizes[len(ms) - 1]
            whole.append((*ms, *(a_sample * size for size in self.sizes[len(ms) :])))
        return replace(self, ms=tuple(whole))

    def table(self, stages: Sequence[int], padded: bool = False) -> Floats:  # [n + 1]
        """Milliseconds that some stages in a row take for 0, 1, ... samples, up to the largest size measured for all.

        Args:
            stages: which.
            padded: whether only measured sizes can run; others then take what the next larger takes. Otherwise
                times between them are interpolated.
        """
        count = min(len(self.ms[stage]) for stage in stages)
        sizes = np.array([0, *self.sizes[:count]])
        times = np.array([0.0, *np.sum([self.ms[stage][:count] for stage in stages], axis=0)])
        every = np.arange(sizes[-1] + 1)
        return times[np.searchsorted(sizes, every)] if padded else np.interp(every, sizes, times)


@dataclass(frozen=True)
class ChunkPlan:
    """The chunk of every stage, and what a sample that comes in is expected to take there."""

    chunks: tuple[int, ...]  # [S]
    expected: tuple[float, ...]  # [S] ms, regrouping before the stage included


def cut_up(
    times: Floats,  # [n + 1]; times[m] of m samples
) -> tuple[NDArray[np.intp], Floats]:  # [n + 1] each
    """For each number of samples: how many of them run next, and the least time that all of them take.

    ``cuts[n]`` is the largest first piece of a cheapest way to cut n up; ``cuts[0]`` is 0.
    """
    cuts, left = np.zeros(len(times), dtype=np.intp), np.zeros(len(times))
    for n in range(1, len(times)):
        pieces = np.arange(n, 0, -1)
        totals = times[pieces] + left[n - pieces]
        best = int(totals.argmin())
        cuts[n], left[n] = pieces[best], totals[best]
    return cuts, left


def plan_chunks(
    times: StageTimes,
    reach: Sequence[float],  # [S]; the share of samples that comes to each stage
    gated: Sequence[bool],  # [S - 1]; whether the gate at each cut is on
    batch_size: int,
    padded: bool = False,
) -> ChunkPlan:
    """The chunks, each one of the measured sizes, that minimise the expected time of a sample.

    Args:
        times: of the stages.
        reach: 1.0 for the first stage.
        gated: a gate that is off does not pack.
        batch_size: samples of a batch by itself.
        padded: see `StageTimes.table`.

    Raises:
        ValueError: if the lengths do not fit the stages, or a share is no probability.
    """
    stages = len(times.ms)
    if len(reach) != stages or len(gated) != stages - 1:
        raise ValueError(
            f"reach and gated: expected {stages} shares and {stages - 1} gates, got {len(reach)} and {len(gated)}"
        )
    plans = {0: ChunkPlan((), ())}  # the best one by its last chunk; 0, which every chunk divides, is that of the input
    for stage in range(stages):
        copying = 0.0 if stage == 0 or gated[stage - 1] else reach[stage] * times.regroup[stage - 1]
        extended = {}
        for chunk, cost in _costs(times, stage, reach[stage], batch_size, padded).items():
            extended[chunk] = min(
                (
                    ChunkPlan((*plan.chunks, chunk), (*plan.expected, cost + (copying if before % chunk else 0.0)))
                    for before, plan in plans.items()
                ),
                key=_total,
            )
        plans = extended
    return min(plans.values(), key=_total)


def worthwhile_chunks(
    times: StageTimes, reach: Sequence[float], gated: Sequence[bool], batch_size: int, padded: bool = False
) -> ChunkPlan:
    """`plan_chunks`, or one size for every stage where chunks of their own are not known to save `WORTH`.

    The arguments are those of `plan_chunks`; here every stage has times at every size, and the last is the batch size.
    """
    costs = [_costs(times, stage, share, batch_size, padded) for stage, share in enumerate(reach)]
    sizes = [size for size in times.sizes if size >= min(SMALL, batch_size)]
    alike = [ChunkPlan((size,) * len(costs), tuple(cost[size] for cost in costs)) for size in sizes]
    if not times.complete:
        return alike[0]
    least = min(sum(plan.expected) for plan in alike)
    one = next(plan for plan in alike if sum(plan.expected) <= (1 + ALIKE) * least)
    best = plan_chunks(times, reach, gated, batch_size, padded)
    return best if sum(best.expected) <= (1 - WORTH) * sum(one.expected) else one


def _total(plan: ChunkPlan) -> tuple[float, list[int]]:
    """What a sample takes; of plans that take the same, but for rounding, the one with larger chunks is better."""
    return float(f"{sum(plan.expected):.9g}"), [-chunk for chunk in plan.chunks]


def _costs(times: StageTimes, stage: int, reach: float, batch_size: int, padded: bool) -> dict[int, float]:
    """What a sample that comes in takes in one stage, by the chunk of that stage."""
    table = times.table([stage], padded)
    _, left = cut_up(table)
    arrivals, n = binomial_arrivals(batch_size, reach), np.arange(batch_size + 1)
    costs = {}
    for chunk in times.sizes[: len(times.ms[stage])]:
        alone = float(arrivals @ (n // chunk * table[chunk] + left[n % chunk])) / batch_size
        costs[chunk] = (alone + reach * float(table[chunk]) / chunk) / 2
    return costs
