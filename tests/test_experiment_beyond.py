"""The experiments beyond the paper: what they count is what they say, verdicts fall either way, runs can be resumed."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_experiments import Fuse, Interrupted

pytest.importorskip("matplotlib")

from dgate_rt.compiling import compile
from dgate_rt.corruptions import KINDS, SEVERITIES, corrupt_test
from dgate_rt.drift import Reference
from dgate_rt.experiments import drift, guarantee, joint
from dgate_rt.experiments.workbench import GateSpec
from dgate_rt.features import FeatureCache, collect
from dgate_rt.frontier import operating_point, sequential
from dgate_rt.gate import Pool
from dgate_rt.risk import certify
from dgate_rt.trace import Trace

JOINT = joint.Options(seeds=3, gates=2, drops=(0.0, 0.02, 0.1), judged=0.02)
GUARANTEE = guarantee.Options(calibrations=4, samples=300, gates=2, pool=Pool.AVG, drops=(0.02, 0.05))
DRIFT = drift.Options(gates=2, windows=6, window=100)


pytestmark = pytest.mark.usefixtures("one_thread")


def verdicts(result) -> list[bool]:
    return [said["holds"] for said in result["claims"]]


def test_joint_and_sequential_share_gates_and_samples(bench):
    result = joint.run(bench, JOINT)
    cheaper = np.array(result["sequential"]["validation_cost"]) - np.array(result["joint"]["validation_cost"])
    assert (cheaper > -1e-12).all()  # where they were chosen, joint ones are never dearer
    specs = [GateSpec(cut, resample=1) for cut in bench.first_cuts(2)]
    costs, scores, (val, test) = bench.costs(specs), bench.scores(specs), bench.held_out(1)
    chosen, tested = scores.trace(val), scores.trace(test)
    replay = tested.replay(sequential(chosen, costs, chosen.network_accuracy - 0.02).thresholds, costs)
    assert result["sequential"]["cost"][1][1] == replay.cost / costs.dense
    assert result["sequential"]["lost"][1][1] == tested.network_accuracy - replay.accuracy
    assert result["network"]["seeds"][1] == tested.network_accuracy


def test_interrupted_joint_thresholds_go_on(bench, again, monkeypatch):
    fuse = Fuse(joint.search_frontier, 4)
    monkeypatch.setattr(joint, "search_frontier", fuse)
    with pytest.raises(Interrupted):
        joint.run(again, JOINT)
    fuse.left = 6  # the first seed is kept, the second begins anew
    resumed = joint.run(again, JOINT)
    assert fuse.left == 0
    assert json.dumps(resumed["claims"]) == json.dumps(joint.run(bench, JOINT)["claims"])


def test_a_curve_is_read_between_its_points():
    grid = np.array([0.0, 0.01, 0.015, 0.02])
    found = joint._at(grid, [0.02, 0.0, 0.01, 0.01], [0.4, 1.0, 0.7, 0.5])
    np.testing.assert_allclose(found, [1.0, 0.6, 0.5, 0.4])


def made_joint(joint_cost, joint_lost, sequential_cost, sequential_lost) -> dict:
    """A result of three seeds, each a hair beside the next."""
    result = {"drops": (0.0, 0.01), "network": {"seeds": [0.9] * 3}}
    for way, cost, lost in (
        ("joint", joint_cost, joint_lost),
        ("sequential", sequential_cost, sequential_lost),
    ):
        result[way] = {"cost": [[1.0, cost + 0.001 * seed] for seed in range(3)], "lost": [[0.0, lost]] * 3}
    return {**result, "equal": joint._equal(result)}


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        ((0.5, 0.01, 0.6, 0.01), [True, True, True]),
        ((0.6, 0.01, 0.5, 0.01), [False, True, False]),
        ((0.5, 0.03, 0.6, 0.01), [True, False, False]),
        ((0.6, 0.01, 0.6, 0.01), [False, True, False]),
    ],
)
def test_verdicts_on_joint_thresholds_fall_either_way(made, expected):
    assert [said["holds"] for said in joint._claims(made_joint(*made), 1)] == expected


def test_curves_that_lose_nothing_in_common_show_nothing():
    made = made_joint(0.5, 0.0, 0.6, 0.01)
    assert made["equal"] == [None] * 3
    said = joint._claims(made, 1)[2]
    assert (said["holds"], said["seen"]) == (False, "in no seed do both ways lose any accuracy in common")


def test_equal_accuracy_is_where_both_ways_of_a_seed_have_points():
    """Joint costs 1 - 50 a point lost, sequential 1 - 25: half of that apart, over the losses up to 1 point."""
    result = {"network": {"seeds": [0.9]}, "joint": {"lost": [[0.0, 0.01]], "cost": [[1.0, 0.5]]}}
    result["sequential"] = {"lost": [[0.0, 0.02]], "cost": [[1.0, 0.5]]}
    (found,) = joint._equal(result)
    assert (found["from"], found["to"]) == (0.0, 0.01)
    assert found["cheaper"] == pytest.approx(0.125)


def test_calibrations_are_measured_on_the_population(bench):
    result = guarantee.run(bench, GUARANTEE)
    specs = [GateSpec(cut, pool="avg") for cut in bench.first_cuts(2)]
    costs, population = bench.costs(specs), bench.scores(specs).trace(np.concatenate(bench.held_out(None)))
    assert result["population"] == bench.settings["samples"]["val"] + bench.settings["samples"]["test"]
    drops = []
    for number in range(4):
        rows = np.random.default_rng([number, 2]).integers(0, result["population"], 300)
        point = operating_point(population, costs, certify(population.take(rows), costs, 0.05, 0.95)[0].thresholds)
        drops.append(population.network_accuracy - point.accuracy)
    assert result["guarantee"][1]["drops"].tolist() == sorted(drops)
    assert all(
        sure["saved"] <= plain["saved"] for sure, plain in zip(result["guarantee"], result["plain"], strict=True)
    )


def test_interrupted_calibrations_go_on(bench, again, monkeypatch):
    fuse = Fuse(guarantee.certify, 3)
    monkeypatch.setattr(guarantee, "certify", fuse)
    with pytest.raises(Interrupted):
        guarantee.run(again, GUARANTEE)
    fuse.left = 6  # one of four is kept
    resumed = guarantee.run(again, GUARANTEE)
    assert fuse.left == 0
    assert json.dumps(resumed["claims"]) == json.dumps(guarantee.run(bench, GUARANTEE)["claims"])


def test_a_guarantee_that_is_none_is_found_out(again, monkeypatch):
    monkeypatch.setattr(
        guarantee, "certify", lambda trace, costs, *_: (operating_point(trace, costs, (-1.0, -1.0)), None)
    )
    result = guarantee.run(again, GUARANTEE)
    assert verdicts(result)[0] is False
    assert [one["violated"] for one in result["guarantee"]] == [4, 4]


def test_a_drop_of_the_bound_is_no_violation():
    rows = [{"drop": drop, "saved": 0.1, "off": off} for drop, off in ((0.02, False), (0.0, True), (0.0201, False))]
    assert {name: guarantee._summary(rows, 0.02)[name] for name in ("violated", "off")} == {"violated": 1, "off": 1}
    assert guarantee._summary([{"drop": 0.3 - 0.28, "saved": 0, "off": False}], 0.02)["violated"] == 0  # float error


@pytest.mark.parametrize(
    ("violated", "expected"),
    [
        (((5, 3), (6, 90)), [True, True]),
        (((3, 6), (6, 90)), [False, True]),
        (((5, 5), (90, 5)), [True, False]),
    ],
)
def test_verdicts_on_guarantees_fall_either_way(violated, expected):
    """Of 100 calibrations at either bound, with guarantee and without."""
    made = {
        way: [{"drops": np.zeros(100), "violated": count} for count in counts]
        for way, counts in zip(guarantee.WAYS, violated, strict=True)
    }
    result = {"confidence": 0.95, "bounds": (0.01, 0.02), **made}
    assert [said["holds"] for said in guarantee._claims(result)] == expected


def test_corrupted_features_are_those_of_corrupted_images(bench):
    clean, found = bench.features("test"), bench.features("test", corruption=("noise", 3))
    loader = corrupt_test(bench.bundle, "noise", 3).loader("test", 128)
    expected = collect(bench.staged(bench.cuts), loader, FeatureCache(1.0), progress=False)
    for ours, theirs, other in zip(found.gates, expected.gates, clean.gates, strict=False):
        assert torch.equal(ours, theirs)
        assert not torch.equal(ours, other)
    assert torch.equal(bench.features("test").gates[0], clean.gates[0])  # neither took the place of the other
    with pytest.raises(ValueError, match="only split 'test' is corrupted, got 'val'"):
        bench.features("val", corruption=("noise", 3))


def test_windows_of_one_order_have_no_image_in_common():
    drawn = drift._drawn(103, 25, 10, 4)
    assert drawn.shape == (25, 10)
    for order in (drawn[:10], drawn[10:20], drawn[20:]):
        assert len(np.unique(order)) == order.size
    assert np.array_equal(drawn, drift._drawn(103, 25, 10, 4))
    assert not np.array_equal(drawn, drift._drawn(103, 25, 10, 5))
    assert not np.array_equal(np.sort(drawn[0]), np.sort(drawn[10]))


def test_windows_are_judged_as_a_monitor_does(bench):
    """The runtime's own monitor on the same images, up to samples within rounding of a threshold or an edge."""
    specs = [GateSpec(cut) for cut in bench.first_cuts(2)]
    costs, chosen = bench.costs(specs), bench.scores(specs).trace(bench.held_out(None)[0])
    point = operating_point(chosen, costs, (1.0, 0.7))
    reference = Reference.at(drift._scores(chosen), point.thresholds)
    program = replace(bench.program(specs, point, costs, chosen.network_accuracy), scores=drift._scores(chosen))
    run = compile(program, batch_size=100, monitor=True)
    assert torch.equal(run.monitor.reference.counts, reference.counts)
    trace = bench.scores_on("test", specs, corruption=("blur", 5)).trace(np.arange(450))
    (rows,) = drift._drawn(450, 1, 100, 9)
    (ours,) = drift._reports(reference, trace, 9, replace(DRIFT, windows=1))
    images = corrupt_test(bench.bundle, "blur", 5).test[rows.tolist()][0]
    run(images)
    theirs = run.monitor.report()
    assert ours.alarm == theirs.alarm
    assert sum(abs(a.samples - b.samples) for a, b in zip(ours.exits, theirs.exits, strict=True)) <= 2
    for one, other in zip(ours.exits, theirs.exits, strict=True):
        assert one.score_shift == pytest.approx(other.score_shift, abs=0.05)


