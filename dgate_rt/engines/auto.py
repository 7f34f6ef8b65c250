"""Which engine is the fastest here: each runs the whole network, in turn, and the choice is kept on disk.

The times are of the dense network at the largest size. An engine whose logits are not those of eager is not taken.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dgate_rt.cache import keep, recall
from dgate_rt.engines.base import EngineStages
from dgate_rt.engines.build import ENGINES, build, missing_packages
from dgate_rt.staged import StagedModel
from dgate_rt.timing import interleaved, machine_header
from dgate_rt.versions import package_version

ROUNDS = 5
AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""How far logits may lie from eager's, relative to the largest."""


def fastest(
    copied: StagedModel,
    staged: StagedModel,
    example: Tensor,
    sizes: Sequence[tuple[int, ...]],
    remeasure: bool = False,
) -> EngineStages:
    """The network on the engine that runs it fastest; ``staged`` is the original, by which the choice is remembered.

    A stage that the engine cannot run is on eager.
    """
    kept = f"engine-{_key(staged, example)}.json"
    ms, notes, how = None if remeasure else _recalled(kept), list[str](), "measured before"
    if ms is None:
        start = time.perf_counter()
        ms, notes = measure(copied, example)
        keep(kept, ms)
        how = f"measured now in {time.perf_counter() - start:.1f} s"
    chosen = min(ms, key=lambda name: ms[name])
    made = build(copied, ENGINES[chosen](), example, sizes, fall_back=True)
    times = ", ".join(f"{name} {value:.3g}" for name, value in sorted(ms.items(), key=lambda item: item[1]))
    made.report += [f"chosen as the fastest, {how} at {len(example)} samples: ms a sample {times}", *notes]
    return made


def measure(copied: StagedModel, example: Tensor) -> tuple[dict[str, float], list[str]]:
    """Milliseconds a sample of the dense network on every engine that is to be had, and what is to be said of them."""
    size, notes = len(example), []
    made: dict[str, EngineStages] = {}
    for name, engine in ENGINES.items():
        missing = missing_packages(engine)
        if missing or example.device.type not in engine.devices:
            notes += [f"{name} not tried: {' and '.join(missing)} not installed"] if missing else []
            continue
        made[name] = build(copied, engine(), example, [(size,)] * len(copied.stages), fall_back=True)
        if len(made[name].fallen) == len(made[name].stages):
            notes.append(f"{name} not taken: it runs no stage; {made.pop(name).fallen[0]}")
    jobs: dict[str, Callable[[], Tensor]] = {name: _job(stages, example) for name, stages in made.items()}
    expected = jobs["eager"]().float()
    for name in [name for name in jobs if name != "eager"]:
        off = float((jobs[name]().float() - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
        if not off <= AGREEMENT.get(example.dtype, AGREEMENT[torch.bfloat16]):
            del jobs[name]
            notes.append(f"{name} not taken: its logits lie {off:.1g} off eager's, relative to the largest")
    timings = interleaved(list(jobs.values()), ROUNDS)
    return {name: timing.median / size for name, timing in zip(jobs, timings, strict=True)}, notes


def _job(stages: EngineStages, example: Tensor) -> Callable[[], Tensor]:
    @torch.inference_mode()
    def job() -> Tensor:
        return stages(example.clone())  # the first stage may work in place

    return job


def _key(staged: StagedModel, example: Tensor) -> str:
    """Everything that the choice depends on."""
    versions = {name: [*map(package_version, engine.packages)] for name, engine in ENGINES.items()}
    strides, dtype = example.stride(), str(example.dtype)
    known = [
        staged.fingerprint(),
        tuple(example.shape),
        strides,
        dtype,
        str(example.device),
        machine_header(),
        versions,
    ]
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _recalled(name: str) -> dict[str, float] | None:
    ms = recall(name)
    usable = isinstance(ms, dict) and ms and all(name in ENGINES and isinstance(ms[name], float) for name in ms)
    return ms if usable else None
