"""Training gates: as good as a solver made for the problem, and the backbone as it was."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC
from torch import Tensor, nn

from dgate_rt.gate import Gate, Pool
from dgate_rt.staged import StagedModel
from dgate_rt.train import Gates, fit, fold, loss_and_slope, moments, objective

L2 = 1e-3  # the default


pytestmark = pytest.mark.usefixtures("one_thread")


def digits() -> tuple[Tensor, Tensor]:
    """1,797 x 64, nearly separable; three features are constant."""
    x, y = load_digits(return_X_y=True)
    return torch.from_numpy(x).float(), torch.from_numpy(y)


def blurred() -> tuple[Tensor, Tensor]:
    """2,000 correlated, rectified features of 5 classes that overlap."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(5, (2000,), generator=generator)
    hidden = torch.randn(5, 12, generator=generator)[y] * 0.7 + torch.randn(2000, 12, generator=generator)
    return torch.relu(hidden @ torch.randn(12, 48, generator=generator) - 1), y


DATA = {"digits": digits, "blurred": blurred}


def plain(width: int, classes: int) -> StagedModel:
    """A network whose only gate reads the input itself."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return StagedModel(stages=[nn.Identity(), nn.Linear(width, classes)]).eval()


def batches(x: Tensor, y: Tensor, size: int = 256) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


def standardise(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In float64: standardised features, mean, deviation with 1 where it is 0."""
    mean, deviation = x.double().mean(0), x.double().std(0, correction=0)
    deviation[deviation < 1e-9] = 1
    return (x.double() - mean) / deviation, mean, deviation


def small_cnn() -> StagedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        stem = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5))
        block = nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
        return StagedModel(stages=[stem, block, head], cuts=["stem", "block"])


def images(count: int = 120) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    y = torch.randint(4, (count,), generator=generator)
    return batches(torch.randn(count, 1, 8, 8, generator=generator) + y[:, None, None, None], y, 32)


def state(module: nn.Module) -> tuple[object, ...]:
    tensors = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    flags = [part.training for part in module.modules()], [p.requires_grad for p in module.parameters()]
    return tensors, flags, [p.grad for p in module.parameters()]


def assert_as_it_was(module: nn.Module, before: tuple[object, ...]) -> None:
    tensors, flags, gradients = state(module)
    assert (flags, gradients) == before[1:]
    for name, tensor in before[0].items():  # type: ignore[attr-defined]
        assert torch.equal(tensors[name], tensor), name  # type: ignore[index]


@pytest.mark.parametrize("name", DATA)
def test_hinge_reaches_the_optimum_of_linear_svc(name: str) -> None:
    x, y = DATA[name]()
    classes = int(y.max()) + 1
    gates = fit(plain(x.shape[1], classes), batches(x, y))
    z, mean, deviation = standardise(x)
    solver = LinearSVC(
        loss="hinge", C=1 / (len(x) * L2), intercept_scaling=5, max_iter=50_000, tol=1e-3, random_state=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it has to converge to be a reference
        solver.fit(z.numpy(), y.numpy())
    best = objective(torch.from_numpy(solver.coef_), torch.from_numpy(solver.intercept_), z, y, L2)
    weight = gates[0].weight.detach().double() * deviation
    bias = gates[0].bias.detach().double() + gates[0].weight.detach().double() @ mean
    ours = objective(weight, bias, z, y, L2)
    assert ours <= 1.01 * best
    assert ours == pytest.approx(gates.reports[0].objective, rel=1e-4)
    labels = gates[0](x).argmax(1)
    assert (labels == torch.from_numpy(solver.predict(z.numpy()))).float().mean() >= 0.99
    assert gates.reports[0].accuracy == pytest.approx((labels == y).float().mean().item(), abs=1e-3)


@pytest.mark.parametrize("name", DATA)
def test_cross_entropy_agrees_with_logistic_regression(name: str) -> None:
    x, y = DATA[name]()
    gates = fit(plain(x.shape[1], int(y.max()) + 1), batches(x, y), loss="cross_entropy")
    z = standardise(x)[0]
    solver = LogisticRegression(C=1 / (len(x) * L2), max_iter=2000, tol=1e-6).fit(z.numpy(), y.numpy())
    best = objective(torch.from_numpy(solver.coef_), torch.from_numpy(solver.intercept_), z, y, L2, "cross_entropy")
    assert gates.reports[0].objective == pytest.approx(best, rel=1e-3)
    assert gates.reports[0].accuracy == pytest.approx(solver.score(z.numpy(), y.numpy()), abs=0.003)


def test_the_objective_is_the_formula_of_the_paper_with_the_norm_added() -> None:
    weight, bias = torch.tensor([[1.0, -2.0], [0.5, 0.0]]), torch.tensor([0.1, -0.3])
    features, labels = torch.tensor([[1.0, 0.2], [0.3, -1.0], [-2.0, 0.7]]), torch.tensor([0, 1, 1])
    expected = 0.05 * (1 + 4 + 0.25)
    for i in range(3):
        for k in range(2):
            sign = 1 if labels[i] == k else -1
            expected += max(0.0, 1 - sign * float(weight[k] @ features[i] + bias[k])) / 3
    assert objective(weight, bias, features, labels, l2=0.1) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("loss", "width"), [("hinge", 0.0), ("hinge", 0.2), ("cross_entropy", 0.0)])
