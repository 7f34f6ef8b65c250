"""The tests of the route on CUDA notice its faults: each planted here is caught, by the mode that the table names."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import simt_harness
import torch
from route_cases import Case, Sizes, buffer, check, draw_case, expect, make_case
from simt_harness import CSRC, MODES, ORDERS, Harness, KernelError

KERNEL, RULES = "cuda/route.cuh", "route.h"
Expected = tuple[Case, tuple[Case, tuple[int, int] | None]]  # before, after and what the switch is told


@dataclass(frozen=True)
class Mutant:
    """``old`` stands ``times`` times in the file; the one with this index becomes ``new``."""

    name: str
    old: str
    new: str
    times: int = 1
    index: int = 0
    file: str = KERNEL
    equivalent: str = ""  # why nothing can tell it from the kernel

    def __str__(self) -> str:
        return self.name

    def text(self) -> str:
        source = (CSRC / self.file).read_text()
        parts = source.split(self.old)
        assert len(parts) == self.times + 1, f"{self.name}: {self.old!r} stands {len(parts) - 1} times in {self.file}"
        head, tail = self.old.join(parts[: self.index + 1]), self.old.join(parts[self.index + 1 :])
        return head + self.new + tail


M = Mutant
MUTANTS = [
    M("no barrier after the verdicts", "__syncthreads();", "", 3, 0),
    M("no barrier after the sums of warps", "__syncthreads();", "", 3, 1),
    M("no barrier after the ranks", "__syncthreads();", "", 3, 2),
    # The verdicts.
    M("rows from count on have a verdict", "row < live && !leaves", "!leaves"),
    M("one row too many has a verdict", "row < live && !leaves", "row <= live && !leaves"),
    M("all lanes write the verdicts", "if (lane == 0) verdicts", "verdicts"),
    M("half of the lanes vote", "__ballot_sync(kAllLanes", "__ballot_sync(0xffff"),
    M("last words are dropped", "(live + 31) / 32;", "live / 32;"),
    M("a margin at the threshold stays", "margin >= threshold", "margin > threshold", file=RULES),
    M("an infinite margin leaves", " && margin <= FLT_MAX", "", file=RULES),
    M("a margin of minus infinity leaves", " && margin >= -FLT_MAX", "", file=RULES),
    # The ranks.
    M("runs of words are rounded down", "(words + kThreads - 1) / kThreads", "words / kThreads"),
    M("runs go past the words", "min(first + run, words)", "first + run"),
    M("scan: wrong distance", "up_to_here, distance)", "up_to_here, distance + 1)"),
    M("scan: one lane too few adds", "lane >= distance", "lane > distance"),
    M("scan: half a warp", "distance < 32", "distance < 16"),
    M("scan: the lane before the last speaks for the warp", "lane == 31", "lane == 30"),
    M("scan: a warp adds itself", "other < warp", "other <= warp"),
    M("scan: not exclusive", "up_to_here - own", "up_to_here"),
    M("search: < for <=", "verdicts.before[middle] <= rank", "verdicts.before[middle] < rank"),
    M("search: ends too early", "high - low > 1", "high - low > 2"),
    M("search: without the last word", "high = words;", "high = words - 1;"),
    M("search: one bit too many is dropped", "left > 0", "left >= 0"),
    M("search: the row behind", "__ffs(bits) - 1", "__ffs(bits)"),
    # The copy.
    M("a word too many is read", "words) values[i]", "words + 1) values[i]"),
    M("a word too many is written", "words) to[", "words + 1) to["),
    M("every second step is skipped", "first += 32 * kInFlight", "first += 64 * kInFlight"),
    M("step without a look at dest", "(from ^ to) | 16", "from | 16"),
    M("step without a look at src", "(from ^ to) | 16", "to | 16"),
    M("head is what lies before, not behind, a step", "(0 - to) & (step - 1)", "to & (step - 1)"),
    M("head is longer than the run", "min(bytes, static_cast<int>((0 - to) & (step - 1)))", "(0 - to) & (step - 1)"),
    M("head: a byte too many", "lane < head", "lane <= head"),
    M("tail: a byte too many", "tail + lane < bytes", "tail + lane <= bytes"),
    M("tail: a byte too few", "tail + lane < bytes", "tail + lane < bytes - 1"),
    M("words: the head is not taken off", "(bytes - head) >> shift", "bytes >> shift"),
    M("the last piece is dropped", "(rows.bytes + kPiece - 1) / kPiece", "rows.bytes / kPiece"),
    M("every piece is read at the start", "* rows.src_stride + offset", "* rows.src_stride"),
    M("every piece is written at the start", "* rows.dest_stride + offset", "* rows.dest_stride"),
    M("every piece is a whole one", "min(static_cast<int64_t>(kPiece), rows.bytes - offset)", "kPiece"),
    M("rows go over those that wait", "(static_cast<int64_t>(waiting) + rank)", "rank"),
    M("a piece is dealt to two warps", "item += warps", "item += warps - 1"),
    M("blocks are dealt the same pieces", "+ static_cast<int>(blockIdx.x);", ";"),
    M("the next tensor starts late", "item -= items;", ""),
    # The answers.
    M("ids go over those that wait", "static_cast<int64_t>(waiting) + verdicts.before", "verdicts.before"),
    M("an id counts itself", "word & (bit - 1)", "word & (bit | (bit - 1))"),
    M("negative ids are answered", "0 <= id && id < route.samples", "id < route.samples"),
    M("an id behind the outputs is answered", "0 <= id && id < route.samples", "0 <= id && id <= route.samples"),
    M("rows from count on are answered", "row < live; row += threads", "row < route.rows; row += threads"),
    M("every block answers every row", "row += threads", "row += kThreads"),
    # Errors and counters.
    M("a bad id is one thread's affair", "return __syncthreads_or(bad);", "return bad;"),
    M("an id behind the outputs is good", "id >= route.samples", "id > route.samples"),
    M("a full count is bad", "live > route.rows", "live >= route.rows"),
    M("count is not checked", "live < 0 || live > route.rows", "live < 0"),
    M("waiting is not checked", "waiting < 0 || waiting > route.capacity", "waiting < 0"),
    M("a full dest overflows", "total > route.capacity", "total >= route.capacity"),
    M("one row too many fits", "total > route.capacity", "total > route.capacity + 1"),
    M("a full bucket is too small", "total > route.buckets", "total >= route.buckets"),
    M("no bucket hides the overflow", "error |= kNoBucket", "error = kNoBucket"),
    M("an error hides those before", "*route.status |= error", "*route.status = error"),
    M("status is never null", "if (speaks && route.status != nullptr)", "if (speaks)"),
    M("every block speaks of errors", "blockIdx.x == 0 && threadIdx.x == 0", "threadIdx.x == 0"),
    M("every thread speaks", "blockIdx.x == 0 && threadIdx.x == 0", "blockIdx.x == 0"),
    M("every thread writes counters", "if (!speaks) return;", ""),
    M("a handle of zero is set", "route.handle != nullptr && *route.handle != 0", "route.handle != nullptr"),
    M("bucket: <= for <", "route.buckets[bucket] < total", "route.buckets[bucket] <= total", file=RULES),
    M("bucket: the first for no row", "if (total == 0) return buckets;", "", file=RULES),
    # What nothing can catch.
    M("a run may start behind the words", "min(thread * run, words)", "thread * run",
      equivalent="its end is cut to the words, so such a run is empty"),
    M("words are copied once more", "first += 32 * kInFlight", "first += 32",
      equivalent="the same lane writes the same values again: slower, not wrong"),
    M("all blocks look for bad ids", "if (blockIdx.x != 0) return;", "",
      equivalent="one thread of the first block still writes; the others only read"),
]  # fmt: skip
ANY = Sizes((0, 1, 31, 33, 100, 300), (0, 1, 3, 7, 8, 13, 16, 31, 48, 4095, 4096, 9000), (1, 2, 3), (64, 384))
SMALLEST = Sizes((1, 33, 70), (1, 7, 16, 31, 4100), (2, 3), (64,), most_bytes=1 << 15)


def corpus(mode: str) -> list[Case]:
    """Small enough for the mode, with what the faults need to show: few of each kind."""
    sizes, drawn = (SMALLEST, 8) if mode == "tsan" else (ANY, 60)
    cases = [make_case([0.0, 1.0, 0.0], capacity=capacity) for capacity in (3, 4, 5)]
    cases += [make_case([0.0, 1.0, 0.25, 0.5, 0.0, 9.0, 0.0], row_bytes=9001)]
    infinity = float("inf")
    cases += [make_case([infinity, -infinity, float("nan")], threshold) for threshold in (0.5, -infinity)]
    for margin in (0.0, 1.0):
        for bad in (-1, 40):
            cases += [make_case([margin] * 40)]
            cases[-1].buffers["ids"] = buffer([*range(39), bad], torch.int64)
    cases += [make_case([0.0, 0.0, 0.0], capacity=4)]
    cases[-1].buffers["buckets"] = buffer([2, 4], torch.int32)
    if mode != "tsan":
        more_words_than_threads = np.random.default_rng(0).random(2100).tolist()
        cases += [make_case(more_words_than_threads)]
    return cases + [draw_case(Random(seed), sizes) for seed in range(drawn)]


@contextmanager
def tree_with(mutant: Mutant, folder: Path) -> Iterator[Path]:
    """A copy of the kernel's sources with the fault in."""
    copy = folder / mutant.name.translate(str.maketrans(" :<>=,", "______"))
    for name in (KERNEL, RULES, "cuda/route_arguments.h"):
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(CSRC / name, target)
    (copy / mutant.file).write_text(mutant.text())
    yield copy
    shutil.rmtree(copy)


