"""The accuracy/cost frontier: every operating point worth having, found on a validation trace.

One primitive does all the work: with the other gates fixed, `_Search.scan` evaluates *every* threshold a gate can
usefully have (one between each two neighbouring margins, and off) exactly, in O(N) after one sort. On it stand the
paper's sequential choice (section 3.1), a Lagrangian descent that traces the whole frontier, and an exact search of
pairs of gates around a target. Whatever any of them visits is a candidate for the frontier, so the result is never
worse than the sequential one.
"""

from __future__ import annotations

import itertools
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
_PAIR_CANDIDATES = 32
"""Otherwise: values of the first gate of a pair that are tried, each with every value of the second."""
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
    point = search.point(thresholds)
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
        search.sequential(int(needed))
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


def _needed(accuracy: float, count: int) -> int:
    """The number of correct answers that an accuracy asks for, safe from float noise."""
    return int(np.ceil(accuracy * count - 1e-9))


@dataclass(frozen=True)
class _Scan:
    """Every useful threshold of one gate, the others fixed: the first is off, then ever lower."""

    values: NDArray[np.float64]  # [M]
    correct: NDArray[np.int64]  # [M]; right answers
    cost: NDArray[np.float64]  # [M]; total over the samples


class _Search:
    """Scans over a trace, and the archive of every undominated point they met."""

    def __init__(self, trace: Trace, costs: Costs) -> None:
        self.trace, self.costs = trace, costs
        self.gate_count, self.count = trace.margins.shape
        self.off: Thresholds = (np.inf,) * self.gate_count
        self.correct = trace.correct.astype(np.int64)
        self.order = [np.argsort(-m, kind="stable") for m in trace.margins]
        self.archive: list[tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]] = []
        self.steps = [_candidates(m[o]) for m, o in zip(trace.margins, self.order, strict=True)]

    def scan(self, gate: int, thresholds: Thresholds) -> _Scan:
        """Every threshold of ``gate``, the others as given: right answers and total cost, exactly."""
        stages, gates, margins = self.costs.stages, self.costs.gates, self.trace.margins
        later_correct, later_cost = self.correct[-1], np.full(self.count, stages[-1])
        for g in range(self.gate_count - 1, gate, -1):
            if thresholds[g] != np.inf:
                leave = margins[g] >= thresholds[g]
                later_correct = np.where(leave, self.correct[g], later_correct)
                later_cost = np.where(leave, 0.0, later_cost) + gates[g]
            later_cost = later_cost + stages[g]
        alive, earlier_correct, earlier_cost = np.ones(self.count, dtype=bool), 0, 0.0
        for g in range(gate):
            earlier_cost += stages[g] * np.count_nonzero(alive)
            if thresholds[g] != np.inf:
                earlier_cost += gates[g] * np.count_nonzero(alive)
                leave = alive & (margins[g] >= thresholds[g])
                earlier_correct += int(self.correct[g][leave].sum())
                alive &= ~leave
        order, (positions, values) = self.order[gate], self.steps[gate]
        alive_ordered = alive[order]
        gain = np.cumsum((self.correct[gate] - later_correct)[order] * alive_ordered)[positions]
        saving = np.cumsum(later_cost[order] * alive_ordered)[positions]
        base_correct = earlier_correct + int(later_correct[alive].sum())
        survivors = np.count_nonzero(alive)
        base_cost = earlier_cost + stages[gate] * survivors + float(later_cost[alive].sum())
        return _Scan(
            np.concatenate([[np.inf], values]),
            np.concatenate([[base_correct], base_correct + gain]),
            np.concatenate([[base_cost], base_cost + gates[gate] * survivors - saving]),
        )

    def visit(self, gate: int, thresholds: Thresholds) -> _Scan:
        """`scan`, with the undominated part of it put into the archive."""
        scan = self.scan(gate, thresholds)
        keep = _undominated(scan.correct, scan.cost)
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
            self.archive.append((np.array([int(self.correct[-1].sum())]), dense, np.empty((1, 0))))

    def sequential(self, needed: int) -> Thresholds:
        """Gate after gate, later gates off: the cheapest threshold with at least ``needed`` right answers."""
        thresholds = self.off
        for gate in range(self.gate_count):
            thresholds = _replace(thresholds, gate, _cheapest(self.visit(gate, thresholds), needed))
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
        sizes = [len(values) + 1 for _, values in self.steps]
        if np.prod(sizes[:-1]) <= _EXHAUSTIVE_SCANS:
            for head in itertools.product(*([np.inf, *values] for _, values in self.steps[:-1])):
                self.visit(self.gate_count - 1, (*map(float, head), np.inf))
            return
        for _ in range(2):
            if self.best_correct() < needed:
                return
            before = thresholds = self.cheapest(needed)
            for first, second in itertools.combinations(range(self.gate_count), 2):
                for value in self.coarse(first, thresholds[first]):
                    self.visit(second, _replace(thresholds, first, value))
                thresholds = self.cheapest(needed)
            if thresholds == before:
                return

    def coarse(self, gate: int, around: float) -> Iterator[float]:
        """Some thresholds of a gate: off, evenly spread ones, and the close neighbours of the present one."""
        values = self.steps[gate][1]
        spread = np.linspace(0, len(values) - 1, _PAIR_CANDIDATES // 2)
        near = np.searchsorted(-values, -around) + np.arange(-_PAIR_CANDIDATES // 4, _PAIR_CANDIDATES // 4)
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

    def cheapest(self, needed: int) -> Thresholds:
        """The cheapest visited thresholds with at least ``needed`` right answers."""
        best, found = np.inf, self.off
        for correct, cost, rows in self.archive:
            fits = correct >= needed
            if fits.any():
                index = int(np.argmin(np.where(fits, cost, np.inf)))
                if cost[index] < best:
                    best, found = float(cost[index]), tuple(map(float, rows[index]))
        return found

    def frontier(self, keep: int | None) -> Frontier:
        """The undominated points of everything visited, thinned; the cheapest with ``keep`` right answers stays."""
        correct = np.concatenate([c for c, _, _ in self.archive])
        cost = np.concatenate([c for _, c, _ in self.archive])
        rows = np.concatenate([r for _, _, r in self.archive])
        front = _undominated(correct, cost)
        chosen = np.linspace(0, len(front) - 1, min(len(front), _MOST_POINTS)).astype(int)
        if keep is not None and correct[front[-1]] >= keep:
            chosen = np.union1d(chosen, np.searchsorted(correct[front], keep))
        return Frontier(tuple(self.point(tuple(map(float, rows[i]))) for i in front[chosen]))

    def point(self, thresholds: Thresholds) -> OperatingPoint:
        replay = self.trace.replay(thresholds, self.costs)
        return OperatingPoint(thresholds, replay.accuracy, replay.cost, tuple(map(float, replay.shares)))


def _candidates(
    descending: NDArray[np.float32],  # [N]; margins, highest first, -inf where a sample never leaves
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The last position that leaves at each useful threshold, and that threshold: halfway to the next margin.

    Halfway, because a threshold that equals a sample's margin lets float noise decide about that sample.
    """
    finite = descending[np.isfinite(descending)]
    if len(finite) == 0:
        return np.empty(0, dtype=np.int64), np.empty(0)
    positions = np.append(np.flatnonzero(finite[:-1] > finite[1:]), len(finite) - 1)
    here = finite[positions]
    below = np.append(finite[positions[:-1] + 1], here[-1] - 1)
    halfway = (here / 2 + below / 2).astype(np.float32)
    safe = np.where((halfway > below) & (halfway <= here), halfway, here)
    return positions, safe.astype(np.float64)


def _undominated(correct: NDArray[np.int64], cost: NDArray[np.float64]) -> NDArray[np.int64]:
    """Indices of the points that no other beats in both, cheapest first (so the most accurate last)."""
    by_cost = np.lexsort((-correct, cost))
    ahead = np.concatenate([[-1], np.maximum.accumulate(correct[by_cost])[:-1]])
    return by_cost[correct[by_cost] > ahead]


def _cheapest(scan: _Scan, needed: int) -> float:
    """The cheapest threshold with at least ``needed`` right answers; off where there is none."""
    fits = scan.correct >= needed
    return float(scan.values[np.argmin(np.where(fits, scan.cost, np.inf))]) if fits.any() else float("inf")


def _replace(thresholds: Thresholds, gate: int, value: float) -> Thresholds:
    return (*thresholds[:gate], value, *thresholds[gate + 1 :])
