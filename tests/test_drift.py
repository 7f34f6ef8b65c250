"""Drift without labels: what is an alarm, how often one is false, and what the report says."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from dgate_rt.cost import Costs
from dgate_rt.drift import DriftReport, Reference, _fisher
from dgate_rt.executors import Predictions
from dgate_rt.frontier import search_frontier
from dgate_rt.trace import Trace

INF, NAN = math.inf, math.nan
THRESHOLDS = (1.0, 0.5, 0.3)


def draw(count: int, seed: int, shift: float = 0.0) -> torch.Tensor:  # [4, N]
    """Scores of three gates and a network; a hard sample has low ones everywhere."""
    generator = torch.Generator().manual_seed(seed)
    ease = torch.randn(count, generator=generator)
    return ease + torch.randn(4, count, generator=generator) - shift


def leave(scores: torch.Tensor, thresholds=THRESHOLDS) -> tuple[torch.Tensor, torch.Tensor]:
    exits = torch.full(scores.shape[1:], len(thresholds))
    for g in reversed(range(len(thresholds))):
        exits[scores[g] >= thresholds[g]] = g
    return exits, scores.gather(0, exits[None])[0]


def report(reference: Reference, scores: torch.Tensor, alpha: float = 0.01) -> DriftReport:
    return reference.compare(reference.count(*leave(scores, reference.thresholds)), alpha)


@pytest.mark.parametrize(("alpha", "count"), [(0.01, 2000), (0.1, 20), (0.1, 200), (0.1, 2000)])
def test_a_false_alarm_is_as_rare_as_promised(alpha, count):
    alarms = 0
    for seed in range(200):
        reference = Reference.at(draw(800, 2 * seed), THRESHOLDS)
        alarms += report(reference, draw(count, 2 * seed + 1), alpha).alarm
    assert alarms <= 200 * alpha + 3 * math.sqrt(200 * alpha)  # chance


def test_thresholds_that_were_chosen_on_the_reference_raise_no_more_alarms():
    alarms = 0
    for seed in range(60):
        scores = draw(500, 2 * seed)
        right = (scores + 0.3 * torch.randn(4, 500)).numpy() > -0.8
        trace = Trace(scores[:3].numpy(), np.where(right, 0, 1), np.zeros(500, dtype=np.int64))
        costs = Costs("flops", (1.0,) * 4, (0.01,) * 3)
        wanted = trace.network_accuracy - 0.02
        point = search_frontier(trace, costs, min_accuracy=wanted).cheapest(wanted)
        alarms += report(Reference.at(scores, point.thresholds), draw(2000, 2 * seed + 1), 0.1).alarm
    assert alarms <= 6 + 3 * math.sqrt(6)


@pytest.mark.parametrize("shift", [0.5, -0.5], ids=["harder", "easier"])
def test_harder_or_easier_samples_raise_an_alarm_that_says_where(shift):
    found = report(Reference.at(draw(1000, 0), THRESHOLDS), draw(500, 1, shift))
    assert found.alarm
    first, last = found.exits[0], found.exits[-1]
    assert first.share_moved
    assert last.share_moved
    assert (first.share < first.expected_share) == (shift > 0)
    assert (last.share > last.expected_share) == (shift > 0)


def test_scores_may_move_where_shares_do_not():
    scores = draw(4000, 0)
    moved = draw(4000, 1)
    exits, _ = leave(moved)
    moved[3, exits == 3] -= 0.5
    found = report(Reference.at(scores, THRESHOLDS), moved)
    assert [e.share_moved for e in found.exits] == [False] * 4
    assert [e.scores_moved for e in found.exits] == [False, False, False, True]
    assert found.exits[3].score_shift < -0.1
    assert "exit 3, the network's own classifier" in str(found)
    assert str(found).count("moved: scores") == 1


def test_larger_samples_show_smaller_drift():
    reference = Reference.at(draw(20_000, 0), THRESHOLDS)
    assert [report(reference, draw(count, 1, 0.15)).alarm for count in (50, 20_000)] == [False, True]


def test_fisher_sums_every_table_that_is_no_likelier():
    def likelihood(a, b, n, m):
        return math.comb(n, a) * math.comb(m, b)

    for a, n, b, m in [(3, 10, 7, 12), (0, 5, 5, 5), (0, 8, 0, 3), (4, 4, 9, 9), (2, 31, 17, 40), (1, 1, 0, 7)]:
        tables = [(k, a + b - k) for k in range(n + 1) if 0 <= a + b - k <= m]
        weights = [likelihood(*table, n, m) for table in tables]
        expected = sum(w for w in weights if w <= likelihood(a, b, n, m)) / sum(weights)
        assert _fisher(a, n, b, m) == pytest.approx(expected, rel=1e-9)


def test_fisher_takes_counts_of_any_size():
    assert _fisher(10**9, 10**10, 1000, 10_000) == pytest.approx(1.0, abs=0.01)
    assert _fisher(10**9, 10**10, 1200, 10_000) < 1e-9


def test_bins_are_half_open_and_nan_has_its_own():
    reference = Reference((0.0,), torch.tensor([1.0, 2.0, INF]), torch.zeros(2, 4, dtype=torch.int64))
    scores = torch.tensor([-INF, 1.0, 1.5, 2.0, 2.5, INF, NAN, -NAN])
    counts = reference.count(torch.ones(8, dtype=torch.int64), scores)
    assert counts.tolist() == [[0, 0, 0, 0], [2, 2, 2, 2]]


def test_scores_outside_the_range_of_the_reference_are_drift():
    reference = Reference.at(draw(500, 0), THRESHOLDS)
    for value in (1e30, -1e30, NAN, INF):
        scores = draw(500, 1)
        scores[3] = value
        found = report(reference, scores)
        assert [e.scores_moved for e in found.exits] == [False, False, False, True]


def test_a_score_that_is_not_finite_never_leaves_at_a_gate():
    scores = draw(100, 0)
    scores[0, :50], scores[1, :50], scores[2, :50] = NAN, INF, -INF
    counts = Reference.at(scores, (-9.0, -9.0, -9.0)).counts.sum(1)
    assert counts.tolist() == [50, 0, 0, 50]


def test_float_noise_on_a_saturated_score_is_no_drift():
    """By softmax most sure samples score 1, less an error that differs from executor to executor."""
    noise = 1 - torch.rand(2, 2000) * 2e-7
    scores = torch.stack([noise[0], torch.zeros(2000)])
    reference = Reference.at(scores, (0.5,))
    now = reference.compare(reference.count(torch.zeros(2000, dtype=torch.int64), noise[1] - 1e-6))
    assert not now.alarm
    assert now.exits[0].score_shift == 0


def test_gates_that_are_off_are_not_tested():
    found = report(Reference.at(draw(100, 0), (INF, 0.5, INF)), draw(100, 1))
    assert found.tests == 4
    assert [e.samples for e in found.exits][::2] == [0, 0]
    assert report(Reference.at(draw(100, 0), (INF,) * 3), draw(100, 1)).tests == 2


def test_all_may_leave_at_one_exit():
    found = report(Reference.at(draw(100, 0), (-INF, 0.0, 0.0)), draw(100, 1))
    assert [e.samples for e in found.exits] == [100, 0, 0, 0]
    assert not found.alarm


def test_no_samples_are_no_drift():
    found = report(Reference.at(draw(100, 0), THRESHOLDS), draw(0, 1))
    assert not found.alarm
    assert all(e.share_p == e.score_p == 1 for e in found.exits)
    assert "no drift seen: 0 samples against 100 of validation" in str(found)


def test_a_network_without_gates_is_judged_by_its_scores():
    scores = draw(1000, 0)[3:]
    assert report(Reference.at(scores, ()), draw(1000, 1, 2.0)[3:]).alarm
    assert not report(Reference.at(scores, ()), draw(1000, 1)[3:]).alarm


def test_without_a_reference_there_is_no_verdict():
    reference = Reference.unknown(THRESHOLDS)
    found = report(reference, draw(100, 1, 50.0))
    assert not found.alarm
    assert found.reference_samples == 0
    assert str(found).startswith("no verdict on 100 samples: the program keeps no validation scores")
    assert "calibrate again" in str(found)
    assert "0.0% / 0.0% / 0.0% / 100.0%" in str(found)


def test_answers_are_judged_as_counts_are():
    reference = Reference.at(draw(500, 0), THRESHOLDS)
    exits, scores = leave(draw(300, 1, 0.7))
    answers = Predictions(torch.zeros(300, dtype=torch.int64), scores, exits)
    assert reference.judge(answers) == reference.compare(reference.count(exits, scores))


def test_a_report_is_json():
    found = report(Reference.at(draw(500, 0), THRESHOLDS), draw(300, 1, 0.7))
    read = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert read["alarm"] is True
    assert [e["exit"] for e in read["exits"]] == [0, 1, 2, 3]
    assert sum(e["share"] for e in read["exits"]) == pytest.approx(1)


def test_what_cannot_be_compared_is_refused():
    reference = Reference.at(draw(100, 0), THRESHOLDS)
    with pytest.raises(ValueError, match="alpha: expected a number between 0 and 1, got 1"):
        reference.compare(reference.counts, 1)
    with pytest.raises(ValueError, match=r"counts: expected shape \[4, \d+\], got \[4, 2\]"):
        reference.compare(reference.counts[:, :2])
