"""The accuracy/cost frontier: every operating point worth having, found on a validation trace.

One primitive does all the work: with the other gates fixed, `_Search.scan` evaluates every threshold of a gate's grid
exactly, in O(N). The fine grid holds *every* threshold a gate can usefully have (one between each two neighbouring
margins, and off), the coarse one about two thousand of them, evenly spread over the samples. On scans of the coarse
grid stands a Lagrangian descent that traces the whole frontier; on those of the fine one the paper's sequential choice
(section 3.1) and a search of pairs of gates around a target. Whatever any of them visits is a candidate for the
frontier, so around a target the result is never worse than the sequential one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dgate_rt.cost import Costs
from dgate_rt.errors import UnreachableTargetError
from dgate_rt.trace import Trace

Thresholds = tuple[float, ...]

_EXHAUSTIVE_SCANS = 2_000
"""Up to this many scans, the pair search becomes a search of all combinations, and is exact."""
_SPREAD = 32
"""Otherwise: evenly spread values of the first gate of a pair that are tried, each with every value of the second."""
_COARSE = 2_000
"""Thresholds a gate on the coarse grid, and points around the target that the archive takes from a fine scan."""
_MULTIPLIERS = np.geomspace(1e-2, 1e3, 48)
"""Prices of an error, in dense networks: the Lagrange multipliers of the descent."""
_MOST_POINTS = 1_000
"""A frontier of more points is thinned to about so many, evenly."""


@dataclass(frozen=True)
class OperatingPoint:
    """One choice of thresholds and what it gave on the validation samples."""

    thresholds: Thresholds  # length G; +inf is a gate that is off
    accuracy: float
    cost: float  # mean a sample
    shares: tuple[float, ...]  # length G + 1; share of the samples that left at each exit


@dataclass(frozen=True)
class Frontier:
    """Operating points none of which is beaten in both accuracy and cost, cheapest first."""

    points: tuple[OperatingPoint, ...]

    def cheapest(self, min_accuracy: float) -> OperatingPoint:
        """The cheapest point of at least this accuracy.

        Raises:
            UnreachableTargetError: if there is none; the message says what is reachable.
        """
        found = next((p for p in self.points if p.accuracy >= min_accuracy - 1e-12), None)
        if found is None:
            best = self.points[-1]
            raise UnreachableTargetError(
                f"accuracy: expected a target of at most {best.accuracy:.4f}, the best reachable on this data "
                f"(at a cost of {best.cost:.4g}), got {min_accuracy:.4f}"
            )
        return found

    def most_accurate(self, max_cost: float) -> OperatingPoint:
        """The most accurate point of at most this cost.

        Raises:
            UnreachableTargetError: if there is none; the message says what is reachable.
        """
        found = next((p for p in reversed(self.points) if p.cost <= max_cost * (1 + 1e-12)), None)
        if found is None:
            best = self.points[0]
            raise UnreachableTargetError(
                f"max_cost: expected a target of at least {best.cost:.4g}, the cheapest reachable on this data "
                f"(at an accuracy of {best.accuracy:.4f}), got {max_cost:.4g}"
            )
        return found


def sequential(trace: Trace, costs: Costs, min_accuracy: float) -> OperatingPoint:
    """The paper's choice: gate after gate, each at its cheapest threshold that keeps the accuracy, later gates off.

    Raises:
        UnreachableTargetError: if not even this reaches ``min_accuracy``.
    """
    search = _Search(trace, costs)
    thresholds = search.sequential(_needed(min_accuracy, len(trace.targets)))
    point = operating_point(trace, costs, thresholds)
    Frontier((point,)).cheapest(min_accuracy)
    return point


def search_frontier(
    trace: Trace, costs: Costs, *, min_accuracy: float | None = None, max_cost: float | None = None
) -> Frontier:
    """The frontier over all gates' thresholds together; searched hardest around the target, where one is given."""
    search = _Search(trace, costs)
    search.scan_all(search.off)
    best, floor = search.best_correct(), search.worst_correct()
    for needed in np.unique(np.linspace(floor, best, 24).astype(int)):
        search.sequential(int(needed), fine=False)
    for multiplier in _MULTIPLIERS:
        search.descend(float(multiplier))
    keep = None
    if min_accuracy is not None:
        keep = _needed(min_accuracy, len(trace.targets))
        search.sequential(keep)
        search.refine(keep)
    elif max_cost is not None:
        keep = search.most_correct(max_cost)
        while keep is not None:  # is one more right answer to be had within the cost?
            search.refine(keep + 1)
            more = search.most_correct(max_cost)
            if more is None or more <= keep:
                break
            keep = more
    return search.frontier(keep)


