"""The ways to run a network on the same images: dense, gated by each executor, and what a user could write instead.

Every way here but `earlyon` is checked against dense execution with post-hoc gating before it is timed. Ways of one
network are timed in turn, in one process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dgate_rt import GateProgram, Runtime, StagedModel, compile
from dgate_rt.bench import cases
from dgate_rt.bench.cases import Case
from dgate_rt.bench.record import Row
from dgate_rt.bench.workload import NO_EXIT, Mix
from dgate_rt.engines import ENGINES, StageEngine
from dgate_rt.engines.base import name_of
from dgate_rt.executors import Predictions
from dgate_rt.files import gates_off
from dgate_rt.staged import Boundary
from dgate_rt.timing import interleaved

DENSE, CHUNKED, LOSING_OFF = "dense", "dense, chunked", "refill, losing gates off"
GATED = ("eager", "refill")


@dataclass(frozen=True)
class Way:
    """One job of a round: all images once."""

    name: str
    mix: Mix
    run: Callable[[], object]
    cost: float | None = None  # FLOPs as a share of the dense network's


class Ways:
    """Ways to run one network with one engine at one batch size.

    Args:
        case: the network.
        engine: of the stages, by name.
        dtype: that they compute in.
        batch_size: how many images at once.
        images: how many a round takes at least.
    """

    def __init__(self, case: Case, engine: str, dtype: str, batch_size: int, images: int) -> None:
        self.case, self.engine, self.dtype, self.batch_size = case, engine, dtype, batch_size
        self.work = cases.measure(case, batch_size, images, 1, getattr(torch, dtype))
        self.ways: list[Way] = []

    @property
    def count(self) -> int:
        """Images of a round."""
        return len(self.work.workload.images)

    def compile(self, program: GateProgram, executor: str, **more: Any) -> Runtime:
        """`dgate_rt.compile`, whose stages are compiled once for all programs of this process."""
        engine = self.engine if self.engine == "eager" else kept(self.engine)
        return compile(program, executor=executor, batch_size=self.batch_size, dtype=self.dtype, engine=engine, **more)

    def checked(self, name: str, program: GateProgram, executor: str, **more: Any) -> Runtime:
        """A program compiled, whose answers are right."""
        run = self.compile(program, executor, **more)
        self.check(name, map(run, self.work.batches), program)
        return run

    def add_dense(self) -> None:
        """The network as one piece, every image through all of it."""
        self._add(DENSE, (), self.checked(DENSE, whole(self.case), "dense"), 1.0)

    def add_chunked(self) -> None:
        """The same network, each stage at the chunk size that suits it: `refill` with every gate off."""
        self._add(CHUNKED, (), self.checked(CHUNKED, self.case.program, "refill"), 1.0)

    def add_gated(self, executor: str, mix: Mix) -> None:
        """The gated network at thresholds that give the mix."""
        program = self.work.program(mix)
        self._add(executor, mix, self.checked(executor, program, executor), self.work.cost(program))

    def add_losing(self) -> None:
        """A program whose gates nobody leaves at, where the runtime switches off those that lose time: all of them."""
        program = self.work.program(NO_EXIT)
        self._add(LOSING_OFF, (), self.checked(LOSING_OFF, program, "refill", losing_gates="off"), 1.0)

    def add_leaving(self, gate: int) -> None:
        """All images leave at one gate, and no other is on: what the stages up to there take."""
        thresholds = tuple(-np.inf if g == gate else np.inf for g in range(len(self.case.program.gates)))
        shares = tuple(float(g == gate) for g in range(len(thresholds) + 1))
        point = replace(self.case.program.point, thresholds=thresholds, shares=shares)
        program = replace(self.case.program, thresholds=thresholds, point=point)
        name = f"refill, all leave at gate {gate + 1}"
        self._add(name, shares, self.checked(name, program, "refill"))

    def add_peer(self, name: str, mix: Mix, make: Callable[[GateProgram], Callable[[Tensor], Predictions]]) -> None:
        """What a user could write instead."""
        program = self.work.program(mix)
        run = make(program)
        self.check(name, map(run, self.work.batches), program)
        self._add(name, mix, run, self.work.cost(program))

    def add_unchecked(self, name: str, mix: Mix, run: Callable[[Tensor], object]) -> None:
        """The one exception, `earlyon`: its batches leave whole, by a rule of its own, so their answers are not ours.

        Neither are its FLOPs those of the mix.
        """
        self._add(name, mix, run)

    def check(self, name: str, answers: Iterable[Predictions], program: GateProgram) -> None:
        """Refuse wrong answers to the batches; those of a network without gates are those with every gate off.

        Raises:
            RuntimeError: if exits, labels and scores are not those of dense execution with post-hoc gating.
        """
        gates_off, answers = self.case.program.thresholds, list(answers)
        if not program.gates:
            answers = [replace(a, exits=a.exits + len(gates_off)) for a in answers]
        wrong = self.work.wrong(answers, program.thresholds or gates_off)
        if wrong:
            raise RuntimeError(f"will not time wrong answers: {name} answers {wrong} of {self.count} differently")

    def _add(self, name: str, mix: Mix, run: Callable[[Tensor], object], cost: float | None = None) -> None:
        self.ways.append(Way(name, mix, functools.partial(_over, self.work.batches, run), cost))


def measure(part: str, groups: Sequence[Ways], repeats: int) -> list[Row]:
    """Time all ways of all groups in turn; a row each, with its speed-up over the dense ways of its own group.

    Of several groups each row also has its speed-up over the best dense way of the first group's network.
    """
    found = [(group, way) for group in groups for way in group.ways]
    timings = interleaved([way.run for _, way in found], repeats)
    a_sample = [timing.per(group.count) for (group, _), timing in zip(found, timings, strict=True)]
    dense = [i for i, (_, way) in enumerate(found) if way.name in (DENSE, CHUNKED)]
    same = [i for i in dense if found[i][0].case.network == groups[0].case.network]
    best = min(same, key=lambda i: a_sample[i].median)
    rows = []
    for (group, way), ms in zip(found, a_sample, strict=True):
        own = {found[i][1].name: a_sample[i] for i in dense if found[i][0] is group}
        over = {name: 1 / ms.ratio(baseline) for name, baseline in own.items() if name != way.name}
        if len(groups) > 1:
            over["best dense"] = 1 / ms.ratio(a_sample[best])
        values = {}
        if way.cost is not None:
            values["gflops"] = way.cost * group.case.program.costs.dense / 1e9
        if way.cost is not None and way.cost < 1 and way.mix and way.mix != NO_EXIT:
            values |= {f"realisation over {n}": (1 - ms.ratio(b)) / (1 - way.cost) for n, b in own.items()}
        name = group.case.network.name
        rows.append(Row(part, name, group.engine, group.dtype, way.name, group.batch_size, way.mix, ms, over, values))
    return rows


def whole(case: Case) -> GateProgram:
    """The network as one stage, without gates."""
    return gates_off(StagedModel([case.exact]).eval(), [], case.images(1))


def _over(batches: Sequence[Tensor], run: Callable[[Tensor], object]) -> None:
    for batch in batches:
        run(batch)


@functools.cache
def kept(name: str) -> StageEngine:
    """An engine that compiles the same stage once for all runtimes of this process."""
    return Kept(ENGINES[name]())


class Kept:
    """What an engine made, by stage, example and sizes; the stages of two copies of a network are the same."""

    def __init__(self, engine: StageEngine) -> None:
        self.name, self._engine = name_of(engine), engine
        self.any_size, self.own_threads = (getattr(engine, what, False) for what in ("any_size", "own_threads"))
        self.packages = getattr(engine, "packages", None)
        self._made: dict[object, Callable[..., Boundary]] = {}

    def __call__(self, stage: nn.Module, example: tuple[Tensor, ...], sizes: Sequence[int]) -> Callable[..., Boundary]:
        shapes = tuple((tuple(t.shape[1:]), t.dtype, t.stride()) for t in example)
        key = StagedModel([stage]).fingerprint(), shapes, tuple(sizes)
        if key not in self._made:
            self._made[key] = self._engine(stage, example, sizes)
        return self._made[key]
