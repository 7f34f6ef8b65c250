"""Buckets are the best there are, and padding to them costs little at the paper's exit mixes."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgate_rt.bench.workload import PAPER_MIXES
from dgate_rt.plan import binomial_arrivals, choose_buckets, likely_sizes, pad_to


def cheapest(arrivals: np.ndarray, cost: np.ndarray, buckets: int) -> float:
    """The least expected cost of all choices of at most so many sizes, found by trying each."""
    batch_size = len(cost) - 1
    found = []
    for count in range(buckets):
        for smaller in combinations(range(1, batch_size), count):
            sizes = (*smaller, batch_size)
            padded = [cost[next(size for size in sizes if size >= n)] for n in range(1, batch_size + 1)]
            found.append(float(arrivals[1:] @ np.array(padded)))
    return min(found)


@given(
    st.integers(1, 4),
    st.integers(1, 9).flatmap(
        lambda b: st.tuples(
            st.lists(st.floats(0, 1), min_size=b + 1, max_size=b + 1),
            st.lists(st.floats(0, 100), min_size=b + 1, max_size=b + 1),
        )
    ),
)
def test_no_other_choice_is_cheaper(buckets: int, drawn: tuple[list[float], list[float]]) -> None:
    arrivals, cost = map(np.array, drawn)
    chosen = choose_buckets(arrivals, cost, buckets)
    assert len(chosen.sizes) <= buckets
    assert list(chosen.sizes) == sorted(set(chosen.sizes))
    assert chosen.sizes[-1] == len(cost) - 1
    padded = [cost[min(size for size in chosen.sizes if size >= n)] for n in range(1, len(cost))]
    assert chosen.expected == pytest.approx(float(arrivals[1:] @ np.array(padded)), abs=1e-9)
    assert chosen.expected == pytest.approx(cheapest(arrivals, cost, buckets), abs=1e-9)


def test_with_a_bucket_for_every_size_nothing_is_wasted() -> None:
    chosen = choose_buckets(binomial_arrivals(12, 0.6), np.arange(13.0), 50)
    assert chosen.waste == pytest.approx(0, abs=1e-12)


def test_given_sizes_cost_what_padding_to_them_costs() -> None:
    arrivals, cost = binomial_arrivals(8, 0.5), np.arange(9.0)
    chosen = choose_buckets(arrivals, cost, 3)
    assert pad_to(arrivals, cost, [*chosen.sizes, 99]) == chosen
    assert pad_to(arrivals, cost, []).sizes == (8,)


def test_a_stage_that_nobody_reaches_costs_nothing() -> None:
    chosen = choose_buckets(binomial_arrivals(8, 0.0), np.arange(9.0), 3)
    assert chosen.expected == chosen.waste == 0
    assert chosen.sizes[-1] == 8


def test_sizes_that_cost_more_than_larger_ones_are_not_chosen() -> None:
    cost = np.array([0.0, 1.0, 9.0, 3.0, 4.0])  # two samples cost more than three: an awkward size of some kernel
    assert 2 not in choose_buckets(np.full(5, 0.2), cost, 3).sizes


@pytest.mark.parametrize("share", [0.0, 0.01, 0.35, 0.999, 1.0])
@pytest.mark.parametrize("batch_size", [1, 7, 1024])
def test_binomial_arrivals(batch_size: int, share: float) -> None:
    arrivals = binomial_arrivals(batch_size, share)
    assert len(arrivals) == batch_size + 1
    assert arrivals.sum() == pytest.approx(1)
    assert arrivals @ np.arange(batch_size + 1) == pytest.approx(batch_size * share)


@pytest.mark.parametrize("mix", PAPER_MIXES, ids=lambda mix: "/".join(map(str, mix)))
def test_six_buckets_waste_at_most_eight_per_cent_at_the_papers_mixes(mix: tuple[float, ...]) -> None:
    reach = 1 - np.cumsum(mix[:-1])
    gflops = (0.4397, 0.6711, 3.3806, 0.5285)  # by stage: CIFAR ResNet-101
    size = np.arange(257.0)
    stages = [choose_buckets(binomial_arrivals(256, r), f * size, 6) for r, f in zip(reach, gflops[1:], strict=True)]
    first = gflops[0] * 256
    padded, ideal = first + sum(s.expected for s in stages), first + sum(s.ideal for s in stages)
    assert ideal <= padded <= 1.08 * ideal


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: choose_buckets(np.ones(3), np.ones(4), 2),
            r"cost: expected one for each of 0 to B .* \(3,\), got \(4,\)",
        ),
        (lambda: choose_buckets(np.ones(1), np.ones(1), 2), "cost: expected one for each"),
        (lambda: choose_buckets(np.ones(3), np.ones(3), 0), "buckets: expected at least 1, got 0"),
        (lambda: binomial_arrivals(4, 1.5), r"share: expected 0 to 1, got 1\.5"),
    ],
    ids=["lengths", "no size", "no bucket", "share"],
)
def test_what_cannot_be_planned_is_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


def test_likely_sizes_suit_the_shares_and_leave_room_for_others():
    first, second, last = likely_sizes(64, (0.5, 0.25, 0.25))
    assert first[-1] == second[-1] == last[-1] == 64
    assert len(first) == len(second) == len(last) == 6
    assert sum(24 <= size <= 44 for size in second) >= 2
    assert sum(8 <= size <= 28 for size in last) >= 2
    assert min(size for size in first if size > 8) < 32
    assert likely_sizes(1, (1.0,)) == [(1,)]