def test_every_corruption_is_held_against_clean_images(bench):
    result = drift.run(bench, DRIFT)
    assert [(row["kind"], row["severity"]) for row in result["corrupted"]] == [
        (k, s) for k in KINDS for s in SEVERITIES
    ]
    assert (result["clean"]["network_lost"], result["clean"]["gated_lost"]) == (0, 0)
    for row in result["corrupted"]:
        assert row["gated_lost"] == result["clean"]["gated"] - row["gated"]
        assert max(row["by_shares"], row["by_scores"]) <= row["alarms"] <= row["by_shares"] + row["by_scores"]
        assert sum(row["shares"]) == pytest.approx(1)
    specs = [GateSpec(cut) for cut in bench.first_cuts(2)]
    noisy: Trace = bench.scores_on("test", specs, corruption=("noise", 5)).trace(np.arange(result["images"]))
    assert result["corrupted"][4]["network"] == noisy.network_accuracy < result["clean"]["network"]


@pytest.mark.parametrize(
    ("lost", "alarms", "expected"),
    [
        ([0.0, 0.01, 0.02, 0.1], [0.0, 0.95, 1.0, 1.0], {"lost": 3, "told": 2}),
        ([0.02, 0.0, 0.1, 0.1], [0.0, 0.5, 0.94, 0.96], {"lost": 1, "told": 4}),
        ([0.0, 0.0], [0.1, 0.2], {"lost": None, "told": None}),
    ],
)
def test_the_first_severity_of_each(lost, alarms, expected):
    pairs = enumerate(zip(lost, alarms, strict=True), 1)
    rows = [{"severity": number, "gated_lost": loss, "alarms": alarm} for number, (loss, alarm) in pairs]
    assert drift._first(rows, drift.Options()) == expected


