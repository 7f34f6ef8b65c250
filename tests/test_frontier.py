"""Thresholds: exact scans, the paper's sequential choice, the joint search, against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgate_rt import UnreachableTargetError
from dgate_rt import frontier as frontier_module
from dgate_rt.cost import Costs
from dgate_rt.frontier import Frontier, _Search, search_frontier, sequential
from dgate_rt.trace import Trace

COSTS = Costs("FLOPs", (0.44, 0.67, 3.38, 0.53), (0.01, 0.02, 0.03))


def make_trace(count: int, seed: int, gates: int = 3, ties: bool = False) -> Trace:
    """Samples of varying difficulty; deeper gates are right more often, margins hint at it."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 10, count)
    skill = rng.normal(size=(gates + 1, count)) + 0.7 * np.arange(1, gates + 2)[:, None] - rng.normal(size=count)
    predictions = np.where(skill > -0.8, targets, (targets + 1) % 10)
    margins = (skill + 0.5 * rng.normal(size=skill.shape))[:gates].astype(np.float32)
    return Trace(np.round(margins) if ties else margins, predictions, targets)


def costs_for(gates: int) -> Costs:
    return Costs("FLOPs", COSTS.stages[:gates] + COSTS.stages[-1:], COSTS.gates[:gates])


def brute_force(trace: Trace, costs: Costs, min_accuracy: float) -> float:
    """The lowest cost over every combination of thresholds."""
    candidates = [[np.inf, *grid.values] for grid in _Search(trace, costs).fine]
    replays = (trace.replay(t, costs) for t in itertools.product(*candidates))
    return min((r.cost for r in replays if r.accuracy >= min_accuracy - 1e-12), default=np.inf)


@given(seed=st.integers(0, 10_000), ties=st.booleans(), gate=st.integers(0, 2), others=st.integers(0, 10_000))
def test_a_scan_says_what_a_replay_says(seed, ties, gate, others):
    trace = make_trace(13, seed, ties=ties)
    search = _Search(trace, COSTS)
    rng = np.random.default_rng(others)
    thresholds = tuple(float(rng.choice([np.inf, *grid.values])) for grid in search.fine)
    scan = search.scan(gate, thresholds, search.fine[gate])
    for value, correct, cost in zip(scan.values, scan.correct, scan.cost, strict=True):
        replay = trace.replay((*thresholds[:gate], float(value), *thresholds[gate + 1 :]), COSTS)
        assert correct == round(replay.accuracy * 13)
        assert cost / 13 == pytest.approx(replay.cost)


@pytest.mark.parametrize("gates", [1, 2, 3])
@pytest.mark.parametrize("drop", [0.0, 0.1])
@pytest.mark.parametrize("scans", [2_000, 0], ids=["exhaustive", "pairs"])
def test_the_joint_search_is_optimal_on_tiny_cases(monkeypatch, gates, drop, scans):
    monkeypatch.setattr(frontier_module, "_EXHAUSTIVE_SCANS", scans)
    costs = costs_for(gates)
    for seed in range(8):
        trace = make_trace(9, seed, gates)
        target = max(trace.network_accuracy - drop, 0.0)
        found = search_frontier(trace, costs, min_accuracy=target).cheapest(target)
        assert found.cost == pytest.approx(brute_force(trace, costs, target))


def test_many_gates_are_searched_in_pairs(monkeypatch):
    """256 ** 8 is 0 in int64: more combinations than anyone can try are not none."""
    trace, gates = make_trace(255, seed=0, gates=9), 9
    costs = Costs("FLOPs", (1.0,) * (gates + 1), (0.01,) * gates)
    assert [len(grid.values) for grid in _Search(trace, costs).fine] == [255] * gates
    monkeypatch.setattr(itertools, "product", lambda *_: pytest.fail("tried all combinations"))
    target = trace.network_accuracy - 0.02
    found = search_frontier(trace, costs, min_accuracy=target).cheapest(target)
    assert found.cost <= sequential(trace, costs, target).cost < costs.dense


