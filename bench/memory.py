"""Peak memory and cost by batch size, each way in a process of its own (Linux).

    python -m dgate_rt.bench.memory WAY BATCH_SIZE DTYPE

prints one JSON object: resident MiB after one sample, with what was freed given back, the peak while batches run, what
arenas hold of that, and milliseconds a sample.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from dgate_rt.allocator import give_back_freed_memory
from dgate_rt.bench.cases import RESNET_101, make_case
from dgate_rt.bench.record import Row
from dgate_rt.bench.ways import CHUNKED, DENSE, GATED, Ways, whole
from dgate_rt.bench.workload import PAPER_MIXES
from dgate_rt.executors.refill import RefillExecutor
from dgate_rt.timing import Timing, interleaved

MIX = PAPER_MIXES[1]
FRESH_PAGES = "dense, freed memory given back"
STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
WAYS = (DENSE, FRESH_PAGES, CHUNKED, "eager", "refill")


def measure_memory(way: str, batch_size: int, dtype: str) -> Row:
    """One way at one batch size, eager engine, in a child process; only a note where the system does not tell peaks.

    Raises:
        subprocess.CalledProcessError: if the child fails; its error goes to standard error.
    """
    row = Row("memory", RESNET_101.name, "eager", dtype, way, batch_size, MIX if way in GATED else ())
    if not (STATUS.exists() and "VmHWM" in STATUS.read_text() and os.access(FORGET, os.W_OK)):
        return replace(row, note=f"skipped: only Linux tells a process's peak memory, in {STATUS} and {FORGET}")
    command = [sys.executable, "-m", "dgate_rt.bench.memory", way, str(batch_size), dtype]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    ms = Timing.of(found.pop("ms"))
    return replace(row, ms=ms, values=found)


def _status_mib(field: str) -> float:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def _child(way: str, batch_size: int, dtype: str) -> None:
    ways = Ways(make_case(RESNET_101, "cpu", torch.float32), "eager", dtype, batch_size, batch_size)
    if way in GATED:
        program, executor = ways.work.program(MIX), way
    else:
        program, executor = (ways.case.program, "refill") if way == CHUNKED else (whole(ways.case), "dense")
    compiled = functools.partial(ways.compile, program, executor, keep_memory=way != FRESH_PAGES)
    ways.check(way, map(compiled(), ways.work.batches), program)  # by a runtime of its own: arenas are kept
    run = compiled()
    (x,) = ways.work.batches
    run(x[:1])
    give_back_freed_memory()  # or what was freed before would be room that no batch needs
    FORGET.write_text("5")  # the peak so far
    idle = _status_mib("VmRSS:")
    (timing,) = interleaved([lambda: run(x)], repeats=3)
    peak = _status_mib("VmHWM:")
    found = {"idle MiB": idle, "peak MiB": peak, "above idle MiB": peak - idle, "ms": timing.per(batch_size).rounds}
    if isinstance(run._executor, RefillExecutor):
        found["arenas MiB"] = run._executor.held_bytes() / 2**20
    print(json.dumps(found))


if __name__ == "__main__":
    _child(sys.argv[1], int(sys.argv[2]), sys.argv[3])
