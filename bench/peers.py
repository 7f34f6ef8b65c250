"""What a user could run instead, with the same stages and gates."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from importlib.util import find_spec

import torch
from torch import Tensor

from dgate_rt.bench.workload import Mix, Workload
from dgate_rt.executors import Predictions
from dgate_rt.gate import pool_features
from dgate_rt.program import GateProgram


class MaskedLoop:
    """Early exit as most people write it: score with stock operators, then ``x = x[~mask]``; channels_last as ours."""

    name = "masked loop"

    def __init__(self, program: GateProgram) -> None:
        self.staged = copy.deepcopy(program.staged)
        self.staged.to(memory_format=torch.channels_last)
        self.gates = program.gates
        self.thresholds = program.thresholds

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> Predictions:
        x = x.contiguous(memory_format=torch.channels_last)
        out, ids = Predictions.empty(len(x), None, x.device), torch.arange(len(x))
        for g, gate in enumerate(self.gates):
            x = self.staged.run_stage(g, x)
            margin, label = (pool_features(x, gate.pool) @ gate.weight.T + gate.bias).max(1)
            mask = margin >= self.thresholds[g]
            gone = ids[mask]
            out.labels[gone], out.scores[gone], out.exits[gone] = label[mask], margin[mask], g
            x, ids = self._survivors(x, ids, ~mask)
            if len(ids) == 0:
                return out
        margin, label = self.staged.run_stage(len(self.gates), x).max(1)
        out.labels[ids], out.scores[ids], out.exits[ids] = label, margin, len(self.gates)
        return out

    @staticmethod
    def _survivors(x: Tensor, ids: Tensor, stay: Tensor) -> tuple[Tensor, Tensor]:
        return x[stay], ids[stay]


class NonzeroLoop(MaskedLoop):
    """The same with ``torch.nonzero_static``, whose size is the number of survivors, and ``index_select``."""

    name = "nonzero_static loop"

    @staticmethod
    def _survivors(x: Tensor, ids: Tensor, stay: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.nonzero_static(stay, size=int(stay.sum()))[:, 0]
        return x.index_select(0, rows), ids.index_select(0, rows)


def no_earlyon() -> str:
    """Why `earlyon` is not timed here, or nothing."""
    return "" if find_spec("earlyon") else 'skipped: earlyon is not installed: pip install "dgate-rt[bench]"'


class EarlyonBatched:
    """``earlyon`` 0.3: a batch exits only where every one of its samples is confident enough."""

    name = "earlyon"

    def __init__(self, workload: Workload, mix: Mix) -> None:
        from earlyon import EarlyExitConfig, EarlyExitWrapper, ExitPoint

        cuts, gates = workload.program.staged.cuts, workload.program.gates
        points = [ExitPoint(cut, cut, gate.width) for cut, gate in zip(cuts, gates, strict=True)]
        heads = dict(zip(cuts, gates, strict=True))
        config = EarlyExitConfig("resnet101", gates[0].classes, points)
        self.wrapper = EarlyExitWrapper(
            copy.deepcopy(workload.backbone).to(memory_format=torch.channels_last),
            heads,
            lambda logits: logits,
            config,
            (1, *workload.program.input_shape),
        ).eval()
        config.confidence_thresholds = self._confidences(workload, mix)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that it only estimates FLOPs; we count them ourselves
            _ = self.wrapper.flops_estimate

    @staticmethod
    @torch.inference_mode()
    def _confidences(workload: Workload, mix: Mix) -> list[float]:
        """Softmax thresholds that give the mix sample by sample; its batches then exit when all agree."""
        program, confidences = workload.program, []
        for chunk in workload.images.split(16):
            distances = [gate(f) for gate, f in zip(program.gates, program.staged.features(chunk), strict=True)]
            confidences.append(torch.stack([d.softmax(1).amax(1) for d in distances]))
        as_margins = replace(workload, margins=torch.cat(confidences, 1))
        return [min(max(t, 0.0), 1.0) for t in as_margins.thresholds(mix)]

    def __call__(self, x: Tensor) -> None:
        x = x.contiguous(memory_format=torch.channels_last)
        if len(x) == 1:
            self.wrapper(x)
        else:
            self.wrapper.forward_inference_batched(x)
