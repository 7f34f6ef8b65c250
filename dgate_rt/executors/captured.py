"""What executors that launch captures share: segments of stages, static arenas before them, and what a capture does.

All memory is static: an arena of survivors before each segment, the answers, the thresholds. A segment holds the stages
from one gate that is on to the next: a gate that is off costs nothing. A segment is captured at a few sizes, its
buckets, together with its gate; rows at and after the live count hold stale data.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import torch
from torch import Tensor

from dgate_rt import ops
from dgate_rt.engines.base import PreparedStage
from dgate_rt.errors import ExecutorError
from dgate_rt.executors.base import GatedModel, Predictions, Setup, empty_rows, row_dense
from dgate_rt.executors.capturable import refuse_uncapturable
from dgate_rt.executors.captures import Captures
from dgate_rt.executors.early import UNANSWERED, publish, unanswered
from dgate_rt.gate import margin_and_label
from dgate_rt.graphs import Capture
from dgate_rt.plan import StageBuckets, entry_sizes, expected_buckets
from dgate_rt.staged import Boundary, as_tuple


@dataclass(frozen=True)
class Segment:
    """The stages from behind one gate that is on to the next; the last segment ends with the network's classifier."""

    stages: range
    gate: int | None

    def called(self, bucket: int | None = None) -> str:
        """What messages call it, or its capture of a bucket: "stage 1", "stages 1 to 2, bucket 64"."""
        first, last = self.stages[0], self.stages[-1]
        name = f"stage {first}" if first == last else f"stages {first} to {last}"
        return name if bucket is None else f"{name}, bucket {bucket}"


@dataclass(frozen=True)
class Arena:
    """What waits before a segment: rows of every tensor that crosses, their samples, and how many are live."""

    rows: tuple[Tensor, ...]  # each [B, ...]
    single: bool  # whether one tensor crosses, not a tuple of one
    ids: Tensor  # [B] int64
    count: Tensor  # [] int32
    sizes: Tensor  # [M] int32, the buckets
    bucket: Tensor  # [] int32, index of the one that runs

    def first(self, size: int) -> Boundary:
        """The boundary of the first ``size`` rows."""
        rows = tuple(t[:size] for t in self.rows)
        return rows[0] if self.single else rows


