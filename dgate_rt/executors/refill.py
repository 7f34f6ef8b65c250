"""An arena before every stage: stages run in chunks, of one size or each of its own, on survivors of many chunks.

The batch size that suits a stage differs: late stages read all their weights for every chunk and want many samples,
early ones may want fewer, whose large maps then stay in the cache. Packing the survivors is the natural place to change
it: they are put behind those that wait in the next arena already, and a stage runs when a full chunk waits
(`scheduler`), or when nothing more can come. A large batch needs less memory this way than all at once, and batches of
a stream share chunks, so that small ones run as well as large ones. The chunks come from measured stage times
(`dgate_rt.chunks`).

Nothing is copied that need not be: chunks of the input are views of it, and where nobody leaves and nobody waits a
boundary is passed on as it is.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dgate_rt import ops
from dgate_rt.accounts import Account, accounts, without_losses
from dgate_rt.chunks import ChunkPlan, StageTimes, cut_up, worthwhile_chunks
from dgate_rt.executors.arena import Arena, Rows
from dgate_rt.executors.base import GatedModel, Predictions, Setup
from dgate_rt.executors.ledger import Ledger
from dgate_rt.executors.scheduler import Schedule
from dgate_rt.gate import leaves, margin_and_label
from dgate_rt.stage_times import gate_times, sizes_up_to, stage_times
from dgate_rt.staged import as_tuple
from dgate_rt.threads import alone


class RefillExecutor:
    """Chunks of their own for every stage; any number of threads may call it, each works in memory of its own."""

    name = "refill"
    devices: tuple[str, ...] = ("cpu",)

    def __init__(self, model: GatedModel, setup: Setup) -> None:
        self.model, self.setup = model, setup
        self.times: StageTimes | None = None
        self.dropped: list[Account] = []
        if setup.chunks == "auto":
            self.times = stage_times(
                model.staged, setup.sample_shape, setup.dtype, model.thresholds.device, setup.channels_last,
                setup.sizes_of(0) or sizes_up_to(setup.batch_size), setup.engine_id, setup.remeasure,
            ).at_all_sizes()  # fmt: skip
            self.plan, self.accounts = self._planned(self.times, setup.shares)
            if setup.losing_gates == "off":
                self._drop_losing_gates(self.times)
        else:
            self.plan, self.accounts = ChunkPlan(tuple(setup.chunks), ()), []
        self._reckoned_at = model.point
        self._free: list[Line] = []

    def run(self, x: Tensor, out: Predictions) -> None:
        """Answer one batch, straight into ``out``."""
        line = self._take()
        try:
            line.answers, line.due = out, len(x)
            line.feed(x, torch.arange(len(x), device=x.device))
            del x
            while line.advance() is not None:
                pass
        finally:
            self._give(line)

    def stream(
        self, batches: Iterable[tuple[Tensor, Predictions]], max_wait: int | None = None
    ) -> Generator[Predictions, None, None]:
        """Answer every batch, in order; samples of different batches share chunks.

        A batch is taken when no full chunk waits anywhere, so that many may be under way where few samples reach a late
        stage. With ``max_wait`` all but the last so many are answered first, at the cost of chunks that are not full.
        New thresholds hold from the next batch that is taken; what is under way is answered first. So it is if
        ``batches`` raises. When closed it leaves nothing under way.
        """
        return self._flow(batches, max_wait, in_order=True)

    def as_finished(
        self, batches: Iterable[tuple[Tensor, Predictions]], max_wait: int | None = None
    ) -> Generator[Predictions, None, None]:
        """As `stream`, but each batch as soon as its last sample is answered."""
        return self._flow(batches, max_wait, in_order=False)

    def describe(self) -> list[str]:
        """Every stage's chunk, what a sample is expected to take there, where samples are regrouped, and memory."""
        lines, line = [], self._take()
        expected = [f", {ms:.3g} ms a sample expected" for ms in self.plan.expected] or [""] * len(self.plan.chunks)
        regrouped = {step.stages.start for step in line.steps[1:]}
        for stage, chunk in enumerate(self.plan.chunks):
            how = ", regrouped before" if stage in regrouped else ""
            lines.append(f"stage {stage}: chunks of {chunk}{how}{expected[stage]}")
        self._give(line)
        if self.model.point == self._reckoned_at:
            lines += [f"{_told(account)}{'' if account.pays else '; it loses time'}" for account in self.accounts]
            lines += [f"{_told(account)}, so it is off" for account in self.dropped]
        elif self.accounts or self.dropped:
            lines.append(
                "what gates take and save was reckoned at other thresholds; compile a program of these to know"
            )
        return [*lines, f"arenas hold {self.held_bytes() / 2**20:.1f} MiB so far"]

    def held_bytes(self) -> int:
        """What arenas hold while nothing is under way; they keep it for the next batch."""
        return sum(arena.nbytes for line in self._free for arena in line.arenas)

    def _planned(self, times: StageTimes, shares: Sequence[float]) -> tuple[ChunkPlan, list[Account]]:
        """The chunks where ``shares`` leave at each exit, and what each gate takes and saves with them."""
        model, setup = self.model, self.setup
        reach = [min(1.0, max(0.0, 1 - sum(shares[:stage]))) for stage in range(len(shares))]
        plan = worthwhile_chunks(times, reach, model.active, setup.batch_size, padded=bool(setup.sizes_of(0)))
        stages_ms, gates_ms = self._costs(times, plan)
        return plan, accounts(shares, model.active, stages_ms, gates_ms)

    def _costs(self, times: StageTimes, plan: ChunkPlan) -> tuple[list[float], tuple[float, ...]]:
        """Milliseconds a sample of each stage and each gate, at the chunks of the plan."""
        setup, chunks = self.setup, plan.chunks
        stages_ms = [float(times.table([stage])[chunk]) / chunk for stage, chunk in enumerate(chunks)]
        return stages_ms, gate_times(
            self.model.staged, self.model.gates, setup.sample_shape, setup.dtype, setup.channels_last, chunks[:-1]
        )

    def _drop_losing_gates(self, times: StageTimes) -> None:
        before = {account.gate: account for account in self.accounts}
        stages_ms, gates_ms = self._costs(times, self.plan)
        thresholds, shares = without_losses(self.model.point, self.setup.shares, stages_ms, gates_ms)
        self.dropped = [before[g] for g in before if thresholds[g] == math.inf]
        if self.dropped:
            self.model.set_thresholds(thresholds)
            self.plan, self.accounts = self._planned(times, shares)

    def _flow(
        self, batches: Iterable[tuple[Tensor, Predictions]], max_wait: int | None, in_order: bool
    ) -> Generator[Predictions, None, None]:
        ledger = Ledger(self.setup.classes, self.model.thresholds.device, in_order)
        source, line = iter(batches), self._take()
        try:
            while True:
                try:
                    x, out = next(source)
                except StopIteration:
                    yield from _drained(line, ledger)
                    return
                except Exception:
                    yield from _drained(line, ledger)
                    raise
                if line.version != self.model.version:
                    yield from _drained(line, ledger)
                    line = self._renewed(line)
                ids = ledger.enter(out)
                line.answers = ledger.answers
                while (taken := line.feed(x, ids)) < len(ids):
                    x, ids = x[taken:], ids[taken:]
                    yield from _advanced(line, ledger, None)
                yield from _advanced(line, ledger, max_wait)
                line.keep_input()
                del x, out
        finally:
            self._give(line)

    def _take(self) -> Line:
        """A line that is free, or a new one."""
        try:
            line = self._free.pop()
        except IndexError:
            line = None
        return self._renewed(line)

    def _renewed(self, line: Line | None) -> Line:
        """The line itself under the thresholds of now, or another where gates were switched."""
        if line is None or line.active != self.model.active:
            setup, chunks = self.setup, self.plan.chunks
            whole = not setup.sizes_of(0) and set(chunks) == {setup.batch_size}  # then remainders are not cut up either
            return Line(self.model, chunks, None if whole else self.times, padded=bool(setup.sizes_of(0)))
        line.renew()
        return line

    def _give(self, line: Line) -> None:
        line.clear()
        self._free.append(line)


