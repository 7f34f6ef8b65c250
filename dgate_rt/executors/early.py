"""Answers that can be had before their batch is done: those of the samples that left at the gates that have run."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from dgate_rt.executors.base import Executor, Predictions

UNANSWERED = -1
"""Exit of a sample that no gate has let go yet."""


class Work(Protocol):
    """What runs a batch."""

    def done(self) -> bool:
        """Whether all of it has run, well or not."""

    def wait(self) -> None:
        """Return when all of it has run; raise what it raised."""


class Ticket:
    """One batch under way, and the answers that it has so far; made by `Runtime.submit`.

    Args:
        answers: on the host, pinned where a GPU writes them; what runs the batch writes labels and scores first and
            exits last, which are `UNANSWERED` until then.
        work: what runs the batch.
    """

    def __init__(self, answers: Predictions, work: Work) -> None:
        self._answers = answers
        self._work: Work | None = work

    @property
    def answers(self) -> Predictions:
        """The answers on the host, in input order; only rows that `ready` has told of are answers."""
        return self._answers

    def ready(self) -> Tensor:  # [N] bool
        """Which samples are answered by now. Waits for nothing."""
        return self._answers.exits != UNANSWERED

    def done(self) -> bool:
        """Whether the batch has run to its end, well or not. Waits for nothing."""
        return self._work is None or self._work.done()

    def result(self) -> Predictions:
        """All answers, on the host; waits for them.

        Raises:
            Exception: whatever the batch raised.
        """
        if self._work is not None:
            self._work.wait()
            self._answers = self._answers.clone()  # the memory that was written to serves the next batch
            self._work = None
        return self._answers


@runtime_checkable
class EarlyExecutor(Executor, Protocol):
    """An executor that shows answers before a batch is done."""

    early_devices: tuple[str, ...]  # where it does

    def submit(
        self,
        x: Tensor,  # [N, ...], N >= 0
    ) -> Ticket:
        """Start a batch and return at once; called only where `Setup.early_answers` asked for it."""


def unanswered(count: int, classes: int | None, pinned: bool) -> Predictions:
    """Memory on the host for the answers of ``count`` samples, none of which is answered."""
    with torch.inference_mode(False):
        answers = Predictions.empty(count, classes, torch.device("cpu"), pinned)
        answers.exits.fill_(UNANSWERED)
    return answers


def publish(answers: Predictions, host: Predictions) -> None:
    """Copy all answers to the host; exits come last, so whoever sees one finds the rest of its row.

    The copies do not wait, and follow each other in their order on the device.
    """
    host.labels.copy_(answers.labels, non_blocking=True)
    host.scores.copy_(answers.scores, non_blocking=True)
    if host.distances is not None and answers.distances is not None:
        host.distances.copy_(answers.distances, non_blocking=True)
    host.exits.copy_(answers.exits, non_blocking=True)
