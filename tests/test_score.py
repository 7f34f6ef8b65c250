"""`gate_score` and `gate_distances` are the reference but for the order of sums; errors say expected and got.

On the CPU they are C++, on a GPU Triton: where there is a GPU every test runs there again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensors import (
    DTYPES,
    LAYOUTS,
    POOLS,
    REFUSAL,
    SHAPES,
    TOLERANCE,
    assert_same_scores,
    i32,
    make,
    make_gate,
    moved,
    name,
)
from torch._subclasses import FakeTensorMode

from dgate_rt import ops, reference
from dgate_rt.gate import confidence_and_label

pytestmark = [
    pytest.mark.skipif(not ops.extension_loaded(), reason="the C++ extension is not built"),
    pytest.mark.usefixtures("device"),
]


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


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice"])
@pytest.mark.parametrize(
    "shape", [(5, 1, 1), (5, 1, 3), (5, 2, 1), (5, 3, 3), (5, 7, 6), (3, 2, 1030), (0, 4, 4)], ids=str
)
@pytest.mark.parametrize("pool", ["grid2", "grid4"])
def test_a_grid_fits_any_map(pool: str, shape: tuple[int, ...], layout: str) -> None:
    features = make(3, shape, layout=layout)
    weight, bias = make_gate(features, 4, pool)
    got = ops.gate_distances(features, weight, bias, pool)
    assert_same_scores(got, reference.gate_distances(features, weight, bias, pool), TOLERANCE[torch.float32])


def test_a_grid_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a map of at least one element \(pool='grid2'\), got \[2, 3, 0, 4\]"):
        ops.gate_score(torch.zeros(2, 3, 0, 4), torch.zeros(5, 12), torch.zeros(5), "grid2")


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
    got = ops.gate_distances(features, weight, bias, pool, live)
    assert_same_scores(tuple(part[:count] for part in got), expected, TOLERANCE[torch.float32])
    assert not any(part[count:].any() for part in got)


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


@pytest.mark.usefixtures("cpu")
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


def test_more_classes_than_a_launch_has_tiles_for_are_refused() -> None:
    with FakeTensorMode(), pytest.raises(ValueError, match="weight: expected at most 1048560 classes, got 2000000"):
        ops.gate_score(torch.empty(2, 4), torch.empty(2_000_000, 4), torch.empty(2_000_000))


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
        ({"pool": "max"}, r"pool: expected 'avg' or 'cls' or 'flat' or 'grid2' or 'grid4', got 'max'"),
        ({"criterion": "top2"}, r"criterion: expected 'margin' or 'softmax' or 'entropy', got 'top2'"),
        (
            {"features": torch.ones(8, 0, 64), "pool": "cls"},
            r"features: .* expects at least one token, got \[8, 0, 64\]",
        ),
        ({"count": torch.tensor(3)}, r"count: expected \[\] int32, got \[\] int64"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("direct", [False, True], ids=["wrapper", "torch.ops"])
def test_score_errors_name_argument_expected_and_got(
    changes: dict[str, Any], message: str, direct: bool, device: str
) -> None:
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
        operator(**{**good, **moved(changes, device)})


@pytest.mark.parametrize("count", [9, -1])
def test_a_score_of_more_rows_than_there_are_is_refused_or_cut_to_those_there_are(count: int, device: str) -> None:
    features = make(8, (64,))
    gate = make_gate(features, 10, "avg")
    if device == "cpu":
        with pytest.raises(ValueError, match=f"count: expected 0 to 8, got {count}"):
            ops.gate_score(features, *gate, "avg", i32(count))
        return
    got = ops.gate_distances(features, *gate, "avg", i32(count))  # the route behind it reports the count
    expected = reference.gate_distances(features, *gate, "avg", i32(min(max(count, 0), 8)))
    assert_same_scores(got, expected, TOLERANCE[torch.float32])


def test_more_weights_than_kernels_address_are_refused() -> None:
    with (
        FakeTensorMode(),
        pytest.raises(ValueError, match="weight: expected at most 2147483647 elements, got 70000 cl"),
    ):
        ops.gate_score(torch.empty(2, 40_000), torch.empty(70_000, 40_000), torch.empty(70_000))


def test_a_tensor_of_another_device_is_refused(device: str) -> None:
    expected = rf"weight: expected \[K, 64\] float32 on {device}(:0)?, got \[10, 64\] float32 on meta"
    with pytest.raises(ValueError, match=expected):
        ops.gate_score(torch.ones(8, 64), torch.ones(10, 64, device="meta"), torch.ones(10))


@pytest.mark.parametrize("live", [None, 3], ids=["all", "count"])
@pytest.mark.parametrize("operator", ["gate_score", "gate_distances"])
def test_opcheck_of_the_scores(operator: str, live: int | None) -> None:
    count = None if live is None else i32(live)
    features = make(5, SHAPES["4d"])
    weight, bias = make_gate(features, 10, "avg")
    overload = getattr(torch.ops.dgate_rt, operator).default
    torch.library.opcheck(overload, (features, weight, bias, "avg", count))
    torch.library.opcheck(overload, (features, weight.requires_grad_(), bias, "avg", count))


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