def _told(account: Account) -> str:
    return f"gate {account.gate} takes {account.costs_ms:.3g} ms of a sample and saves {account.saves_ms:.3g} ms"


def _advanced(line: Line, ledger: Ledger, max_wait: int | None) -> Generator[Predictions, None, None]:
    """Run all full chunks, and whatever all batches but the last ``max_wait`` need; hand out what is complete."""
    while True:
        yield from ledger.finished()
        line.due = 0 if max_wait is None else ledger.due(max_wait)
        ids = line.advance()
        if ids is None:
            return
        ledger.note(ids)


def _drained(line: Line, ledger: Ledger) -> Generator[Predictions, None, None]:
    """Answer all that is under way."""
    yield from _advanced(line, ledger, 0)
    assert len(ledger) == 0


@dataclass(frozen=True)
class Step:
    """Stages that run as one, for no gate and no regrouping lies between; and the gate at their end, if it is on."""

    stages: range
    gate: int | None
    chunk: int


def steps_of(active: tuple[bool, ...], chunks: tuple[int, ...]) -> list[Step]:
    """The steps that are left when neighbours of equal chunks merge wherever no gate is on."""
    found, start = [], 0
    for stage, chunk in enumerate(chunks):
        last = stage + 1 == len(chunks)
        gate = stage if not last and active[stage] else None
        if last or gate is not None or chunks[stage + 1] != chunk:
            found.append(Step(range(start, stage + 1), gate, chunk))
            start = stage + 1
    return found


