"""Which engines there are, and build(): every stage of a network on one of them."""

from __future__ import annotations

import importlib.util
import re
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dgate_rt.allocator import give_back_freed_memory
from dgate_rt.engines.base import EngineStages, PreparedStage, StageEngine, name_of
from dgate_rt.engines.eager import EagerEngine
from dgate_rt.engines.export import ExportedRun
from dgate_rt.engines.inductor import InductorEngine
from dgate_rt.engines.onnxruntime import OnnxRuntimeEngine
from dgate_rt.engines.openvino import OpenVinoEngine
from dgate_rt.errors import ExecutorError
from dgate_rt.executors.base import row_dense
from dgate_rt.progress import note
from dgate_rt.staged import Boundary, StagedModel, as_tuple
from dgate_rt.versions import package_version

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_NO_OPERATOR = ("No conversion rule found", "No ONNX function found")  # as OpenVINO and the ONNX exporter say it
BuiltIn = EagerEngine | InductorEngine | OpenVinoEngine | OnnxRuntimeEngine
ENGINES: dict[str, type[BuiltIn]] = {
    engine.name: engine for engine in (EagerEngine, InductorEngine, OpenVinoEngine, OnnxRuntimeEngine)
}


def check_engine(engine: str | StageEngine, device: torch.device) -> StageEngine | None:
    """The engine that is meant; None for "auto".

    Raises:
        ValueError: if it is no name of an engine.
        TypeError: if it is neither a name nor can be called.
        ExecutorError: if it is not installed or does not run on ``device``.
    """
    if not isinstance(engine, str):
        if not callable(engine):
            raise TypeError(f"engine: expected a name or a function, got {type(engine).__name__}")
        return engine
    if engine == "auto":
        return None
    if engine not in ENGINES:
        raise ValueError(
            f"engine: expected one of 'auto', {', '.join(map(repr, ENGINES))}, or a function, got {engine!r}"
        )
    if device.type not in ENGINES[engine].devices:
        raise ExecutorError(f"engine: {engine} runs on {' and '.join(ENGINES[engine].devices)}, not on {device.type}")
    missing = missing_packages(ENGINES[engine])
    if missing:
        raise ExecutorError(f'engine: {engine} needs {" and ".join(missing)}: pip install "dgate-rt[{engine}]"')
    return ENGINES[engine]()


def missing_packages(engine: type[BuiltIn]) -> list[str]:
    """What a built-in engine needs and is not installed."""
    return [package for package in engine.packages if importlib.util.find_spec(package) is None]


def build(
    staged: StagedModel,
    engine: StageEngine,
    example: Tensor,  # [N, ...], N the largest size
    sizes: Sequence[tuple[int, ...]],  # for each stage, with the same largest
    fall_back: bool = False,
) -> EngineStages:
    """Put every stage on an engine; with ``fall_back``, on eager where the engine cannot run it.

    Raises:
        ExecutorError: as `prepare`.
    """
    name = name_of(engine)
    stages: list[nn.Module] = []
    fallen: dict[int, str] = {}
    if isinstance(engine, EagerEngine):
        return EngineStages(staged, list(staged.stages), name, _id_of(engine), example.dtype)
    start, before = time.perf_counter(), _resident_bytes()
    boundary: Boundary = example
    for index, (stage, wanted) in enumerate(zip(staged.stages, sizes, strict=True)):
        given = tuple(map(row_dense, as_tuple(boundary)))
        note(f"{name}: stage {index + 1} of {len(staged.stages)}")
        try:
            prepared, boundary = _prepared(stage, engine, given, wanted)
        except Exception as error:  # an engine may raise anything
            if not fall_back:
                raise ExecutorError(
                    f"engine: {name} cannot run stage {index}, {_place(staged, index)}: {_cause(error)}"
                ) from error
            fallen[index] = _cause(error)
            prepared, boundary = _prepared(stage, EagerEngine(), given, wanted)
        stages.append(prepared)
    made = EngineStages(staged, stages, name, _id_of(engine), example.dtype)
    made.fallen = fallen
    made.own_threads = getattr(engine, "own_threads", False) and not fallen
    runs = [stage.run for stage in stages if isinstance(stage, PreparedStage)]
    found = sum(isinstance(run, ExportedRun) and run.found for run in runs)
    kept = f", {found} of {len(stages)} stages found on disk" if found else ""
    made.report = [f"prepared in {time.perf_counter() - start:.1f} s{kept}{_growth(before)}"]
    return made


def _id_of(engine: StageEngine) -> str | None:
    """Name and versions, if it tells which packages it depends on."""
    packages = getattr(engine, "packages", None)
    if packages is None:
        return None
    return " ".join([name_of(engine), *(f"({package_version(package)})" for package in packages)])


def _prepared(
    stage: nn.Module, engine: StageEngine, given: tuple[Tensor, ...], sizes: tuple[int, ...]
) -> tuple[nn.Module, Boundary]:
    """A stage on an engine, and what it makes of a boundary."""
    run = engine(stage, tuple(t.clone() for t in given), sizes)  # a stage may work in place on what it is given
    prepared = PreparedStage(run, given, () if getattr(engine, "any_size", False) else sizes)
    with torch.inference_mode():
        return prepared, prepared(*(t.clone() for t in given))


def _place(staged: StagedModel, index: int) -> str:
    return f"which ends at {staged.cuts[index]}" if index < len(staged.cuts) else "the last"


def _cause(error: Exception) -> str:
    """The line that names an operator, where one is known to; else the first that says something."""
    lines = [line.strip() for line in _COLOURS.sub("", str(error)).splitlines() if line.strip()]
    text = next((line for line in lines if any(phrase in line for phrase in _NO_OPERATOR)), (lines or [""])[0])
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _resident_bytes() -> int | None:
    """Resident memory of this process, without what it has freed; None where the system does not say."""
    give_back_freed_memory()
    try:
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[1])
    except OSError:
        return None
    import resource

    return pages * resource.getpagesize()


def _growth(before: int | None) -> str:
    after = _resident_bytes()
    if before is None or after is None:
        return ""
    return f"; the process grew by {max(0, after - before) / 2**20:.0f} MiB"
