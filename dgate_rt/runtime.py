"""compile(): a program becomes a callable Runtime on one device, run by one executor."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dgate_rt.errors import ExecutorError
from dgate_rt.executors import EXECUTORS, GatedModel, Predictions
from dgate_rt.program import GateProgram


def compile(
    program: GateProgram,
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    executor: str = "auto",
    scores: bool = False,
    channels_last: bool | None = None,
) -> Runtime:
    """Make a program ready to run.

    The backbone and the gates are copied, so the caller's model is left as it is and later changes to it do not show.

    Args:
        program: from `calibrate` or `load`.
        batch_size: the most samples to run at once; larger calls are cut up, smaller ones run as they are.
        device: where to run.
        executor: ``"dense"``, ``"eager"``, or ``"auto"``, which picks one and says which and why (`Runtime.describe`).
        scores: also return the ``[N, K]`` distances, or the logits of samples that ran to the end.
        channels_last: memory format of images and convolution weights. By default channels_last on the CPU if the
            network convolves images, where it is about twice as fast; otherwise the layout stays as it is.

    Raises:
        ValueError: on an unknown executor or a batch size below one.
        ExecutorError: if the device or the executor that was asked for is not to be had here. Nothing falls back.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if executor not in ("auto", *EXECUTORS):
        raise ValueError(f"executor: expected one of 'auto', {', '.join(map(repr, EXECUTORS))}, got {executor!r}")
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ExecutorError(f"device: {device} was asked for, but torch sees no CUDA device here")
    reason = "asked for"
    if executor == "auto":
        executor, reason = "eager", "exact sub-batch sizes, on any device"
    if channels_last is None:
        convolves = any(isinstance(m, nn.Conv2d) for m in program.staged.modules())
        channels_last = device.type == "cpu" and convolves and len(program.input_shape) == 3
    staged = copy.deepcopy(program.staged).to(device).eval()
    if channels_last:
        staged.to(memory_format=torch.channels_last)
    model = GatedModel(staged, [copy.deepcopy(gate).to(device) for gate in program.gates], program.thresholds)
    return Runtime(program, model, executor, reason, batch_size, scores, channels_last)


class Runtime:
    """A gated network, ready to run: ``run(x)`` gives `Predictions` in input order. Made by `compile`."""

    def __init__(
        self,
        program: GateProgram,
        model: GatedModel,
        executor: str,
        reason: str,
        batch_size: int,
        scores: bool,
        channels_last: bool,
    ) -> None:
        self.program = program
        self.batch_size = batch_size
        self.executor = executor
        self.reason = reason
        self.scores = scores
        self.channels_last = channels_last
        self.device = model.thresholds.device
        self._model = model
        self._executor = EXECUTORS[executor](model)
        self._thresholds = tuple(program.thresholds)

    @property
    def thresholds(self) -> tuple[float, ...]:
        """The operating point in force, length G."""
        return self._thresholds

    def set_thresholds(self, thresholds: Sequence[float] | Tensor) -> None:
        """Move the operating point; holds from the next batch on. ``+inf`` switches a gate off.

        Raises:
            ValueError: if there are not as many as gates, or one is NaN.
        """
        values = tuple(float(t) for t in thresholds)
        if len(values) != len(self._model.gates):
            raise ValueError(f"thresholds: expected {len(self._model.gates)}, one a gate, got {len(values)}")
        if any(map(math.isnan, values)):
            raise ValueError(f"thresholds: expected numbers, got {values}")
        self._model.set_thresholds(values)
        self._thresholds = values

    @torch.inference_mode()
    def __call__(
        self,
        x: Tensor,  # [N, ...], N >= 0
    ) -> Predictions:
        """Answer every sample of ``x``; more than ``batch_size`` of them run in several batches.

        Raises:
            TypeError: if ``x`` is not a tensor, or of another dtype than the program was calibrated on.
            ValueError: if its shape or device is another.
        """
        self._check(x)
        out = Predictions.empty(len(x), self._classes() if self.scores else None, self.device)
        for start in range(0, len(x), self.batch_size):
            stop = min(start + self.batch_size, len(x))
            chunk = x[start:stop]
            if self.channels_last:
                chunk = chunk.contiguous(memory_format=torch.channels_last)
            self._executor.run(chunk, out.rows(start, stop))
        return out

    def describe(self) -> str:
        """What runs where: executor and why, batch size, layout, and every gate's place, threshold and share."""
        point = self.program.point
        layout = "channels_last" if self.channels_last else "as given"
        lines = [
            f"executor {self.executor} ({self.reason}) on {self.device}, batch size {self.batch_size}, layout {layout}"
        ]
        for g, (cut, threshold) in enumerate(zip(self.program.staged.cuts, self._thresholds, strict=True)):
            state = "off" if threshold == math.inf else f"t = {threshold:.4g}"
            lines.append(f"gate {g} after {cut}: {state}, {point.shares[g]:.1%} left here on validation data")
        lines.append(f"network's own classifier: {point.shares[-1]:.1%}")
        return "\n".join(lines)

    def _classes(self) -> int:
        if len(self._model.gates):
            return self._model.gates[0].classes
        probe = torch.zeros((1, *self.program.input_shape), dtype=self.program.input_dtype, device=self.device)
        return int(self._model.staged(probe).shape[1])

    def _check(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
        shape = self.program.input_shape
        if tuple(x.shape[1:]) != shape or x.ndim == 0:
            raise ValueError(f"x: expected shape [N, {', '.join(map(str, shape))}], got {list(x.shape)}")
        if x.dtype != self.program.input_dtype:
            raise TypeError(f"x: expected {self.program.input_dtype}, got {x.dtype}")
        if x.device.type != self.device.type or self.device.index not in (None, x.device.index):
            raise ValueError(f"x: expected a tensor on {self.device}, got one on {x.device}")
