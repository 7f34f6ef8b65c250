"""`route_` is the reference, bit for bit; errors say expected and got.

On the CPU it is C++, on a GPU CUDA C++: where there is a GPU every test runs there again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tensors import (
    REFUSAL,
    i32,
    lay_out,
    moved,
)
from torch import Tensor

from dgate_rt import ops, reference

pytestmark = [
    pytest.mark.skipif(not ops.extension_loaded(), reason="the C++ extension is not built"),
    pytest.mark.usefixtures("device"),
]


ROWS: list[tuple[torch.dtype, tuple[int, ...], str]] = [
    (torch.float32, (3, 2, 5), "contiguous"),
    (torch.float32, (3, 2, 5), "channels_last"),
    (torch.bfloat16, (7, 3), "contiguous"),
    (torch.uint8, (13,), "contiguous"),
    (torch.bool, (5,), "contiguous"),
    (torch.float64, (), "contiguous"),
    (torch.int16, (0, 4), "contiguous"),
    (torch.float16, (1, 4, 1), "channels_last"),
    (torch.complex64, (257, 9, 2), "channels_last"),
]


def arena(rows: int, kind: tuple[torch.dtype, tuple[int, ...], str]) -> Tensor:
    dtype, shape, layout = kind
    values = torch.randint(0, 2 if dtype is torch.bool else 100, (rows, *shape))
    return lay_out(values.to(dtype), layout)


def route_arguments(
    n: int, capacity: int, kinds: list[tuple[torch.dtype, tuple[int, ...], str]], exit_rate: float
) -> dict[str, Any]:
    margin = torch.rand(n) - exit_rate
    return {
        "src": [arena(n, kind) for kind in kinds],
        "ids": torch.randperm(n + 5)[:n],
        "margin": torch.where(margin < 0, 1.0 - margin, margin),  # 0..1 stay, 1..2 leave
        "label": torch.randint(0, 10, (n,)),
        "count": None,
        "thresholds": torch.tensor([math.inf, 1.0, math.nan]),
        "gate": 1,
        "dest": [arena(capacity, kind) for kind in kinds],
        "dest_ids": torch.randint(0, 99, (capacity,)),
        "dest_count": torch.tensor(77, dtype=torch.int32),
        "out_labels": torch.full((n + 5,), -1),
        "out_scores": torch.full((n + 5,), -1.0),
        "out_exits": torch.full((n + 5,), -1),
    }


MUTATED = ("dest_ids", "dest_count", "out_labels", "out_scores", "out_exits")


def copied(arguments: dict[str, Any]) -> dict[str, Any]:
    mutated = {key: arguments[key].clone() for key in MUTATED}
    return {**arguments, **mutated, "dest": [tensor.clone() for tensor in arguments["dest"]]}


def assert_same_arenas(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert all(torch.equal(got[key], expected[key]) for key in MUTATED)
    assert all(torch.equal(a, b) for a, b in zip(got["dest"], expected["dest"], strict=True))


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(0, 70),
    waiting=st.none() | st.integers(0, 9),  # None: to the front
    room=st.integers(-3, 5),
    dead=st.integers(0, 5),
    kinds=st.lists(st.sampled_from(ROWS), max_size=3),
    exit_rate=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
)
@example(seed=0, n=64, waiting=None, room=0, dead=0, kinds=ROWS, exit_rate=0.0)
@example(seed=0, n=64, waiting=3, room=0, dead=2, kinds=ROWS, exit_rate=1.0)
def test_route_is_the_reference(
    seed: int,
    n: int,
    waiting: int | None,
    room: int,
    dead: int,
    kinds: list[tuple[torch.dtype, tuple[int, ...], str]],
    exit_rate: float,
    device: str,
) -> None:
    torch.manual_seed(seed)
    arguments = route_arguments(n, max(waiting or 0, n + (waiting or 0) + room), kinds, exit_rate)
    live = max(0, n - dead)
    if dead:
        arguments["count"] = torch.tensor(live, dtype=torch.int32)
        arguments["ids"][live:] = 2**60
        arguments["margin"][live:] = 9.0
    if waiting is not None:
        arguments["waiting"] = i32(waiting)
    expected, got, before = copied(arguments), copied(arguments), copied(arguments)
    try:
        reference.route_(**expected)
    except ValueError as error:
        expected = before  # a refusal writes nothing
        if device == "cpu":
            with pytest.raises(ValueError, match=f"^{error}$"):
                ops.route_(**got)
        else:
            status = i32(0)
            ops.route_(**got, status=status)
            assert status == ops.RouteError.OVERFLOW
    else:
        ops.route_(**got)
    assert_same_arenas(got, expected)


@pytest.mark.parametrize("exit_rate", [0.0, 0.4, 1.0], ids=["none", "mixed", "all"])
@pytest.mark.parametrize("n", [0, 1, 31, 129, 1000])
def test_route_sends_on_and_lets_go(n: int, exit_rate: float, threads: Callable[[int], None]) -> None:
    threads(2)
    arguments = route_arguments(n, n + 3, [(torch.float32, (16, 9, 9), "channels_last"), ROWS[3]], exit_rate)
    expected, got = copied(arguments), copied(arguments)
    reference.route_(**expected)
    ops.route_(**got)
    assert_same_arenas(got, expected)


def test_route_exits_at_the_threshold_and_never_with_a_margin_that_is_not_finite() -> None:
    arguments = route_arguments(6, 6, [], 0.0)
    below = math.nextafter(1.0, 0.0) - 1e-7
    arguments["margin"] = torch.tensor([1.0, below, math.nan, math.inf, -math.inf, 1.5])
    ops.route_(**arguments)
    assert arguments["dest_count"] == 4
    assert torch.equal(arguments["dest_ids"][:4], arguments["ids"][1:5])
    assert arguments["out_exits"][arguments["ids"][[0, 5]]].eq(1).all()


@pytest.mark.parametrize(("gate", "stay"), [(0, 4), (2, 4)], ids=["inf", "nan"])
def test_route_lets_none_go_at_a_threshold_that_no_margin_reaches(gate: int, stay: int) -> None:
    arguments = route_arguments(4, 4, [], 1.0)
    ops.route_(**{**arguments, "gate": gate})
    assert arguments["dest_count"] == stay


def test_route_takes_strided_vectors_and_rows() -> None:
    arguments = route_arguments(20, 20, [ROWS[0]], 0.5)
    expected = copied(arguments)
    reference.route_(**expected)
    strided = {key: torch.stack([arguments[key]] * 2, 1)[:, 0] for key in ("ids", "margin", "label", *MUTATED[2:])}
    parent = torch.zeros(40, 3, 2, 5)
    parent[::2] = arguments["src"][0]
    got = {**arguments, **strided, "src": [parent[::2]]}
    ops.route_(**got)
    assert_same_arenas(got, expected)


def small_route(**changes: Any) -> dict[str, Any]:
    return {**route_arguments(4, 6, [ROWS[0]], 0.5), **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"margin": torch.zeros(3)}, r"margin: expected \[4\] float32, got \[3\] float32"),
        ({"label": torch.zeros(4)}, r"label: expected \[4\] int64, got \[4\] float32"),
        ({"ids": torch.zeros(4, 1).long()}, r"ids: expected \[N\] int64, got \[4, 1\] int64"),
        ({"thresholds": torch.zeros(3).double()}, r"thresholds: expected \[G\] float32, got \[3\] float64"),
        ({"gate": 3}, r"gate: expected 0 to 2, got 3"),
        ({"gate": -1}, r"gate: expected 0 to 2, got -1"),
        ({"dest": []}, r"dest: expected 1 tensors like src, got 0"),
        ({"src": [torch.zeros(5, 3, 2, 5)]}, r"src\[0\]: expected \[4, 3, 2, 5\] float32, got \[5, 3, 2, 5\] float32"),
        (
            {"dest": [torch.zeros(5, 3, 2, 5)]},
            r"dest\[0\]: expected \[6, 3, 2, 5\] float32, got \[5, ",
        ),
        ({"dest": [torch.zeros(6, 3, 2, 5).half()]}, r"dest\[0\]: expected .* float32, got .* float16"),
        (
            {"dest": [torch.zeros(6, 3, 5, 2).mT]},
            r"dest\[0\]: expected rows with strides \(10, 5, 1\) like",
        ),
        (
            {"src": [torch.zeros(4, 3, 2, 10)[..., ::2]], "dest": [torch.zeros(6, 3, 2, 10)[..., ::2]]},
            r"src\[0\]: expected each row in one run of memory, got strides \(20, 10, 2\)",
        ),
        ({"dest": [torch.zeros(1, 3, 2, 5).expand(6, 3, 2, 5)]}, r"dest\[0\]: expected rows that do not overlap"),
        ({"waiting": torch.tensor(1)}, r"waiting: expected \[\] int32, got \[\] int64"),
        ({"bucket": i32(0)}, r"buckets: expected sizes to choose from, got none"),
        ({"buckets": torch.zeros(0, dtype=torch.int32)}, r"buckets: expected at least one size, got none"),
        ({"buckets": torch.ones(2)}, r"buckets: expected \[M\] int32, got \[2\] float32"),
        (
            {"buckets": i32(9)[None], "handles": torch.zeros(2).long()},
            r"handles: expected \[3\] int64, got \[2\] int64",
        ),
        ({"status": torch.zeros(1).int()}, r"status: expected \[\] int32, got \[1\] int32"),
        ({"out_scores": torch.zeros(8)}, r"out_scores: expected \[9\] float32, got \[8\] float32"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("direct", [False, True], ids=["wrapper", "torch.ops"])
def test_route_errors_name_argument_expected_and_got(
    changes: dict[str, Any], message: str, direct: bool, device: str
) -> None:
    arguments = small_route(**moved(changes, device))
    before = copied(arguments)
    if direct:
        message = message.partition(":")[0] + ":"
    with pytest.raises(REFUSAL[direct], match=message):
        (torch.ops.dgate_rt.route_ if direct else ops.route_)(**arguments)
    assert_same_arenas(arguments, before)


@pytest.mark.parametrize(
    ("changes", "message", "error"),
    [
        ({"count": i32(5)}, r"count: expected 0 to 4, got 5", ops.RouteError.COUNT),
        ({"count": i32(-1)}, r"count: expected 0 to 4, got -1", ops.RouteError.COUNT),
        ({"waiting": i32(7)}, r"waiting: expected 0 to 6, got 7", ops.RouteError.WAITING),
        ({"waiting": i32(-1)}, r"waiting: expected 0 to 6, got -1", ops.RouteError.WAITING),
        (
            {"waiting": i32(3), "thresholds": torch.full((3,), 9.0)},
            r"dest: 3 rows wait and 4 survive, more than its capacity of 6",
            ops.RouteError.OVERFLOW,
        ),
        (
            {"buckets": i32(1)[None], "thresholds": torch.full((3,), 9.0)},
            r"buckets: 4 rows go on, more than the largest bucket of 1 takes",
            ops.RouteError.BUCKET,
        ),
    ],
    ids=["count", "negative count", "waiting", "negative waiting", "overflow", "bucket"],
)
def test_what_only_the_device_knows_is_an_error_on_the_cpu_and_a_status_on_cuda(
    changes: dict[str, Any], message: str, error: ops.RouteError, device: str
) -> None:
    arguments = small_route(**moved(changes, device), status=i32(64))
    before = copied(arguments)
    if device == "cpu":
        with pytest.raises(ValueError, match=message):
            ops.route_(**arguments)
        assert arguments["status"] == 64
    else:
        ops.route_(**arguments)
        assert arguments["status"] == 64 | error
    assert_same_arenas(arguments, before)


@pytest.mark.parametrize("bad", [9, -1])
def test_an_id_that_is_no_index_is_an_error_on_the_cpu_and_a_status_on_cuda(bad: int, device: str) -> None:
    arguments = small_route(margin=torch.full((4,), 2.0), status=i32(0))
    arguments["ids"][2] = bad
    before = copied(arguments)
    if device == "cpu":
        with pytest.raises(ValueError, match=f"ids: expected 0 to 8, got {bad} in row 2"):
            ops.route_(**arguments)
        assert_same_arenas(arguments, before)
    else:
        ops.route_(**arguments)
        assert arguments["status"] == ops.RouteError.ID
        assert arguments["out_exits"].eq(1).sum() == 3


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize("handle", [1, -1, 2**60])
def test_a_switch_on_the_cpu_is_one_of_the_simulated_driver(handle: int) -> None:
    arguments = small_route(buckets=i32(9)[None], bucket=i32(7), handles=torch.tensor([0, handle, 0]))
    before = copied(arguments)
    with pytest.raises(ValueError, match=f"handles: expected a switch of the simulated driver, got {handle}"):
        ops.route_(**arguments)
    assert_same_arenas(arguments, before)
    assert arguments["bucket"] == 7


def test_a_handle_of_zero_is_no_switch(device: str) -> None:
    arguments = small_route(buckets=i32(9)[None], bucket=i32(7), handles=torch.tensor([5, 0, 5]))
    ops.route_(**arguments)
    assert arguments["bucket"] == 0


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("dest_count", "count"),
        ("dest_count", "waiting"),
        ("dest_count", "bucket"),
        ("dest_count", "status"),
        ("dest_ids", "ids"),
        ("out_labels", "label"),
        ("out_scores", "margin"),
        ("out_exits", "out_labels"),
    ],
)
def test_route_refuses_what_is_written_and_used_otherwise(written: str, read: str) -> None:
    arguments = small_route(count=i32(4), waiting=i32(0), buckets=i32(9)[None], bucket=i32(0), status=i32(0))
    length = max(arguments[written].numel(), arguments[read].numel())
    shared = torch.zeros(length + 3, dtype=arguments[written].dtype)
    for name in (written, read):
        shape = arguments[name].shape
        arguments[name] = shared[: shape[0]] if shape else shared[0]
    with pytest.raises(
        ValueError, match=f"({written}|{read}): expected memory of its own, got some that ({read}|{written}) u"
    ):
        ops.route_(**arguments)


def test_route_refuses_destinations_that_are_one_or_lie_over_what_it_reads() -> None:
    arguments = small_route(src=[torch.zeros(4, 3), torch.ones(4, 3)], margin=torch.zeros(4))
    one = torch.zeros(6, 3)
    with pytest.raises(ValueError, match="dest: expected memory of its own, got some that dest uses"):
        ops.route_(**{**arguments, "dest": [one, one]})
    over = torch.zeros(6, 3)
    with pytest.raises(ValueError, match="dest: expected memory of its own, got some that margin uses"):
        ops.route_(**{**arguments, "dest": [one, over], "margin": over.view(-1)[:4]})
    with pytest.raises(ValueError, match="out_scores: expected memory of its own, got some that src uses"):
        ops.route_(**{**arguments, "dest": [one, over], "out_scores": arguments["src"][1].view(-1)[:9]})


def test_route_takes_destinations_that_lie_row_by_row_side_by_side() -> None:
    arguments = route_arguments(20, 20, [(torch.float32, (3,), "contiguous"), (torch.float32, (5,), "contiguous")], 0.5)
    expected = copied(arguments)
    reference.route_(**expected)
    table = torch.zeros(20, 8)
    count = int(expected["dest_count"])
    ops.route_(**{**arguments, "dest": [table[:, :3], table[:, 3:]]})
    assert torch.equal(table[:count], torch.cat(expected["dest"], 1)[:count])


def test_route_takes_outputs_that_interleave() -> None:
    arguments = route_arguments(20, 20, [], 0.5)
    expected = copied(arguments)
    reference.route_(**expected)
    table = torch.full((25, 2), -1)
    ops.route_(**{**arguments, "out_labels": table[:, 0], "out_exits": table[:, 1]})
    assert torch.equal(table, torch.stack([expected["out_labels"], expected["out_exits"]], 1))


@pytest.mark.parametrize("name", ["out_scores", "dest_ids"])
def test_route_refuses_outputs_whose_elements_are_one(name: str) -> None:
    arguments = small_route()
    arguments[name] = arguments[name][:1].expand(len(arguments[name]))
    with pytest.raises(ValueError, match=f"{name}: expected memory of its own for every element"):
        ops.route_(**arguments)


@pytest.mark.usefixtures("cpu")
def test_route_refuses_memory_that_is_not_aligned() -> None:
    margin = torch.frombuffer(bytearray(17), dtype=torch.float32, offset=1, count=4)
    with pytest.raises(ValueError, match="margin: expected memory aligned to 4 bytes, got an address 1 behind one"):
        ops.route_(**small_route(margin=margin))


@pytest.mark.parametrize(
    ("stay", "waiting", "expected"), [(0, 0, 3), (1, 0, 0), (2, 0, 0), (3, 0, 1), (3, 2, 2), (8, 0, 2), (0, 3, 1)]
)
def test_the_bucket_is_the_smallest_that_holds_all_and_none_where_none_goes_on(
    stay: int, waiting: int, expected: int
) -> None:
    arguments = route_arguments(10, 12, [ROWS[0]], 1.0)
    arguments["margin"][:stay] = 0.0
    bucket = i32(9)
    arguments |= {"waiting": i32(waiting), "buckets": torch.tensor([2, 4, 8], dtype=torch.int32), "bucket": bucket}
    ops.route_(**arguments)
    assert arguments["dest_count"] == stay + waiting
    assert bucket == expected
    again = {**copied(arguments), "bucket": i32(9)}
    reference.route_(**again)
    assert again["bucket"] == expected


def test_route_refuses_a_destination_that_the_source_uses() -> None:
    shared = torch.zeros(8, 3, 2, 5)
    with pytest.raises(ValueError, match="dest: expected memory of its own"):
        ops.route_(**small_route(src=[shared[:4]], dest=[shared[2:]]))
    ops.route_(**{**small_route(src=[shared[:4]], dest=[shared[4:]]), "dest_ids": torch.zeros(4).long()})


def test_route_errors_are_those_of_the_kernel() -> None:
    header = (Path(__file__).parent.parent / "csrc" / "cuda" / "route_arguments.h").read_text()
    bits = {int(bit): name for name, bit in re.findall(r"^ +k(?:Bad|No)?(\w+) = (\d+),", header, re.MULTILINE)}
    assert {error.value: error.name for error in ops.RouteError} == {bit: name.upper() for bit, name in bits.items()}


def test_opcheck_of_route() -> None:
    arguments = route_arguments(8, 8, [ROWS[0], ROWS[3]], 0.5)
    torch.library.opcheck(torch.ops.dgate_rt.route_.default, (), arguments)
    more = {"waiting": i32(0), "buckets": i32(9)[None], "bucket": i32(0), "status": i32(0)}
    torch.library.opcheck(torch.ops.dgate_rt.route_.default, (), {**arguments, **more})
