"""The lag executor on the simulated driver: it answers as dense execution with post-hoc gating, and rarely waits."""

from __future__ import annotations

import itertools
import math
from contextlib import contextmanager, nullcontext

import pytest
import torch
from captured_checks import agrees, check, program_of_several_tensors, random_program, simulate
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import all_margins, make_program, thresholds_for
from torch import nn

import dgate_rt as dg
from dgate_rt import StagedModel, ops
from dgate_rt.executors import lag
from dgate_rt.executors.captured import CapturedStages
from dgate_rt.executors.lag import IN_FLIGHT
from dgate_rt.graphs import driver_counts, reset_simulation

pytestmark = pytest.mark.skipif(not ops.extension_loaded(), reason="the C++ extension is not built")

INF = math.inf


def lagging(program, **options):
    return simulate(program, **{"executor": "lag", **options})


@pytest.fixture
def images():
    return torch.randn(129, 3, 16, 16) * torch.linspace(0.2, 2.0, 129)[torch.randperm(129), None, None, None]


@pytest.fixture
def program(tiny_staged, tiny_gates, images):
    """Of which some samples leave at every gate."""
    return make_program(
        tiny_staged, tiny_gates, thresholds_for(all_margins(tiny_staged, tiny_gates, images), 0.4), images
    )


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


@pytest.fixture
def late():
    """Counts that arrive only when they are waited for."""
    with Late(INF).installed() as installed:
        yield installed


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0], ids=["none", "mixed", "all"])
@pytest.mark.parametrize("count", [0, 1, 31, 64, 129], ids="N={}".format)
@pytest.mark.parametrize("buckets", ["auto", [1, 7, 32]], ids=["auto", "given"])
def test_it_agrees_with_dense_and_post_hoc_gating(tiny_staged, tiny_gates, images, count, share, buckets):
    thresholds = thresholds_for(all_margins(tiny_staged, tiny_gates, images), share)
    program = make_program(tiny_staged, tiny_gates, thresholds, images)
    run = lagging(program, buckets=buckets)
    if count == 0:
        assert len(run(images[:0])) == 0
        return
    out = check(run, program, images[:count])
    assert share != 1.0 or out.exits.eq(0).all()
    assert share != 0.0 or out.exits.eq(3).all()
    (streamed,) = run.stream([images[:count]])
    assert torch.equal(streamed.exits, out.exits)
    assert torch.equal(streamed.scores, out.scores)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    batch=st.integers(1, 40),
    sizes=st.lists(st.integers(0, 50), max_size=8),
    share=st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]),
    off=st.sets(st.integers(0, 4)),
    buckets=st.just("auto") | st.lists(st.integers(1, 50), max_size=4),
    polls=st.lists(st.sampled_from([0, 1, 2, 5, INF]), min_size=1, max_size=10),
)
def test_it_agrees_on_random_programs_and_streams_however_late_the_counts(
    seed, widths, batch, sizes, share, off, buckets, polls
):
    program, x = random_program(seed, widths, max(1, sum(sizes)), share, off)
    delays = itertools.cycle(polls)
    with Late(lambda: next(delays)).installed():
        run = lagging(program, batch_size=batch, buckets=buckets)
        batches = x[: sum(sizes)].split(sizes)
        outs = list(run.stream(batches))
    assert [len(out) for out in outs] == sizes
    if sum(sizes):
        whole = dg.Predictions(*(torch.cat([getattr(o, n) for o in outs]) for n in ("labels", "scores", "exits")))
        agrees(whole, run.thresholds, program, x, most=1)


def test_several_tensors_cross_a_cut():
    program, x = program_of_several_tensors()
    run = lagging(program)
    assert set(check(run, program, x).exits.tolist()) == {0, 1}
    for part, out in zip(x.split(7), run.stream(x.split(7)), strict=True):
        agrees(out, run.thresholds, program, part)


@pytest.mark.parametrize("counted", ["at once", "late"])
def test_answers_come_in_order_and_at_most_two_batches_are_taken_ahead(program, images, counted):
    taken = []

    def batches():
        for start in range(0, 129, 16):
            taken.append(start)
            yield images[start : start + 16]

    with Late(0 if counted == "at once" else INF).installed():
        run = lagging(program, batch_size=16)
        stream = run.stream(batches())
        assert taken == []
        ahead = []
        for answered, out in enumerate(stream, 1):
            ahead.append(len(taken) - answered + 1)
            agrees(out, run.thresholds, program, images[(answered - 1) * 16 : answered * 16])
    assert answered == len(taken) == 9
    assert max(ahead) == (1 if counted == "at once" else IN_FLIGHT)