class Line:
    """The arenas before every step, and what is under way in them, under thresholds of its own.

    Attributes:
        active: which gates are on.
        version: of the thresholds.
        due: how many of the oldest samples under way have to be answered before more input comes.
        answers: where samples are answered, at their ids.
    """

    def __init__(self, model: GatedModel, chunks: tuple[int, ...], times: StageTimes | None, padded: bool) -> None:
        self._model, self._staged = model, model.staged
        self.active, self.due = model.active, 0
        self.answers = self._nowhere = Predictions.empty(0, None, model.thresholds.device)
        with torch.inference_mode(False):
            self._thresholds = torch.empty_like(model.thresholds)
        self.steps = steps_of(self.active, chunks)
        tables = [None if times is None else times.table(step.stages, padded) for step in self.steps]
        cuts = tuple(None if table is None else cut_up(table)[0].tolist() for table in tables)
        self._schedule = Schedule(tuple(step.chunk for step in self.steps), cuts)
        self.arenas = [Arena(capacity) for capacity in self._schedule.capacities]
        self._input = 0  # where the memory of the batch that was fed last begins
        self.renew()

    @torch.inference_mode()
    def renew(self) -> None:
        """Take over the thresholds in force."""
        self.version = self._model.version
        self._thresholds.copy_(self._model.thresholds)

    @torch.inference_mode()
    def feed(
        self,
        x: Tensor,  # [N, ...]
        ids: Tensor,  # [N] int64
    ) -> int:
        """Let rows wait before the first step, all of them where they lie or as many as complete a chunk there."""
        arena, chunk = self.arenas[0], self.steps[0].chunk
        if not len(arena):
            arena.lend((x,), ids)
            self._input = _memory(x)
            return len(x)
        count = min(len(x), chunk - len(arena))
        with alone(self._staged):
            arena.append((x[:count],), ids[:count])
        return count

    @torch.inference_mode()
    def keep_input(self) -> None:
        """Let the caller have its batch back, which it may change from here on."""
        with alone(self._staged):
            self.arenas[0].keep()

    @torch.inference_mode()
    def advance(self) -> Tensor | None:  # [n] int64
        """Run the next step; returns the samples that it ran on, or None if there is nothing to run."""
        turn = self._schedule.next([len(arena) for arena in self.arenas], self.due)
        if turn is None:
            return None
        with alone(self._staged):
            return self._run(*turn)

    def clear(self) -> None:
        """Give up what is under way."""
        for arena in self.arenas:
            arena.clear()
        self.answers = self._nowhere

    def _run(self, index: int, count: int) -> Tensor:  # [count] int64
        step = self.steps[index]
        if index + 1 < len(self.steps):
            self.arenas[index + 1].keep()  # what was lent may lie where this step writes
        rows, ids = self.arenas[index].take(count)
        for stage in step.stages:
            rows = as_tuple(self._staged.run_stage(stage, rows))
        if index + 1 == len(self.steps):
            self._finish(rows[0].float(), ids)
        elif step.gate is not None:
            self._decide(step.gate, index + 1, rows, ids)
        elif self._passes(index + 1, rows):
            self.arenas[index + 1].lend(rows, ids)
        else:
            self.arenas[index + 1].append(rows, ids)
        return ids

    def _decide(self, g: int, following: int, rows: Rows, ids: Tensor) -> None:
        """Score; keep the answers of those that leave; let the others wait before the following step."""
        gate, answers, arena = self._model.gates[g], self.answers, self.arenas[following]
        features = self._staged.gate_features(g, rows)
        if answers.distances is None:
            margin, label = gate.score(features)
        else:
            margin, label, distances = gate.distances(features)
            answers.distances.index_copy_(0, ids, distances)  # a later exit overwrites its rows
        survivors = len(ids) - int(leaves(margin, self._thresholds[g]).sum())
        if survivors == len(ids) and self._passes(following, rows):
            arena.lend(rows, ids)
            return
        src = arena.laid_out(rows)
        dest, dest_ids = arena.room(tuple(src), survivors)
        dest_count = torch.empty((), dtype=torch.int32, device=ids.device)  # known already
        ops.route_(
            src, ids, margin, label, None, self._thresholds, g,
            dest, dest_ids, dest_count, answers.labels, answers.scores, answers.exits,
        )  # fmt: skip
        arena.added(survivors)

    def _finish(self, logits: Tensor, ids: Tensor) -> None:
        """The answers of those that ran to the end."""
        answers = self.answers
        answers.scores[ids], answers.labels[ids] = margin_and_label(logits)
        answers.exits[ids] = len(self._model.gates)
        if answers.distances is not None:
            answers.distances.index_copy_(0, ids, logits)

    def _passes(self, following: int, rows: Rows) -> bool:
        """Whether a boundary may wait where it lies: it alone will run next, and it lies in nobody else's memory."""
        waiting = [len(arena) for arena in self.arenas]
        if waiting[following]:
            return False
        waiting[following] = len(rows[0])
        turn = self._schedule.next(waiting, self.due)
        if turn is None or turn[0] != following:
            return False
        owned = {_memory(t) for arena in self.arenas for t in arena.own} | {self._input}
        return owned.isdisjoint(map(_memory, rows))


def _memory(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()