def operating_point(trace: Trace, costs: Costs, thresholds: Thresholds) -> OperatingPoint:
    """What these thresholds give on a trace."""
    replay = trace.replay(thresholds, costs)
    return OperatingPoint(thresholds, replay.accuracy, replay.cost, tuple(map(float, replay.shares)))


def _needed(accuracy: float, count: int) -> int:
    """The number of correct answers that an accuracy asks for, safe from float noise."""
    return int(np.ceil(accuracy * count - 1e-9))


@dataclass(frozen=True)
class _Grid:
    """Thresholds of one gate, ever lower, and where each sample begins to leave."""

    values: NDArray[np.float64]  # [M]
    bins: NDArray[np.int64]  # [N]; the first of the values at which the sample leaves, M if it never does

    def thinned(self, count: int) -> _Grid:
        """About ``count`` of the values, evenly spread over the samples that leave."""
        size = len(self.values)
        if size <= count:
            return self
        ends = np.bincount(self.bins, minlength=size)[:size].cumsum()
        chosen = np.unique(np.searchsorted(ends, np.linspace(1, ends[-1], count)))
        return _Grid(self.values[chosen], np.searchsorted(chosen, self.bins))


@dataclass(frozen=True)
class _Scan:
    """Every threshold of one gate's grid, the others fixed: the first is off, then ever lower."""

    values: NDArray[np.float64]  # [M]
    correct: NDArray[np.int64]  # [M]; right answers
    cost: NDArray[np.float64]  # [M]; total over the samples; falls, from the second on