def test_the_host_waits_for_a_count_only_while_another_batch_computes(program, images, late):
    run = lagging(program, batch_size=16, buckets=[16])
    list(run.stream(images[:32].split(16)))
    assert late.taken("run", "wait") == [
        ("run", "a", 0),
        ("run", "b", 0),
        *itertools.chain.from_iterable(
            [("wait", "a"), ("run", "a", index), ("wait", "b"), ("run", "b", index)] for index in (1, 2, 3)
        ),
    ]


def test_it_never_waits_for_the_batch_that_went_on_last_while_another_is_under_way(program, images, late):
    run = lagging(program, batch_size=16, buckets=[4, 8])
    list(run.stream(images[:128].split(16)))
    under_way, last = set(), None
    for what, stream, *segment in late.log:
        if what == "run":
            under_way.add(stream)
            last = stream
            if segment[0] == 3:
                under_way.remove(stream)
        elif what == "wait":
            assert stream != last or under_way == {stream}
    assert sum(entry[0] == "run" and entry[2] == 0 for entry in late.log) == 8


def test_a_count_that_has_arrived_goes_first_and_a_free_place_is_filled_before_any_wait(program, images):
    with Late(1).installed() as late:  # the first batch's count comes while the second starts
        run = lagging(program, batch_size=16, buckets=[16])
        list(run.stream(images[:32].split(16)))
    expected = [("run", "a", 0), ("run", "b", 0), ("run", "a", 1), ("wait", "b"), ("run", "b", 1)]
    assert late.taken("run", "wait")[:5] == expected


def test_more_batches_may_be_in_flight(program, images, late):
    executor = lagging(program, batch_size=16)._executor
    jobs = [(x, dg.Predictions.empty(16, None, x.device)) for x in images[:96].split(16)]
    outs = executor.stream(jobs, in_flight=3)
    assert next(outs) is jobs[0][1]
    assert late.taken("run")[:3] == [("run", "a", 0), ("run", "b", 0), ("run", "c", 0)]
    assert [out is job[1] for out, job in zip(outs, jobs[1:], strict=True)] == [True] * 5


def test_one_batch_waits_for_its_own_counts(program, images, late):
    check(lagging(program, buckets=[16, 32]), program, images[:50])
    assert late.taken("run", "wait") == [
        ("run", "a", 0), ("wait", "a"), ("run", "a", 1), ("wait", "a"), ("run", "a", 2), ("wait", "a"), ("run", "a", 3)
    ]  # fmt: skip


def test_the_smallest_bucket_that_holds_the_survivors_is_launched(tiny_staged, tiny_gates, images):
    margins = all_margins(tiny_staged, tiny_gates, images[:64])
    ordered = margins[0].sort(descending=True).values
    with Late(0).installed() as late:
        run = lagging(make_program(tiny_staged, tiny_gates, (0.0, INF, INF), images), buckets=[1, 7, 8, 32])
        for survivors in (64, 33, 32, 31, 9, 8, 7, 2, 1):
            last = 64 - survivors  # as many leave
            threshold = ordered[0] + 1 if last == 0 else (ordered[last - 1] + ordered[last]) / 2
            run.set_thresholds([float(threshold), INF, INF])
            run(images[:64])
    assert [entry[3] for entry in late.log if entry[0] == "run" and entry[2] == 1] == [64, 64, 32, 32, 32, 8, 7, 7, 1]


def test_streams_wait_for_each_other_where_memory_changes_hands(program, images, late):
    """Behind the caller's stream when a batch comes in, before it when it is loaded and when it is handed back."""
    run = lagging(program, batch_size=16)
    late.log.clear()
    run(images[:16])
    ordered = [entry[0] for entry in late.log if entry[0] in ("follow", "lead", "run")]
    assert ordered == ["follow", "lead", "run", "run", "run", "run", "lead"]
    assert len({id(entry[1]) for entry in late.log if entry[0] in ("follow", "lead")}) == 1


