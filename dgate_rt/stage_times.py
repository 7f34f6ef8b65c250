"""What each stage takes at each batch size on this machine: measured once, then kept in the user's cache directory."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from dgate_rt.cache import keep, recall
from dgate_rt.chunks import StageTimes
from dgate_rt.executors.base import empty_rows, row_dense
from dgate_rt.gate import Gate
from dgate_rt.progress import track
from dgate_rt.staged import StagedModel, as_tuple
from dgate_rt.threads import alone
from dgate_rt.timing import machine_header

ROUNDS = 5
_SAMPLES = 4  # of which the inputs of later stages are made, by repeating them
_LONG_MS = 1000.0
_LARGE = 2**29
"""Bytes of a boundary that no cache holds: from there on a sample costs what it costs, and memory runs out."""
_SCHEMA = 3  # of what is kept: raised where older times would mislead
_MACHINE = ("cpu", "kernels", "bfloat16", "torch_threads", "torch", "freed_memory")  # what times depend on


def stage_times(
    staged: StagedModel,
    input_shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    channels_last: bool,
    sizes: Sequence[int],  # ascending
    engine_id: str | None = "eager",
    remeasure: bool = False,
) -> StageTimes:
    """`measure_stage_times`, or what it found when it was last asked the same.

    Kept in the user's cache directory (`dgate_rt.cache`). The same are backbone, shape, dtype, layout, engine, sizes,
    threads, machine and versions. What cannot be read is measured again, and what a machine was too busy to measure
    whole is not kept.

    Args:
        staged: in eval mode, on ``device``, in the memory format that it will run in.
        input_shape: of one sample.
        dtype: of the input.
        device: where to run.
        channels_last: whether images come in that memory format.
        sizes: the batch sizes to time.
        engine_id: what runs a stage, and its version; None for what is not known again and so measured every time.
        remeasure: whether to measure even so, and to keep that.
    """
    header = machine_header()
    key = {
        "schema": _SCHEMA,
        "backbone": staged.fingerprint(),
        "input": [list(input_shape), str(dtype), "channels_last" if channels_last else "as given"],
        "engine": engine_id,
        "sizes": list(sizes),
        "machine": {name: header[name] for name in _MACHINE} | {"device": str(device)},
    }
    name = f"stage-times-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.json"
    known = None if remeasure or engine_id is None else _recalled(name, key)
    if known is not None:
        return known
    times = measure_stage_times(staged, input_shape, dtype, device, channels_last, sizes)
    if times.complete and engine_id is not None:
        keep(name, {"key": key, "times": asdict(times)})
    return times


def sizes_up_to(batch_size: int) -> tuple[int, ...]:
    """The powers of two up to ``batch_size``, and itself."""
    return tuple(sorted({batch_size, *(2**i for i in range(batch_size.bit_length()))}))


@torch.inference_mode()
def measure_stage_times(
    staged: StagedModel,
    input_shape: Sequence[int],  # of one sample
    dtype: torch.dtype,
    device: torch.device,
    channels_last: bool,
    sizes: Sequence[int],  # ascending
    budget_s: float = 10.0,
) -> StageTimes:
    """Time every stage at every size, and the copying of rows at every cut, on noise.

    Rounds go over sizes and stages in turn, so that a slow spell of the machine meets all alike. The least time counts:
    with few rounds a median would still hold the warm-up, and whatever else the machine did. A stage is not tried at
    larger sizes once two in a row have not made a sample cheaper, or where what it takes or returns would be above half
    a GiB. Each size that is tried runs twice, and up to `ROUNDS` times until ``budget_s`` is spent; if that is too
    early for some sizes, a sample is taken to cost there what it cost at the largest that was tried.
    """
    end = time.perf_counter() + budget_s
    inputs = _inputs(staged, input_shape, dtype, device, channels_last)
    stages = range(len(inputs))
    a_sample = [sum(t.nbytes for t in boundary) // _SAMPLES for boundary in inputs]
    most = [_LARGE // max(1, *around) for around in zip(a_sample, [*a_sample[1:], 0], strict=True)]

    def clock(stage: int, size: int) -> float:
        with alone(staged):
            given = tuple(_repeated(t, size) for t in inputs[stage])  # afresh, for a stage may work in place
            return _milliseconds(lambda: staged.run_stage(stage, given))

    least: list[dict[int, float]] = [{} for _ in stages]  # milliseconds by size
    single = sum(min(clock(stage, 1), clock(stage, 1)) for stage in stages)
    watched = 2 * single * sum(sizes) > _LONG_MS
    cut_short: set[int] = set()
    for size in track(sizes, "timing the stages", enabled=watched):
        for stage in stages:
            if _grown_too_large(least[stage]) or size > max(most[stage], sizes[0]):
                continue
            if size == sizes[0] or time.perf_counter() < end:
                least[stage][size] = min(clock(stage, size), clock(stage, size))
            else:
                cut_short.add(stage)
    for _ in track(range(ROUNDS - 2), "once more", enabled=watched):
        for stage, size in [(stage, size) for size in sizes for stage in stages if size in least[stage]]:
            if time.perf_counter() < end:
                least[stage][size] = min(least[stage][size], clock(stage, size))
    for stage in cut_short:
        largest, ms = next(reversed(least[stage].items()))
        least[stage] |= {size: ms / largest * size for size in sizes if size > largest}
    found = tuple(tuple(by_size.values()) for by_size in least)
    with alone(staged):
        regroup = tuple(_copying(boundary) for boundary in inputs[1:])
    return StageTimes(tuple(sizes), found, regroup, not cut_short)


@torch.inference_mode()
def gate_times(
    staged: StagedModel,
    gates: Sequence[Gate],
    input_shape: Sequence[int],  # of one sample
    dtype: torch.dtype,
    channels_last: bool,
    sizes: Sequence[int],  # [G]; at which to score
) -> tuple[float, ...]:  # [G]
    """Milliseconds that each gate's score takes a sample; the least of a few, on noise."""
    device = next((t.device for gate in gates for t in gate.parameters()), torch.device("cpu"))
    found = []
    inputs = _inputs(staged, input_shape, dtype, device, channels_last)[1:] if gates else []
    for g, (gate, boundary, size) in enumerate(zip(gates, inputs, sizes, strict=True)):
        features = staged.gate_features(g, _repeated(boundary[0], size))
        score = functools.partial(gate.score, features)
        with alone(staged):
            found.append(min(_milliseconds(score) for _ in range(ROUNDS)) / size)
    return tuple(found)


