"""Peak memory of dense and gated execution, each in a process of its own (Linux).

    python -m dgate_rt.bench.memory dense|eager BATCH_SIZE

prints one JSON object: resident MiB before the first batch, and the peak while batches run.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from dgate_rt import compile
from dgate_rt.bench.workload import PAPER_MIXES, resnet101_workload


@dataclass(frozen=True)
class Peak:
    """Resident memory of one process, MiB."""

    idle: float
    peak: float


def measure(executor: str, batch_size: int) -> Peak:
    """Peak memory of an executor at the second exit mix of the paper, measured in a child process.

    Raises:
        OSError: where the system has no ``/proc/self/status``.
        subprocess.CalledProcessError: if the child fails; its error goes to standard error.
    """
    if not Path("/proc/self/status").exists():
        raise OSError("memory: expected Linux, whose /proc/self/status tells a process's peak memory")
    command = [sys.executable, "-m", "dgate_rt.bench.memory", executor, str(batch_size)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return Peak(**json.loads(output))


def _status_mib(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def _child(executor: str, batch_size: int) -> None:
    workload = resnet101_workload(batch_size)
    program = workload.at(workload.thresholds(PAPER_MIXES[1]))
    run, images = compile(program, batch_size=batch_size, executor=executor), workload.images
    run(images[:1])
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    idle = _status_mib("VmRSS:")
    for _ in range(3):
        run(images)
    print(json.dumps({"idle": idle, "peak": _status_mib("VmHWM:")}))


if __name__ == "__main__":
    _child(sys.argv[1], int(sys.argv[2]))