def test_the_slope_is_the_gradient(loss: str, width: float) -> None:
    scores, labels = torch.randn(40, 5, dtype=torch.float64), torch.randint(5, (40,))
    slope = loss_and_slope(loss, scores, labels, width)[1]
    step = 1e-6 * torch.randn_like(scores)
    up, down = (loss_and_slope(loss, scores + sign * step, labels, width)[0] for sign in (1, -1))
    assert (up - down).item() == pytest.approx(2 * (slope * step).sum().item(), rel=1e-4)


def test_folding_is_exact() -> None:
    x = torch.randn(300, 20) * torch.logspace(-3, 3, 20) + torch.linspace(-50, 50, 20) * torch.logspace(-3, 3, 20)
    x[:, 7] = 1234.5678  # constant
    weight, bias = torch.randn(4, 20), torch.randn(4)
    mean, scale = moments(x, torch.arange(300))
    gate = Gate(20, 4)
    gate.weight.data, gate.bias.data = fold(weight, bias, mean, scale)
    expected = ((x.double() - mean.double()) * scale.double()) @ weight.double().T + bias.double()
    error = (gate(x).double() - expected).abs().max() / expected.abs().max()
    assert error < 1e-4
    assert scale[7] == 0
    assert torch.all(gate.weight[:, 7] == 0)


def test_moments_are_those_of_the_rows_asked_for() -> None:
    x = torch.randn(5000, 300) * 3 + 100  # more than one chunk
    rows = torch.arange(0, 5000, 2)
    mean, scale = moments(x, rows)
    torch.testing.assert_close(mean, x[rows].double().mean(0).float())
    torch.testing.assert_close(1 / scale, x[rows].double().std(0, correction=0).float())


def test_the_backbone_is_bit_for_bit_as_it_was() -> None:
    staged = small_cnn()
    staged.train()
    staged.stages[1].eval()
    staged.stages[0][0].weight.requires_grad_(False)
    before = state(staged)
    gates = fit(staged, images(), epochs=1, polish=0, val_loader=images(40))
    assert_as_it_was(staged, before)
    assert [report.cut for report in gates.reports] == ["stem", "block"]
    assert [(gate.width, gate.classes, gate.pool) for gate in gates] == [(24, 4, Pool.GRID2), (32, 4, Pool.GRID2)]
    again = fit(
        staged.eval(), images(), epochs=1, polish=0
    )  # train mode had no influence: no dropout, no batch statistics
    assert all(torch.equal(one.weight, other.weight) for one, other in zip(gates, again, strict=True))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_fit_is_resumed_and_leaves_the_backbone_alone(
    tmp_path: Path, error: type[BaseException]
) -> None:
    staged, data = small_cnn().train(), images()
    seen = []
    staged.stages[1].register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))

    def breaks() -> Iterator[tuple[Tensor, Tensor]]:
        yield from data[:2]
        raise error

    before = state(staged)
    with pytest.raises(error):
        fit(staged, breaks(), cache=tmp_path / "cache")
    assert_as_it_was(staged, before)
    seen.clear()
    resumed = fit(staged, data, epochs=1, polish=0, cache=tmp_path / "cache", val_loader=data[:1])
    assert seen == [32, 24, 1, 32]  # the two batches that were missing; one sample for the classes, and validation
    seen.clear()
    again = fit(staged, data, epochs=1, polish=0, cache=str(tmp_path / "cache"), val_loader=data[:1])
    assert seen == []
    for one, other, fresh in zip(resumed, again, fit(staged, data, epochs=1, polish=0), strict=True):
        assert torch.equal(one.weight, other.weight)
        assert torch.equal(one.weight, fresh.weight)


def test_the_same_seed_gives_the_same_bits_and_the_global_generator_stays() -> None:
    x, y = blurred()
    staged, data = plain(x.shape[1], 5), batches(x, y)
    before = torch.get_rng_state()
    one, other, third = (fit(staged, data, epochs=2, polish=0, seed=seed)[0] for seed in (3, 3, 4))
    assert torch.equal(one.weight, other.weight)
    assert torch.equal(one.bias, other.bias)
    assert not torch.equal(one.weight, third.weight)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("loss", ["hinge", "cross_entropy"])
def test_one_class_is_legal(loss: str) -> None:
    gates = fit(plain(6, 1), [(torch.randn(50, 6), torch.zeros(50, dtype=torch.long))], loss=loss, epochs=2)
    assert gates[0].weight.shape == (1, 6)
    assert gates[0].weight.isfinite().all()
    assert gates.reports[0].accuracy == 1


