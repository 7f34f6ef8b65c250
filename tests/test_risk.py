"""Thresholds with a guarantee: both tests are exact, and calibrations repeated on fresh data keep what they promise."""

from __future__ import annotations

import numpy as np
import pytest
from test_frontier import COSTS, costs_for, make_trace

from dgate_rt.frontier import search_frontier
from dgate_rt.risk import broken_p_value, certify, paired_p_value, samples_needed
from dgate_rt.trace import Trace

LEVEL = 0.05


def log_factorials(count: int) -> np.ndarray:
    return np.append(0.0, np.cumsum(np.log(np.arange(1, count + 1))))


@pytest.mark.parametrize(("count", "max_drop"), [(40, 0.15), (60, 0.1), (60, 0.05), (60, 0.0)])
def test_no_p_value_is_small_too_often(count, max_drop):
    """Summed over every outcome, for true drops at the bound and above, however many samples change."""
    outcomes = np.array([(b, f) for b in range(count + 1) for f in range(count + 1 - b)])
    broken, fixed = outcomes.T
    rejected = {
        "broken": [broken_p_value(int(b), count, max_drop) <= LEVEL for b in broken],
        "paired": [paired_p_value(int(b), int(f), count, max_drop, LEVEL) <= LEVEL for b, f in outcomes],
    }
    ways = log_factorials(count)
    ways = ways[count] - ways[broken] - ways[fixed] - ways[count - broken - fixed]
    for drop in (max_drop, max_drop + 0.01, max_drop + 0.1):
        for changing in np.linspace(drop, 1, 30)[1:-1]:
            chances = np.log([(changing + drop) / 2, (changing - drop) / 2, 1 - changing])
            weights = np.exp(ways + np.stack([broken, fixed, count - broken - fixed], 1) @ chances)
            for name, small in rejected.items():
                assert weights[small].sum() <= LEVEL, (name, drop, changing)


def test_the_tests_have_power():
    """At 2,500 samples and a bound of 1 %, a network that loses nothing passes, and one that loses 1 % does not."""
    assert broken_p_value(0, 2_500, 0.01) < 1e-9
    assert paired_p_value(20, 20, 2_500, 0.01, LEVEL) < LEVEL
    assert broken_p_value(20, 2_500, 0.01) > LEVEL
    assert paired_p_value(45, 20, 2_500, 0.01, LEVEL) > LEVEL


def test_samples_that_are_needed_suffice():
    """Of answers that are never worse; with one sample less they do not."""
    needed = samples_needed(0.01, 0.95)
    half = int(needed - needed // 2)
    assert broken_p_value(0, half, 0.01) <= LEVEL < broken_p_value(0, half - 1, 0.01)
    assert samples_needed(0.0, 0.95) == float("inf")


@pytest.mark.parametrize("count", [1, 2, 30])
def test_few_samples_leave_all_gates_off(count):
    point, guarantee = certify(make_trace(count, 0), COSTS, 0.01, 0.95)
    assert point.thresholds == (float("inf"),) * 3
    assert guarantee.samples == count - count // 2


def test_the_same_samples_give_the_same_point():
    trace = make_trace(1_000, 3)
    assert certify(trace, COSTS, 0.05, 0.9) == certify(trace, COSTS, 0.05, 0.9)


def test_a_guarantee_holds_as_often_as_it_says():
    """On 200 fresh draws from a population whose drops are known; beside it, what no guarantee gives."""
    bound, count, costs = 0.03, 800, costs_for(2)
    population = make_trace(100_000, 11, gates=2)
    rng = np.random.default_rng(0)
    draws = [population.take(rng.integers(0, 100_000, count)) for _ in range(200)]

    def true_drop(thresholds: tuple[float, ...]) -> float:
        return population.network_accuracy - population.replay(thresholds, costs).accuracy

    def plain(draw: Trace) -> tuple[float, ...]:
        target = draw.network_accuracy - bound
        return search_frontier(draw, costs, min_accuracy=target).cheapest(target).thresholds

    sure = [certify(draw, costs, bound, 1 - LEVEL)[0] for draw in draws]
    violations = sum(true_drop(point.thresholds) > bound for point in sure)
    assert violations <= 16  # which so many draws exceed with a chance of 3 %, at a true rate of 5 %
    assert sum(true_drop(plain(draw)) > bound for draw in draws[:20]) >= 8

    best = search_frontier(population, costs, min_accuracy=population.network_accuracy - bound)
    possible = 1 - best.cheapest(population.network_accuracy - bound).cost / costs.dense
    saved = np.mean([1 - point.cost / costs.dense for point in sure])
    assert saved >= 0.7 * possible
