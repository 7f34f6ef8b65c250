"""Times that can be compared: jobs run in turn in one process, medians with their spread."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dgate_rt.allocator import freed_memory


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one job over several rounds."""

    median: float
    p20: float
    p80: float
    rounds: tuple[float, ...] = ()

    @classmethod
    def of(cls, rounds: Sequence[float]) -> Timing:
        """The summary of the times of all rounds, in the order in which they were taken."""
        p20, median, p80 = map(float, np.percentile(rounds, [20, 50, 80]))
        return cls(median, p20, p80, tuple(map(float, rounds)))

    def per(self, count: int) -> Timing:
        """The same times for one of ``count`` equal parts of the job."""
        return Timing.of([ms / count for ms in self.rounds])

    def ratio(self, baseline: Timing) -> float:
        """Median over the rounds of this time by the baseline's of the same round: drift of the machine cancels."""
        return float(np.median(np.divide(self.rounds, baseline.rounds)))


def interleaved(
    jobs: Sequence[Callable[[], object]], repeats: int = 5, on_round: Callable[[], object] | None = None
) -> list[Timing]:
    """Run all jobs in turn, ``repeats`` rounds after one warm-up, so that a slow spell of the machine meets all alike.

    On CUDA each job is timed to its end on the device. ``on_round`` is called after every round.
    """
    samples = np.empty((repeats, len(jobs)))
    for round_index in range(-1, repeats):
        for job_index, job in enumerate(jobs):
            start = time.perf_counter()
            job()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            if round_index >= 0:
                samples[round_index, job_index] = 1e3 * (time.perf_counter() - start)
        if on_round is not None:
            on_round()
    return [Timing.of(rounds) for rounds in samples.T]


def machine_header() -> dict[str, Any]:
    """What a measurement must say about where it was made.

    A CPU's name does not say which instructions it has: virtual machines of one name differ.
    """
    from dgate_rt.engines.precision import supports_bfloat16

    return {
        "cpu": _cpu_name(),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": "native" if supports_bfloat16(torch.device("cpu")) else None,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "freed_memory": freed_memory(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.system(),
    }


def driver_cuda_version() -> tuple[int, int] | None:
    """The CUDA version of the driver, read without touching a device; None without a driver."""
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            library, version = ctypes.CDLL(name), ctypes.c_int()
        except OSError:
            continue
        if library.cuDriverGetVersion(ctypes.byref(version)) == 0:
            return version.value // 1000, version.value % 1000 // 10
    return None


def commit() -> str | None:
    """The commit of the checkout that this package runs from, "-dirty" if it has changes; None outside of one."""
    here = Path(__file__).resolve()
    git = ["git", "-C", str(here.parent)]
    try:
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=False)
        if tracked.returncode:  # installed into an environment that lies in some checkout
            return None
        describe = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:
        return None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
