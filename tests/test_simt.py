"""The harness that runs CUDA kernels on the host tells right kernels from wrong ones, in every order of the threads."""

from __future__ import annotations

import itertools
import os
import subprocess

import pytest
import simt_harness
from simt_harness import MODES, ORDERS, SIMT

THREADS, BLOCKS = 96, 3  # of simt/toys.cpp


def toy(name: str, mode: str = "plain", order: str = "forward", seed: int = 0) -> subprocess.CompletedProcess[str]:
    if reason := simt_harness.why_not(mode):
        pytest.skip(reason)
    return simt_harness.run_once(
        simt_harness.program(SIMT / "toys.cpp", mode), name, str(ORDERS.index(order)), str(seed)
    )


def written(done: subprocess.CompletedProcess[str]) -> list[list[int]]:  # [blocks, threads]
    assert done.returncode == 0, done.stderr
    numbers = [int(word) for word in done.stdout.splitlines()[0].split()]
    return [numbers[block * THREADS : (block + 1) * THREADS] for block in range(BLOCKS)]


def line_of(text: str) -> str:
    """Where this stands in the toys, as reports name it."""
    lines = (SIMT / "toys.cpp").read_text().splitlines()
    (line,) = [number for number, code in enumerate(lines, 1) if text in code]
    return f"toys.cpp:{line}"


def caught(done: subprocess.CompletedProcess[str], *expected: str) -> None:
    assert done.returncode != 0, done.stdout
    for text in expected:
        assert text in done.stderr


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mode", MODES)
def test_a_right_kernel_gives_the_same_in_every_order_and_mode(mode: str, order: str) -> None:
    for seed in range(3 if order == "random" else 1):
        for block, got in enumerate(written(toy("scan", mode, order, seed))):
            sums = list(itertools.accumulate(block + thread for thread in range(THREADS)))
            assert got == [sums[-1] - sums[THREADS - 1 - thread] for thread in range(THREADS)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mode", MODES)
def test_warps_meet_in_whole_and_in_part(mode: str, order: str) -> None:
    blocks = written(toy("operations", mode, order))
    lanes = [4 if thread % 32 < 16 else 31 for thread in range(THREADS)]  # 12 to 15 voted; the last one's number
    sums = [0b01001001 + (thread // 32 * 32 + 7) * 1000 + lanes[thread] + 100000 for thread in range(THREADS)]
    assert blocks == [sums, [-1] * THREADS, sums]  # all threads of the second block return at once


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mode", MODES)
def test_syncwarp_orders_the_memory_of_a_warp(mode: str, order: str) -> None:
    assert written(toy("ordered_in_a_warp", mode, order)) == [[thread ^ 1 for thread in range(THREADS)]] * BLOCKS


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "name", ["missing_barrier", "missing_second_barrier", "unordered_in_a_warp", "blocks_write_one_place"]
)
def test_a_race_is_reported_in_any_order(name: str, order: str) -> None:
    caught(toy(name, "tsan", order), "ThreadSanitizer: data race", "toys.cpp:")


@pytest.mark.parametrize("name", ["missing_barrier", "missing_second_barrier"])
def test_a_missing_barrier_shows_in_a_random_order(name: str) -> None:
    right = [[THREADS - 1 - thread for thread in range(THREADS)]] * BLOCKS
    if name == "missing_second_barrier":
        right = [[2 * ((thread + 1) % THREADS) + 1 for thread in range(THREADS)]] * BLOCKS
    assert any(written(toy(name, "plain", "random", seed)) != right for seed in range(3))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("divergent_barrier", "divergent barrier: threads wait at different ones"),
        ("barrier_after_return", "barrier after a return: threads of the block wait, others returned"),
        ("mask_without_the_caller", "wrong mask: the calling lane is not in it"),
        ("mask_with_a_returned_lane", "wrong mask: it names a lane that returned"),
        ("mask_with_a_lane_elsewhere", "wrong mask: it names a lane that waits elsewhere"),
        ("shuffle_from_a_lane_not_named", "wrong mask: a shuffle reads from a lane that it does not name"),
        ("switch_set_twice", "cudaGraphSetConditional: called twice in a launch"),
    ],
)
@pytest.mark.parametrize("order", ORDERS)
def test_a_meeting_that_goes_wrong_is_told_with_where_the_threads_are(name: str, message: str, order: str) -> None:
    caught(toy(name, "plain", order), message, "toys.cpp:")


@pytest.mark.parametrize(
    ("name", "report", "line"),
    [
        ("shared_memory_past_its_end", "AddressSanitizer: global-buffer-overflow", "// past the end of shared memory"),
        ("row_past_its_end", "index 96 out of bounds for type 'int [96]'", "// past the end of the row"),
        ("global_memory_past_its_end", "AddressSanitizer: heap-buffer-overflow", "// past the buffer"),
        ("global_memory_before_its_start", "AddressSanitizer: heap-buffer-overflow", "// before the start"),
        ("words_across", "misaligned address", "// not aligned"),
    ],
)
def test_a_wrong_address_is_reported_at_its_line(name: str, report: str, line: str) -> None:
    caught(toy(name, "asan"), report, line_of(line))


@pytest.mark.parametrize("name", ["global_memory_past_its_end", "global_memory_before_its_start"])
def test_a_write_next_to_a_buffer_is_seen_without_a_sanitizer(name: str) -> None:
    caught(toy(name), "simt: out of 1152 bytes: byte ")


@pytest.mark.parametrize("mode", MODES)
def test_shared_memory_is_poisoned_before_every_block(mode: str) -> None:
    assert written(toy("shared_memory_not_set", mode)) == [[-1] * THREADS] * BLOCKS


def test_the_switch_is_recorded_if_it_is_set_once() -> None:
    assert toy("switch_set_once").stdout.splitlines()[1] == "1 40"


def test_what_cannot_be_run_here_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    simt_harness.why_not.cache_clear()
    monkeypatch.setitem(os.environ, "PATH", "")
    assert "no C++ compiler" in (simt_harness.why_not("plain") or "")
    simt_harness.why_not.cache_clear()
