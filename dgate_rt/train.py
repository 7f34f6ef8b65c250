"""Training the gates: one-vs-all hinge loss on the features of a frozen backbone.

Each gate by itself, on standardised pooled features ``z`` (Shafiee et al. 2019, equations 1-2, section 2.2)::

    (1/n) sum_i sum_k max(0, 1 - y_ik (w_k . z_i + b_k)) + (l2/2) sum_k ||w_k||^2,      y_ik = +1 or -1

The paper prints the regulariser with a minus; it is a norm to be kept small, so it is added. The problem is convex, and
solved in two parts: mini-batch sub-gradient steps, as the paper has it, then L-BFGS over all the data. There the corner
of the hinge is rounded over a small width (the slope ``clamp(violation / width, 0, 1)`` is a sub-gradient of the hinge
outside that width), because mini-batches alone stay several per cent above the optimum.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from dgate_rt.batches import check_staged
from dgate_rt.features import SKIP, DiskCache, FeatureCache, Features, collect
from dgate_rt.gate import DEFAULT_POOL, Criterion, Gate, Pool, margin_and_label
from dgate_rt.progress import note, track
from dgate_rt.staged import StagedModel

LOSSES = ("hinge", "cross_entropy")
SMOOTHING = (0.2, 0.02)  # widths of the rounded corner, in units of the margin
ROUND = 20  # L-BFGS iterations between two ticks of the progress bar
CONVERGED = 1e-4  # relative gain of a round below which L-BFGS stops
CHUNK_BYTES = 4_000_000  # features read at once: few enough to stay in a CPU's cache


@dataclass(frozen=True)
class GateReport:
    """How the training of one gate ended."""

    cut: str
    width: int  # pooled features
    samples: int  # trained on
    skipped: int  # left out, because a feature was not finite
    objective: float  # at the end, in the standardised space, without rounding of the hinge
    accuracy: float  # share of the training samples whose largest distance is their class's
    val_accuracy: float | None  # the same for val_loader; a sample with a feature that is not finite counts as wrong
    seconds: float


class Gates(nn.ModuleList):
    """The trained gates, in order, with a `GateReport` for each in ``reports``."""

    def __init__(self, gates: Iterable[nn.Module] | None = None, reports: Sequence[GateReport] = ()) -> None:
        super().__init__(gates)
        self.reports = list(reports)


def fit(
    staged: StagedModel,
    loader: Iterable[Sequence[object]],
    *,
    loss: str = "hinge",
    pool: Pool | str = DEFAULT_POOL,
    criterion: Criterion | str = Criterion.MARGIN,
    epochs: int = 20,
    lr: float = 0.1,
    l2: float = 1e-3,
    polish: int = 200,
    val_loader: Iterable[Sequence[object]] | None = None,
    device: torch.device | str = "cpu",
    cache: str | PathLike[str] = "memory",
    cache_gb: float = 4.0,
    seed: int = 0,
    progress: bool = True,
) -> Gates:
    """Train a gate at every cut of ``staged``, which stays as it is: parameters, buffers, flags.

    The backbone runs once over ``loader``, in eval mode; pooled features are cached, and the gates train on them.
    Features are standardised (mean 0, deviation 1 over the training data) for training, and the standardisation is
    folded into weight and bias afterwards, so a gate takes the features as they are. ``l2`` acts before the folding.

    Args:
        staged: the network; it has to be on ``device``.
        loader: any iterable of ``(x, y)``, consumed once: ``x`` ``[N, ...]`` as the network takes it, ``y`` ``[N]``
            integer classes. A sample with a pooled feature that is not finite is left out, with a warning.
        loss: ``"hinge"``, or ``"cross_entropy"`` (multinomial) for comparison.
        pool: what the gates read of features, see `Pool`; by default means over a 2x2 grid.
        criterion: what their thresholds are compared with, see `Criterion`; training does not depend on it. The softmax
            criteria are meant for ``loss="cross_entropy"``.
        epochs: passes of mini-batch sub-gradient steps (Adam, step size falling to zero along a cosine).
        lr: the first step size, in the standardised space.
        l2: weight of the penalty on the squared norm of the weights; scikit-learn's ``C`` is ``1 / (n * l2)``.
        polish: at most about this many L-BFGS passes follow, fewer where they stop gaining; 0 for mini-batches alone.
        val_loader: data to report each gate's accuracy on; it has no other influence.
        device: where backbone and training run; the gates come back there.
        cache: ``"memory"``, or a directory where features stay: an interrupted fit goes on from there, and a later
            one with the same batches in the same order runs no backbone at all.
        cache_gb: the most that the features may take, in units of 1e9 bytes; those of ``val_loader`` come on top. With
            the default pool they are 4 float32 a sample and channel.
        seed: of the order of mini-batches; the same seed gives the same gates, bit for bit.
        progress: show progress on stderr, if that is a terminal.

    Returns:
        The gates; ``.reports`` tells how each did.

    Raises:
        ValueError, TypeError: for arguments or data that do not fit; the message names them.
    """
    pool, criterion, device = _check_arguments(staged, loss, pool, criterion, epochs, lr, l2, polish, device, cache_gb)
    identity: dict[str, object] = {}
    if cache != "memory":
        identity = {"fingerprint": staged.fingerprint(), "cuts": list(staged.cuts), "pool": pool.value}
    found: dict[str, Features] = {}
    for name, data in (("loader", loader), ("val_loader", val_loader)):
        if data is not None:
            folder = Path(cache) / name if cache != "memory" else None
            store = DiskCache(folder, cache_gb, identity) if folder else FeatureCache(cache_gb)
            try:
                found[name] = collect(staged, data, store, pool=pool, device=device, name=name, progress=progress)
            finally:
                store.close()
    training = found["loader"]
    kept = (training.labels != SKIP).nonzero()[:, 0]
    skipped = len(training.labels) - len(kept)
    if not len(kept):
        raise ValueError(f"loader: none of its {skipped} samples has finite features at every gate")
    if skipped:
        warnings.warn(f"loader: {skipped} samples with features that are not finite were left out", stacklevel=2)

    gates, reports = [], []
    for index, cut in enumerate(staged.cuts):
        start = time.perf_counter()
        features = training.gates[index]
        gate, reached = fit_gate(
            features,
            training.labels,
            training.classes,
            rows=kept,
            loss=loss,
            pool=pool,
            criterion=criterion,
            epochs=epochs,
            lr=lr,
            l2=l2,
            polish=polish,
            device=device,
            seed=seed,
            progress=f"gate {index} ({cut})" if progress else None,
        )
        report = GateReport(
            cut=cut,
            width=gate.width,
            samples=len(kept),
            skipped=skipped,
            objective=reached,
            accuracy=_accuracy(gate, features, training.labels) * len(training.labels) / len(kept),
            val_accuracy=_accuracy(gate, found["val_loader"].gates[index], found["val_loader"].labels)
            if val_loader is not None
            else None,
            seconds=time.perf_counter() - start,
        )
        validation = "" if report.val_accuracy is None else f", validation {report.val_accuracy:.4f}"
        note(f"gate {index} ({cut}): accuracy {report.accuracy:.4f}{validation}", progress)
        gates.append(gate)
        reports.append(report)
    return Gates(gates, reports)


def fit_gate(
    features: Tensor,  # [N, C] float32, pooled, on the CPU
    labels: Tensor,  # [N] int64
    classes: int,
    *,
    rows: Tensor,  # [M] int64; the samples to train on, none of them SKIP; one may come several times
    loss: str = "hinge",
    pool: Pool | str,
    criterion: Criterion | str = Criterion.MARGIN,
    epochs: int = 20,
    lr: float = 0.1,
    l2: float = 1e-3,
    polish: int = 200,
    device: torch.device | str = "cpu",
    seed: int = 0,
    progress: str | None = None,  # a name for the bar; none is shown without one
) -> tuple[Gate, float]:  # on ``device``; the objective that it reached, in the standardised space
    """Train one gate on features that are there already; everything else is as for `fit`."""
    problem = _Problem(features, labels, rows, classes, loss, l2, torch.device(device))
    steps = _solve(problem, epochs, lr, polish, torch.Generator().manual_seed(seed))
    for _ in track(steps, progress or "", epochs + polish // ROUND, progress is not None):
        pass
    gate = Gate(features.shape[1], classes, pool, criterion)
    gate.weight.data, gate.bias.data = fold(problem.weight, problem.bias, problem.mean, problem.scale)
    return gate.to(device), problem.objective()


def objective(
    weight: Tensor,  # [K, C]
    bias: Tensor,  # [K]
    features: Tensor,  # [N, C]; standardised, to compare with what `fit` minimises
    labels: Tensor,  # [N] int64
    l2: float,
    loss: str = "hinge",
) -> float:
    """The objective at the head of this file (or its cross-entropy form), in the space of ``features``."""
    value, _ = loss_and_slope(loss, features @ weight.T + bias, labels)
    return value.item() / len(labels) + l2 / 2 * weight.double().square().sum().item()


def loss_and_slope(
    loss: str,
    scores: Tensor,  # [N, K]
    labels: Tensor,  # [N] int64
    width: float = 0.0,
) -> tuple[Tensor, Tensor]:  # [] float64, [N, K]
    """The summed loss and a sub-gradient of it; the corner of the hinge is rounded over ``width``, if that is not 0."""
    target = labels[:, None]
    if loss == "cross_entropy":
        logarithms = scores.log_softmax(1)
        value = -logarithms.gather(1, target)
        return value.sum(dtype=torch.float64), logarithms.exp().scatter_add_(1, target, -torch.ones_like(value))
    sign = torch.full_like(scores, -1).scatter_(1, target, 1.0)
    violation = 1 - sign * scores
    slope = (violation / width).clamp(0, 1) if width else (violation > 0).to(scores.dtype)
    value = slope * (violation - width / 2 * slope)
    return value.sum(dtype=torch.float64), -sign * slope


def fold(
    weight: Tensor,  # [K, C], for standardised features
    bias: Tensor,  # [K]
    mean: Tensor,  # [C]
    scale: Tensor,  # [C] one over the deviation; 0 for a constant feature
) -> tuple[Tensor, Tensor]:  # [K, C], [K] float32, for features as they are
    """``weight @ ((x - mean) * scale) + bias`` as one linear map of ``x``, computed in float64."""
    raw = weight.double() * scale.double()
    return raw.float(), (bias.double() - raw @ mean.double()).float()


def moments(
    features: Tensor,  # [N, C] float32
    rows: Tensor,  # [M] int64
) -> tuple[Tensor, Tensor]:  # mean [C], scale [C] float32
    """Mean and one over the standard deviation of each feature over ``rows``; scale 0 where it is constant."""
    mean = torch.zeros(features.shape[1], dtype=torch.float64)
    squares = torch.zeros_like(mean)
    seen = 0
    for index in rows.split(_chunk_rows(features)):
        chunk = features[index].double()
        delta = chunk.mean(0) - mean
        squares += (chunk - chunk.mean(0)).square().sum(0) + delta.square() * (seen * len(index) / (seen + len(index)))
        mean += delta * (len(index) / (seen + len(index)))
        seen += len(index)
    deviation = (squares / seen).sqrt()
    constant = deviation <= 1e-6 * mean.abs()  # no more than the rounding of float32
    return mean.float(), torch.where(constant, 0.0, 1 / deviation).float()


class _Problem:
    """The objective of one gate over cached features, and the hyperplanes sought."""

    def __init__(
        self, features: Tensor, labels: Tensor, rows: Tensor, classes: int, loss: str, l2: float, device: torch.device
    ) -> None:
        self.features, self.labels, self.rows = features, labels, rows
        self.loss, self.l2, self.device = loss, l2, device
        self.mean, self.scale = (moment.to(device) for moment in moments(features, rows))
        self.weight = torch.zeros(classes, features.shape[1], device=device)
        self.bias = torch.zeros(classes, device=device)

    def differentiate(self, rows: Tensor, width: float = 0.0) -> Tensor:  # [] float64
        """The objective over ``rows``; its sub-gradient goes to ``weight.grad`` and ``bias.grad``."""
        value = self.l2 / 2 * self.weight.square().sum(dtype=torch.float64)
        self.weight.grad = self.l2 * self.weight
        self.bias.grad = torch.zeros_like(self.bias)
        for index in rows.split(_chunk_rows(self.features)):
            standard = self.features[index].to(self.device).sub_(self.mean).mul_(self.scale)
            scores = torch.addmm(self.bias, standard, self.weight.T)
            part, slope = loss_and_slope(self.loss, scores, self.labels[index].to(self.device), width)
            value += part / len(rows)
            self.weight.grad.addmm_(slope.T, standard, alpha=1 / len(rows))
            self.bias.grad += slope.sum(0) / len(rows)
        return value

    def objective(self) -> float:
        return self.differentiate(self.rows).item()


def _solve(problem: _Problem, epochs: int, lr: float, polish: int, generator: torch.Generator) -> Iterator[None]:
    """Minimise; yields after every epoch and every `ROUND` iterations."""
    count = len(problem.rows)
    batch = min(max(64, count // 32), 4096)
    parameters = [problem.weight, problem.bias]
    adam = torch.optim.Adam(parameters, lr=lr)
    total = epochs * math.ceil(count / batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, total)
    for _ in range(epochs):
        for rows in problem.rows[torch.randperm(count, generator=generator)].split(batch):
            problem.differentiate(rows)
            adam.step()
            schedule.step()
        yield
    widths = SMOOTHING if problem.loss == "hinge" else (0.0,)
    for width in widths:
        lbfgs = torch.optim.LBFGS(
            parameters, max_iter=ROUND, tolerance_grad=1e-9, tolerance_change=1e-9, line_search_fn="strong_wolfe"
        )
        before = math.inf
        for _ in range(math.ceil(polish / ROUND / len(widths))):
            value = lbfgs.step(lambda width=width: problem.differentiate(problem.rows, width)).item()  # at its start
            yield
            if value > before * (1 - CONVERGED):
                break
            before = value


def _accuracy(gate: Gate, features: Tensor, labels: Tensor) -> float:
    """The share of samples whose largest distance is their class's; one to skip counts as wrong."""
    weight, bias = gate.weight.detach(), gate.bias.detach()
    correct = 0
    for rows in torch.arange(len(labels)).split(_chunk_rows(features)):
        distances = torch.addmm(bias, features[rows].to(weight.device), weight.T)
        correct += int((margin_and_label(distances)[1].cpu() == labels[rows]).sum())
    return correct / len(labels)