@pytest.mark.parametrize("drop", [0.0, 0.02, 0.2])
def test_joint_is_never_dearer_than_sequential(drop):
    for seed in range(5):
        trace = make_trace(400, seed)
        target = trace.network_accuracy - drop
        joint = search_frontier(trace, COSTS, min_accuracy=target).cheapest(target)
        assert joint.accuracy >= target - 1e-12
        assert joint.cost <= sequential(trace, COSTS, target).cost + 1e-12


def test_the_frontier_is_undominated_and_holds_what_it_says():
    trace = make_trace(300, 1)
    points = search_frontier(trace, COSTS).points
    assert all(a.cost < b.cost and a.accuracy < b.accuracy for a, b in itertools.pairwise(points))
    for point in points[:: max(1, len(points) // 20)]:
        replay = trace.replay(point.thresholds, COSTS)
        assert (point.accuracy, point.cost) == (pytest.approx(replay.accuracy), pytest.approx(replay.cost))
        assert sum(point.shares) == pytest.approx(1)


def test_a_gate_that_is_off_costs_nothing():
    trace = make_trace(50, 0)
    assert trace.replay((np.inf,) * 3, COSTS).cost == pytest.approx(COSTS.dense)
    nobody_leaves = trace.replay((1e9,) * 3, COSTS)
    assert nobody_leaves.cost == pytest.approx(COSTS.dense + sum(COSTS.gates))


def test_thresholds_lie_between_margins():
    trace = make_trace(60, 3)
    point = search_frontier(trace, COSTS, min_accuracy=0.8).cheapest(0.8)
    for threshold, margins in zip(point.thresholds, trace.margins, strict=True):
        assert threshold not in margins.tolist()


def test_samples_without_a_finite_margin_never_leave():
    trace = make_trace(40, 2)
    trace.margins[:, :10] = -np.inf
    for point in search_frontier(trace, COSTS).points:
        assert (trace.replay(point.thresholds, COSTS).exits[:10] == 3).all()


def test_gates_that_never_help_stay_off():
    trace = make_trace(100, 0)
    dear = Costs("FLOPs", COSTS.stages, (100.0, 100.0, 100.0))
    assert search_frontier(trace, dear, min_accuracy=0.5).cheapest(0.5).thresholds == (np.inf,) * 3


def test_unreachable_targets_say_what_is_reachable():
    frontier = search_frontier(make_trace(100, 0), COSTS)
    best, cheapest = frontier.points[-1], frontier.points[0]
    with pytest.raises(UnreachableTargetError, match=rf"at most {best.accuracy:.4f}.*got 1\.1"):
        frontier.cheapest(1.1)
    with pytest.raises(UnreachableTargetError, match=rf"at least {cheapest.cost:.4g}.*got 1e-06"):
        frontier.most_accurate(1e-6)


def test_most_accurate_within_a_cost():
    frontier = search_frontier(make_trace(200, 5), COSTS)
    for limit in (1.0, 2.0, COSTS.dense):
        point = frontier.most_accurate(limit)
        assert point.cost <= limit
        assert point.accuracy == max(p.accuracy for p in frontier.points if p.cost <= limit)


def test_a_network_without_gates_has_one_point():
    trace = make_trace(20, 0, gates=0)
    costs = costs_for(0)
    (point,) = search_frontier(trace, costs, min_accuracy=trace.network_accuracy).points
    assert (point.thresholds, point.cost, point.shares) == ((), pytest.approx(costs.dense), (1.0,))
    assert Frontier((point,)).cheapest(0.0) == point


@pytest.mark.parametrize("gates", [1, 2, 3])
def test_within_a_cost_the_best_accuracy_is_found_on_tiny_cases(gates):
    costs = costs_for(gates)
    for seed in range(8):
        trace = make_trace(9, seed, gates)
        candidates = [[np.inf, *grid.values] for grid in _Search(trace, costs).fine]
        replays = [trace.replay(t, costs) for t in itertools.product(*candidates)]
        for limit in np.linspace(min(r.cost for r in replays), costs.dense, 5):
            best = max(r.accuracy for r in replays if r.cost <= limit + 1e-9)
            found = search_frontier(trace, costs, max_cost=limit + 1e-9).most_accurate(limit + 1e-9)
            assert found.accuracy == pytest.approx(best)
