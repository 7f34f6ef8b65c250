"""Streams of batches of one size: throughput, and how long a sample waits for its answer, `eager` against `refill`.

`refill` runs twice: with batches that wait until their chunks are full, and with a bound on how long they do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import numpy as np
from torch import Tensor

from dgate_rt import Predictions
from dgate_rt.bench.cases import Case
from dgate_rt.bench.record import Row
from dgate_rt.bench.ways import GATED, Ways
from dgate_rt.bench.workload import Mix
from dgate_rt.timing import Timing

ARRIVING = (1, 2, 4, 8, 16, 32, 64, 128)
CHUNK = 64  # the most that runs at once
MAX_WAIT = 8
BOUNDED = f"refill, max_wait={MAX_WAIT}"
Stream = Callable[[Iterator[Tensor]], Iterable[Predictions]]
BESIDE_FULL = f"time as a multiple of batches of {CHUNK}"


def measure_streams(
    case: Case, engine: str, dtype: str, images: int, mix: Mix, repeats: int, arriving: Sequence[int] = ARRIVING
) -> list[Row]:
    """Batches of every size, each the next as soon as it is asked for, through `Runtime.stream`.

    A sample's latency runs from when its batch was taken to when its answers came out, in order.
    """
    ways = Ways(case, engine, dtype, CHUNK, images)
    program = ways.work.program(mix)
    runs = {executor: ways.compile(program, executor) for executor in GATED}
    streams: dict[str, Stream] = {executor: run.stream for executor, run in runs.items()}
    streams[BOUNDED] = partial(runs["refill"].stream, max_wait=MAX_WAIT)
    x = ways.work.workload.images
    for way, stream in streams.items():
        for size in arriving:
            ways.check(f"{way} in batches of {size}", stream(iter(x.split(size))), program)
    jobs = [
        (way, size, partial(_through, stream, x.split(size))) for size in arriving for way, stream in streams.items()
    ]
    passes = _passes([job for *_, job in jobs], repeats)
    by_job = {(name, size): p for (name, size, _), p in zip(jobs, passes, strict=True)}
    rows = []
    for (name, size), (totals, latencies) in by_job.items():
        full = by_job[name, CHUNK][0] if (name, CHUNK) in by_job else totals
        over = {"eager": float(np.median(np.divide(by_job["eager", size][0], totals)))} if name != "eager" else {}
        p50, p99 = np.percentile(latencies, (50, 99))
        values = {
            "p50 latency ms": float(p50),
            "p99 latency ms": float(p99),
            BESIDE_FULL: float(np.median(np.divide(totals, full))),
        }
        ms = Timing.of(totals).per(len(x))
        rows.append(Row("streams", case.network.name, engine, dtype, name, size, mix, ms, over, values))
    return rows


def _passes(
    jobs: Sequence[Callable[[], tuple[float, list[float]]]], repeats: int
) -> list[tuple[list[float], list[float]]]:
    """For each job the milliseconds of every round and the latencies of all its samples; the first round warms up."""
    found: list[tuple[list[float], list[float]]] = [([], []) for _ in jobs]
    for turn in range(-1, repeats):
        for job, (totals, latencies) in zip(jobs, found, strict=True):
            total, waited = job()
            if turn >= 0:
                totals.append(total)
                latencies.extend(waited)
    return found


def _through(stream: Stream, batches: Sequence[Tensor]) -> tuple[float, list[float]]:
    """Milliseconds for all batches, and the latency of every sample."""
    taken: list[float] = []

    def source() -> Iterator[Tensor]:
        for batch in batches:
            taken.append(time.perf_counter())
            yield batch

    start, waited = time.perf_counter(), []
    for index, answers in enumerate(stream(source())):
        waited += [1e3 * (time.perf_counter() - taken[index])] * len(answers)
    return 1e3 * (time.perf_counter() - start), waited
