"""Counting on the device where samples leave and with what scores, while a network is in use.

One addition behind every batch, which the host launches and does not wait for; it reads the counts when it is asked for
them. What they are compared with, and how, is in `dgate_rt.drift`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from dgate_rt.drift import ALPHA, DriftReport, Reference, count_into
from dgate_rt.executors import Predictions, Ticket


class Window:
    """The samples that were answered at one choice of thresholds since some moment."""

    def __init__(self, reference: Reference, device: torch.device) -> None:
        self.reference = reference
        self._lock = threading.Lock()
        with torch.inference_mode(False):
            edges = reference.edges.pin_memory() if device.type == "cuda" else reference.edges  # then no copy waits
            self._tables = {  # where answers lie: edges and counts; those of tickets lie on the host
                there.type: (
                    edges.to(there, non_blocking=True),
                    torch.zeros(reference.counts.numel(), dtype=torch.int64, device=there),
                )
                for there in (torch.device("cpu"), device)
            }

    def add(self, answers: Predictions) -> None:
        """Count the samples of a batch where its answers lie, behind what wrote them."""
        edges, counts = self._tables[answers.exits.device.type]
        with self._lock:  # another thread's addition may not come in between
            count_into(counts, edges, answers.exits, answers.scores)

    def counts(self) -> Tensor:  # [G + 1, E + 1] int64, on the host
        """The counts so far, by exit and by bin of `reference`; waits for them."""
        with self._lock:
            summed = torch.stack([counts.cpu() for _, counts in self._tables.values()]).sum(0)
        return summed.view_as(self.reference.counts)


class Monitor:
    """Where samples leave a runtime, and with what scores; compiled with ``monitor=True``, it is ``run.monitor``.

    It counts what was answered since it was compiled, since `reset`, or since the thresholds were moved, whichever was
    last. Threads may run batches at once, and none is lost. On CUDA it counts on the stream that is current; use one.

    Args:
        reference_at: what to compare with at given thresholds.
        thresholds: those in force.
        device: where the answers are.
    """

    def __init__(
        self,
        reference_at: Callable[[tuple[float, ...]], Reference],
        thresholds: tuple[float, ...],
        device: torch.device,
    ) -> None:
        self._reference_at, self._device = reference_at, device
        self._submitted: list[tuple[Ticket, Window]] = []
        self._lock = threading.Lock()  # of what was submitted
        self.window = Window(reference_at(thresholds), device)

    @property
    def reference(self) -> Reference:
        """What samples are compared with: validation samples at the thresholds in force."""
        return self.window.reference

    def counts(self) -> Tensor:  # [G + 1, E + 1] int64, on the host
        """Samples by exit and by bin of `reference`; waits for the device, and not for tickets that are not done."""
        self._count_submitted()
        return self.window.counts()

    def report(self, alpha: float = ALPHA) -> DriftReport:
        """What moved beside the validation samples; waits as `counts` does.

        Args:
            alpha: chance of an alarm where nothing drifted, at most; of one report.

        Raises:
            ValueError: if ``alpha`` is not in (0, 1).
        """
        self._count_submitted()
        window = self.window
        return window.reference.compare(window.counts(), alpha)

    def reset(self) -> None:
        """Forget the counts; what is under way now is not counted."""
        self.window = Window(self.reference, self._device)

    def moved_to(self, thresholds: tuple[float, ...]) -> None:
        """Begin anew where the operating point is another one; batches under way count for the one they began at."""
        if thresholds != self.reference.thresholds:
            self.window = Window(self._reference_at(thresholds), self._device)

    def submitted(self, ticket: Ticket, window: Window) -> None:
        """Count a ticket's samples in ``window`` when it is done."""
        with self._lock:
            self._submitted.append((ticket, window))
        self._count_submitted()

    def _count_submitted(self) -> None:
        """Count tickets that are done by now; a batch that failed is not answered, and not counted."""
        with self._lock:
            left = []
            for ticket, window in self._submitted:
                if not ticket.done():
                    left.append((ticket, window))
                elif ticket.ready().all():
                    window.add(ticket.answers)
            self._submitted = left
