"""Freed memory stays with the process: seen by the page faults that large tensors cost, in processes of their own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

import dgate_rt as dg
from dgate_rt import allocator

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")

MEASURE = """
import ctypes, resource, threading, torch
from dgate_rt import allocator

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a huge page is one fault

def faults(count=5, megabytes=64):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        torch.empty(megabytes * 2**18).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20

faults()
print(faults(), allocator.keep_freed_memory(), allocator.freed_memory())
settle = lambda: [faults() for _ in range(4)]  # small blocks settle between the large ones first, which moves those
settle()
print(faults(), allocator.keep_freed_memory())
thread = threading.Thread(target=lambda: (settle(), print(faults())))
thread.start()
thread.join()
held = resident()
allocator.give_back_freed_memory()
print(held - resident())
"""


SETTINGS = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")


def measured(**environment: str) -> list[list[str]]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(SETTINGS)}
    run = subprocess.run(
        [sys.executable, "-c", MEASURE], env={**kept, **environment}, capture_output=True, text=True, check=True
    )
    return [line.split(" ", 2) for line in run.stdout.splitlines()]


def test_large_tensors_are_made_of_pages_that_are_there():
    before, after, (in_a_thread,), (given_back,) = measured()
    assert before[1:] == ["True", "stays with the process"]
    assert after[1] == "True"
    pages = 5 * 64 * 2**20 // os.sysconf("SC_PAGE_SIZE")
    assert int(before[0]) > pages / 2
    assert max(int(after[0]), int(in_a_thread)) < pages / 20
    assert float(given_back) > 32  # MiB


@pytest.mark.parametrize(
    "environment",
    [
        {"MALLOC_TRIM_THRESHOLD_": "100000"},
        {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2:glibc.malloc.mmap_max=10"},
        {"LD_PRELOAD": "libnone-jemalloc.so"},
    ],
    ids=lambda e: next(iter(e)),
)
def test_what_the_environment_says_holds(environment):
    assert measured(**environment)[0][1:] == ["False", "as the environment says"]


def test_a_program_that_is_compiled_says_where_freed_memory_goes(monkeypatch, tiny_program):
    monkeypatch.setattr(allocator, "_state", {"kept": False})
    for name in [name for name in os.environ if name.startswith(SETTINGS)]:
        monkeypatch.delenv(name)
    assert "freed memory goes back to the system" in dg.compile(tiny_program, keep_memory=False).describe()
    assert "freed memory stays with the process" in dg.compile(tiny_program).describe()


@pytest.fixture
def tiny_program():
    from programs import make_program, random_gates

    x = torch.randn(8, 4)
    staged = dg.StagedModel([torch.nn.Linear(4, 6), torch.nn.Linear(6, 3)]).eval()
    return make_program(staged, random_gates(staged, x, classes=3), (0.5,), x)
