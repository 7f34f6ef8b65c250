"""Stages compiled by OpenVINO for the CPU, one compiled model a batch size."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dgate_rt.engines.base import Run
from dgate_rt.engines.export import Exported, ExportedRun, export
from dgate_rt.progress import track
from dgate_rt.staged import Boundary

_FILE = "stage.xml"  # the weights beside it
_GENERATION = "SNIPPETS_MODE"  # a property that OpenVINO (2026.4) takes and does not list


class OpenVinoEngine:
    """OpenVINO for least latency, in the dtype of the stage, on as many threads as torch has when it is prepared.

    A bfloat16 stage is given to it in float32, with bfloat16 at its edges and as the precision to compute in: OpenVINO
    (2026.4) reads bfloat16 weights where torch has them, but drops the copies that it makes of strided ones.

    Images enter and leave a stage with their pixels as one dimension, and results are rounded to bfloat16 before that.
    ``[N, H, W, C]`` is the same memory, but where a residual block begins or ends a stage, OpenVINO copies it several
    times: it fuses the sum into a convolution, and then does not see that no pixel has to move. Nor does it see that a
    cast from bfloat16 to what it computes in is none, once it has generated code for it; so where these casts are all
    that it generates code for, at every size, it is told not to.
    """

    name = "openvino"
    any_size = False
    own_threads = True
    devices = ("cpu",)
    packages = ("openvino",)

    def __call__(self, stage: nn.Module, example: tuple[Tensor, ...], sizes: Sequence[int]) -> Run:
        low = any(t.dtype is torch.bfloat16 for t in (*example, *stage.parameters()))
        exported = export(stage, example, widen=low, merged=True)
        model, found = _model(exported)
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "bf16" if low else "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        fixed = {}
        for size in sizes:
            given = exported.given([t[:size] for t in example])
            fixed[size] = model.clone()
            fixed[size].reshape({port: list(t.shape) for port, t in zip(fixed[size].inputs, given, strict=True)})
        compiled = _compiled(fixed, options)
        if low and all(map(_generates_casts_alone, compiled.values())):
            with suppress(RuntimeError):  # where a version does not take it
                compiled = _compiled(fixed, {**options, _GENERATION: "DISABLE"})
        return _Requests(exported, compiled, found)


def _model(exported: Exported) -> tuple[Any, bool]:
    """The stage as OpenVINO's model, and whether it was kept from before."""
    import openvino as ov

    def write(folder: Path) -> None:
        model = ov.convert_model(exported.program)
        try:
            ov.save_model(model, folder / _FILE, compress_to_fp16=False)
        except RuntimeError as error:
            raise OSError(str(error)) from error

    try:
        return exported.converted(OpenVinoEngine.packages, write, lambda folder: _core().read_model(folder / _FILE))
    except OSError:  # there is no place to write to
        return ov.convert_model(exported.program), False


def _compiled(models: Mapping[int, Any], options: Mapping[str, Any]) -> dict[int, Any]:
    """By batch size."""
    sizes = track(models, "sizes compiled")
    return {size: _core().compile_model(models[size], "CPU", dict(options)) for size in sizes}


def _generates_casts_alone(compiled: Any) -> bool:
    """Whether OpenVINO generates code, as "subgraphs", and for casts only; it fuses all else into larger operators."""
    infos = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    names = [info["originalLayersNames"].astype(str) for info in infos if info["layerType"].astype(str) == "Subgraph"]
    generated = [name.rpartition("/")[2] for joined in names for name in joined.split(",")]
    return bool(generated) and all(name.startswith("Convert") for name in generated)


@cache
def _core() -> Any:
    """The one core of this process, never given up.

    A core gives its thread another stack for signals, and takes that back when it ends. Of two that end in the order in
    which they were made (2026.4), the second leaves the thread the stack of the first, which is gone: the next signal
    that Python handles, of a DataLoader's worker that ends, say, ends the process.
    """
    import openvino as ov

    return ov.Core()


class _Requests(ExportedRun):
    """Runs compiled models; each thread has requests of its own, and memory for what they return."""

    def __init__(self, exported: Exported, compiled: Mapping[int, Any], found: bool) -> None:
        super().__init__(exported, found)
        self._compiled = compiled
        self._own = threading.local()

    def __call__(self, *tensors: Tensor) -> Boundary:
        exported, count = self._exported, len(tensors[0])
        given, rows = exported.given(tensors), exported.outputs(count)
        request = self._request(count)
        for index, t in enumerate(given):
            request.set_input_tensor(index, _shared(t))
        for index, t in enumerate(rows):
            request.set_output_tensor(index, _shared(t))
        request.infer()
        return exported.boundary(rows)

    def _request(self, count: int) -> Any:
        requests: dict[int, Any] = self._own.__dict__.setdefault("requests", {})
        if count not in requests:
            requests[count] = self._compiled[count].create_infer_request()
        return requests[count]


def _shared(t: Tensor) -> Any:
    """A contiguous tensor as OpenVINO's, in the same memory."""
    import openvino as ov

    if t.dtype is torch.bfloat16:  # numpy has none
        return ov.Tensor(t.view(torch.int16).numpy(), ov.Shape(list(t.shape)), ov.Type.bf16)
    return ov.Tensor(t.numpy(), shared_memory=True)