@pytest.mark.parametrize("polish", [0, 200])
def test_a_single_sample_and_constant_features_give_finite_gates(polish: int) -> None:
    for x in (torch.randn(1, 6), torch.full((9, 6), 7.0)):
        gates = fit(plain(6, 3), [(x, torch.zeros(len(x), dtype=torch.long))], epochs=3, polish=polish)
        assert gates[0].weight.isfinite().all()
        assert gates[0].bias.isfinite().all()


def test_broken_samples_are_left_out_with_one_warning() -> None:
    data = images()
    data[0][0][3] = math.nan
    data[2][0][7, 0, 4, 4] = math.inf
    with pytest.warns(UserWarning, match="loader: 2 samples .* not finite were left out") as caught:
        gates = fit(small_cnn(), data, epochs=2, val_loader=data)
    assert len(caught) == 1
    for gate, report in zip(gates, gates.reports, strict=True):
        assert gate.weight.isfinite().all()
        assert (report.samples, report.skipped) == (118, 2)
        assert report.val_accuracy == pytest.approx(report.accuracy * 118 / 120)  # there they count as wrong


def test_only_broken_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="loader: none of its 5 samples"):
        fit(plain(6, 3), [(torch.full((5, 6), math.nan), torch.zeros(5, dtype=torch.long))])


def test_validation_accuracy_is_that_of_the_gate_on_val_loader() -> None:
    x, y = digits()
    gates = fit(plain(64, 10), batches(x[:1200], y[:1200]), val_loader=batches(x[1200:], y[1200:]), polish=0)
    expected = (gates[0](x[1200:]).argmax(1) == y[1200:]).double().mean().item()
    assert gates.reports[0].val_accuracy == expected
    assert expected > 0.85
    assert fit(plain(64, 10), batches(x, y), epochs=1, polish=0).reports[0].val_accuracy is None


@pytest.mark.parametrize("pool", ["avg", "cls", "flat", "grid2"])
def test_gates_take_the_features_of_their_pool(pool: str) -> None:
    staged = StagedModel(stages=[nn.Linear(4, 6), nn.Sequential(nn.Flatten(), nn.Linear(30, 3))]).eval()
    x, y = torch.randn(60, 5, 4), torch.randint(3, (60,))
    gates = fit(staged, [(x, y)], pool=pool, epochs=2)
    labels = gates[0](staged.run_stage(0, x)).argmax(1)
    assert gates[0].pool is Pool(pool)
    assert gates.reports[0].accuracy == pytest.approx((labels == y).float().mean().item(), abs=1e-6)


def test_gates_go_by_the_criterion_that_was_asked_for() -> None:
    gates = fit(small_cnn(), images(), loss="cross_entropy", criterion="entropy", epochs=1, polish=0)
    assert all(gate.criterion == "entropy" for gate in gates)


def test_gates_are_a_module_list() -> None:
    gates = fit(small_cnn(), images(), epochs=1, polish=0)
    assert isinstance(gates, nn.ModuleList)
    assert len(gates[:1]) == 1
    assert all(parameter.requires_grad and not parameter.is_inference() for parameter in gates.parameters())
    assert len(Gates().reports) == 0


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_callers_gradient_mode_does_not_matter(context: type) -> None:
    x, y = blurred()
    expected = fit(plain(48, 5), batches(x, y), epochs=1, polish=40)[0]
    with context():
        gate = fit(plain(48, 5), batches(x, y), epochs=1, polish=40)[0]
    assert torch.equal(gate.weight, expected.weight)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"loss": "mse"}, "loss: expected one of .*hinge.*, got 'mse'"),
        ({"pool": "max"}, "pool: expected one of .*avg.*, got 'max'"),
        ({"criterion": "top2"}, "criterion: expected one of .*margin.*, got 'top2'"),
        ({"epochs": 0}, "epochs, polish: expected at least 1 and 0, got 0 and 200"),
        ({"polish": -1}, "epochs, polish: .* got 20 and -1"),
        ({"lr": 0.0}, "lr: expected a number above 0, got 0"),
        ({"lr": math.nan}, "lr: expected a number above 0, got nan"),
        ({"l2": -1.0}, "l2: expected a number at least 0, got -1"),
        ({"l2": math.inf}, "l2: expected a number at least 0, got inf"),
        ({"cache_gb": 0}, "cache_gb: expected a number above 0, got 0"),
        ({"device": "meta"}, "device: expected cpu, where staged has .*, got 'meta'"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fit(plain(6, 3), [(torch.randn(4, 6), torch.zeros(4, dtype=torch.long))], **arguments)  # type: ignore[arg-type]


def test_a_network_without_cuts_and_a_bad_val_loader_are_refused() -> None:
    good = [(torch.randn(4, 6), torch.zeros(4, dtype=torch.long))]
    with pytest.raises(ValueError, match="staged: expected at least one cut"):
        fit(StagedModel(stages=[nn.Linear(6, 3)]), good)
    with pytest.raises(ValueError, match="val_loader: expected batches"):
        fit(plain(6, 3), good, val_loader=[])