def _inputs(
    staged: StagedModel, input_shape: Sequence[int], dtype: torch.dtype, device: torch.device, channels_last: bool
) -> list[tuple[Tensor, ...]]:
    """What each stage is given, for a few samples."""
    generator = torch.Generator().manual_seed(0)
    if dtype.is_floating_point:
        x = torch.randn((_SAMPLES, *input_shape), generator=generator).to(device, dtype)
    else:
        x = torch.zeros((_SAMPLES, *input_shape), dtype=dtype, device=device)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    boundaries = staged.boundaries(x.clone())
    copies = [tuple(_repeated(row_dense(t), _SAMPLES) for t in as_tuple(boundary)) for boundary in boundaries]
    return [(x,), *copies[:-1]]


def _repeated(t: Tensor, count: int) -> Tensor:
    """``count`` rows, those of ``t`` again and again, in its layout."""
    rows = empty_rows(t, count)
    for start in range(0, count, len(t)):
        part = rows[start : start + len(t)]
        part.copy_(t[: len(part)])
    return rows


def _grown_too_large(least: dict[int, float]) -> bool:
    a_sample = [ms / size for size, ms in least.items()]
    return len(a_sample) > 2 and min(a_sample[-2:]) >= min(a_sample[:-2])


def _copying(boundary: tuple[Tensor, ...]) -> float:
    """Milliseconds to copy one row."""
    dest = [empty_rows(t, len(t)) for t in boundary]

    def copy() -> None:
        for t, to in zip(boundary, dest, strict=True):
            to.copy_(t)

    return min(_milliseconds(copy) for _ in range(ROUNDS)) / _SAMPLES


def _milliseconds(job: Callable[[], object]) -> float:
    start = time.perf_counter()
    job()
    return 1e3 * (time.perf_counter() - start)


def _recalled(name: str, key: dict[str, Any]) -> StageTimes | None:
    found = recall(name)
    try:
        if found["key"] != key:
            return None
        times = found["times"]
        return StageTimes(
            tuple(map(int, times["sizes"])),
            tuple(tuple(map(float, ms)) for ms in times["ms"]),
            tuple(map(float, times["regroup"])),
        )
    except (ValueError, KeyError, TypeError):
        return None