def catch(mutant: Mutant, corpora: dict[str, list[Expected]], folder: Path) -> str:
    """The first mode that catches it, cheapest first, and what it said; empty if none does."""
    with tree_with(mutant, folder) as csrc:
        for mode, cases in corpora.items():
            flags = () if mode == "plain" else ("-g",)
            program = simt_harness.program(simt_harness.SIMT / "route_main.cpp", mode, csrc, csrc, flags)
            with closing(Harness(program, patience_s=20)) as harness:
                if failure := first_failure(harness, cases):
                    return f"{mode:5} {failure}"
    return ""


def first_failure(harness: Harness, cases: list[Expected]) -> str:
    order = 0
    try:
        for order, (case, expected) in itertools.product(range(len(ORDERS)), cases):
            check(harness, replace(case, order=order), expected)
    except (AssertionError, KernelError) as error:
        return f"{ORDERS[order]:8} {gist(str(error))}"
    return ""


def gist(report: str) -> str:
    """The line of a report that says what is wrong."""
    telling = [line for line in report.splitlines() if any(mark in line for mark in ("simt:", "ERROR", "WARNING"))]
    telling += [line.split(": ", 1)[-1] for line in report.splitlines() if "runtime error" in line]
    return (telling or report.splitlines())[0].split(" (pid=")[0].split("; Case(")[0][:90]


