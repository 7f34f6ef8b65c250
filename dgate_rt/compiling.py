"""compile(): a program becomes a `Runtime` on one device: where it runs, by what executor, on what engine."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

import torch

from dgate_rt.allocator import keep_freed_memory
from dgate_rt.engines import StageEngine, prepare
from dgate_rt.errors import ExecutorError
from dgate_rt.executors import EXECUTORS, GatedModel, Setup, prefers_channels_last
from dgate_rt.executors.capturable import refuse_uncapturable_stages
from dgate_rt.executors.captured import segments
from dgate_rt.graphs import graph_driver
from dgate_rt.plan import entry_sizes, expected_buckets, likely_sizes, refill_sizes
from dgate_rt.program import GateProgram
from dgate_rt.runtime import Runtime

MOST_ROWS_ON_CUDA = 65_536
"""What one launch of the route takes; kMaxRows in csrc/cuda/route_arguments.h."""
_ON_ANY_ENGINE = ("dense", "eager", "refill", "graph")
_CHOICE = {
    "cpu": ("refill", "chunks that suit a CPU"),
    "cpu-sim": ("graph", "what is simulated"),
}
_SHOWS_EARLY = ("eager", "what shows early answers on the CPU")
_ANYWHERE = ("eager", "exact sub-batch sizes, on any device")
_ON_CUDA = ("graph", "one launch a batch, and the host waits for nothing")


def compile(
    program: GateProgram,
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    executor: str = "auto",
    engine: str | StageEngine = "eager",
    dtype: str | torch.dtype | None = None,
    scores: bool = False,
    channels_last: bool | None = None,
    buckets: Sequence[int] | Literal["auto"] = "auto",
    chunks: Sequence[int] | Literal["auto"] = "auto",
    remeasure: bool = False,
    losing_gates: Literal["keep", "off"] = "keep",
    early_answers: bool = False,
    monitor: bool = False,
    keep_memory: bool = True,
) -> Runtime:
    """Make a program ready to run.

    The backbone and the gates are copied, so the caller's model is left as it is and later changes to it do not show.

    Args:
        program: from `calibrate` or `load`.
        batch_size: the most samples to run at once; larger calls are cut up, smaller ones run as they are.
        device: where to run. ``"cpu-sim"`` simulates a GPU's driver on the CPU, for tests and for the curious.
        executor: ``"dense"``, ``"eager"``, ``"refill"``, ``"lag"``, ``"graph"``, or ``"auto"``, which picks one and
            says which and why (`Runtime.describe`): on CUDA ``"graph"`` where driver and network allow it.
        engine: what the stages run on: ``"eager"``, ``"inductor"``, ``"openvino"``, ``"onnxruntime"``, a function
            (`dgate_rt.engines.StageEngine`), or ``"auto"``, which measures those that are installed and takes the
            fastest. ``"lag"`` runs on eager only. What OpenVINO and ONNX Runtime convert a stage to is kept in the
            user's cache directory, weights included (`dgate_rt.cache`).
        dtype: ``"float32"`` or ``"bfloat16"``, for the stages' weights and what passes between them; None leaves them
            as they are. Batches keep the dtype of the program, and gates score in float32.
        scores: also return the ``[N, K]`` distances, or the logits of samples that ran to the end.
        channels_last: memory format of images and convolution weights. By default channels_last on the CPU if the
            network convolves images, where it is about twice as fast; otherwise the layout stays as it is.
        buckets: for ``"lag"`` and ``"graph"``, the batch sizes that stages are prepared for, beside ``batch_size``;
            by default the powers of four for the stages before the first gate, which meet batches as they are given,
            and for each stage behind it the six that should cost least (`dgate_rt.plan`). For engines
            that prepare a stage for each batch size, those sizes; by default six a stage that suit the program's exit
            shares, and leave some room for others but for ``"graph"``, or for ``"refill"`` the powers of four
            and half of ``batch_size``.
        chunks: for ``"refill"``, how many samples each stage runs on at a time. By default one size for
            all or, where that should save a tenth, those that should cost least (`dgate_rt.chunks`), by the times of
            the stages on this machine: measured once, in seconds, and then kept in the user's cache directory
            (`dgate_rt.stage_times`).
        remeasure: measure those times again, and which engine ``"auto"`` takes.
        losing_gates: for ``"refill"`` with those times, what happens to gates that take more of them than they save at
            the program's exit shares. ``"keep"`` only tells (`Runtime.describe`), because other gates give other
            answers; ``"off"`` switches them off.
        early_answers: prepare for `Runtime.submit`, which shows answers as soon as the gate that gave them has run; for
            ``"eager"`` on the CPU, and ``"graph"``.
        monitor: count on the device where samples leave and with what scores, and compare that with the validation
            samples when asked (`Runtime.monitor`): whether the data have drifted, without labels.
        keep_memory: on the CPU, let this process keep the memory that it frees, all of it and from now on, since fresh
            pages make large batches slow (`dgate_rt.allocator`). False leaves that as it is.

    Raises:
        TypeError: if ``program`` is no program, or ``engine`` neither a name nor a function.
        ValueError: on an unknown executor, engine, dtype or device, a batch size, bucket or chunk below one, or not a
            chunk a stage.
        ExecutorError: if the device, executor, engine or dtype that was asked for is not to be had here, or the engine
            cannot run a stage. Nothing falls back, but for stages under ``engine="auto"``.
    """
    if not isinstance(program, GateProgram):
        raise TypeError(f"program: expected a GateProgram, from calibrate or load, got {type(program).__name__}")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size: expected a whole number of at least 1, got {batch_size!r}")
    if executor not in ("auto", *EXECUTORS):
        raise ValueError(f"executor: expected one of 'auto', {', '.join(map(repr, EXECUTORS))}, got {executor!r}")
    if buckets != "auto" and any(not isinstance(n, int) or n < 1 for n in buckets):
        raise ValueError(f"buckets: expected 'auto' or whole numbers of at least 1, got {buckets!r}")
    stages = len(program.staged.stages)
    if chunks != "auto" and (len(chunks) != stages or any(not isinstance(n, int) or n < 1 for n in chunks)):
        raise ValueError(f"chunks: expected 'auto' or {stages} whole numbers above 0, one a stage, got {chunks!r}")
    if losing_gates not in ("keep", "off"):
        raise ValueError(f"losing_gates: expected 'keep' or 'off', got {losing_gates!r}")
    simulated = device == "cpu-sim"
    try:
        device = torch.device("cpu" if simulated else device)
    except RuntimeError as error:
        raise ValueError(f"device: expected a name such as 'cpu' or 'cuda', got {device!r}") from error
    if device.type == "cuda" and batch_size > MOST_ROWS_ON_CUDA:
        raise ValueError(f"batch_size: expected at most {MOST_ROWS_ON_CUDA} on cuda, got {batch_size}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ExecutorError(f"device: {device} was asked for, but torch sees no CUDA device here")
    if device.type == "cpu" and keep_memory:  # before anything is timed
        keep_freed_memory()
    kind, reason = "cpu-sim" if simulated else device.type, "asked for"
    if executor == "auto":
        executor, reason = _choice(kind, program, early_answers)
    if kind not in EXECUTORS[executor].devices:
        raise ExecutorError(f"executor: {executor} runs on {' and '.join(EXECUTORS[executor].devices)}, not on {kind}")
    if losing_gates == "off" and (executor != "refill" or chunks != "auto"):
        raise ExecutorError(f"losing_gates: expected the executor refill with chunks='auto', got {executor}")
    if early_answers and kind not in getattr(EXECUTORS[executor], "early_devices", ()):
        raise ExecutorError(
            f"early_answers: expected the executor eager on cpu, or graph on cuda or cpu-sim, got {executor} on {kind}"
        )
    if engine != "eager" and executor not in _ON_ANY_ENGINE:
        raise ExecutorError(f"engine: the executor {executor} runs on eager only, got {engine!r}")
    if engine != "eager" and executor == "graph":  # compiled, a stage does not show its operators any more
        refuse_uncapturable_stages(program.staged, program.input_shape, program.input_dtype)
    if channels_last is None:
        channels_last = prefers_channels_last(program.staged, program.input_shape, device)
    staged = prepare(
        program.staged,
        engine,
        sizes=_sizes(executor, batch_size, buckets, program),
        sample_shape=program.input_shape,
        input_dtype=program.input_dtype,
        dtype=dtype,
        device=device,
        channels_last=channels_last,
        remeasure=remeasure,
    )
    model = GatedModel(staged, [copy.deepcopy(gate).to(device) for gate in program.gates], program.thresholds)
    with torch.inference_mode():
        classes = model.classes(program.input_shape, staged.input_dtype) if scores else None
    setup = Setup(
        batch_size=batch_size,
        sample_shape=program.input_shape,
        dtype=staged.input_dtype,
        channels_last=channels_last,
        classes=classes,
        shares=program.point.shares,
        buckets=buckets,
        chunks=chunks,
        remeasure=remeasure,
        losing_gates=losing_gates,
        simulated=simulated,
        early_answers=early_answers,
        engine_id=staged.engine_id,
        sizes=tuple(staged.sizes(stage) for stage in range(stages)),
    )
    return Runtime(program, model, EXECUTORS[executor](model, setup), reason, setup, staged, monitor)


def _choice(kind: str, program: GateProgram, early_answers: bool) -> tuple[str, str]:
    """The executor that suits a kind of device, and why."""
    if kind == "cpu" and early_answers:
        return _SHOWS_EARLY
    if kind != "cuda":
        return _CHOICE.get(kind, _ANYWHERE)
    try:
        graph_driver("cuda")
        refuse_uncapturable_stages(program.staged, program.input_shape, program.input_dtype)
    except ExecutorError as error:
        executor, why = _ANYWHERE
        return executor, f"{why}; graph cannot run here: {error}"
    return _ON_CUDA


def _sizes(
    executor: str, batch_size: int, buckets: Sequence[int] | Literal["auto"], program: GateProgram
) -> list[tuple[int, ...]]:
    """For each stage the batch sizes to prepare, where an engine has to know them."""
    shares = program.point.shares
    if executor == "graph":  # whose stages behind a gate that is on are captured at these and no others
        active = tuple(threshold != float("inf") for threshold in program.thresholds)
        first, *later = segments(active)
        sizes = [expected_buckets(batch_size, shares, part.stages[0], buckets).sizes for part in later]
        parts = zip([first, *later], [entry_sizes(batch_size, buckets), *sizes], strict=True)
        return [size for part, size in parts for _ in part.stages]
    if buckets == "auto" and executor != "refill":
        return likely_sizes(batch_size, shares)
    return [refill_sizes(batch_size, buckets)] * len(shares)
