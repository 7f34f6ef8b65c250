"""What streams of batches are tested with: the two executors that share work between batches, and late counts."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from captured_checks import simulate

import dgate_rt as dg
from dgate_rt.executors import lag
from dgate_rt.executors.captured import CapturedStages


def lagging(program, **options):
    return simulate(program, **{"executor": "lag", **options})


def refilling(program, chunks="auto", **options):
    given = {"batch_size": 64, "executor": "refill", "channels_last": False, **options}
    return dg.compile(program, chunks=chunks, **given)


def joined(outs):
    """The answers to several batches as those to one."""
    return dg.Predictions(*(torch.cat([getattr(out, n) for out in outs]) for n in ("labels", "scores", "exits")))


def within(run, batches, in_order=True, max_wait=None):
    """The answers to a stream, in the order of its batches; none came later than ``max_wait`` says."""
    found = {}

    def source():
        for index, x in enumerate(batches):
            if max_wait is not None:
                assert set(range(index - max_wait)) <= set(found)
            yield x

    outs = run.stream(source(), in_order=in_order, max_wait=max_wait)
    for index, out in enumerate(outs) if in_order else outs:
        assert index not in found
        found[index] = out
    assert sorted(found) == list(range(len(batches)))
    return [found[index] for index in range(len(batches))]


class Late:
    """Events that are past once they were polled ``polls`` times or waited for, and counts that are not there before.

    It records what happens, in order, as (what, stream, ...): a "run" of a segment at a size, a "count" asked for, a
    "wait" of the host for it, and what "follow"s or "lead"s the caller's stream. A stream goes by the order in which
    batches first ran on it.
    """

    def __init__(self, polls):
        self.polls, self.log, self.now, self.names = polls, [], None, {}

    def name(self, stream):
        return self.names.setdefault(id(stream), "abcdefgh"[len(self.names)])

    def taken(self, *kinds):
        return [(*entry[:2], *entry[2:3]) for entry in self.log if entry[0] in kinds]

    @contextmanager
    def installed(self):
        late = self

        class Stream(lag.SimulatedStream):
            def __init__(self):
                super().__init__()
                self.event = Event(self)

            @contextmanager
            def current(self):
                assert late.now is None
                late.now = self
                try:
                    yield
                finally:
                    late.now = None

            def follow(self):
                late.log.append(("follow", self))

            def lead(self):
                late.log.append(("lead", self))

        class Event(lag.SimulatedEvent):
            def __init__(self, stream):
                self.stream, self.left, self.hidden = stream, None, None

            def record(self):
                assert late.now is self.stream
                late.log.append(("count", late.name(self.stream)))
                self.left, self.hidden = late.polls() if callable(late.polls) else late.polls, self.stream.count.clone()
                self.stream.count.fill_(-1000)

            def query(self):
                if self.left == 0:
                    self.arrive()
                    return True
                self.left -= 1
                return False

            def synchronize(self):
                if self.hidden is not None:
                    late.log.append(("wait", late.name(self.stream)))
                    self.arrive()

            def arrive(self):
                if self.hidden is not None:
                    self.stream.count.copy_(self.hidden)
                self.left, self.hidden = 0, None

        original = CapturedStages.run_segment

        def run_segment(stages, index, size):
            if late.now is not None:
                late.log.append(("run", late.name(late.now), index, size))
            return original(stages, index, size)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lag, "SimulatedStream", Stream)
            patch.setattr(CapturedStages, "run_segment", run_segment)
            yield self
