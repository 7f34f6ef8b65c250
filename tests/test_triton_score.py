"""The Triton score is the reference, run by Triton's interpreter on CPU tensors; outputs and scratch start as NaN."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensors import DTYPES, LAYOUTS, POOLS, SHAPES, TOLERANCE, assert_same_scores, i32, make, name
from torch import Tensor

from dgate_rt import reference

triton = pytest.importorskip("triton", reason="needs triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("needs Triton's interpreter: set TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

from triton.runtime import interpreter  # noqa: E402

from dgate_rt.kernels import gate_score, score_kernels  # noqa: E402
from dgate_rt.kernels.score_plan import ScorePlan, plan_score  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities in the interpreter

CRITERIA = ["margin", "softmax", "entropy"]
DIVISIONS = ["whole", "classes", "channels"]


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """`torch.empty` gives NaN and the largest integer, so whatever is read before it is written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def divide(monkeypatch: pytest.MonkeyPatch, division: str, variant: Any = None) -> None:
    """Have rows scored whole, in tiles of classes (where a product scores them), or in three splits of channels."""

    def divided(*args: Any, sms: int = 0, **kwargs: Any) -> ScorePlan:
        *sizes, _ = args
        forced = variant if sizes[2] > 1 else None
        plan = plan_score(*sizes, 1 if division == "whole" else 10**6, variant=forced, **kwargs)
        if division == "channels":
            channels = 8 if plan.variant == "fused" else 16
            return dataclasses.replace(plan, splits=3, block_c=8, tile_c=channels)
        return dataclasses.replace(plan, splits=1)

    monkeypatch.setattr(gate_score, "plan_score", divided)


