"""Few of many gates: a network with some of its cuts, which of its gates are kept, and by whose say."""

from __future__ import annotations

import copy
import importlib
from itertools import combinations

import numpy as np
import pytest
import torch
from engine_cases import needs
from programs import all_margins, in_band, make_program, random_gates, thresholds_for
from test_split import Join, Pair
from torch import Tensor, nn

import dgate_rt as dg
from dgate_rt import StagedModel, ops, reference, risk
from dgate_rt.cost import Costs, measure_costs
from dgate_rt.frontier import search_frontier
from dgate_rt.selection import forward_selection, select_gates
from dgate_rt.trace import Trace, collect_trace

GATES = 6
SIMULATED = [(executor, "cpu-sim") for executor in ("graph", "lag") if ops.extension_loaded()]
COSTS = Costs("FLOPs", (1.0,) * (GATES + 1), (0.01, 0.02, 0.03) * 2)


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.two = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.two(self.norm(self.one(x)).relu())).relu()


class Net(nn.Module):
    def __init__(self, blocks: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)
        self.blocks = nn.Sequential(*(Block(8) for _ in range(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def images() -> Tensor:  # [48, 3, 12, 12]
    spread = torch.linspace(0.2, 2, 48)[:, None, None, None]
    return torch.randn(48, 3, 12, 12, generator=torch.Generator().manual_seed(0)) * spread


@pytest.fixture(scope="module")
def staged(images) -> StagedModel:
    return dg.split(Net().eval(), "blocks", example=images[:2])


@pytest.mark.parametrize("cuts", [("blocks.0", "blocks.1", "blocks.2", "blocks.3"), ("blocks.1",), ()], ids=len)
@torch.no_grad()
def test_some_cuts_leave_the_network_as_it_is(staged, images, cuts):
    assert staged.cuts == ("blocks.0", "blocks.1", "blocks.2", "blocks.3")
    kept = staged.keeping(cuts)
    assert (kept.cuts, kept.split_at, kept.checked, kept.example_shape) == (cuts, staged.cuts, True, (3, 12, 12))
    assert not kept.training
    assert not any(module.training for module in kept.modules())
    assert torch.equal(kept(images), staged(images))
    every = dict(zip(staged.cuts, staged.features(images), strict=True))
    for cut, features in zip(cuts, kept.features(images), strict=True):
        assert torch.equal(features, every[cut])
    assert {p.data_ptr() for p in kept.parameters()} == {p.data_ptr() for p in staged.parameters()}


def test_how_cuts_were_left_out_does_not_show(staged):
    directly = staged.keeping(["blocks.2"]).fingerprint()
    assert staged.keeping(["blocks.0", "blocks.2"]).keeping(["blocks.2"]).fingerprint() == directly
    assert copy.deepcopy(staged).keeping(["blocks.2"]).fingerprint() == directly
    assert staged.keeping(["blocks.1"]).fingerprint() != directly
    assert staged.keeping(staged.cuts).fingerprint() == staged.fingerprint()


def test_several_tensors_cross_inside():
    join, x = Join(), torch.randn(5, 4)
    staged = StagedModel([Pair(), nn.Identity(), join], nhwc=[True, False])
    assert staged.keeping(["stage0"]).nhwc == (True,)
    whole = StagedModel([Pair(), join]).keeping([])
    assert torch.equal(whole(x), join(x * 2, x))


@pytest.mark.parametrize("cuts", [["blocks.1", "blocks.0"], ["blocks.1", "blocks.1"], ["blocks.4"], "blocks.1"])
def test_cuts_that_are_not_there_are_refused(staged, cuts):
    with pytest.raises(ValueError, match="cuts: expected some of"):
        staged.keeping(cuts)


@pytest.mark.parametrize("engine", [needs(engine) for engine in ("eager", "inductor", "openvino", "onnxruntime")])
def test_stages_that_were_joined_run_on_every_engine(staged, images, engine):
    kept = staged.keeping(["blocks.1"])
    gates = random_gates(kept, images, classes=5)
    margins = all_margins(kept, gates, images)
    thresholds = thresholds_for(margins, 0.5)
    program = make_program(kept, gates, thresholds, images)
    run = dg.compile(program, batch_size=16, engine=engine, executor="refill", chunks=[16, 16])
    with torch.inference_mode():
        expected, _, exits = reference.predict(kept, gates, thresholds, images)
    out = run(images)
    same = out.exits == exits
    assert (same | in_band(margins, thresholds)).all()
    assert torch.equal(out.labels[same], expected[same])
    assert set(out.exits.tolist()) == {0, 1}


def test_a_program_of_some_gates_is_loaded_for_the_network_or_its_stages(staged, images, tmp_path):
    for cuts in (["blocks.0", "blocks.3"], []):
        kept = staged.keeping(cuts)
        program = make_program(kept, random_gates(kept, images, classes=5), [0.5] * len(cuts), images)
        program.save(tmp_path / "program.safetensors")
        expected = dg.compile(program, executor="eager")(images)
        for model in (Net().eval(), staged, kept):
            loaded = dg.load(tmp_path / "program.safetensors", model)
            assert loaded.staged.cuts == tuple(cuts)
            assert loaded.staged.split_at == staged.cuts
            out = dg.compile(loaded, executor="eager")(images)
            assert torch.equal(out.exits, expected.exits)
            assert torch.equal(out.labels, expected.labels)
        with pytest.raises(dg.ProgramError, match="backbone: expected fingerprint"):
            dg.load(tmp_path / "program.safetensors", Net(6).eval())
        anew = dg.split(Net().eval(), cuts, images[:2]) if cuts else StagedModel([Net().eval()])
        with pytest.raises(dg.ProgramError, match="expected the model itself, or a StagedModel with the cuts"):
            dg.load(tmp_path / "program.safetensors", anew)


def test_forward_selection_takes_the_best_and_stops_where_none_helps():
    asked = []
    made = {(): 0, (0,): 2, (1,): 4, (2,): 4, (0, 1): 5, (1, 2): 3, (0, 1, 2): 5}

    def worth(subset):
        asked.append(subset)
        return (float(made[subset]),)

    assert list(forward_selection(3, worth)) == [(1, (1,)), (0, (0, 1))]
    assert len(asked) == len(set(asked)) == 7
    made |= {(0,): 0, (1,): -1, (2,): 0}
    assert list(forward_selection(3, worth)) == []
    assert list(forward_selection(0, worth)) == []


def many_gates(count: int, seed: int) -> Trace:
    """Samples of varying difficulty; deeper gates are right a little more often, margins hint at it."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 10, count)
    skill = rng.normal(size=(GATES + 1, count)) + 0.2 * np.arange(GATES + 1)[:, None] - rng.normal(size=count)
    margins = (skill + 0.5 * rng.normal(size=skill.shape))[:GATES].astype(np.float32)
    return Trace(margins, np.where(skill > -1, targets, (targets + 1) % 10), targets)


def best_point(trace: Trace, costs, subset, **target: float):
    part, prices = trace.keeping(subset), costs.keeping(subset)
    frontier = search_frontier(part, prices, **target)
    return frontier.most_accurate(target["max_cost"]) if "max_cost" in target else frontier.cheapest(**target)


def worth_of(point) -> tuple[float, float]:
    return point.accuracy, -point.cost


@pytest.mark.parametrize("seed", range(3))
def test_gates_are_chosen_for_the_target(seed):
    trace, costs = many_gates(400, seed), COSTS
    wanted = trace.network_accuracy - 0.02
    chosen = select_gates(trace, costs, 2, min_accuracy=wanted)
    cost = {pair: best_point(trace, costs, pair, min_accuracy=wanted).cost for pair in combinations(range(GATES), 2)}
    alone = [best_point(trace, costs, (gate,), min_accuracy=wanted).cost for gate in range(GATES)]
    first = int(np.argmin(alone))
    assert first in chosen
    assert cost[chosen] == min(cost[pair] for pair in cost if first in pair)
    limit = 0.9 * costs.dense
    within = select_gates(trace, costs, 2, max_cost=limit)
    points = {pair: best_point(trace, costs, pair, max_cost=limit) for pair in cost}
    best = max(range(GATES), key=lambda gate: worth_of(best_point(trace, costs, (gate,), max_cost=limit)))
    assert best in within
    assert worth_of(points[within]) == max(worth_of(points[pair]) for pair in points if best in pair)


def test_the_nearest_are_kept_where_few_gates_do_not_reach_the_target():
    trace, costs = many_gates(400, 0), COSTS
    most = search_frontier(trace, costs, min_accuracy=1.0).points[-1].accuracy
    kept = select_gates(trace, costs, 1, min_accuracy=1.0)
    alone = [search_frontier(trace.keeping((g,)), costs.keeping((g,))).points[-1].accuracy for g in range(GATES)]
    assert trace.network_accuracy < max(alone) < most < 1
    assert kept == (int(np.argmax(alone)),)
    assert select_gates(trace, costs, 1, max_cost=0.0) == (0,)


def test_float_noise_of_times_keeps_no_gate_that_is_off():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 10, 200)
    wrong = [(targets + 1) % 10] * 32
    trace = Trace(rng.normal(size=(32, 200)).astype(np.float32), np.stack([*wrong, targets]), targets)
    costs = Costs("ms", tuple(rng.random(33)), tuple(0.01 * rng.random(32)))
    assert select_gates(trace, costs, 3, min_accuracy=1.0) == ()
    assert select_gates(trace, costs, 3, max_cost=costs.dense) == ()


@pytest.fixture(scope="module")
def fitted(staged, images):
    labels = torch.arange(48) % 5
    with torch.no_grad():
        labels[:40] = staged(images[:40]).argmax(1)
    gates = dg.fit(staged, [(images, labels)], epochs=3, polish=20, progress=False)
    return gates, [(images, labels)]


def test_calibrate_keeps_few_gates(staged, fitted):
    gates, loader = fitted
    every = dg.calibrate(staged, gates, loader, max_accuracy_drop=0.05, progress=False)
    few = dg.calibrate(staged, gates, loader, max_accuracy_drop=0.05, max_gates=2, progress=False)
    assert 1 <= len(few.gates) <= 2 < len(every.gates) == 4
    assert set(few.staged.cuts) < set(staged.cuts)
    assert few.point.accuracy >= few.network_accuracy - 0.05
    assert few.costs.dense == pytest.approx(every.costs.dense)
    assert few.costs == measure_costs(few.staged, few.gates, loader[0][0])
    assert few.scores.shape == (len(few.gates) + 1, 48)
    out = dg.compile(few, batch_size=48, executor="eager")(loader[0][0])
    shares = torch.bincount(out.exits, minlength=len(few.gates) + 1) / 48
    assert shares.tolist() == pytest.approx(few.point.shares)


def test_samples_that_test_a_guarantee_choose_no_gates(staged, fitted, monkeypatch):
    gates, loader = fitted
    traces = []

    def seen(trace, *args, **kwargs):
        traces.append(trace)
        return select_gates(trace, *args, **kwargs)

    monkeypatch.setattr(importlib.import_module("dgate_rt.calibrate"), "select_gates", seen)
    sure = dg.calibrate(staged, gates, loader, max_accuracy_drop=0.5, confidence=0.9, max_gates=1, progress=False)
    assert sure.guarantee.samples == 24
    first, second = risk.halves(collect_trace(staged, gates, loader, progress=False)[0])
    assert np.array_equal(traces[0].margins, first.margins)
    assert len(first.targets) == len(second.targets) == 24


def test_no_gate_that_helps_leaves_the_network_and_says_so(staged, images):
    with torch.no_grad():
        labels = staged(images).argmax(1)
    wrong = next(k for k in range(5) if k not in labels)
    gates = [dg.Gate(8, 5) for _ in staged.cuts]
    for gate in gates:
        gate.bias.data[wrong] = 1.0
    with pytest.warns(UserWarning, match="max_gates: no gate helps towards this target"):
        program = dg.calibrate(staged, gates, [(images, labels)], max_gates=2, progress=False)
    assert (program.thresholds, program.staged.cuts) == ((), ())
    for executor, device in (("eager", "cpu"), ("refill", "cpu"), ("dense", "cpu"), *SIMULATED):
        run = dg.compile(program, batch_size=16, executor=executor, device=device, monitor=True, channels_last=False)
        assert run(images).exits.tolist() == [0] * 48
        assert "exit 0" in run.describe()
        assert run.monitor.report()


def test_gates_are_chosen_for_a_cost(staged, fitted):
    gates, loader = fitted
    limit = 0.7 * measure_costs(staged, list(gates), loader[0][0]).dense
    few = dg.calibrate(staged, gates, loader, max_cost=limit, max_gates=2, progress=False)
    trace, costs = collect_trace(staged, gates, loader, progress=False)[0], measure_costs(staged, gates, loader[0][0])
    kept = select_gates(trace, costs, 2, max_cost=limit)
    assert few.staged.cuts == tuple(staged.cuts[gate] for gate in kept)
    assert few.point.cost <= limit


def test_a_target_that_few_gates_do_not_reach_is_told(staged, fitted):
    gates, loader = fitted
    with pytest.raises(dg.UnreachableTargetError, match="with at most 1 gates"):
        dg.calibrate(staged, gates, loader, max_cost=1.0, max_gates=1, progress=False)


def test_gates_that_the_same_samples_chose_may_void_a_guarantee(staged, fitted):
    gates, loader = fitted
    few = dg.calibrate(staged, gates, loader, max_accuracy_drop=0.05, max_gates=2, progress=False)
    with pytest.warns(UserWarning, match="confidence: these gates were chosen among others"):
        dg.calibrate(few.staged, few.gates, loader, max_accuracy_drop=0.5, confidence=0.5, progress=False)


def test_one_sample_chooses_nothing(staged, fitted):
    gates, [(x, y)] = fitted
    with pytest.warns(UserWarning, match="max_gates: no gate helps"):
        program = dg.calibrate(
            staged, gates, [(x[:1], y[:1])], max_accuracy_drop=0.1, confidence=0.5, max_gates=1, progress=False
        )
    assert program.gates == ()


@pytest.mark.parametrize("most", [0, -1, 1.5, "3"])
def test_a_number_of_gates_is_wanted(staged, fitted, most):
    gates, loader = fitted
    with pytest.raises(ValueError, match="max_gates: expected a whole number of at least 1"):
        dg.calibrate(staged, gates, loader, max_gates=most, progress=False)
