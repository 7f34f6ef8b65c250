"""The C++ operators are the reference, bit for bit where nothing is rounded; errors say expected and got."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from dgate_rt import ops, reference
from dgate_rt.gate import confidence_and_label

pytestmark = pytest.mark.skipif(not ops.extension_loaded(), reason="the C++ extension is not built")

# Features are widened to float32 exactly, so only the order of the sums differs, whatever their dtype.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
DTYPES = list(TOLERANCE)
LAYOUTS = ["contiguous", "channels_last", "slice", "transposed"]
SHAPES = {"4d": (37, 5, 3), "3d": (6, 37), "2d": (37,)}
POOLS = [("avg", "4d"), ("flat", "4d"), ("avg", "3d"), ("cls", "3d"), ("flat", "3d"), ("avg", "2d"), ("flat", "2d")]
# What a refusal is, by whether torch.ops is called directly: torch 2.15 turns whatever a kernel throws to RuntimeError.
REFUSAL: dict[bool, tuple[type[Exception], ...]] = {False: (ValueError,), True: (ValueError, RuntimeError)}


def name(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same values at other strides; the memory between them is NaN."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "channels_last":
        order = (0, *range(2, x.ndim), 1)
    elif layout == "transposed":
        order = tuple(reversed(range(x.ndim)))
    else:
        out = x.new_full([size * 2 + 1 for size in x.shape], math.nan)[tuple(slice(1, None, 2) for _ in x.shape)]
        return out.copy_(x)
    inverse = [order.index(dim) for dim in range(x.ndim)]
    return x.permute(order).contiguous().permute(inverse)


def make(n: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> Tensor:
    torch.manual_seed(n)
    return lay_out(torch.randn(n, *shape).to(dtype), layout)


def make_gate(features: Tensor, classes: int, pool: str) -> tuple[Tensor, Tensor]:
    width = reference.pool_features(features[:0], pool).shape[1]
    return torch.randn(classes, width), torch.randn(classes)


def assert_same_scores(got: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    """Distances and margins agree; so do labels, unless two classes lie within the tolerance of each other."""
    margin, label, distances = expected
    close = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
    torch.testing.assert_close(got[0], margin, **close)
    torch.testing.assert_close(got[2], distances, **close)
    flipped = got[1] != label
    chosen = distances.gather(1, got[1][:, None])[:, 0]
    torch.testing.assert_close(chosen[flipped], margin[flipped], **close)


@pytest.mark.parametrize("n", [0, 1, 31, 129])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize(("pool", "rank"), POOLS)
def test_scores_are_the_reference(pool: str, rank: str, dtype: torch.dtype, layout: str, n: int) -> None:
    features = make(n, SHAPES[rank], dtype, layout)
    weight, bias = make_gate(features, 10, pool)
    got = ops.gate_distances(features, weight, bias, pool)
    assert_same_scores(got, reference.gate_distances(features, weight, bias, pool), TOLERANCE[dtype])
    margin, label = ops.gate_score(features, weight, bias, pool)
    assert torch.equal(margin, got[0])
    assert torch.equal(label, got[1])


@pytest.mark.parametrize(
    ("n", "shape", "classes"),
    [
        (1000, (19, 4, 4), 10),
        (129, (300, 1, 1), 1),
        (31, (300, 2, 3), 2),
        (129, (513, 3, 3), 100),
        (1000, (64, 1, 1), 1000),
        (1, (2048, 7, 7), 1000),
        (5, (70, 33, 35), 3),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_scores_are_the_reference_at_size(n: int, shape: tuple[int, ...], classes: int, layout: str) -> None:
    features = make(n, shape, layout=layout)
    weight, bias = make_gate(features, classes, "avg")
    got = ops.gate_distances(features, weight, bias)
    assert_same_scores(got, reference.gate_distances(features, weight, bias), TOLERANCE[torch.float32])


def test_wide_features_are_scored_in_several_passes() -> None:
    features = make(40, (5, 111, 131), torch.bfloat16)  # 40 x 72,705 float32 exceed the scratch memory
    weight, bias = make_gate(features, 3, "flat")
    got = ops.gate_distances(features, weight / 100, bias, "flat")
    assert_same_scores(got, reference.gate_distances(features, weight / 100, bias, "flat"), TOLERANCE[torch.bfloat16])


def test_every_float16_and_bfloat16_widens_exactly() -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        features = bits.view(dtype)[:, None]
        _, _, distances = ops.gate_distances(features, torch.ones(1, 1), torch.zeros(1))
        torch.testing.assert_close(distances, features.float(), rtol=0, atol=0, equal_nan=True)


def test_weight_and_bias_may_be_strided() -> None:
    features = make(9, (37,))
    weight, bias = torch.randn(37, 20).T[::2], torch.randn(20)[::2]
    got = ops.gate_distances(features, weight, bias)
    assert_same_scores(got, reference.gate_distances(features, weight, bias), TOLERANCE[torch.float32])


@pytest.mark.parametrize("count", [0, 1, 17, 31])
@pytest.mark.parametrize(("pool", "rank"), POOLS)
def test_rows_from_count_on_are_not_read_and_zero(pool: str, rank: str, count: int) -> None:
    features = make(31, SHAPES[rank])
    weight, bias = make_gate(features, 10, pool)
    expected = ops.gate_distances(features[:count], weight, bias, pool)
    features[count:] = math.nan
    live = torch.tensor(count, dtype=torch.int32)
    for got, want in zip(ops.gate_distances(features, weight, bias, pool, live), expected, strict=True):
        assert torch.equal(got[:count], want)
        assert not got[count:].any()


CRITERIA = ["margin", "softmax", "entropy"]


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("classes", [1, 2, 10, 1000])
@pytest.mark.parametrize("scale", [0.01, 1.0, 300.0], ids="scale{}".format)
def test_criteria_are_the_reference(criterion: str, classes: int, scale: float) -> None:
    features = make(31, SHAPES["4d"])
    weight, bias = make_gate(features, classes, "avg")
    margin, label, distances = ops.gate_distances(features, weight * scale, bias * scale, "avg", None, criterion)
    expected, best = confidence_and_label(
        distances, criterion
    )  # of the same distances: a softmax magnifies their error
    torch.testing.assert_close(margin, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(label, best)


def test_criteria_mean_what_they_say() -> None:
    distances = torch.tensor([[0.0, 0.0], [2.0, 2.0 - math.log(3)], [0.0, -math.inf]])
    arguments = (distances, torch.eye(2), torch.zeros(2))
    margin, softmax, entropy = (ops.gate_score(*arguments, criterion=c)[0].tolist() for c in CRITERIA)
    assert margin[:2] == [0.0, 2.0]
    assert softmax[:2] == pytest.approx([0.5, 0.75])
    assert entropy[:2] == pytest.approx([-math.log(2), 0.75 * math.log(0.75) + 0.25 * math.log(0.25)])


@pytest.mark.parametrize("criterion", CRITERIA)
def test_criteria_of_distances_that_are_not_finite(criterion: str) -> None:
    inf, nan = math.inf, math.nan
    bias = torch.tensor([[0.0, -inf, 1.0], [0.0, inf, 1.0], [nan, 0.0, 1.0], [-inf, -inf, -inf], [inf, nan, 0.0]])
    for row in bias:
        arguments = (torch.zeros(1, 1), torch.zeros(3, 1), row, "avg", None, criterion)
        assert_same_scores(ops.gate_distances(*arguments), reference.gate_distances(*arguments), 1e-6)
        assert torch.equal(ops.gate_score(*arguments)[1], reference.gate_score(*arguments)[1])


def test_a_tie_goes_to_the_lowest_class() -> None:
    weight, bias = torch.zeros(70, 4), torch.zeros(70)
    bias[[3, 5, 66]] = 1.0
    margin, label = ops.gate_score(torch.randn(20, 4), weight, bias)
    assert margin.eq(1).all()
    assert label.eq(3).all()


def test_a_nan_distance_gives_a_nan_margin_and_the_lowest_nan_class() -> None:
    features = torch.ones(3, 2)
    weight, bias = torch.ones(5, 2), torch.tensor([9.0, 0.0, math.nan, math.nan, 10.0])
    margin, label = ops.gate_score(features, weight, bias)
    assert margin.isnan().all()
    assert label.eq(2).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_broken_sample_harms_no_other(bad: float, layout: str) -> None:
    features = make(33, SHAPES["4d"], layout=layout)
    weight, bias = make_gate(features, 10, "avg")
    clean = ops.gate_distances(features, weight, bias)
    features[7, 2, 1, 1] = bad
    got = ops.gate_distances(features, weight, bias)
    assert_same_scores(got, reference.gate_distances(features, weight, bias), TOLERANCE[torch.float32])
    others = torch.arange(33) != 7
    assert all(torch.equal(a[others], b[others]) for a, b in zip(got, clean, strict=True))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("pool", ["avg", "flat"])
def test_bits_depend_on_neither_batch_nor_place_nor_threads(
    pool: str, dtype: torch.dtype, layout: str, threads: Callable[[int], None]
) -> None:
    features = make(130, (130, 17, 9), dtype, layout)
    weight, bias = make_gate(features, 70, pool)
    threads(1)
    whole = ops.gate_distances(features, weight, bias, pool)
    for workers in (2, 3):
        threads(workers)
        for start, stop in ((0, 130), (0, 1), (129, 130), (5, 22), (40, 90)):
            part = ops.gate_distances(features[start:stop], weight, bias, pool)
            assert all(torch.equal(a, b[start:stop]) for a, b in zip(part, whole, strict=True)), (workers, start, stop)


def test_a_decision_has_no_gradient() -> None:
    margin, label = ops.gate_score(make(3, (4,)), torch.ones(2, 4, requires_grad=True), torch.zeros(2))
    assert not margin.requires_grad
    assert not label.requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.ones(10, 32)}, r"weight: expected \[K, 64\] float32, got \[10, 32\] float32"),
        ({"weight": torch.ones(64)}, r"weight: expected \[K, 64\] float32, got \[64\] float32"),
        ({"weight": torch.ones(10, 64).half()}, r"weight: expected \[K, 64\] float32, got \[10, 64\] float16"),
        ({"weight": torch.ones(0, 64)}, r"weight: expected at least one class, got \[0, 64\] float32"),
        ({"bias": torch.ones(9)}, r"bias: expected \[10\] float32, got \[9\] float32"),
        ({"features": torch.ones(8, 64, 2).double()}, r"features: expected .*float32.*; got \[8, 64, 2\] float64"),
        ({"features": torch.ones(64)}, r"features: expected rank 2 or 3 or 4 .*; got \[64\] float32"),
        ({"pool": "cls"}, r"features: expected rank 3 \(pool='cls'\).*; got \[8, 64, 2, 2\] float32"),
        ({"pool": "max"}, r"pool: expected 'avg' or 'cls' or 'flat', got 'max'"),
        ({"criterion": "top2"}, r"criterion: expected 'margin' or 'softmax' or 'entropy', got 'top2'"),
        (
            {"features": torch.ones(8, 0, 64), "pool": "cls"},
            r"features: .* expects at least one token, got \[8, 0, 64\]",
        ),
        ({"count": torch.tensor(3)}, r"count: expected \[\] int32, got \[\] int64"),
        ({"count": torch.tensor(9, dtype=torch.int32)}, r"count: expected 0 to 8, got 9"),
        ({"count": torch.tensor(-1, dtype=torch.int32)}, r"count: expected 0 to 8, got -1"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("direct", [False, True], ids=["wrapper", "torch.ops"])
def test_score_errors_name_argument_expected_and_got(changes: dict[str, Any], message: str, direct: bool) -> None:
    good: dict[str, Any] = {
        "features": torch.ones(8, 64, 2, 2),
        "weight": torch.ones(10, 64),
        "bias": torch.ones(10),
        "pool": "avg",
    }
    if direct:  # the kernel itself refuses too, if less eloquently
        message = message.partition(":")[0] + ":"
    operator = torch.ops.dgate_rt.gate_score if direct else ops.gate_score
    with pytest.raises(REFUSAL[direct], match=message):
        operator(**{**good, **changes})


def test_more_weights_than_kernels_address_are_refused() -> None:
    with (
        FakeTensorMode(),
        pytest.raises(ValueError, match="weight: expected at most 2147483647 elements, got 70000 cl"),
    ):
        ops.gate_score(torch.empty(2, 40_000), torch.empty(70_000, 40_000), torch.empty(70_000))


def test_a_tensor_of_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight: expected \[K, 64\] float32 on cpu, got \[10, 64\] float32 on meta"):
        ops.gate_score(torch.ones(8, 64), torch.ones(10, 64, device="meta"), torch.ones(10))


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


def i32(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int32)


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
) -> None:
    torch.manual_seed(seed)
    arguments = route_arguments(n, max(0, n + (waiting or 0) + room), kinds, exit_rate)
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
        with pytest.raises(ValueError, match=f"^{error}$"):
            ops.route_(**got)
        expected = before  # a refusal writes nothing
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
        ({"ids": torch.tensor([0, 1, 9, 2])}, r"ids: expected 0 to 8, got 9 in row 2"),
        ({"ids": torch.tensor([0, 1, 2, -1])}, r"ids: expected 0 to 8, got -1 in row 3"),
        ({"count": torch.tensor(5, dtype=torch.int32)}, r"count: expected 0 to 4, got 5"),
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
        ({"waiting": i32(7)}, r"waiting: expected 0 to 6, got 7"),
        ({"waiting": i32(-1)}, r"waiting: expected 0 to 6, got -1"),
        ({"waiting": torch.tensor(1)}, r"waiting: expected \[\] int32, got \[\] int64"),
        ({"bucket": i32(0)}, r"buckets: expected sizes to choose from, got none"),
        ({"buckets": torch.zeros(0, dtype=torch.int32)}, r"buckets: expected at least one size, got none"),
        ({"buckets": torch.ones(2)}, r"buckets: expected \[M\] int32, got \[2\] float32"),
        (
            {"buckets": i32(1)[None], "thresholds": torch.full((3,), 9.0)},
            r"buckets: 4 rows go on, more than the largest",
        ),
        (
            {"buckets": i32(9)[None], "handles": torch.zeros(2).long()},
            r"handles: expected \[3\] int64, got \[2\] int64",
        ),
        ({"buckets": i32(9)[None], "handles": torch.ones(3).long()}, r"handles: expected none on cpu"),
        ({"status": torch.zeros(1).int()}, r"status: expected \[\] int32, got \[1\] int32"),
        ({"out_scores": torch.zeros(8)}, r"out_scores: expected \[9\] float32, got \[8\] float32"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("direct", [False, True], ids=["wrapper", "torch.ops"])
def test_route_errors_name_argument_expected_and_got(changes: dict[str, Any], message: str, direct: bool) -> None:
    arguments = small_route(**changes)
    before = copied(arguments)
    if direct:
        message = message.partition(":")[0] + ":"
    with pytest.raises(REFUSAL[direct], match=message):
        (torch.ops.dgate_rt.route_ if direct else ops.route_)(**arguments)
    assert_same_arenas(arguments, before)


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


@pytest.mark.parametrize("count", [None, torch.tensor(3, dtype=torch.int32)], ids=["all", "count"])
@pytest.mark.parametrize("operator", ["gate_score", "gate_distances"])
def test_opcheck_of_the_scores(operator: str, count: Tensor | None) -> None:
    features = make(5, SHAPES["4d"])
    weight, bias = make_gate(features, 10, "avg")
    overload = getattr(torch.ops.dgate_rt, operator).default
    torch.library.opcheck(overload, (features, weight, bias, "avg", count))
    torch.library.opcheck(overload, (features, weight.requires_grad_(), bias, "avg", count))


def test_route_errors_are_those_of_the_kernel() -> None:
    header = (Path(__file__).parent.parent / "csrc" / "cuda" / "route_arguments.h").read_text()
    bits = {int(bit): name for name, bit in re.findall(r"^ +k(?:Bad|No)?(\w+) = (\d+),", header, re.MULTILINE)}
    assert {error.value: error.name for error in ops.RouteError} == {bit: name.upper() for bit, name in bits.items()}


def test_opcheck_of_route() -> None:
    arguments = route_arguments(8, 8, [ROWS[0], ROWS[3]], 0.5)
    torch.library.opcheck(torch.ops.dgate_rt.route_.default, (), arguments)
    more = {"waiting": i32(0), "buckets": i32(9)[None], "bucket": i32(0), "status": i32(0)}
    torch.library.opcheck(torch.ops.dgate_rt.route_.default, (), {**arguments, **more})


def test_fakes_read_no_device_data() -> None:
    with FakeTensorMode(), torch.device("cuda"):
        features, weight = torch.empty(8, 64, 4, 4, dtype=torch.float16), torch.empty(10, 64)
        count = torch.empty((), dtype=torch.int32)
        margin, label, distances = ops.gate_distances(features, weight, torch.empty(10), "avg", count)
        assert (margin.shape, label.dtype, distances.shape) == ((8,), torch.int64, (8, 10))
        vector = torch.empty(8, dtype=torch.int64)
        ops.route_(
            [features], vector, margin, label, count, torch.empty(2), 0,
            [torch.empty_like(features)], vector, count, vector, margin, vector,
        )  # fmt: skip