class _Search:
    """Scans over a trace, and an archive that holds every undominated point they met, or those around a target."""

    def __init__(self, trace: Trace, costs: Costs) -> None:
        self.trace, self.costs = trace, costs
        self.gate_count, self.count = trace.margins.shape
        self.off: Thresholds = (np.inf,) * self.gate_count
        self.correct = trace.correct.astype(np.int8)
        self.fine = [_grid(margins) for margins in trace.margins]
        self.coarse = [grid.thinned(_COARSE) for grid in self.fine]
        self.visited: dict[tuple[int, Thresholds], _Scan] = {}
        self.archive: list[tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]] = []

    def scan(self, gate: int, thresholds: Thresholds, grid: _Grid) -> _Scan:
        """Every threshold of ``gate`` in ``grid``, the others as given: right answers and total cost, exactly."""
        off = _replace(thresholds, gate, np.inf)
        exits, correct, left = self.trace.gated(off)
        to_exit = self.costs.to_exits(off)
        reach = exits > gate
        gain = (self.correct[gate] - correct.view(np.int8)) * reach
        behind = np.where(np.arange(self.gate_count + 1) > gate, to_exit - to_exit[gate], 0.0).take(exits)
        size = len(grid.values)
        gains = np.bincount(grid.bins, gain, size + 1)[:size].cumsum()
        savings = np.bincount(grid.bins, behind, size + 1)[:size].cumsum()
        at_gate = self.costs.gates[gate] * np.count_nonzero(reach)
        return _Scan(
            np.append(np.inf, grid.values),
            np.count_nonzero(correct) + np.append(0, gains).astype(np.int64),
            left @ to_exit + np.append(0.0, at_gate - savings),
        )

    def visit(self, gate: int, thresholds: Thresholds, around: int | None = None) -> _Scan:
        """`scan`, with the undominated part of it put into the archive.

        On the coarse grid, where descents meet the same scan again and again; or, to see around a number of right
        answers, on the fine one, of which only what lies there is kept.
        """
        key = gate, _replace(thresholds, gate, np.inf)
        if around is None and key in self.visited:
            return self.visited[key]
        scan = self.scan(gate, thresholds, (self.coarse if around is None else self.fine)[gate])
        if around is None:
            self.visited[key] = scan
        best = np.maximum.accumulate(scan.correct[::-1])[::-1]  # of this threshold and all that are cheaper
        keep = np.flatnonzero(np.append(best[:-1] > best[1:], True))[::-1]
        if around is not None:
            middle = int(np.searchsorted(scan.correct[keep], around))
            keep = keep[max(0, middle - _COARSE // 2) : middle + _COARSE // 2]
        keep = np.append(keep, 0)  # off, which may be cheaper than a gate that few samples leave at
        rows = np.tile(np.asarray(thresholds), (len(keep), 1))
        rows[:, gate] = scan.values[keep]
        self.archive.append((scan.correct[keep], scan.cost[keep], rows))
        return scan

    def scan_all(self, thresholds: Thresholds) -> None:
        """Visit every gate from one point; with no gate at all, the dense network is the only point."""
        for gate in range(self.gate_count):
            self.visit(gate, thresholds)
        if self.gate_count == 0:
            dense = np.array([self.costs.dense * self.count])
            self.archive.append((np.array([np.count_nonzero(self.correct[-1])]), dense, np.empty((1, 0))))

    def sequential(self, needed: int, fine: bool = True) -> Thresholds:
        """Gate after gate, later gates off: the cheapest threshold with at least ``needed`` right answers."""
        thresholds = self.off
        for gate in range(self.gate_count):
            scan = self.visit(gate, thresholds, needed if fine else None)
            index = _cheapest(scan, needed)
            thresholds = _replace(thresholds, gate, np.inf if index is None else float(scan.values[index]))
        return thresholds

    def descend(self, multiplier: float) -> None:
        """Coordinate descent on ``cost / dense cost + multiplier * error rate``, from all gates off."""
        price, thresholds = multiplier * self.costs.dense, self.off
        for _ in range(6):
            before = thresholds
            for gate in range(self.gate_count):
                scan = self.visit(gate, thresholds)
                best = int(np.argmin(scan.cost - price * scan.correct))
                thresholds = _replace(thresholds, gate, float(scan.values[best]))
            if thresholds == before:
                return

    def refine(self, needed: int) -> None:
        """Search around the cheapest point with ``needed`` right answers: all combinations if few, else pairs."""
        if self.gate_count < 2:
            return
        sizes = [len(grid.values) + 1 for grid in self.fine]
        if math.prod(sizes[:-1]) <= _EXHAUSTIVE_SCANS:  # as Python counts: from seven gates on int64 overflows
            for head in itertools.product(*([np.inf, *grid.values] for grid in self.fine[:-1])):
                self.visit(self.gate_count - 1, (*map(float, head), np.inf), needed)
            return
        cost, best = self.cheapest(needed)
        for _ in range(2):
            before = best
            for first, second in itertools.combinations(range(self.gate_count), 2):
                around = best
                for value in self.trials(first, around[first]):
                    thresholds = _replace(around, first, value)
                    scan = self.visit(second, thresholds, needed)
                    index = _cheapest(scan, needed)
                    if index is not None and scan.cost[index] < cost:
                        cost, best = float(scan.cost[index]), _replace(thresholds, second, float(scan.values[index]))
            if best == before:
                return

    def trials(self, gate: int, around: float) -> Iterator[float]:
        """Some thresholds of a gate: off, evenly spread ones, and ever closer neighbours of the present one."""
        values = self.fine[gate].values
        spread = np.linspace(0, len(values) - 1, _SPREAD)
        steps = 2 ** np.arange(len(values).bit_length())
        near = np.searchsorted(-values, -around) + np.concatenate([-steps, [0], steps])
        chosen = np.unique(np.concatenate([spread, near]).clip(0, max(len(values) - 1, 0)).astype(int))
        yield np.inf
        yield from (float(values[i]) for i in chosen if len(values))

    def best_correct(self) -> int:
        return max(int(correct.max()) for correct, _, _ in self.archive)

    def worst_correct(self) -> int:
        return min(int(correct.min()) for correct, _, _ in self.archive)

    def most_correct(self, max_cost: float) -> int | None:
        """The most right answers of any visited point within a mean cost; None if there is none."""
        limit = max_cost * self.count * (1 + 1e-12)
        found = [int(correct[cost <= limit].max()) for correct, cost, _ in self.archive if (cost <= limit).any()]
        return max(found, default=None)

    def cheapest(self, needed: int) -> tuple[float, Thresholds]:
        """The cheapest visited point with at least ``needed`` right answers: total cost, infinite if there is none."""
        best, found = np.inf, self.off
        for correct, cost, rows in self.archive:
            fits = correct >= needed
            if fits.any():
                index = int(np.argmin(np.where(fits, cost, np.inf)))
                if cost[index] < best:
                    best, found = float(cost[index]), tuple(map(float, rows[index]))
        return best, found

    def frontier(self, keep: int | None) -> Frontier:
        """The undominated points of everything visited, thinned; the cheapest with ``keep`` right answers stays."""
        correct = np.concatenate([c for c, _, _ in self.archive])
        cost = np.concatenate([c for _, c, _ in self.archive])
        rows = np.concatenate([r for _, _, r in self.archive])
        front = _undominated(correct, cost)
        chosen = np.linspace(0, len(front) - 1, min(len(front), _MOST_POINTS)).astype(int)
        if keep is not None and correct[front[-1]] >= keep:
            chosen = np.union1d(chosen, np.searchsorted(correct[front], keep))
        return Frontier(
            tuple(operating_point(self.trace, self.costs, tuple(map(float, rows[i]))) for i in front[chosen])
        )


def _grid(
    margins: NDArray[np.float32],  # [N]; -inf where a sample never leaves
) -> _Grid:
    """Every useful threshold: halfway between each two neighbouring margins, and one below them all.

    Halfway, because a threshold that equals a sample's margin lets float noise decide about that sample.
    """
    lowest_first, bins = np.unique(margins, return_inverse=True)
    here = lowest_first[::-1]
    bins = len(here) - 1 - bins
    if len(here) and here[-1] == -np.inf:
        here = here[:-1]
    if len(here) == 0:
        return _Grid(np.empty(0), bins)
    below = np.append(here[1:], here[-1] - 1)
    halfway = (here / 2 + below / 2).astype(np.float32)
    safe = np.where((halfway > below) & (halfway <= here), halfway, here)
    return _Grid(safe.astype(np.float64), bins)


def _undominated(correct: NDArray[np.int64], cost: NDArray[np.float64]) -> NDArray[np.int64]:
    """Indices of the points that no other beats in both, cheapest first (so the most accurate last)."""
    by_cost = np.lexsort((-correct, cost))
    ahead = np.concatenate([[-1], np.maximum.accumulate(correct[by_cost])[:-1]])
    return by_cost[correct[by_cost] > ahead]


def _cheapest(scan: _Scan, needed: int) -> int | None:
    """Where the cheapest threshold with at least ``needed`` right answers is; None if there is none."""
    fits = scan.correct >= needed
    return int(np.argmin(np.where(fits, scan.cost, np.inf))) if fits.any() else None


def _replace(thresholds: Thresholds, gate: int, value: float) -> Thresholds:
    return (*thresholds[:gate], value, *thresholds[gate + 1 :])
