"""Places, pools and static networks: costs of a choice of gates add up, choices and verdicts fall either way."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_experiments import TINY, TRAINING, Fuse, Interrupted

pytest.importorskip("matplotlib")

from dgate_rt import backbones, pretrain
from dgate_rt.cost import Costs
from dgate_rt.experiments import curves, depths, pools, static
from dgate_rt.experiments.workbench import GateSpec, Workbench
from dgate_rt.flops import count_flops
from dgate_rt.frontier import OperatingPoint, search_frontier
from dgate_rt.gate import Pool
from dgate_rt.trace import Trace

DEPTHS = depths.Options(drop=0.02, pool=Pool.AVG, seeds=3, subsets=21)
POOLS = pools.Options(gates=2, budgets=5, widest=1024)
STATIC = static.Options(gates=2, drops=(0.05,))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def found(bench) -> dict:
    return depths.run(bench, DEPTHS)


def verdicts(claims) -> list[bool]:
    return [said["holds"] for said in claims]


@pytest.mark.parametrize(
    ("name", "count", "last"),
    [("resnet18", 7, "layer4.0"), ("resnet101", 32, "layer4.1"), ("densenet121", 6, "features.transition3")],
)
def test_blocks_are_all_but_the_last(name, count, last):
    cuts = backbones.block_cuts(name)
    assert (len(cuts), cuts[-1]) == (count, last)
    model = backbones.build(name, width=0.125)
    assert all(model.get_submodule(cut) is not None for cut in cuts)
    ends = [cuts[depths._last(cuts, end)] for end in backbones.default_cuts(name)]
    assert len(set(ends)) == 3


def test_costs_of_some_gates_are_those_of_the_network_cut_there(bench):
    cuts = backbones.block_cuts("resnet18")
    every = bench.costs([GateSpec(cut) for cut in cuts], cuts)
    for subset in ((0,), (1, 3, 5), (2, 6), tuple(range(7))):
        assert every.keeping(subset) == bench.costs([GateSpec(cuts[gate]) for gate in subset], cuts)
    assert every.keeping(()) == Costs("FLOPs", (every.dense,), ())


def test_some_gates_are_all_gates_with_the_others_off(bench, found):
    """A replay of the whole trace, in which gates that are off cost nothing."""
    cuts = backbones.block_cuts("resnet18")
    specs = [GateSpec(cut, pool="avg") for cut in cuts]
    costs, scores, (val, test) = bench.costs(specs, cuts), bench.scores(specs, cuts), bench.held_out(None)
    third = found["steps"][2]
    subset = tuple(cuts.index(cut) for cut in third["cuts"])
    chosen = scores.trace(val).keeping(subset)
    wanted = chosen.network_accuracy - 0.02
    point = search_frontier(chosen, costs.keeping(subset), min_accuracy=wanted).cheapest(wanted)
    thresholds = np.full(len(cuts), np.inf)
    thresholds[list(subset)] = point.thresholds
    replay = scores.trace(test).replay(thresholds, costs)
    assert third["test"]["cost"] == pytest.approx(replay.cost / costs.dense)
    assert third["test"]["lost"] == pytest.approx(found["network"]["accuracy"] - replay.accuracy)
    assert third["shares"] == pytest.approx([*replay.shares[list(subset)], replay.shares[-1]])


def test_gates_at_the_ends_are_the_papers(bench, found):
    """Though their features come from another pass."""
    specs = [GateSpec(cut, pool="avg") for cut in bench.cuts]
    costs, (val, test) = bench.costs(specs), bench.held_out(None)
    chosen, tested = (bench.scores(specs).trace(rows) for rows in (val, test))
    wanted = chosen.network_accuracy - 0.02
    replay = tested.replay(search_frontier(chosen, costs, min_accuracy=wanted).cheapest(wanted).thresholds, costs)
    assert found["ends"]["cuts"] == ["layer1.1", "layer2.1", "layer3.1"]
    assert found["ends"]["test"]["cost"] == pytest.approx(replay.cost / costs.dense)


def test_every_gate_that_is_added_makes_it_cheaper(found):
    cost = [step["validation"]["cost"] for step in found["steps"]]
    assert all(after < before for before, after in zip([1, *cost], cost, strict=False))
    for before, after in zip(found["steps"], found["steps"][1:], strict=False):
        assert set(after["cuts"]) == {*before["cuts"], after["added"]}
    assert all(step["validation"]["lost"] <= 0.02 + 1e-9 for step in found["steps"])


def test_the_best_choice_is_no_dearer_than_the_greedy_one(found):
    one, two, three = found["best"]
    assert one["found"] == {name: value for name, value in found["steps"][0].items() if name != "added"}
    assert two["found"]["validation"]["cost"] <= found["steps"][1]["validation"]["cost"]
    assert (three["subsets"], three["found"]) == (35, None)  # more than options.subsets
    assert depths.tables(found)[2].rows[2] == ["3", "35", "not tried", "–", "–", "–", "–"]


def test_greedy_takes_the_cheapest_and_stops_where_none_helps(monkeypatch):
    made = {(): 1.0, (0,): 0.8, (1,): 0.6, (2,): 0.6, (0, 1): 0.5, (1, 2): 0.7, (0, 1, 2): 0.5}
    monkeypatch.setattr(
        depths._Candidates, "measured", lambda self, subset, seed: {"validation": {"cost": made[subset]}}
    )
    none = Costs("FLOPs", (1.0,), ())
    among = depths._Candidates(None, ("a", "b", "c"), (), none, None, 0.01)
    assert [gate for gate, _ in among.greedy(None)] == [1, 0]
    made |= {(0,): 1.0, (1,): 1.2, (2,): 1.0}
    assert list(among.greedy(None)) == []


def test_no_gates_are_the_network(bench):
    cuts = backbones.block_cuts("resnet18")
    specs = [GateSpec(cut) for cut in cuts]
    among = depths._Candidates(bench, cuts, tuple(specs), bench.costs(specs, cuts), bench.scores(specs, cuts), 0.02)
    nothing = among.measured((), 1)
    assert (nothing["test"], nothing["shares"]) == ({"cost": 1.0, "lost": 0.0}, [1.0])


def test_interrupted_choice_goes_on(bench, again, found, monkeypatch):
    fuse = Fuse(depths.search_frontier, 10)
    monkeypatch.setattr(depths, "search_frontier", fuse)
    with pytest.raises(Interrupted):
        depths.run(again, DEPTHS)
    kept = len(list((again.folder / "kept").glob("subset-*")))
    assert kept == 10
    fuse.left, fuse.made = 10_000, 0
    resumed = depths.run(again, DEPTHS)
    assert fuse.made == len(list((again.folder / "kept").glob("subset-*"))) - kept
    assert json.dumps(resumed["steps"]) == json.dumps(found["steps"])


def made_depths(chosen: float, ends: float, chosen_lost: float, ends_lost: float, steps=(0.8, 0.7, 0.6, 0.58)) -> dict:
    rows = [
        {
            "chosen": {"test": {"cost": chosen + 0.01 * seed, "lost": chosen_lost}},
            "ends": {"test": {"cost": ends, "lost": ends_lost}},
        }
        for seed in range(3)
    ]
    made = {"drop": 0.01, "ends": {"cuts": ["a", "b", "c"]}, "seeds": rows}
    return {**made, "steps": [{"test": {"cost": cost}} for cost in steps]}


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (made_depths(0.5, 0.6, 0.01, 0.01), [True, True, True]),
        (made_depths(0.59, 0.6, 0.02, 0.01), [False, False, True]),
        (made_depths(0.5, 0.6, 0.01, 0.01, (0.8, 0.7, 0.65, 0.6, 0.4)), [True, True, False]),
        (made_depths(1.0, 1.0, 0.0, 0.0, ()), [False, True, False]),
    ],
)
def test_verdicts_on_places_fall_either_way(made, expected):
    assert verdicts(depths._claims(made)) == expected


def test_a_curve_keeps_to_its_budgets(bench):
    specs = [GateSpec(cut) for cut in bench.first_cuts(2)]
    costs, trace = bench.costs(specs), bench.scores(specs).trace(bench.held_out(None)[0])
    reached = curves.along(trace, trace, costs, 5)
    cheapest = search_frontier(trace, costs).points[0].cost / costs.dense
    assert [cost for cost, _ in reached] == sorted(cost for cost, _ in reached)
    for budget, (cost, _) in zip(np.linspace(0, 1, 5), reached, strict=True):
        assert cost <= max(budget, cheapest) + 1e-9


def test_curves_are_compared_where_all_have_points():
    made = [{"points": [(0.2, 0.5), (0.6, 0.9)]}, {"points": [(0.4, 0.7), (1.0, 0.8)]}]
    grid = curves.common_grid(made)
    assert (grid[0], grid[-1]) == (0.4, 1.0)
    np.testing.assert_allclose(curves.at(made[0], np.array([0.4, 0.6, 1.0])), [0.7, 0.9, 0.9])


def test_wide_maps_get_no_flat_gate(bench):
    result = pools.run(bench, POOLS)
    assert result["widths"] == {"layer1": 8 * 16 * 16, "layer2": 16 * 8 * 8}
    places = {name: [gate["cut"] for gate in gates] for name, gates in result["gates"].items()}
    everywhere = {name + pools.EVERYWHERE: ["layer1", "layer2"] for name in pools.POOLS if name != pools.FLAT}
    assert places == {name: ["layer2"] for name in pools.POOLS} | everywhere
    (flat,) = result["gates"][pools.FLAT]
    assert (flat["width"], flat["parameters"], flat["flops"]) == (1024, 10 * 1024 + 10, 2 * 10 * 1024)
    assert [gate["width"] for gate in result["gates"]["grid2" + pools.EVERYWHERE]] == [32, 64]
    assert result["gates"]["grid2"][0]["flops"] == 16 * 8 * 8 + 2 * 10 * 64
    areas = pools.tables(result)[0]
    assert "layer1 (2,048)" in areas.note
    assert [len(row) for row in areas.rows] == [len(areas.columns)] * 7
    average = np.array(result["curves"][pools.AVERAGE]["area"]) - result["curves"][pools.FLAT]["area"]
    assert result["ahead"][pools.FLAT].tolist() == average.tolist()


def test_pools_are_compared_where_all_at_their_places_have_points(bench):
    result = pools.run(bench, POOLS)
    starts = {name: curve["grid"][0] for name, curve in result["curves"].items()}
    narrow = {start for name, start in starts.items() if not name.endswith(pools.EVERYWHERE)}
    everywhere = set(starts.values()) - narrow
    assert (len(narrow), len(everywhere)) == (1, 1)
    assert min(everywhere) < min(narrow)  # a gate after layer1 lets samples leave that cost less
    mean = np.array(result["curves"][pools.AVERAGE + pools.EVERYWHERE]["area"])
    grid = np.array(result["curves"]["grid2" + pools.EVERYWHERE]["area"])
    assert result["ahead"]["grid2" + pools.EVERYWHERE].tolist() == (mean - grid).tolist()


def test_what_pools_save_is_that_of_the_cheapest_thresholds_within_the_drop(bench):
    at = pools.run(bench, POOLS)["at_drop"]["grid2" + pools.EVERYWHERE]
    specs = [GateSpec(cut, pool="grid2", resample=2) for cut in bench.first_cuts(2)]
    costs, (val, test) = bench.costs(specs), bench.held_out(2)
    chosen, tested = (bench.scores(specs).trace(rows) for rows in (val, test))
    wanted = chosen.network_accuracy - POOLS.drop
    replay = tested.replay(search_frontier(chosen, costs, min_accuracy=wanted).cheapest(wanted).thresholds, costs)
    assert at["saved"][2] == 1 - replay.cost / costs.dense
    assert at["lost"][2] == tested.network_accuracy - replay.accuracy


def test_without_a_map_that_is_narrow_enough_there_is_no_flat_gate(bench):
    result = pools.run(bench, replace(POOLS, widest=100))
    assert set(result["gates"]) == {name + pools.EVERYWHERE for name in pools.POOLS if name != pools.FLAT}
    assert len(result["claims"]) == 1
    assert "layer2 (1,024)" in pools.tables(result)[0].note
    assert set(pools.figures(result)) == {"curves"}


def test_average_and_flat_gates_share_their_places_and_data(bench):
    result = pools.run(bench, replace(POOLS, widest=2048))
    assert set(result["gates"]) == set(pools.POOLS)
    assert [gate["cut"] for gate in result["gates"][pools.FLAT]] == ["layer1", "layer2"]
    tested = bench.scores([GateSpec("layer2", pool="flat", resample=2)], ("layer1", "layer2"))
    trace = tested.trace(bench.held_out(2)[1])
    assert result["network"]["seeds"][2] == trace.network_accuracy
    alone = [
        bench.scores([GateSpec("layer2", pool="flat", resample=seed)], ("layer1", "layer2"))
        .trace(bench.held_out(seed)[1])
        .correct[0]
        .mean()
        for seed in range(3)
    ]
    assert result["gates"][pools.FLAT][1]["accuracy"] == pytest.approx(np.mean(alone))


def test_interrupted_pools_go_on(bench, again, monkeypatch):
    fuse = Fuse(curves.search_frontier, 4)
    monkeypatch.setattr(curves, "search_frontier", fuse)
    with pytest.raises(Interrupted):
        pools.run(again, POOLS)
    fuse.left = 2 * 3 * 7 - 4  # two for each of seven kinds and three seeds, less those that were kept
    resumed = pools.run(again, POOLS)
    assert fuse.left == 0
    assert json.dumps(resumed["claims"]) == json.dumps(pools.run(bench, POOLS)["claims"])


@pytest.mark.parametrize(
    ("ahead", "grid", "share", "saved", "expected"),
    [
        ([0.01, 0.0, 0.02], 0.0, 0.001, 0.31, [True, True, True, True]),
        ([0.01, -0.001, 0.02], 0.02, 0.02, 0.29, [False, False, False, False]),
        ([-0.02, -0.02, -0.02], -0.01, 0.02, 0.3, [False, False, False, True]),
        ([-0.02, -0.02, -0.02], -0.009, 0.02, 0.4, [True, False, False, False]),
    ],
)
def test_verdicts_on_pools_fall_either_way(ahead, grid, share, saved, expected):
    flat = [{"cut": "a", "share": 0.0001, "parameters": 10}, {"cut": "b", "share": share, "parameters": 20}]
    one, four = ({"saved": [value] * 3, "lost": [0.01] * 3} for value in (0.3, saved))
    made = {
        "ahead": {pools.FLAT: ahead, "grid4": [grid] * 3},
        "gates": {pools.FLAT: flat},
        "curves": {pools.FLAT: {"grid": [0.3, 1.0]}},
        "drop": 0.01,
        "at_drop": {pools.AVERAGE + pools.EVERYWHERE: one, "grid2" + pools.EVERYWHERE: four},
    }
    claims = pools._claims(made)
    assert verdicts(claims) == expected
    assert "after b" in claims[2]["seen"]


@pytest.mark.parametrize(
    ("experiment", "options", "message"),
    [
        (depths, depths.Options(drop=1.0), "expected a drop in"),
        (pools, pools.Options(seeds=2), "seeds of at least 3"),
        (static, static.Options(drops=()), "a drop or more"),
        (static, static.Options(multiple=8), "multiple: expected less than 8 for this width, got 8"),
    ],
)
def test_options_out_of_range_are_refused(bench, experiment, options, message):
    with pytest.raises(ValueError, match=message):
        experiment.run(bench, options)


def test_channels_come_in_multiples():
    counts = lambda **how: backbones.build("resnet26", width=13 / 64, **how).conv1.out_channels  # noqa: E731
    assert [counts(), counts(multiple=1), counts(multiple=2), counts(multiple=4)] == [16, 13, 14, 12]
    assert backbones.build("densenet121", width=0.1, multiple=1).features.conv0.out_channels == 6
    with pytest.raises(ValueError, match=r"must be positive, .*multiple=0"):
        backbones.build("resnet26", multiple=0)


def test_sizes_of_narrower_networks(bench):
    sizes = static._sizes(bench, 2)
    assert list(sizes) == [2 / 64, 4 / 64, 6 / 64]
    assert list(sizes.values()) == sorted(sizes.values())
    assert max(sizes.values()) < bench.costs([GateSpec("layer1")]).dense
    with count_flops() as counter:
        static._build(bench, 6 / 64, 2).eval()(bench.example)
    assert sizes[6 / 64] == counter.get_total_flops()


def test_static_networks_are_as_large_as_the_gated_one_is_on_average(bench):
    result = static.run(bench, STATIC)
    (row,) = result["rows"]
    sizes = static._sizes(bench, 2)
    shares = np.array(list(sizes.values())) / bench.costs([GateSpec("layer1")]).dense
    assert row["static"]["cost"] in shares
    specs = [GateSpec(cut) for cut in bench.first_cuts(2)]
    chosen, tested = (bench.scores(specs).trace(rows) for rows in bench.held_out(None))
    costs = bench.costs(specs)
    within = search_frontier(chosen, costs, max_cost=sizes[row["static"]["width"]])
    point = within.most_accurate(sizes[row["static"]["width"]])
    assert point.cost <= sizes[row["static"]["width"]]
    assert row["equal"]["accuracy"] == tested.replay(point.thresholds, costs).accuracy
    assert row["ahead"] == pytest.approx(row["equal"]["accuracy"] - row["static"]["accuracy"])
    assert result["training"]["as_the_network"]


def test_a_static_network_answers_as_it_was_trained(bench):
    """Its accuracy is that of the same training without any of this."""
    answers = static._answers(bench, bench.training, 4 / 64, 2)
    torch.manual_seed(bench.training.seed)
    model = backbones.build("resnet18", num_classes=10, width=4 / 64, in_channels=1, multiple=2)
    loader = bench.bundle.loader("train", 32, shuffle=True)
    how = {"epochs": 3, "lr": 0.1, "label_smoothing": 0.1, "progress": False}
    pretrain.train_backbone(model, loader, **how)
    targets = np.concatenate([y.numpy() for _, y in bench.bundle.loader("test", 128)])
    assert (answers == targets).mean() == pretrain.evaluate(model, bench.bundle.loader("test", 128))


def test_interrupted_training_of_a_static_network_goes_on(bench, tmp_path, monkeypatch):
    how = replace(TRAINING, epochs=3)
    fresh = Workbench(tmp_path, training=how, **TINY)
    fuse = Fuse(pretrain._one_epoch, 2)
    monkeypatch.setattr(pretrain, "_one_epoch", fuse)
    with pytest.raises(Interrupted):
        static._answers(fresh, how, 4 / 64, 2)
    fuse.left = 1  # the first two epochs are kept
    assert static._answers(fresh, how, 4 / 64, 2).tolist() == static._answers(bench, how, 4 / 64, 2).tolist()
    assert not list((tmp_path / "kept").glob("*.training.safetensors"))


def test_a_network_from_a_file_was_trained_as_nobody_knows(again, monkeypatch):
    monkeypatch.setattr(static, "_answers", lambda bench, how, width, multiple: np.zeros(450, dtype=np.int64))
    result = static.run(again, STATIC)
    assert not result["training"]["as_the_network"]
    assert "while the network's are not known" in static.tables(result)[0].note


def test_how_far_the_gated_network_is_ahead():
    """Right on 3 of 4 samples where the static one is right on 1: differences 1, 1, 0, 0."""
    trace = Trace(
        np.array([[1.0, 1.0, -1.0, -1.0]], dtype=np.float32),
        np.array([[0, 0, 0, 0], [1, 1, 0, 1]]),
        np.zeros(4, dtype=np.int64),
    )
    costs, point = Costs("FLOPs", (1.0, 1.0), (0.0,)), OperatingPoint((0.0,), 0.0, 0.0, ())
    found = static._ahead(trace, costs, point, np.array([False, False, True, False]))
    assert found["ahead"] == 0.5
    assert found["error"] == pytest.approx(np.std([1, 1, 0, 0], ddof=1) / 2)
    assert static._ahead(trace, costs, None, np.array([True] * 4)) == {"ahead": None, "error": None}


@pytest.mark.parametrize(
    ("ahead", "holds"), [((0.01, 0.002), True), ((0.01, -0.002), False), ((0.01, None), False), ((0.0,), False)]
)
def test_verdicts_on_static_networks_fall_either_way(ahead, holds):
    rows = [
        {
            "static": {"cost": 0.5, "accuracy": 0.9},
            "equal": None if by is None else {"accuracy": 0.9 + by},
            "ahead": by,
            "error": 0.001,
        }
        for by in ahead
    ]
    (said,) = static._claims({"rows": rows})
    assert said["holds"] == holds
    assert ("no thresholds cost as little as 50.0%" in said["seen"]) == (None in ahead)
    assert said["seen"].count("of the FLOPs") == len(set(ahead))


def test_points_with_one_static_network_are_said_once():
    row = {"static": {"cost": 0.5, "accuracy": 0.9}, "equal": {"accuracy": 0.8}, "ahead": -0.1, "error": 0.01}
    (said,) = static._claims({"rows": [row, row]})
    assert said["seen"].count("static 90.00%") == 1