@pytest.fixture(params=DIVISIONS)
def division(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    divide(monkeypatch, request.param)
    return request.param


def make_gate(features: Tensor, classes: int, pool: str) -> tuple[Tensor, Tensor]:
    """Distances of size 1 at any width, so that one tolerance fits all."""
    width = reference.pool_features(features[:0], pool).shape[1]
    return torch.randn(classes, width) / width**0.5, torch.randn(classes)


def small(pool: str, rank: str, n: int = 5, classes: int = 10, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    features = make(n, SHAPES[rank], **kwargs)
    return features, *make_gate(features, classes, pool)


def check(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    pool: str = "avg",
    count: int | None = None,
    criterion: str = "margin",
) -> tuple[Tensor, Tensor, Tensor]:
    """Score and compare with the reference. A tie or a NaN of the reference decides its label exactly."""
    tolerance = TOLERANCE[features.dtype]
    got = gate_score.score(features, weight, bias, pool, None if count is None else i32(count), criterion, True)
    live = None if count is None else i32(min(max(count, 0), len(features)))
    margin, label, distances = reference.gate_distances(features, weight, bias, pool, live, criterion)
    torch.testing.assert_close(got[0], margin, rtol=tolerance, atol=tolerance, equal_nan=True)
    largest, _ = reference.margin_and_label(distances)
    chosen = distances.gather(1, got[1][:, None])[:, 0]
    assert_same_scores((chosen, *got[1:]), (largest, label, distances), tolerance)
    flipped = got[1] != label
    assert not ((chosen == largest) | largest.isnan())[flipped].any()
    return got


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize(("pool", "rank"), POOLS)
def test_scores_are_the_reference(pool: str, rank: str, dtype: torch.dtype, layout: str) -> None:
    check(*small(pool, rank, 3, dtype=dtype, layout=layout), pool)


@pytest.mark.parametrize(
    ("pool", "rank", "n"), [(*pool, n) for pool in POOLS for n in (0, 1, 31, 129)] + [("cls", "3d", 1000)]
)
def test_any_number_of_rows_will_do(pool: str, rank: str, n: int) -> None:
    check(*small(pool, rank, n), pool)


@pytest.mark.parametrize(
    ("n", "shape", "classes", "pool"),
    [
        (3, (40, 9, 9), 1, "avg"),
        (3, (300, 2, 3), 2, "avg"),
        (2, (33, 7, 7), 100, "avg"),
        (3, (19, 3, 3), 1000, "avg"),
        (2, (6, 33, 35), 3, "avg"),
        (2, (197, 24), 1000, "cls"),
        (3, (9, 4, 5), 1000, "flat"),
        (2, (70, 5, 1), 10, "avg"),
        (3, (40, 9, 9), 1, "grid2"),
        (2, (33, 7, 8), 100, "grid4"),
        (2, (19, 3, 3), 1000, "grid2"),
        (2, (6, 33, 35), 3, "grid2"),
        (2, (70, 5, 1), 10, "grid4"),
        (2, (70, 1, 1), 10, "grid2"),
    ],
    ids=str,
)
def test_any_shape_will_do(n: int, shape: tuple[int, ...], classes: int, pool: str, division: str) -> None:
    features = make(n, shape)
    check(features, *make_gate(features, classes, pool), pool)


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("rank", SHAPES)
def test_every_criterion_is_the_reference(rank: str, criterion: str, classes: int, division: str) -> None:
    check(*small("avg", rank, classes=classes), criterion=criterion)


@pytest.mark.parametrize("variant", ["fused", "pooled"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice"])
def test_every_variant_gives_the_same(layout: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for division in DIVISIONS:
        divide(monkeypatch, division, variant)
        for criterion in CRITERIA:
            check(*small("avg", "4d", 3, 70, layout=layout), count=2, criterion=criterion)
            check(*small("grid2", "4d", 3, 70, layout=layout), "grid2", 2, criterion)


@pytest.mark.parametrize("variant", ["fused", "pooled"])
def test_distances_that_are_not_kept_change_nothing(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for division in DIVISIONS:
        divide(monkeypatch, division, variant)
        arguments = (*small("avg", "4d", 3, 70), "avg", i32(2), "entropy")
        *bare, distances = gate_score.score(*arguments, False)
        *kept, _ = gate_score.score(*arguments, True)
        assert all(torch.equal(a, b) for a, b in zip(bare, kept, strict=True))
        assert distances.shape == (0, 70)


@pytest.mark.parametrize("classes", [10, 40])
@pytest.mark.parametrize("count", [0, 1, 4])
@pytest.mark.parametrize(("pool", "rank"), [("avg", "4d"), ("cls", "3d"), ("flat", "4d"), ("avg", "2d")])
def test_rows_from_count_on_are_zero(pool: str, rank: str, count: int, classes: int, division: str) -> None:
    features, weight, bias = small(pool, rank, 4, classes)
    clean = gate_score.score(features, weight, bias, pool, None, "margin", True)
    features[count:] = math.nan
    got = check(features, weight, bias, pool, count)
    for scores, undisturbed in zip(got, clean, strict=True):
        assert torch.equal(scores[:count], undisturbed[:count])
        assert not scores[count:].any()


@pytest.mark.parametrize("count", [-(2**31), 4, 2**31 - 1])
def test_a_count_out_of_range_is_clamped(count: int, division: str) -> None:
    for rank in SHAPES:
        for classes in (10, 40):
            check(*small("avg", rank, 3, classes), count=count)


@contextmanager
def only_live_rows_may_be_read(features: Tensor, live: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Any read from the memory of ``features`` must be of an element of a live row, not between, behind or before."""
    size, storage = features.element_size(), features.untyped_storage()
    start, stop = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    elements = torch.arange(storage.nbytes() // size)
    elements = elements.as_strided(features.shape, features.stride(), features.storage_offset())
    allowed = start + size * elements[:live].flatten().numpy().astype(np.uint64)
    real = interpreter._interpreter

    class Watch:
        def __getattr__(self, attribute: str) -> Any:
            return getattr(real, attribute)

        def load(self, addresses: Any, mask: Any, other: Any, dtype: Any) -> Any:
            read = addresses[mask.astype(bool)]
            read = read[(read >= start) & (read < stop)]
            assert np.isin(read, allowed).all(), "read what is no feature of a live row"
            return real.load(addresses, mask, other, dtype)

    with monkeypatch.context() as patch:
        patch.setattr(interpreter, "_interpreter", Watch())
        yield


def guarded(features: Tensor) -> Tensor:
    """The same, at the same strides, with NaN before and behind."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(features.shape, features.stride(), strict=True))
    memory = torch.full((span + 2 * 4096,), math.nan, dtype=features.dtype)
    return memory.as_strided(features.shape, features.stride(), 4096).copy_(features)


@pytest.mark.parametrize("count", [None, 2])
@pytest.mark.parametrize("layout", ["channels_last", "slice"])
@pytest.mark.parametrize(("pool", "rank"), POOLS)
def test_only_live_rows_are_read(
    pool: str, rank: str, layout: str, count: int | None, division: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = guarded(make(3, SHAPES[rank], layout=layout))
    with only_live_rows_may_be_read(features, 3 if count is None else count, monkeypatch):
        check(features, *make_gate(features, 20, pool), pool, count)


def test_weight_and_bias_may_be_strided(division: str) -> None:
    for shape in ((37,), (37, 3, 5)):
        for classes in (10, 70):
            memory, line = torch.full((37 * 2, classes * 3), math.nan), torch.full((classes * 3,), math.nan)
            weight, bias = memory.T[::3, ::2].copy_(torch.randn(classes, 37)), line[::3].copy_(torch.randn(classes))
            check(make(3, shape), weight, bias)


def test_expanded_features_are_read_where_they_lie() -> None:
    features = torch.randn(3, 1, 4, 1).expand(3, 20, 4, 5)
    for pool in ("avg", "flat"):
        check(features, *make_gate(features, 10, pool), pool)


@pytest.mark.parametrize("shape", [(37, 2, 20), (37, 2, 2), (37,)], ids=str)
def test_a_tie_goes_to_the_lowest_class(shape: tuple[int, ...], division: str) -> None:
    for attaining in ([3, 5, 66], [66, 69], [0, 16], [15, 16], [31, 32], range(70)):
        bias = torch.zeros(70)
        bias[list(attaining)] = 1.0
        _, label, _ = check(torch.zeros(1, *shape), torch.zeros(70, 37), bias)
        assert label.eq(attaining[0]).all()


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("shape", [(37, 2, 20), (37,)], ids=str)
def test_a_nan_distance_gives_a_nan_margin_and_the_lowest_nan_class(
    shape: tuple[int, ...], criterion: str, division: str
) -> None:
    for broken in ([2, 3], [40, 41], [0], [69], [17, 60]):
        bias = torch.linspace(0, 9, 70)
        bias[[1, 50]] = math.inf
        bias[broken] = math.nan
        margin, label, _ = check(torch.ones(1, *shape), torch.ones(70, 37), bias, criterion=criterion)
        assert margin.isnan().all()
        assert label.eq(broken[0]).all()


INFINITIES = {
    "inf": {3: math.inf},
    "infs": {3: math.inf, 40: math.inf, 2: -math.inf},
    "-inf": {0: -math.inf, 20: -math.inf},
    "-inf in a tile": dict.fromkeys(range(16), -math.inf),
    "-inf in all": dict.fromkeys(range(70), -math.inf),
    "sure": {7: 200.0},  # all others underflow
}


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("case", INFINITIES)
def test_infinities_are_those_of_the_reference(case: str, criterion: str, division: str) -> None:
    bias = torch.linspace(0, 9, 70)
    bias[list(INFINITIES[case])] = torch.tensor(list(INFINITIES[case].values()))
    for shape in ((37, 2, 20), (37,)):
        check(torch.ones(1, *shape), torch.full((70, 37), 0.125), bias, criterion=criterion)


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_broken_sample_harms_no_other(bad: float, classes: int, division: str) -> None:
    for rank in SHAPES:
        features, weight, bias = small("avg", rank, 3, classes)
        clean = check(features, weight, bias)
        features[1].view(-1)[11] = bad
        got = check(features, weight, bias)
        assert all(torch.equal(a[::2], b[::2]) for a, b in zip(got, clean, strict=True))


def check_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few scores that reach every kernel, every way to divide a row, and every rule."""
    for division, shape, pool, variant in (
        ("channels", (20, 3, 5), "avg", "fused"),
        ("classes", (20, 3, 5), "avg", "pooled"),
        ("channels", (20, 2, 3), "flat", None),
        ("whole", (20, 3, 5), "avg", "fused"),
        ("classes", (5, 37), "cls", None),
        ("channels", (12, 7, 5), "grid2", "fused"),
        ("classes", (12, 3, 3), "grid4", "pooled"),
    ):
        divide(monkeypatch, division, variant)
        features = guarded(make(3, shape, layout="slice"))
        features[2] = math.nan
        weight, bias = make_gate(features, 37, pool)
        with only_live_rows_may_be_read(features, 2, monkeypatch):
            check(features, weight, bias, pool, 2, "entropy")
        with only_live_rows_may_be_read(features, 0, monkeypatch):
            check(features, weight, bias, pool, -3)
        bias[[4, 8, 30]] = 999.0
        check(features[:2], weight * 0, bias, pool, None, "softmax")
        bias[[5, 7, 31]] = math.nan
        check(features[:2], weight, bias, pool)


MUTANTS = {
    "position mask": ("& (position < P)[None, :]", "& (position < P + 1)[None, :]"),
    "channel mask of features": ("used = channel < C\n", "used = channel < C + 1\n"),
    "channel mask of the pool kernel": ("channel, channel < C, cell", "channel, channel < C + 1, cell"),
    "cells begin too late": ("+ cell * (size % SIDE)", "+ SIDE * (size % SIDE)"),
    "cells end too early": ("((cell + 1) * size + SIDE - 1) // SIDE", "(cell + 1) * size // SIDE"),
    "row mask of a cell": ("(position // WIDTH < rows)", "(position // WIDTH < rows + 1)"),
    "column mask of a cell": ("(position % WIDTH < columns)", "(position % WIDTH < columns + 1)"),
    "cells one channel after another": ("channel * (SIDE * SIDE) + cell", "cell * C + channel"),
    "a block behind the last cell": ("(channel < C) & (cell < SIDE * SIDE)", "channel < C"),
    "channel mask of a product": ("(row < live)[:, None] & (channel < C)[None, :]", "(row < live)[:, None]"),
    "class mask": ("(classes < K)[None, :], distances, float", "(classes < K + 1)[None, :], distances, float"),
    "count of the fused kernel": ("if sample < live:\n        for", "if sample < rows:\n        for"),
    "count of the pool kernel": ("if sample < _live_rows(count, rows):", "if sample < rows:"),
    "count of the product": ("mask=(row < live)[:, None] & (channel", "mask=(row < rows)[:, None] & (channel"),
    "count is not clamped": ("tl.minimum(tl.maximum(tl.load(count), 0), rows)", "tl.abs(tl.load(count))"),
    "dead rows keep a margin": ("tl.where(row < live, confidence, 0.0)", "confidence"),
    "dead rows keep a label": ("tl.where(row < live, label, 0)", "label"),
    "dead rows keep distances": ("tl.where((row < live)[:, None], distances, 0.0)", "distances"),
    "ties go to the highest": (
        "attained = tl.min(tl.where(peak == top[:, None], label, _NO_CLASS), 1)",
        "attained = tl.max(tl.where(peak == top[:, None], label, -1), 1)",
    ),
    "the highest NaN": (
        "tl.where(any_broken, first_broken, attained)",
        "tl.where(any_broken, tl.max(tl.where(broken, label, -1), 1), attained)",
    ),
    "NaN does not win": ('tl.where(any_broken, float("nan"), top)', "top"),
    "softmax is not shifted": ("scale = tl.exp(shifted)", "scale = tl.exp(peak)"),
    "moments are not shifted": ("(t + s * shifted) * scale", "t * scale"),
    "sums of tiles are not scaled": ("s = tl.sum(s * scale, 1)", "s = tl.sum(s, 1)"),
    "padded splits are added": ("(split < SPLITS)[:, None] &", "(split < SPLITS + 1)[:, None] &"),
    "a split is missing": ("(split < SPLITS)[:, None] &", "(split < SPLITS - 1)[:, None] &"),
    "bias is missing": ("distance += tl.load(bias + column", "distance += 0 * tl.load(bias + column"),
    "stride of a line": ("(position // WIDTH).to(tl.int64) * stride_h", "(position // WIDTH).to(tl.int64) * stride_p"),
    "stride of the middle": ("wide // C_SIZE % B_SIZE * stride_b", "wide // C_SIZE % B_SIZE * stride_c"),
    "alignment": ("stride_c * ALIGN_C)", "stride_c)"),
}  # fmt: skip


def test_the_corpus_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    check_corpus(monkeypatch)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_broken_kernel_is_caught(mutant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, (good, bad) = Path(score_kernels.__file__).read_text(), MUTANTS[mutant]
    assert source.count(good) == 1, f"{mutant}: expected one {good!r}, got {source.count(good)}"
    path = tmp_path / "mutant.py"  # a file: triton reads the source of a kernel
    path.write_text(source.replace(good, bad))
    mutated: dict[str, Any] = {"__name__": "mutant"}
    exec(compile(path.read_text(), path, "exec"), mutated)
    for kernel in ("fused_kernel", "pool_kernel", "product_kernel", "combine_kernel"):
        monkeypatch.setattr(gate_score, kernel, mutated[kernel])
    with pytest.raises((AssertionError, interpreter.InterpreterError)):
        check_corpus(monkeypatch)


TRACE = """
import torch
from torch._library.triton import get_inner_triton_kernels
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from dgate_rt.kernels import gate_score

operator = torch.library.triton_op("dgate_rt_test::triton_score", gate_score.score, mutates_args=())
kernels = {kernel.fn.__name__ for kernel in get_inner_triton_kernels(gate_score.score)}
assert kernels == {"fused_kernel", "pool_kernel", "product_kernel", "combine_kernel"}, kernels
for shape, classes, launches in (
    ((1024, 256, 32, 32), 10, 1),  # fused
    ((8, 256, 32, 32), 10, 2),  # fused, combine
    ((32, 1024, 14, 14), 1000, 3),  # pool, product, combine
    ((4096, 64), 10, 1),  # product
    ((0, 64), 10, 0),
):
    with FakeTensorMode(), torch.device("cuda"):
        features, weight = torch.empty(shape, dtype=torch.bfloat16), torch.empty(classes, shape[1])
        arguments = features, weight, torch.empty(classes), torch.empty((), dtype=torch.int32)
        call = lambda f, w, b, n: gate_score.score(f, w, b, "avg", n, "entropy", True)
        nodes = [node for node in make_fx(call)(*arguments).graph.nodes if "triton_kernel_wrapper" in str(node.target)]
        assert len(nodes) == launches, (shape, nodes)
        margin, label, distances = operator(*arguments[:3], "avg", arguments[3], "softmax", False)
        assert margin.shape == label.shape == (shape[0],), margin.shape
        assert distances.shape == (0, classes), distances.shape
        assert (margin.device.type, label.dtype) == ("cuda", torch.int64)
print("traced")
"""


def test_tracing_sees_the_launches_and_reads_nothing_from_the_device() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", TRACE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (0, "traced\n"), done.stderr