def test_when_all_leave_nothing_but_the_first_segment_is_launched(tiny_staged, tiny_gates, images):
    thresholds = thresholds_for(all_margins(tiny_staged, tiny_gates, images), 1.0)
    run = lagging(make_program(tiny_staged, tiny_gates, thresholds, images), batch_size=32)
    reset_simulation()
    assert all(out.exits.eq(0).all() for out in run.stream(images[:128].split(32)))
    counts = driver_counts()
    assert (counts.launches, counts.stages, counts.allocations) == (4, 4, 0)


def test_a_gate_that_is_off_is_not_captured(tiny_staged, tiny_gates, images, late):
    program = make_program(tiny_staged, tiny_gates, (INF, 1000.0, INF), images)
    run = lagging(program, buckets=[8])
    check(run, program, images[:20])
    assert [entry[2:] for entry in late.log if entry[0] == "run"] == [(0, 64), (1, 64)]
    run.set_thresholds([INF] * 3)
    late.log.clear()
    check(run, program, images[:20])
    assert [entry[2:] for entry in late.log if entry[0] == "run"] == [(0, 64)]
    assert late.taken("wait", "count") == []


def test_a_network_without_gates_streams():
    staged, x = StagedModel(stages=[nn.Linear(4, 3)]).eval(), torch.randn(10, 4)
    run = lagging(make_program(staged, nn.ModuleList(), (), x), batch_size=3, scores=True)
    out = torch.cat([out.distances for out in run.stream(x.split(4))])
    torch.testing.assert_close(out, staged(x).detach())


def test_thresholds_hold_from_the_next_batch_that_is_taken(tiny_staged, tiny_gates, images):
    program = make_program(tiny_staged, tiny_gates, (1e6,) * 3, images)
    polls = itertools.chain([1, INF, 0, 0], itertools.repeat(INF))  # the second batch still is where it started
    with Late(lambda: next(polls)).installed() as late:
        run = lagging(program, batch_size=16)
        lanes = set(map(id, run._executor._free))
        outs = run.stream(images[:80].split(16))
        exits = [next(outs).exits]
        assert [entry[2] for entry in late.taken("run") if entry[1] == "b"] == [0]
        run.set_thresholds([1e6, 1e6, -1e6])
        exits += [out.exits for out in outs]
    assert [e.unique().tolist() for e in exits] == [[3], [3], [2], [2], [2]]
    assert set(map(id, run._executor._free)) == lanes  # nothing was captured again


def test_batches_under_way_keep_their_gates_when_one_is_switched(tiny_staged, tiny_gates, images, late):
    program = make_program(tiny_staged, tiny_gates, (1e6, -1e6, 1e6), images)
    run = lagging(program, batch_size=16)
    outs = run.stream(images[:80].split(16))
    exits = [next(outs).exits]
    run.set_thresholds([INF, INF, -1e6])
    exits += [out.exits for out in outs]
    assert [e.unique().tolist() for e in exits] == [[1], [1], [2], [2], [2]]
    assert len(run._executor._free) == IN_FLIGHT


def test_thresholds_may_be_moved_by_the_source_of_the_batches(tiny_staged, tiny_gates, images, late):
    run = lagging(make_program(tiny_staged, tiny_gates, (1e6,) * 3, images), batch_size=16)

    def batches():
        for gate, x in enumerate(images[:48].split(16)):
            run.set_thresholds([-1e6 if g == gate else INF for g in range(3)])
            yield x

    assert [out.exits.unique().tolist() for out in run.stream(batches())] == [[0], [1], [2]]


@pytest.mark.parametrize("closed", ["closed", "dropped"])
def test_a_stream_that_is_closed_early_leaves_nothing_under_way(program, images, late, simulation, closed):
    run = lagging(program, batch_size=16)
    outs = run.stream(itertools.cycle([images[:16], images[16:32]]))
    next(outs)
    assert len(run._executor._free) == 1
    late.log.clear()
    if closed == "closed":
        outs.close()
    del outs
    assert [entry[0] for entry in late.log] == ["lead"]
    assert len(run._executor._free) == IN_FLIGHT
    check(run, program, images[:40])
    for x, out in zip(images.split(16), run.stream(images.split(16)), strict=True):
        agrees(out, run.thresholds, program, x)


