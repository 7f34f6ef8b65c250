"""One sample at a time: for one that leaves at the first gate, and one that runs to the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from dgate_rt.bench.cases import Case
from dgate_rt.bench.peers import EarlyonBatched, no_earlyon
from dgate_rt.bench.record import Row
from dgate_rt.bench.ways import DENSE, GATED, Ways, whole
from dgate_rt.bench.workload import NO_EXIT, Mix
from dgate_rt.timing import Timing

PERCENTILES = (50, 95, 99)
EARLY: Mix = (1.0, 0.0, 0.0, 0.0)
BESIDE_EARLYON = "time as a multiple of earlyon's"


def measure_latency(case: Case, engine: str, dtype: str, calls: int) -> list[Row]:
    """Calls with one sample, all ways in turn.

    Whoever leaves early passes one gate; whoever runs to the end passes them all. `earlyon` is timed where stages run
    eagerly in float32, the only way that it has.
    """
    ways = Ways(case, engine, dtype, 1, 1)
    jobs: list[tuple[str, Mix, Callable[[Tensor], object]]] = [(DENSE, (), ways.checked(DENSE, whole(case), "dense"))]
    for mix in (EARLY, NO_EXIT):
        program = ways.work.program(mix)
        jobs += [(executor, mix, ways.checked(executor, program, executor)) for executor in GATED]
        if (engine, dtype) == ("eager", "float32") and not no_earlyon():
            jobs.append((EarlyonBatched.name, mix, EarlyonBatched(ways.work.workload, mix)))
    (x,) = ways.work.batches
    spent = _turns([run for *_, run in jobs], x, calls)
    timings = {(name, mix): Timing.of(rounds) for (name, mix, _), rounds in zip(jobs, spent, strict=True)}
    rows = []
    for (name, mix), timing in timings.items():
        percentiles = np.percentile(timing.rounds, PERCENTILES)
        values = {f"p{p} ms": float(ms) for p, ms in zip(PERCENTILES, percentiles, strict=True)}
        over = {} if name == DENSE else {DENSE: timings[DENSE, ()].ratio(timing)}
        if (EarlyonBatched.name, mix) in timings:
            values[BESIDE_EARLYON] = timing.ratio(timings[EarlyonBatched.name, mix])
        rows.append(Row("latency", case.network.name, engine, dtype, name, 1, mix, timing, over, values))
    if (engine, dtype) == ("eager", "float32") and no_earlyon():
        rows.append(Row("latency", case.network.name, engine, dtype, EarlyonBatched.name, 1, note=no_earlyon()))
    return rows


def _turns(jobs: Sequence[Callable[[Tensor], object]], x: Tensor, calls: int) -> list[list[float]]:
    """Milliseconds of every call of every job, after a few that do not count."""
    spent: list[list[float]] = [[] for _ in jobs]
    for call in range(-3, calls):
        for job, times in zip(jobs, spent, strict=True):
            start = time.perf_counter()
            job(x)
            if call >= 0:
                times.append(1e3 * (time.perf_counter() - start))
    return spent
