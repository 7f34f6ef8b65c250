"""Exact sub-batches, launched by the host, which waits for the survivor count after each gate.

Runs everywhere. Features are read once by the fused score, and nothing is copied at a gate where nobody leaves.
Survivors are packed into memory that is kept from batch to batch: fresh pages cost more than the copy.

A batch that is submitted runs on a thread of the executor's own, which shows the answers after every gate.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from dgate_rt import ops
from dgate_rt.executors.base import GatedModel, Predictions, Setup, row_dense
from dgate_rt.executors.early import Ticket, publish, unanswered
from dgate_rt.gate import leaves, margin_and_label
from dgate_rt.staged import as_tuple
from dgate_rt.threads import alone


class EagerExecutor:
    """Gate after gate on the host: score, count, route the survivors, run the next stage on them."""

    name = "eager"
    devices: tuple[str, ...] = ("cpu", "cuda")
    early_devices = ("cpu",)

    def __init__(self, model: GatedModel, setup: Setup) -> None:
        self.model, self.setup = model, setup
        self._arenas = threading.local()  # each thread that calls the runtime packs into its own
        self._worker = ThreadPoolExecutor(1, "dgate_rt submit") if setup.early_answers else None  # starts at need

    def run(self, x: Tensor, out: Predictions) -> None:
        self._run(self.model, x, out, lambda: None)

    def submit(self, x: Tensor) -> Ticket:
        """Run a batch behind those that were submitted before."""
        assert self._worker is not None
        host, out = (unanswered(len(x), self.setup.classes, pinned=False) for _ in range(2))
        show = functools.partial(publish, out, host)
        future = self._worker.submit(self._run, self.model.snapshot(), x, out, show)
        return Ticket(host, Submitted(future))

    @torch.inference_mode()
    def _run(self, model: GatedModel, x: Tensor, out: Predictions, answered: Callable[[], None]) -> None:
        """Answer a batch; ``answered`` is called whenever ``out`` has new answers."""
        if len(x) == 0:
            return
        with alone(model.staged):
            self._answer(model, x, out, answered)

    def _answer(self, model: GatedModel, x: Tensor, out: Predictions, answered: Callable[[], None]) -> None:
        ids = torch.arange(len(x), device=x.device)
        boundary: Tensor | tuple[Tensor, ...] = x
        del x  # the batch may be freed once the first stage has read it
        for g, gate in enumerate(model.gates):
            boundary = model.staged.run_stage(g, boundary)
            if not model.active[g]:
                continue
            features = model.staged.gate_features(g, boundary)
            if out.distances is None:
                margin, label = gate.score(features)
            else:
                margin, label, distances = gate.distances(features)
                out.distances.index_copy_(0, ids, distances)  # a later exit overwrites its rows
            del features
            survivors = len(ids) - int(leaves(margin, model.thresholds[g]).sum())
            if survivors == len(ids):
                continue
            src = [row_dense(t) for t in as_tuple(boundary)]
            dest = self._arena(src, survivors)
            dest_ids, dest_count = ids.new_empty(survivors), torch.zeros((), dtype=torch.int32, device=ids.device)
            ops.route_(
                src, ids, margin, label, None, model.thresholds, g,
                dest, dest_ids, dest_count, out.labels, out.scores, out.exits,
            )  # fmt: skip
            answered()
            if survivors == 0:
                return
            boundary, ids = (dest[0] if isinstance(boundary, Tensor) else tuple(dest)), dest_ids
            del src, dest
        logits = as_tuple(model.staged.run_stage(len(model.gates), boundary))[0].float()
        out.scores[ids], out.labels[ids] = margin_and_label(logits)
        out.exits[ids] = len(model.gates)
        if out.distances is not None:
            out.distances.index_copy_(0, ids, logits)
        answered()

    def describe(self) -> list[str]:
        """Nothing: it prepares nothing."""
        return []

    def _arena(self, src: list[Tensor], count: int) -> list[Tensor]:
        """Unwritten memory for ``count`` rows laid out as those of each tensor of ``src``.

        One arena serves all gates, since a stage has read it before the next gate writes; where what a stage returned
        still lies in it (an identity, or a tensor that only passes through), a new one takes its place.
        """
        sizes = [_bytes_of(t, count) for t in src]
        arena: Tensor | None = getattr(self._arenas, "bytes", None)
        used = arena is not None and any(_same_memory(t, arena) for t in src)
        if arena is None or used or len(arena) < sum(sizes) or arena.device != src[0].device:
            with torch.inference_mode(False):
                arena = torch.empty(sum(sizes), dtype=torch.uint8, device=src[0].device)
            self._arenas.bytes = arena
        rows = []
        for t, part in zip(src, arena[: sum(sizes)].split(sizes), strict=True):
            row = t[0].numel()
            values = part[: count * row * t.element_size()].view(t.dtype)
            rows.append(values.as_strided((count, *t.shape[1:]), (row, *t.stride()[1:])))
        return rows


class Submitted:
    """A batch on the executor's thread."""

    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def done(self) -> bool:
        return self._future.done()

    def wait(self) -> None:
        self._future.result()


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _bytes_of(t: Tensor, count: int) -> int:
    """Bytes that ``count`` rows like those of ``t`` take, up to a multiple of 64."""
    return -(-count * t[0].numel() * t.element_size() // 64) * 64
