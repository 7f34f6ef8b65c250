"""Which groups `dgate bench` measures, and in what order."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import psutil
import torch

from dgate_rt.bench import contest, latency, memory, mixes, overhead, streams
from dgate_rt.bench.cases import DENSENET_201, RESNET_50, RESNET_101, VIT_B, Case, Network, make_case
from dgate_rt.bench.record import Group, Row
from dgate_rt.bench.workload import NO_EXIT, PAPER_MIXES, Mix
from dgate_rt.engines import check_engine, supports_bfloat16
from dgate_rt.errors import ExecutorError
from dgate_rt.staged import as_tuple

Engine = tuple[str, str]
"""A stage engine by name, and the dtype it computes in."""
EAGER: Engine = ("eager", "float32")
EAGER_BFLOAT16: Engine = ("eager", "bfloat16")
COMPILED: tuple[Engine, ...] = (
    ("inductor", "float32"),
    ("inductor", "bfloat16"),
    ("openvino", "float32"),
    ("openvino", "bfloat16"),
    ("onnxruntime", "float32"),
)
MIXED = PAPER_MIXES[1]
_UNCUT = 256  # images of the largest batch that ways without arenas run in one piece
_BOUNDARIES, _REST_GIB = 6, 2.0  # what running a batch is taken to need: boundaries of it, and this for all else


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    networks: tuple[tuple[Network, int, tuple[Engine, ...]], ...]  # beside ResNet-101: images a round, engines
    batch_sizes: tuple[int, ...]
    images: int  # a round takes at least
    mixes: tuple[Mix, ...]
    engines: tuple[Engine, ...]  # of the exit mixes
    contest: tuple[Engine, ...]
    overhead_batch_sizes: tuple[int, ...]  # beside those of the exit mixes, of which one is that nobody leaves
    gate_batch_sizes: tuple[int, ...]
    memory_batch_sizes: tuple[int, ...]
    stream_images: int
    calls: int  # of one sample
    repeats: int


FULL = Scale(
    networks=(
        (DENSENET_201, 64, (EAGER, EAGER_BFLOAT16)),
        (RESNET_50, 32, (EAGER, EAGER_BFLOAT16)),
        (VIT_B, 8, (EAGER, EAGER_BFLOAT16)),
    ),
    batch_sizes=(8, 32, 64, 128),
    images=64,
    mixes=(*PAPER_MIXES, NO_EXIT),
    engines=(EAGER, EAGER_BFLOAT16),
    contest=(EAGER, EAGER_BFLOAT16, *COMPILED),
    overhead_batch_sizes=(1, 256),
    gate_batch_sizes=(1, 8, 32, 64, 256),
    memory_batch_sizes=(64, 256, 1024, 4096),
    stream_images=128,
    calls=100,
    repeats=5,
)
QUICK = Scale(
    networks=(),
    batch_sizes=(32,),
    images=32,
    mixes=(MIXED, NO_EXIT),
    engines=(EAGER,),
    contest=(EAGER, EAGER_BFLOAT16),
    overhead_batch_sizes=(),
    gate_batch_sizes=(32,),
    memory_batch_sizes=(),
    stream_images=32,
    calls=10,
    repeats=3,
)
PARTS = ("mixes", "sweep", "overhead", "latency", "contest", "memory", "streams")


def groups(scale: Scale, parts: Sequence[str] = PARTS) -> list[Group]:
    """All groups of some parts."""
    makers: dict[str, Callable[[Scale], Iterator[Group]]] = {
        "mixes": _mixes,
        "sweep": _sweep,
        "overhead": _overhead,
        "latency": _latency,
        "contest": _contest,
        "memory": _memory,
        "streams": _streams,
    }
    return [group for part in parts for group in makers[part](scale)]


def _mixes(scale: Scale) -> Iterator[Group]:
    work = [(RESNET_101, b, scale.images, scale.engines, scale.mixes) for b in scale.batch_sizes]
    work += [(network, n, n, engines, scale.mixes) for network, n, engines in scale.networks]
    for network, batch_size, images, engines, chosen in work:
        for engine in engines:
            yield _group(
                "mixes", network, engine, batch_size, lambda case, engine, b, images=images, chosen=chosen: (
                    mixes.measure_mixes(case, *engine, b, images, chosen, scale.repeats)
                )
            )  # fmt: skip


def _sweep(scale: Scale) -> Iterator[Group]:
    b = max(size for size in scale.batch_sizes if size <= 64)
    yield _group(
        "sweep", RESNET_101, EAGER, b, lambda case, engine, b: (
            mixes.measure_sweep(case, *engine, b, scale.images, scale.repeats)
        )
    )  # fmt: skip


def _overhead(scale: Scale) -> Iterator[Group]:
    for b in scale.overhead_batch_sizes:
        yield _group(
            "overhead", RESNET_101, EAGER, b, lambda case, engine, b: (
                overhead.measure_no_exit(case, *engine, b, scale.images, scale.repeats)
            )
        )  # fmt: skip
    for b in scale.gate_batch_sizes:
        yield _group(
            "gates", RESNET_101, EAGER, b, lambda case, engine, b: overhead.measure_gates(case, b, scale.repeats)
        )  # fmt: skip


def _latency(scale: Scale) -> Iterator[Group]:
    for engine in scale.engines:
        yield _group(
            "latency", RESNET_101, engine, 1, lambda case, engine, b: (
                latency.measure_latency(case, *engine, scale.calls)
            )
        )  # fmt: skip


def _contest(scale: Scale) -> Iterator[Group]:
    def measure(case: Case, engine: Engine, b: int) -> list[Row]:
        missing = {e: why_not(*e) for e in scale.contest}
        skipped = [
            Row("contest", case.network.name, *e, "dense", b, note=f"skipped: {why}")
            for e, why in missing.items()
            if why
        ]
        engines = [e for e, why in missing.items() if not why]
        return [
            *contest.measure_contest(case, engines, b, scale.images, (MIXED, NO_EXIT), scale.repeats),
            *skipped,
        ]

    yield _group("contest", RESNET_101, ("every engine", ""), min(64, max(scale.batch_sizes)), measure)


def _memory(scale: Scale) -> Iterator[Group]:
    for size in scale.memory_batch_sizes:
        ways = memory.WAYS if size <= _UNCUT else ("refill",)

        def measure(case: Case, engine: Engine, b: int, ways: Sequence[str] = ways) -> list[Row]:
            return [memory.measure_memory(way, b, engine[1]) for way in ways]

        yield _group("memory", RESNET_101, EAGER, size, measure, at_once=min(size, _UNCUT))


def _streams(scale: Scale) -> Iterator[Group]:
    yield _group(
        "streams", RESNET_101, EAGER, streams.CHUNK, lambda case, engine, b: (
            streams.measure_streams(case, *engine, scale.stream_images, MIXED, scale.repeats)
        )
    )  # fmt: skip


def _group(
    part: str,
    network: Network,
    engine: Engine,
    batch_size: int,
    measure: Callable[[Case, Engine, int], Sequence[Row]],
    at_once: int | None = None,  # images that run at once, where batches are cut up
) -> Group:
    """A group that says so instead of measuring where an engine is missing or the machine too small."""

    def checked() -> Sequence[Row]:
        def skipped(why: str) -> list[Row]:
            return [Row(part, network.name, *engine, "all", batch_size, note=f"skipped: {why}")]

        missing = why_not(*engine) if engine[1] else None
        if missing:
            return skipped(missing)
        case = case_of(network)
        small = too_small(case, at_once or batch_size)
        if small:
            return skipped(small)
        return measure(case, engine, batch_size)

    return Group(part, f"{part}: {network.name}, {' '.join(engine).strip()}, B {batch_size}", checked)


def why_not(engine: str, dtype: str) -> str | None:
    """Why an engine cannot be measured here in a dtype, or None."""
    try:
        check_engine(engine, torch.device("cpu"))
    except ExecutorError as error:
        return str(error)
    if dtype == "bfloat16" and not supports_bfloat16(torch.device("cpu")):
        return "this CPU has no instructions for bfloat16"
    return None


@functools.lru_cache(maxsize=1)
def case_of(network: Network) -> Case:
    """The network, made once for groups that follow each other."""
    return make_case(network, "cpu", torch.float32)


def too_small(case: Case, batch_size: int) -> str | None:
    """Why a batch is not tried on this machine, or None."""
    with torch.inference_mode():
        widest = max(sum(t.nbytes for t in as_tuple(b)) for b in case.exact.boundaries(case.images(1)))
    need = _BOUNDARIES * batch_size * widest / 2**30 + _REST_GIB
    free = psutil.virtual_memory().available / 2**30
    return f"expected {need:.1f} GiB of free memory, got {free:.1f}" if need > free else None
