"""Answers of a gated run, held against gates applied afterwards to what the dense network computed."""

from __future__ import annotations

import numpy as np

from dgate_rt.executors import Predictions
from dgate_rt.program import GateProgram
from dgate_rt.trace import Trace

_NOISE = 1e-3
"""Float noise of a margin when layout and batch size change, relative to a threshold of at least one."""


def check_agreement(name: str, program: GateProgram, trace: Trace, answers: Predictions) -> None:
    """Compare with gates applied afterwards; only a margin at its threshold, or a tie of two classes, may go both ways.

    Raises:
        RuntimeError: if another sample left at another exit or with another label.
    """
    replay, every = trace.replay(program.thresholds, program.costs), np.arange(len(trace.targets))
    exits, labels = answers.exits.cpu().numpy(), answers.labels.cpu().numpy()
    elsewhere = exits != replay.exits
    wrong = elsewhere | (labels != trace.predictions[replay.exits, every])
    first = np.minimum(np.minimum(exits, replay.exits), len(trace.margins) - 1)
    thresholds = np.asarray(program.thresholds)[first]
    near = np.abs(trace.margins[first, every] - thresholds) <= _NOISE * np.maximum(1, np.abs(thresholds))
    at_threshold = near & np.isfinite(thresholds)
    assert answers.distances is not None
    best, second = answers.distances.cpu().topk(2).values.T.numpy()
    tied = best - second <= _NOISE * np.maximum(1, np.abs(best))
    wrong &= ~np.where(elsewhere, at_threshold, tied)
    if wrong.any():
        sample = int(np.flatnonzero(wrong)[0])
        raise RuntimeError(
            f"{name}: {wrong.sum()} of {len(wrong)} samples were answered otherwise than by the dense network with the "
            f"gates applied afterwards; sample {sample}: expected exit {replay.exits[sample]}, got {exits[sample]}"
        )
