"""Gated against dense execution at the exit mixes of the paper's Table 1, and with no exit at all.

For every batch size, in one process and in turn: the dense network, the gated runtime, the masked loop that a user
would write, and earlyon. Two ratios say how much of the possible saving was realised:

    realisation      = (1 - t_gated / t_dense) / (1 - F_gated / F_dense)         the paper's own is 0.99
    time realisation = (t_dense - t_gated) / (t_dense - t_ideal)

where times are compared round by round, and ``t_ideal`` sums, over the stages, the share of samples that reach a stage
times that stage's dense time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dgate_rt import compile
from dgate_rt.bench.peers import EarlyonBatched, MaskedLoop
from dgate_rt.bench.workload import NO_EXIT, PAPER_MIXES, Mix, Workload, resnet101_workload
from dgate_rt.engines import EngineStages
from dgate_rt.executors import Predictions
from dgate_rt.program import GateProgram
from dgate_rt.runtime import Runtime
from dgate_rt.timing import Timing, interleaved

BATCH_SIZES = (1, 8, 32, 64, 128)
MIXES = (*PAPER_MIXES, NO_EXIT)


@dataclass(frozen=True)
class Row:
    """One engine at one batch size and exit mix. Times are milliseconds a sample."""

    batch_size: int
    mix: Mix  # shares of (gate 1, gate 2, gate 3, end)
    engine: str
    executor: str | None  # of dgate_rt; None for peers
    gflops: float | None  # mean a sample, gates included; None where the peer does not follow the mix
    ms: Timing
    speed_up: float  # dense / this, median over the rounds
    realisation: float | None  # None where nobody leaves
    time_realisation: float | None

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def run(
    batch_sizes: Sequence[int] = BATCH_SIZES,
    mixes: Sequence[Mix] = MIXES,
    repeats: int = 5,
    images: int = 64,
    on_round: Callable[[], object] | None = None,
    engine: str = "eager",
    dtype: str | None = None,
) -> Iterator[Row]:
    """Measure and yield rows, dense first, batch size after batch size; each round runs at least ``images`` images.

    Dense and gated run on ``engine`` in ``dtype``. The peers run on eager in float32, and are left out beside another.

    Raises:
        RuntimeError: before any timing, if gated answers differ from dense execution with post-hoc gating.
    """
    workload = resnet101_workload(max(images, *batch_sizes))
    for batch_size in batch_sizes:
        yield from _rows(workload.first(max(images, batch_size)), batch_size, mixes, repeats, on_round, engine, dtype)


def _rows(
    workload: Workload,
    batch_size: int,
    mixes: Sequence[Mix],
    repeats: int,
    on_round: Callable[[], object] | None,
    engine: str,
    dtype: str | None,
) -> Iterator[Row]:
    batches, count = workload.images.split(batch_size), len(workload.images)
    beside_peers = engine == "eager" and dtype is None
    options: Any = {"batch_size": batch_size, "engine": engine, "dtype": dtype}
    dense = compile(workload.program, executor="dense", **options)
    gated = compile(workload.program, executor="eager", **options)
    workload = workload if beside_peers else workload.on(gated.stages)
    engines: list[tuple[Mix, str, str | None, Callable[[Tensor], object]]] = [((), "dense", "dense", dense)]
    thresholds = {mix: workload.thresholds(mix) for mix in mixes}
    for mix in mixes:
        program = workload.at(thresholds[mix])
        at = _At(gated, program.thresholds)
        refuse_wrong_answers(workload, program, at, batches)
        engines.append((mix, "dgate_rt", gated.executor, at))
        if beside_peers:
            masked = MaskedLoop(program)
            refuse_wrong_answers(workload, program, masked, batches)
            engines.append((mix, MaskedLoop.name, None, masked))
    if beside_peers:
        engines.append((mixes[0], EarlyonBatched.name, None, EarlyonBatched(workload, mixes[0])))

    clock = _StageClock(dense.stages, batches)
    jobs = [_over(batches, engine) for *_, engine in engines]
    timings = interleaved([*jobs, clock], repeats, on_round)
    stage_share, costs = clock.shares(), workload.program.costs
    for (mix, name, executor, _), timing in zip(engines, timings, strict=False):
        ms, ratio = timing.per(count), timing.ratio(timings[0])
        if name == "dense":
            yield Row(batch_size, NO_EXIT, name, executor, costs.dense / 1e9, ms, 1.0, None, None)
            continue
        if name == EarlyonBatched.name:  # a batch exits as one, so neither FLOPs nor ideal are those of the mix
            yield Row(batch_size, mix, name, executor, None, ms, 1 / ratio, None, None)
            continue
        shares = workload.shares(thresholds[mix])
        reach = 1 - np.concatenate([[0.0], np.cumsum(shares[:-1])])
        flops = float(reach @ np.array(costs.stages) + reach[:-1] @ np.array(costs.gates))
        realisation = time_realisation = None
        if mix != NO_EXIT:
            realisation = (1 - ratio) / (1 - flops / costs.dense)
            time_realisation = (1 - ratio) / (1 - float(reach @ stage_share))
        yield Row(batch_size, mix, name, executor, flops / 1e9, ms, 1 / ratio, realisation, time_realisation)


def refuse_wrong_answers(
    workload: Workload,
    program: GateProgram,
    engine: Callable[[Tensor], Predictions],
    batches: Sequence[Tensor],
) -> None:
    """Raise unless exits, labels and scores are those of dense execution with post-hoc gating."""
    answers = [engine(batch) for batch in batches]
    exits, labels, scores = (torch.cat([getattr(a, name) for a in answers]) for name in ("exits", "labels", "scores"))
    expected = workload.expected(program.thresholds)
    wrong = (exits != expected.exits) | (labels != expected.labels)
    wrong |= ~torch.isclose(scores, expected.scores, rtol=1e-3, atol=1e-3)
    if wrong.any():
        raise RuntimeError(f"will not time wrong answers: {int(wrong.sum())} of {len(wrong)} samples differ")


class _At:
    """One runtime at other thresholds; to prepare a network on an engine for every mix would be dear."""

    def __init__(self, runtime: Runtime, thresholds: Sequence[float]) -> None:
        self.runtime, self.thresholds = runtime, thresholds

    def __call__(self, x: Tensor) -> Predictions:
        if self.runtime.thresholds != self.thresholds:
            self.runtime.set_thresholds(self.thresholds)
        return self.runtime(x)


class _StageClock:
    """A dense pass that notes the time of each stage, round after round."""

    def __init__(self, staged: EngineStages, batches: Sequence[Tensor]) -> None:
        self.staged = staged
        casts = (batch.to(staged.input_dtype) for batch in batches)
        self.batches = [batch.contiguous(memory_format=torch.channels_last) for batch in casts]
        self.rounds: list[np.ndarray] = []

    @torch.inference_mode()
    def __call__(self) -> None:
        spent = np.zeros(len(self.staged.stages))
        for boundary in self.batches:
            for index in range(len(spent)):
                start = time.perf_counter()
                boundary = self.staged.run_stage(index, boundary)
                spent[index] += time.perf_counter() - start
        self.rounds.append(spent)

    def shares(self) -> np.ndarray:
        """Each stage's share of the dense time; the first round was warm-up."""
        spent = np.median(np.array(self.rounds[1:]), axis=0)
        return spent / spent.sum()


def _over(batches: Sequence[Tensor], engine: Callable[[Tensor], object]) -> Callable[[], None]:
    def job() -> None:
        for batch in batches:
            engine(batch)

    return job