def _check_arguments(
    staged: StagedModel,
    loss: str,
    pool: Pool | str,
    criterion: Criterion | str,
    epochs: int,
    lr: float,
    l2: float,
    polish: int,
    device: torch.device | str,
    cache_gb: float,
) -> tuple[Pool, Criterion, torch.device]:
    wanted = check_staged(staged, device)
    if staged.gate_count == 0:
        raise ValueError("staged: expected at least one cut to put a gate at, got none")
    if loss not in LOSSES:
        raise ValueError(f"loss: expected one of {LOSSES}, got {loss!r}")
    if pool not in (pools := [known.value for known in Pool]):
        raise ValueError(f"pool: expected one of {pools}, got {pool!r}")
    if criterion not in (criteria := [known.value for known in Criterion]):
        raise ValueError(f"criterion: expected one of {criteria}, got {criterion!r}")
    if epochs < 1 or polish < 0:
        raise ValueError(f"epochs, polish: expected at least 1 and 0, got {epochs} and {polish}")
    for name, value, least in (("lr", lr, "above 0"), ("cache_gb", cache_gb, "above 0"), ("l2", l2, "at least 0")):
        if not (value > 0 or (name == "l2" and value == 0)) or (name != "cache_gb" and math.isinf(value)):
            raise ValueError(f"{name}: expected a number {least}, got {value}")
    return Pool(pool), Criterion(criterion), wanted


def _chunk_rows(features: Tensor) -> int:
    return max(1, CHUNK_BYTES // (4 * features.shape[1]))
