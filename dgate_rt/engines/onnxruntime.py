"""Stages run by ONNX Runtime on the CPU, at any batch size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dgate_rt.engines.base import Run
from dgate_rt.engines.export import Exported, ExportedRun, export
from dgate_rt.errors import ExecutorError
from dgate_rt.staged import Boundary

_FILE = "stage.onnx"  # the weights beside it


class OnnxRuntimeEngine:
    """ONNX Runtime's CPU provider in float32, on as many threads as torch has when it is prepared.

    Stages return planar images: what they hand on is then reordered once on the way in, not twice.
    """

    name = "onnxruntime"
    any_size = True
    own_threads = True
    devices = ("cpu",)
    packages = ("onnxruntime", "onnx", "onnxscript")

    def __call__(self, stage: nn.Module, example: tuple[Tensor, ...], sizes: Sequence[int]) -> Run:
        import onnxruntime as ort

        if any(t.dtype is torch.bfloat16 for t in (*example, *stage.parameters())):
            raise ExecutorError(
                "onnxruntime: expected float32, got bfloat16, for which its CPU provider has few kernels"
            )
        exported = export(stage, example, planar=True)
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # every stage has threads of its own

        def write(folder: Path) -> None:
            program = torch.onnx.export(exported.program, dynamo=True, verbose=False)
            assert program is not None
            program.save(folder / _FILE, external_data=True)  # one file holds 2 GB at most

        def read(folder: Path) -> Any:
            return ort.InferenceSession(folder / _FILE, options, providers=["CPUExecutionProvider"])

        return _Session(exported, *exported.converted(self.packages, write, read))


class _Session(ExportedRun):
    """Runs a session on tensors where they lie; each thread keeps memory for what comes out."""

    def __init__(self, exported: Exported, session: Any, found: bool) -> None:
        super().__init__(exported, found)
        self._session = session
        self._inputs = [i.name for i in session.get_inputs()]
        self._outputs = [o.name for o in session.get_outputs()]

    def __call__(self, *tensors: Tensor) -> Boundary:
        exported = self._exported
        given = exported.given(tensors)
        rows = exported.outputs(len(tensors[0]))
        binding = self._session.io_binding()
        for name, t in zip(self._inputs, given, strict=True):
            binding.bind_input(name, "cpu", 0, _element(t), tuple(t.shape), t.data_ptr())
        for name, t in zip(self._outputs, rows, strict=True):
            binding.bind_output(name, "cpu", 0, _element(t), tuple(t.shape), t.data_ptr())
        self._session.run_with_iobinding(binding)
        return exported.boundary(rows)


def _element(t: Tensor) -> Any:
    """The numpy type of a tensor's elements."""
    return t[:0].numpy().dtype.type