class CapturedStages:
    """Everything that one batch in flight needs, ready to be launched segment by segment.

    Args:
        model: the network, its gates and thresholds.
        setup: batch size, buckets, and whether a driver is simulated.
        capture: makes a capture of a function, and says of what in its errors.
    """

    def __init__(self, model: GatedModel, setup: Setup, capture: Captures) -> None:
        self.model, self.setup = model, setup
        self._device = model.thresholds.device
        self._capture = capture
        size = setup.batch_size
        with torch.inference_mode(False):
            self.input = setup.empty_input(self._device)
            self._live = self._int32(0)
            self.status = self._int32(0)
            self._positions = torch.arange(size, device=self._device)
            self.answers = Predictions.empty(size + 1, setup.classes, self._device)  # the last row: of what is not live
        self.host = unanswered(size + 1, setup.classes, self._device.type == "cuda") if setup.early_answers else None
        self.active = model.active
        self.segments = segments(model.active)
        self.buckets = [self._plan(segment) for segment in self.segments[1:]]
        self.entries = setup.sizes_of(0) or entry_sizes(size, setup.buckets)
        """At which sizes batches enter: the first segment is captured at these."""
        self.handles = torch.zeros(len(model.thresholds), dtype=torch.int64, device=self._device)
        self.handles_of = {entry: torch.zeros_like(self.handles) for entry in self.entries}
        """Of the graph that begins with each; its first segment makes them those in force."""
        self.arenas: list[Arena] = []
        self.captures: list[dict[int, Capture]] = []
        """For each segment the captures by their size, smallest first."""
        self.taken: dict[str, int] = {}
        """Bytes that captures took, where a device has memory of its own."""
        try:
            with torch.inference_mode():
                self._make_arenas()
                self._make_captures()
            self._padding = [stage.padding() for stage in model.staged.stages if isinstance(stage, PreparedStage)]
            """What captures on CUDA pad in; it would otherwise end with the thread that made them."""
        except torch.OutOfMemoryError as error:
            raise ExecutorError(f"executor: {error}\n{self._needed()}") from error

    def entry(self, count: int) -> int:
        """At which size a batch of ``count`` samples enters."""
        return self.entries[bisect_left(self.entries, count)]

    def load(self, x: Tensor) -> None:
        """Bring a batch in, unless it lies in `input` already."""
        if x.data_ptr() != self.input.data_ptr():
            self.input[: len(x)].copy_(x)
        self._live.fill_(len(x))

    def store(self, out: Predictions) -> None:
        """Bring the answers out."""
        answers = self.answers.rows(0, len(out))
        out.labels.copy_(answers.labels)
        out.scores.copy_(answers.scores)
        out.exits.copy_(answers.exits)
        if out.distances is not None and answers.distances is not None:
            out.distances.copy_(answers.distances)

    def describe(self) -> list[str]:
        """The sizes of every segment, what padding to them is expected to cost behind the first, and the memory."""
        lines = [f"{self.segments[0].called()}: batches of {', '.join(map(str, self.entries))}"]
        for segment, buckets in zip(self.segments[1:], self.buckets, strict=True):
            sizes = ", ".join(map(str, buckets.sizes))
            lines.append(f"{segment.called()}: buckets {sizes}; padding is expected to add {buckets.waste:.1%}")
        captures = f", captures {_mebibytes(sum(self.taken.values()))}" if self._device.type == "cuda" else ""
        return [*lines, f"memory: arenas {_mebibytes(self._arena_bytes())}{captures}"]

    def called(self, index: int, size: int) -> str:
        """What messages call a capture."""
        return self.segments[index].called(size)

    def run_segment(self, index: int, size: int) -> None:
        """What one capture does: stages, then the gate or the end."""
        segment, arena = self.segments[index], self.arenas[index]
        if index == 0:
            self.handles.copy_(self.handles_of[size])
            if self.host is not None:
                self.answers.exits.fill_(UNANSWERED)
        boundary = self._run_stages(segment, arena.first(size))
        if segment.gate is None:
            self._finish(arena, as_tuple(boundary)[0].float(), size)
        else:
            self._decide(segment.gate, arena, self.arenas[index + 1], boundary, size)
        if self.host is not None:
            publish(self.answers, self.host)

    def _make_arenas(self) -> None:
        """Run every stage once, at the full batch: it says what crosses, and shows what cannot be captured."""
        size = self.setup.batch_size
        sizes = self._sizes(*self.entries)
        self.arenas.append(Arena((self.input,), True, self._positions, self._live, sizes, self._int32(0)))
        for segment, buckets in zip(self.segments, [*self.buckets, None], strict=True):
            boundary = self.arenas[-1].first(size)
            for stage in segment.stages:
                boundary = self._try_stage(stage, boundary)
            if buckets is not None:
                self.arenas.append(self._arena(boundary, buckets))

    def _try_stage(self, stage: int, boundary: Boundary) -> Boundary:
        try:
            if self.setup.sizes_of(stage):  # it was looked at before an engine compiled it
                return self.model.staged.run_stage(stage, boundary)
            with refuse_uncapturable(self.model.staged.stages[stage], f"stage {stage}"):
                return self.model.staged.run_stage(stage, boundary)
        except (ExecutorError, torch.OutOfMemoryError):
            raise
        except RuntimeError as error:
            size = self.setup.batch_size
            raise ExecutorError(f"executor: stage {stage} does not run on {size} samples: {error}") from error

    def _make_captures(self) -> None:
        for index, sizes in enumerate([self.entries, *(buckets.sizes for buckets in self.buckets)]):
            largest_first: dict[int, Capture] = {}  # so the pool grows once
            for size in reversed(sizes):
                before = self._capture.reserved()
                largest_first[size] = self._captured(index, size)
                self.taken[self.called(index, size)] = self._capture.reserved() - before
            self.captures.append(dict(reversed(largest_first.items())))

    def _needed(self) -> str:
        """What was taken before memory ran out, and what would need less."""
        captures = "; ".join(f"{what}: {_mebibytes(n)}" for what, n in self.taken.items())
        return (
            f"Taken before, and freed now: arenas {_mebibytes(self._arena_bytes())}; captures: {captures or 'none'}. "
            f"A smaller batch_size than {self.setup.batch_size}, or fewer buckets, would need less"
        )

    def _arena_bytes(self) -> int:
        return sum(t.nbytes for arena in self.arenas for t in arena.rows)

    def _run_stages(self, segment: Segment, boundary: Boundary) -> Boundary:
        for stage in segment.stages:
            boundary = self.model.staged.run_stage(stage, boundary)
        return boundary

    def _decide(self, g: int, arena: Arena, following: Arena, boundary: Boundary, size: int) -> None:
        """Score, keep the answers of those that leave, pack the others, set the switch of what follows."""
        gate, answers = self.model.gates[g], self.answers
        features = self.model.staged.gate_features(g, boundary)
        if answers.distances is None:
            margin, label = gate.score(features, arena.count)
        else:
            margin, label, distances = gate.distances(features, arena.count)
            answers.distances.index_copy_(0, self._places(arena, size), distances)  # a later exit overwrites its rows
        ops.route_(
            [row_dense(t) for t in as_tuple(boundary)], arena.ids[:size], margin, label, arena.count,
            self.model.thresholds, g, following.rows, following.ids, following.count,
            answers.labels, answers.scores, answers.exits,
            buckets=following.sizes, bucket=following.bucket, handles=self.handles, status=self.status,
        )  # fmt: skip

    def _finish(self, arena: Arena, logits: Tensor, size: int) -> None:
        """The answers of those that ran to the end."""
        margin, label = margin_and_label(logits)
        places = self._places(arena, size)
        self.answers.scores.index_copy_(0, places, margin)
        self.answers.labels.index_copy_(0, places, label)
        self.answers.exits.index_fill_(0, places, len(self.model.gates))
        if self.answers.distances is not None:
            self.answers.distances.index_copy_(0, places, logits)

    def _places(self, arena: Arena, size: int) -> Tensor:  # [size] int64
        """Where the answer of each row goes: its sample, or behind all of them if it is not live."""
        return torch.where(self._positions[:size] < arena.count, arena.ids[:size], self.setup.batch_size)

    def _arena(self, boundary: Boundary, buckets: StageBuckets) -> Arena:
        size = self.setup.batch_size
        with torch.inference_mode(False):
            rows = tuple(empty_rows(row_dense(t), size) for t in as_tuple(boundary))
            ids = torch.zeros(size, dtype=torch.int64, device=self._device)
            return Arena(
                rows, isinstance(boundary, Tensor), ids, self._int32(0), self._sizes(*buckets.sizes), self._int32(0)
            )

    def _plan(self, segment: Segment) -> StageBuckets:
        """The sizes that an engine prepared the first stage for, or those asked for, or the best few."""
        setup, first = self.setup, segment.stages[0]
        return expected_buckets(setup.batch_size, setup.shares, first, setup.sizes_of(first) or setup.buckets)

    def _int32(self, value: int) -> Tensor:
        with torch.inference_mode(False):
            return torch.full((), value, dtype=torch.int32, device=self._device)

    def _sizes(self, *sizes: int) -> Tensor:
        return torch.tensor(sizes, dtype=torch.int32, device=self._device)

    def _captured(self, index: int, size: int) -> Capture:
        return self._capture(lambda: self.run_segment(index, size), self.called(index, size))


def segments(active: tuple[bool, ...]) -> list[Segment]:
    """Stages between the gates that are on; ``active[g]`` says it of the gate after stage g."""
    found, start = [], 0
    for g, on in enumerate(active):
        if on:
            found.append(Segment(range(start, g + 1), g))
            start = g + 1
    return [*found, Segment(range(start, len(active) + 1), None)]


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
