"""calibrate(): targets met on real validation margins, costs that count, clear errors."""

from __future__ import annotations

import pytest
import torch
from engine_cases import network
from programs import random_gates
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dgate_rt as dg
from dgate_rt.cost import gate_flops, measure_costs
from dgate_rt.risk import Guarantee
from dgate_rt.trace import collect_trace


@pytest.fixture(scope="module")
def digits():
    """Scikit-learn's digits through a small network trained on them: staged, gates, validation loader."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)),
    )
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(10):
        for index in torch.randperm(1200).split(100):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x[index]), y[index]).backward()
            optimiser.step()
    staged = dg.split(model.eval(), ["0", "1"], example=x[:2])
    gates = dg.fit(staged, [(x[:1200], y[:1200])], epochs=5, progress=False)
    return staged, gates, DataLoader(TensorDataset(x[1200:], y[1200:]), 128)


def test_targets_are_met(digits):
    staged, gates, loader = digits
    no_drop = dg.calibrate(staged, gates, loader, progress=False)
    assert no_drop.point.accuracy >= no_drop.network_accuracy
    cheaper = dg.calibrate(staged, gates, loader, max_accuracy_drop=0.02, progress=False)
    assert cheaper.point.accuracy >= cheaper.network_accuracy - 0.02
    assert cheaper.point.cost < no_drop.point.cost < no_drop.costs.dense
    absolute = dg.calibrate(staged, gates, loader, min_accuracy=0.9, progress=False)
    assert absolute.point.accuracy >= 0.9
    limit = 0.8 * no_drop.costs.dense
    within = dg.calibrate(staged, gates, loader, max_cost=limit, progress=False)
    assert within.point.cost <= limit
    assert no_drop.at(max_cost=limit).point.cost <= limit


def test_a_confidence_makes_a_guarantee(digits):
    staged, gates, loader = digits
    plain = dg.calibrate(staged, gates, loader, max_accuracy_drop=0.05, progress=False)
    sure = dg.calibrate(staged, gates, loader, max_accuracy_drop=0.05, confidence=0.9, progress=False)
    assert plain.guarantee is None
    assert sure.guarantee == Guarantee(0.05, 0.9, 299)  # half of the 597 samples
    assert plain.point.cost <= sure.point.cost < sure.costs.dense
    assert sure.frontier == plain.frontier
    assert sure.at(max_accuracy_drop=0.05).guarantee is None
    run = dg.compile(sure, executor="eager")
    promise = "on new data: accuracy drop at most 5 % with 90 % confidence (n = 299)"
    assert promise in run.describe()
    run.set_thresholds(plain.thresholds)
    assert promise not in run.describe()


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        (0.01, "expected at least 597 samples, got 100"),
        (0.0, "100 samples do not tell a drop within 0 % from a larger"),
    ],
    ids=["too few", "no drop"],
)
def test_where_nothing_can_be_certified_all_gates_are_off(digits, drop, message):
    staged, gates, loader = digits
    few = [(x[:100], y[:100]) for x, y in loader][:1]
    with pytest.warns(UserWarning, match=rf"{message}.*all gates are off"):
        program = dg.calibrate(staged, gates, few, max_accuracy_drop=drop, confidence=0.95, progress=False)
    assert program.thresholds == (float("inf"),) * 2
    assert program.point.cost == program.costs.dense


def test_the_runtime_reproduces_the_calibrated_point(digits):
    staged, gates, loader = digits
    program = dg.calibrate(staged, gates, loader, max_accuracy_drop=0.01, progress=False)
    x = torch.cat([x for x, _ in loader])
    y = torch.cat([y for _, y in loader])
    out = dg.compile(program, batch_size=200)(x)
    assert (out.labels == y).double().mean() == pytest.approx(program.point.accuracy)
    shares = out.exits.bincount(minlength=3) / len(x)
    torch.testing.assert_close(
        shares.double(), torch.tensor(program.point.shares, dtype=torch.float64), atol=1e-6, rtol=0
    )
    moved = dg.compile(program.at(min_accuracy=0.9))(x)
    assert (moved.labels == y).double().mean() >= 0.9


def test_costs_count_stages_and_gates(digits):
    staged, gates, loader = digits
    costs = measure_costs(staged, gates, next(iter(loader))[0])
    assert costs.stages == (2 * 9 * 16 * 64, 2 * 9 * 16 * 32 * 16, 2 * 9 * 32 * 64 * 4 + 2 * 256 * 10)
    assert costs.gates == (gate_flops(gates[0], (16, 8, 8)), gate_flops(gates[1], (32, 4, 4)))
    assert costs.gates[0] == 16 * 64 + 2 * 10 * 4 * 16
    times = measure_costs(staged, gates, next(iter(loader))[0], "time")
    assert times.unit == "ms"
    assert all(t > 0 for t in (*times.stages, *times.gates))


def test_times_are_those_of_what_will_run(digits):
    staged, x = network("conv"), torch.randn(64, 3, 16, 16)
    seen = []

    def engine(stage, example, sizes):
        seen.append((stage, len(example[0]), tuple(sizes)))
        return stage

    assert any(isinstance(module, nn.BatchNorm2d) for module in staged.modules())
    measure_costs(staged, random_gates(staged, x, 5), x, "time", engine=engine)
    assert not any(isinstance(module, nn.BatchNorm2d) for stage, *_ in seen for module in stage.modules())
    assert [tuple(rest) for _, *rest in seen] == [(64, (1, 4, 16, 32, 64))] * 2  # as refill's
    for given in ({"engine": engine}, {"dtype": "float32"}, {"remeasure": True}):
        with pytest.raises(
            ValueError, match="engine, dtype and remeasure: expected cost='time' with them, got 'flops'"
        ):
            dg.calibrate(*digits, progress=False, **given)


def test_an_engine_or_dtype_that_is_not_to_be_had_is_told_before_the_data_are_read(digits):
    staged, gates, _ = digits
    for given, match in (({"engine": "fast"}, "engine: expected one of"), ({"dtype": "int8"}, "dtype: expected None")):
        with pytest.raises(ValueError, match=match):
            dg.calibrate(staged, gates, None, cost="time", progress=False, **given)


def test_time_is_a_cost_too(digits):
    staged, gates, loader = digits
    program = dg.calibrate(staged, gates, loader, max_accuracy_drop=0.05, cost="time", progress=False)
    assert program.costs.unit == "ms"
    assert program.point.accuracy >= program.network_accuracy - 0.05


def test_non_finite_images_never_leave(digits):
    staged, gates, loader = digits
    x, y = next(iter(loader))
    x[3] = float("nan")
    trace, _ = collect_trace(staged, gates, [(x, y)], progress=False)
    assert (trace.margins[:, 3] == -float("inf")).all()


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"min_accuracy": 0.5, "max_cost": 1.0}, "expected one of .* got min_accuracy and max_cost"),
        ({"max_accuracy_drop": -0.1}, "max_accuracy_drop: expected a number of at least 0, got -0.1"),
        ({"max_cost": float("nan")}, "max_cost: expected a number of at least 0, got nan"),
        ({"confidence": 0.95}, "confidence: expected max_accuracy_drop with it"),
        ({"confidence": 0.95, "min_accuracy": 0.9}, "confidence: expected max_accuracy_drop with it"),
        ({"confidence": 1.0, "max_accuracy_drop": 0.01}, "confidence: expected a number between 0 and 1, got 1.0"),
        ({"confidence": 0.9, "max_accuracy_drop": 1.0}, r"max_accuracy_drop: expected a number in \[0, 1\), got 1.0"),
        ({"cost": "joules"}, "cost: expected 'flops' or 'time', got 'joules'"),
        ({"min_accuracy": 1.01}, "the best reachable on this data"),
        ({"max_cost": 1.0}, "the cheapest reachable on this data"),
    ],
    ids=["two targets", "negative", "nan", "bare", "other target", "certain", "all", "cost", "accuracy", "reach"],
)
def test_bad_targets_are_refused(digits, targets, message):
    staged, gates, loader = digits
    with pytest.raises(ValueError, match=message):
        dg.calibrate(staged, gates, loader, progress=False, **targets)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "loader: expected at least one batch"),
        (
            [(torch.zeros(2, 1, 8, 8), torch.tensor([0, 10]))],
            r"expected labels in 0\.\.9, as the network has 10 classes, got 0\.\.10",
        ),
        ([(torch.zeros(2, 1, 8, 8), torch.tensor([0.0, 1.0]))], "expected y of an integer dtype"),
        ([(torch.zeros(2, 1, 8, 8), torch.tensor([0]))], r"expected y \[N\], a class for each x"),
        ([(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))], r"loader: x: stage 0 does not take .* \(2, 3, 8, 8\)"),
        ([torch.zeros(2, 1, 8, 8)], r"loader: batch 0: expected a pair \(x, y\), got Tensor"),
    ],
    ids=["empty", "range", "float", "length", "channels", "no pair"],
)
def test_bad_data_is_refused(digits, batches, message):
    staged, gates, _ = digits
    with pytest.raises((ValueError, TypeError), match=message):
        dg.calibrate(staged, gates, batches, progress=False)


def test_one_gate_a_cut(digits):
    staged, gates, loader = digits
    with pytest.raises(ValueError, match="gates: expected 2, one a cut, got 1"):
        dg.calibrate(staged, gates[:1], loader, progress=False)


class InPlace(nn.Module):
    """Works in place on its input, as some networks begin."""

    def forward(self, x):
        return x.clamp_(min=0)


class Centred(nn.Module):
    """Mixes the samples of a batch."""

    def forward(self, x):
        return x - x.mean(0)


def test_validation_data_stays_as_it_is():
    staged = dg.StagedModel([InPlace(), nn.Linear(4, 3)]).eval()
    x, y = torch.randn(20, 4), torch.randint(3, (20,))
    before = x.clone()
    for given in (x, x.numpy()):
        dg.calibrate(staged, [dg.Gate(4, 3)], [(given, y)], progress=False)
        assert torch.equal(x, before)


def test_an_empty_batch_is_passed_over(digits):
    staged, gates, loader = digits
    batches = [(torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64)), *loader]
    program = dg.calibrate(staged, gates, batches, progress=False)
    assert program.point == dg.calibrate(staged, gates, loader, progress=False).point


def test_a_hand_made_stage_that_mixes_samples_is_refused():
    staged = dg.StagedModel([Centred(), nn.Linear(4, 3)]).eval()
    with pytest.raises(dg.SplitError, match=r"stage 0 does not treat samples independently.*Centred"):
        dg.calibrate(staged, [dg.Gate(4, 3)], [(torch.randn(9, 4), torch.zeros(9, dtype=torch.int64))], progress=False)


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        (dg.Gate(5, 3), r"gates\[0\]: expected a gate of width 4 after stage0, got 5"),
        (dg.Gate(4, 7), r"gates\[0\]: expected 3 classes, as the network has, got 7"),
    ],
    ids=["width", "classes"],
)
def test_a_gate_that_does_not_fit_is_named(gate, message):
    staged = dg.StagedModel([nn.Linear(4, 4), nn.Linear(4, 3)]).eval()
    with pytest.raises(ValueError, match=message):
        dg.calibrate(staged, [gate], [(torch.randn(9, 4), torch.zeros(9, dtype=torch.int64))], progress=False)


def test_what_is_not_staged_or_no_gate_is_refused(digits):
    staged, _, loader = digits
    with pytest.raises(TypeError, match="staged: expected a StagedModel, as split returns it, got Linear"):
        dg.calibrate(nn.Linear(2, 2), [], loader)
    with pytest.raises(TypeError, match="gates: expected Gate modules, got Linear"):
        dg.calibrate(staged, [nn.Linear(2, 2)] * 2, loader)