@pytest.mark.parametrize(
    ("first", "false_alarms", "expected"),
    [
        ([(3, 2), (2, 2), (None, None)], 0.01, [True, True]),
        ([(3, 2), (2, 3), (None, None)], 0.02, [False, False]),
        ([(3, 2), (2, None), (4, 1)], 0.0, [False, True]),
        ([(None, 1), (None, None), (None, 5)], 0.0, [False, True]),  # nothing was lost, so nothing could be told
    ],
)
def test_verdicts_on_the_monitor_fall_either_way(first, false_alarms, expected):
    by_kind = {kind: {"lost": lost, "told": told} for kind, (lost, told) in zip(KINDS, first, strict=True)}
    made = {"first": by_kind, "clean": {"alarms": false_alarms}, "images": 5000, "windows": 100, "window": 250}
    assert [said["holds"] for said in drift._claims(made, drift.Options())] == expected


@pytest.mark.parametrize(
    ("experiment", "options", "message"),
    [
        (joint, replace(JOINT, seeds=2), "seeds of at least 3"),
        (joint, replace(JOINT, judged=0.01), "judged among them"),
        (guarantee, replace(GUARANTEE, drops=(0.0, 0.01)), "drops above 0"),
        (drift, replace(DRIFT, window=451), "each of 1 to 450 images"),
    ],
)
def test_options_out_of_range_are_refused(bench, experiment, options, message):
    with pytest.raises(ValueError, match=message):
        experiment.run(bench, options)
