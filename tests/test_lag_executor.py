"""The lag executor on the simulated driver: it answers as dense execution with post-hoc gating, and rarely waits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from captured_checks import agrees, check, program_of_several_tensors, random_program
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import all_margins, make_program, thresholds_for
from stream_checks import Late, joined, lagging, within

import dgate_rt as dg
from dgate_rt import ops
from dgate_rt.executors import lag
from dgate_rt.executors.lag import IN_FLIGHT
from dgate_rt.graphs import driver_counts, reset_simulation

pytestmark = pytest.mark.skipif(not ops.extension_loaded(), reason="the C++ extension is not built")

INF = math.inf


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
    max_wait=st.none() | st.integers(0, 3),
)
def test_it_agrees_on_random_programs_and_streams_however_late_the_counts(
    seed, widths, batch, sizes, share, off, buckets, polls, max_wait
):
    program, x = random_program(seed, widths, max(1, sum(sizes)), share, off)
    delays = itertools.cycle(polls)
    with Late(lambda: next(delays)).installed():
        run = lagging(program, batch_size=batch, buckets=buckets)
        batches = x[: sum(sizes)].split(sizes)
        outs = within(run, batches, max_wait=max_wait)
    assert [len(out) for out in outs] == sizes
    if sum(sizes):
        agrees(joined(outs), run.thresholds, program, x, most=1)


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


def test_with_a_bound_of_none_ahead_one_batch_is_in_flight(program, images, late):
    list(lagging(program, batch_size=16, buckets=[16]).stream(images[:32].split(16), max_wait=0))
    assert [stream for _, stream, _ in late.taken("run")] == ["a"] * 8


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


def test_the_callers_stream_waits_for_what_is_given_up(program, images, late):
    outs = lagging(program, batch_size=16).stream(images.split(16))
    next(outs)
    late.log.clear()
    outs.close()
    assert [entry[0] for entry in late.log] == ["lead"]


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