@pytest.mark.parametrize("executor", ["lag", "graph", "eager"])
@pytest.mark.parametrize("wrong", ["raises", "shape", "type"])
def test_when_a_batch_is_wrong_those_before_are_answered_first(program, images, executor, wrong):
    def batches():
        yield images[:10]
        yield images[10:30]
        if wrong == "raises":
            raise KeyError("no such file")
        yield images[:, :2] if wrong == "shape" else [1.0]

    error, message = {
        "raises": (KeyError, "no such file"),
        "shape": (ValueError, r"x: expected shape \[N, 3, 16, 16\], got \[129, 2, 16, 16\]"),
        "type": (TypeError, "x: expected a torch.Tensor, got list"),
    }[wrong]
    with Late(INF).installed() if executor == "lag" else nullcontext():
        run = simulate(program, executor=executor, device="cpu" if executor == "eager" else "cpu-sim")
        outs, answered = run.stream(batches()), []
        with pytest.raises(error, match=message):
            answered.extend(outs)
        assert list(map(len, answered)) == [10, 20]
        assert list(outs) == []
        check(run, program, images[:10])


@pytest.mark.parametrize(("executor", "device"), [("lag", "cpu-sim"), ("graph", "cpu-sim"), ("eager", "cpu")])
@pytest.mark.parametrize("scores", [False, True], ids=["", "scores"])
def test_a_stream_answers_each_batch_as_a_call_does(program, images, executor, device, scores):
    run = simulate(program, executor=executor, device=device, batch_size=16, scores=scores)
    assert list(run.stream([])) == []
    sizes = [5, 0, 0, 16, 17, 70, 0, 21, 0]
    for x, out in zip(images.split(sizes), run.stream(images.split(sizes)), strict=True):
        whole = run(x)  # while others are under way
        for name in ("labels", "scores", "exits", "distances"):
            assert (name == "distances" and not scores) or torch.equal(getattr(out, name), getattr(whole, name))
        out.scores.add_(1)  # ordinary tensors


@pytest.mark.parametrize("executor", ["lag", "graph"])
def test_inference_mode_does_not_leak_out_of_a_stream(program, images, executor):
    def batches():
        for x in images[:48].split(16):
            assert not torch.is_inference_mode_enabled()
            assert torch.is_grad_enabled()
            yield x.clone().requires_grad_()

    for out in simulate(program, executor=executor, batch_size=16).stream(batches()):
        assert not torch.is_inference_mode_enabled()
        assert not out.scores.requires_grad
        assert not out.scores.is_inference()


def test_two_streams_of_one_runtime_do_not_mix(program, images, late):
    run = lagging(program, batch_size=16)
    one, two = run.stream(images.split(16)), run.stream(images.flip(0).split(16))
    for (x, out), (y, other) in zip(
        zip(images.split(16), one, strict=True), zip(images.flip(0).split(16), two, strict=True), strict=True
    ):
        agrees(out, run.thresholds, program, x)
        agrees(other, run.thresholds, program, y)


def test_a_stage_that_fails_says_why_and_the_runtime_goes_on(tiny_staged, tiny_gates, images, late):
    class Fails(nn.Module):
        armed = False

        def forward(self, x):
            if self.armed:
                raise RuntimeError("no such luck")
            return x

    staged = StagedModel([*list(tiny_staged.stages)[:3], nn.Sequential(Fails(), tiny_staged.stages[3])]).eval()
    program = make_program(staged, tiny_gates, (1e6,) * 3, images)
    run = lagging(program, batch_size=16)
    fails = run._model.staged.stages[3][0]
    fails.armed = True
    with pytest.raises(RuntimeError, match="no such luck"):
        run(images[:16])
    with pytest.raises(RuntimeError, match="no such luck"):
        list(run.stream(images.split(16)))
    assert len(run._executor._free) == IN_FLIGHT
    fails.armed = False
    check(run, program, images[:40])


def test_on_cuda_captures_are_launched_without_the_assembler_which_asks_for_switches(monkeypatch):
    did = []

    class Graph:
        def instantiate(self):
            did.append("instantiate")

        def replay(self):
            did.append("replay")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    lag.launcher(Graph(), "cuda", "stage 0")()
    assert did == ["instantiate", "replay"]


def test_describe_tells_batches_in_flight_and_buckets(program):
    text = lagging(program, buckets=[8, 32]).describe()
    assert "executor lag (asked for) on cpu-sim" in text
    assert "2 batches of a stream in flight" in text
    assert "stage 1: buckets 8, 32, 64; padding is expected to add " in text


def test_it_does_not_run_on_a_cpu_that_simulates_nothing(program):
    with pytest.raises(dg.ExecutorError, match="executor: lag runs on cuda and cpu-sim, not on cpu"):
        dg.compile(program, executor="lag")