def test_every_fault_that_is_planted_stands_in_the_kernel() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        assert mutant.text() != (CSRC / mutant.file).read_text()


def expected_in(*modes: str) -> dict[str, list[Expected]]:
    for mode in modes:
        if reason := simt_harness.why_not(mode):
            pytest.skip(reason)
    return {mode: [(case, expect(case)) for case in corpus(mode)] for mode in modes}


@pytest.mark.parametrize("mutant", [mutant for mutant in MUTANTS if mutant.old == "__syncthreads();"], ids=str)
def test_a_missing_barrier_is_a_race_even_where_the_answers_are_right(mutant: Mutant, tmp_path: Path) -> None:
    assert "data race" in catch(mutant, expected_in("tsan"), tmp_path)


def test_every_fault_is_caught_but_those_that_are_none(tmp_path: Path) -> None:
    corpora = expected_in(*MODES)
    with ThreadPoolExecutor(max_workers=2) as pool:
        caught = dict(zip(MUTANTS, pool.map(lambda mutant: catch(mutant, corpora, tmp_path), MUTANTS), strict=True))
    for mutant, how in caught.items():
        print(f"{mutant.name:55} {how or mutant.equivalent or 'NOT CAUGHT'}")
    assert [mutant.name for mutant, how in caught.items() if not how and not mutant.equivalent] == []
    assert [mutant.name for mutant, how in caught.items() if how and mutant.equivalent] == []
