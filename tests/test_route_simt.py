"""The route on CUDA, run on the host: the reference byte for byte, at any size and layout, in any order of threads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import simt_harness
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from route_cases import (
    BAD_COUNT,
    BAD_ID,
    BAD_WAITING,
    LARGEST,
    NO_BUCKET,
    OVERFLOW,
    Case,
    Sizes,
    buffer,
    check,
    draw_case,
    expect,
    make_case,
)
from simt_harness import MODES, ORDERS, Harness

ROW_BYTES = (0, 1, 2, 3, 7, 8, 13, 16, 31, 48, 4095, 4096, 4097, 8192, 9000, 20000)
ANY = Sizes(tuple(range(301)), ROW_BYTES, (1, 2, 3, 5, 7), (64, 384))
LARGE = Sizes((1000, 1023, 1025), ROW_BYTES, (1, 2, 3, 5, 7), (64, 384), most_bytes=2 << 20)
SMALL = Sizes((0, 1, 31, 32, 33, 70, 129), ROW_BYTES, (1, 2, 3), (64, 384), most_bytes=1 << 18)
SMALLEST = Sizes((0, 1, 31, 32, 33, 70), ROW_BYTES, (2, 3), (64,), most_bytes=1 << 16)


@pytest.fixture(scope="module", params=MODES)
def harness(request: pytest.FixtureRequest) -> Iterator[Harness]:
    """The kernel in every mode."""
    yield from start(request.param)


@pytest.fixture(scope="module")
def plain() -> Iterator[Harness]:
    yield from start("plain")


def start(mode: str) -> Iterator[Harness]:
    if reason := simt_harness.why_not(mode):
        pytest.skip(reason)
    harness = Harness(simt_harness.program(simt_harness.SIMT / "route_main.cpp", mode))
    yield harness
    harness.close()


def status_of(case: Case) -> int:
    return expect(case)[0].integer("status", 0)


@given(st.randoms(use_true_random=False))
@settings(max_examples=400)
def test_the_route_is_the_reference_and_touches_nothing_else(plain: Harness, random: Random) -> None:
    check(plain, draw_case(random, ANY))


@pytest.mark.parametrize("seed", range(20))
def test_the_route_is_the_reference_at_size(plain: Harness, seed: int) -> None:
    check(plain, draw_case(Random(seed), LARGE))


@pytest.mark.parametrize("harness", ["plain", "asan"], indirect=True)
@pytest.mark.parametrize("threads", [64, 384])
def test_as_many_rows_as_one_launch_takes(harness: Harness, threads: int) -> None:
    margin = np.random.default_rng(threads).random(65536).tolist()
    check(
        harness,
        replace(
            make_case(margin, row_bytes=3),
            threads=threads,
            order=2,
            buffers={name: there for name, there in make_case(margin).buffers.items() if name != "buckets"},
        ),
    )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("seed", range(12))
def test_sanitizers_find_nothing_in_any_order(harness: Harness, order: str, seed: int) -> None:
    sizes = SMALLEST if harness.program.mode == "tsan" else SMALL
    for part in range(3):
        case = draw_case(Random(3 * seed + part), sizes)
        check(harness, replace(case, order=ORDERS.index(order)))


@pytest.mark.parametrize("order", ORDERS)
def test_sanitizers_find_nothing_where_pieces_and_rows_are_dealt_to_several_blocks(
    harness: Harness, order: str
) -> None:
    case = make_case([0.0, 1.0, 0.25, 0.5, 0.0, 9.0, 0.0], row_bytes=9001)
    check(harness, replace(case, order=ORDERS.index(order), blocks=3))


@pytest.mark.parametrize("shift", range(16))
def test_rows_are_copied_at_every_alignment_of_source_and_destination(harness: Harness, shift: int) -> None:
    lengths = (1, 15, 16, 17, 31, 33, 100, 4096, 4111) if harness.program.mode != "tsan" else (33,)
    for length in lengths:
        case = make_case([0.0, 1.0, 0.0], row_bytes=length)
        for side, offset in ((case.carried[0].src, shift), (case.carried[0].dest, (shift * 7 + length) % 16)):
            side.offset = offset
        check(harness, case)


@pytest.mark.parametrize(
    ("margin", "threshold", "leaves"),
    [
        ([0.5, 0.4999999], 0.5, [True, False]),
        ([-0.0, 0.0], 0.0, [True, True]),
        ([float("nan")] * 2, float("-inf"), [False, False]),
        ([float("inf"), float("-inf")], float("-inf"), [False, False]),
        ([LARGEST, -LARGEST], -LARGEST, [True, True]),
        ([LARGEST, 1.0], float("inf"), [False, False]),
        ([LARGEST, 1.0], float("nan"), [False, False]),
    ],
    ids=str,
)
def test_a_row_leaves_where_its_margin_is_finite_and_reaches_the_threshold(
    plain: Harness, margin: list[float], threshold: float, leaves: list[bool]
) -> None:
    case = make_case(margin, threshold)
    assert (expect(case)[0].buffers["out_exits"].tensor() == 3).tolist() == leaves
    check(plain, case)


@pytest.mark.parametrize("harness", ["plain", "asan"], indirect=True)
@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("count", -1, BAD_COUNT),
        ("count", 4, BAD_COUNT),
        ("count", 2**31 - 1, BAD_COUNT),
        ("waiting", -1, BAD_WAITING),
        ("waiting", 6, BAD_WAITING),
        ("waiting", -(2**31), BAD_WAITING),
        ("waiting", 3, OVERFLOW),
        ("waiting", 5, OVERFLOW),
        ("waiting", 2, 0),
    ],
)
def test_an_error_writes_nothing_but_its_bit_of_the_status(harness: Harness, name: str, value: int, error: int) -> None:
    case = make_case([0.0, 0.0, 0.0], capacity=5)
    case.buffers[name] = buffer([value], torch.int32)
    case.buffers["status"] = buffer([32], torch.int32)
    assert status_of(case) == 32 | error
    check(harness, case)
    del case.buffers["status"]
    check(harness, case)


def test_errors_are_added_up(plain: Harness) -> None:
    case = make_case([0.0] * 3, capacity=4)
    case.buffers["buckets"] = buffer([2, 4], torch.int32)
    assert status_of(case) == OVERFLOW | NO_BUCKET
    check(plain, case)
    case.buffers |= {"count": buffer([9], torch.int32), "waiting": buffer([9], torch.int32)}
    assert status_of(case) == BAD_COUNT | BAD_WAITING
    check(plain, case)


def test_an_error_on_a_run_before_stays_in_the_status(plain: Harness) -> None:
    case = make_case([0.0, 1.0])
    case.buffers["status"] = buffer([OVERFLOW], torch.int32)
    assert status_of(case) == OVERFLOW
    check(plain, case)


@pytest.mark.parametrize("bad", [-1, 4, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("row", [0, 1], ids=["of_a_row_that_stays", "of_a_row_that_leaves"])
def test_a_bad_id_drops_the_answer_of_its_row_alone(harness: Harness, row: int, bad: int) -> None:
    case = make_case([0.0, 1.0, 1.0, 0.0])
    case.buffers["ids"] = buffer([bad if i == row else i for i in range(4)], torch.int64)
    assert status_of(case) == BAD_ID
    check(harness, case)


def test_an_id_from_count_on_is_not_looked_at(plain: Harness) -> None:
    case = make_case([0.0, 1.0, 1.0])
    case.buffers |= {"ids": buffer([0, 1, -5], torch.int64), "count": buffer([2], torch.int32)}
    assert status_of(case) == 0
    check(plain, case)


@pytest.mark.parametrize(
    ("waiting", "rows", "bucket"), [(0, 0, 4), (1, 0, 0), (2, 0, 0), (2, 1, 1), (2, 2, 1), (2, 3, 2), (0, 9, 3)]
)
def test_the_bucket_is_the_smallest_that_holds_all_and_none_for_no_row(
    plain: Harness, waiting: int, rows: int, bucket: int
) -> None:
    case = make_case([0.0] * rows + [1.0])
    case.buffers["waiting"] = buffer([waiting], torch.int32)
    after, switch = expect(case)
    assert after.integer("bucket", -1) == bucket
    assert switch == (1234567890123, bucket)
    check(plain, case)


@pytest.mark.parametrize("without", ["handle", "bucket", "buckets"])
def test_no_switch_without_a_handle_or_sizes(plain: Harness, without: str) -> None:
    case = make_case([0.0, 1.0])
    del case.buffers[without]
    assert (expect(case)[1] is not None) == (without == "bucket")
    check(plain, case)


def test_a_handle_of_zero_is_no_switch(plain: Harness) -> None:
    case = make_case([0.0, 1.0])
    case.buffers["handle"] = buffer([0], torch.int64)
    assert expect(case)[1] is None
    check(plain, case)


def test_as_many_tensors_as_one_launch_takes(harness: Harness) -> None:
    case = make_case([0.0, 1.0, 0.0])
    case.carried *= 0
    for i in range(64):
        case.carried += make_case([0.0, 1.0, 0.0], row_bytes=i).carried
    check(harness, case)
