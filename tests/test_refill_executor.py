"""The refill executor answers as dense execution with post-hoc gating, whatever the chunks and however batches come."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from captured_checks import agrees, check, program_of_several_tensors, random_program
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import NETWORKS
from programs import all_margins, in_band, make_program, program_with, random_gates, thresholds_for
from stream_checks import joined, refilling, within
from torch import nn

import dgate_rt as dg
from dgate_rt import StagedModel, ops, reference
from dgate_rt.executors import arena

INF, NAN = math.inf, math.nan


@pytest.fixture
def turns(monkeypatch):
    """The stage and the number of rows of every run of a stage."""
    taken, run_stage = [], StagedModel.run_stage

    def noted(self, index, boundary):
        taken.append((index, len(boundary if isinstance(boundary, torch.Tensor) else boundary[0])))
        return run_stage(self, index, boundary)

    monkeypatch.setattr(StagedModel, "run_stage", noted)
    return taken


@pytest.fixture
def copies(monkeypatch):
    """How often an arena was asked for room to copy to."""
    asked, room = [], arena.Arena.room
    monkeypatch.setattr(arena.Arena, "room", lambda self, like, n: (asked.append(n), room(self, like, n))[1])
    return asked


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0], ids=["none", "mixed", "all"])
@pytest.mark.parametrize("count", [0, 1, 31, 64, 129], ids="N={}".format)
@pytest.mark.parametrize("chunks", ["auto", (4, 16, 3, 64)], ids=["auto", "4-16-3-64"])
def test_it_agrees_with_dense_and_post_hoc_gating(
    tiny_staged, tiny_gates, images, count, share, dtype, channels_last, chunks
):
    staged, x = tiny_staged.to(dtype), images.to(dtype)
    program = program_with(staged, tiny_gates, x, share)
    out = refilling(program, chunks, channels_last=channels_last)(x[:count])
    assert (out.labels.dtype, out.scores.dtype, out.exits.dtype) == (torch.int64, torch.float32, torch.int64)
    assert len(out) == count
    if count and dtype is torch.float32:
        agrees(out, program.thresholds, program, x[:count])
    elif count:
        with torch.inference_mode():
            _, _, exits = reference.predict(staged, tiny_gates, program.thresholds, x[:count])
            band = in_band(all_margins(staged, tiny_gates, x[:count]), program.thresholds, dtype)
        assert ((out.exits == exits) | band).all()


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet18 inside a residual branch", "densenet121", "vit_b_16"], ids=lambda n: n.split()[-1]
)
@pytest.mark.parametrize("chunks", [(2, 8, 4, 16), (8, 8, 3, 3)], ids=str)
def test_networks(name, chunks):
    network = NETWORKS[name]
    x = network.images(21)
    staged = dg.split(network.make(), list(network.cuts), example=x[:2])
    gates = random_gates(staged, x, classes=10)
    for share in (0.0, 0.4, 1.0):
        program = program_with(staged, gates, x, share)
        run = refilling(program, chunks, channels_last=None)
        check(run, program, x)
        check(run, program, x[:1])
        outs = list(run.stream(x.split([5, 0, 9, 7])))
        agrees(joined(outs), program.thresholds, program, x)


@settings(deadline=None, max_examples=250)
@given(
    seed=st.integers(0, 2**31),
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    batch=st.integers(1, 40),
    sizes=st.lists(st.integers(0, 50), max_size=8),
    share=st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]),
    off=st.sets(st.integers(0, 4)),
    chunks=st.lists(st.integers(1, 50), min_size=6, max_size=6),
    in_order=st.booleans(),
    max_wait=st.none() | st.integers(0, 8),
)
def test_it_agrees_on_random_programs_chunks_and_streams(
    seed, widths, batch, sizes, share, off, chunks, in_order, max_wait
):
    program, x = random_program(seed, widths, max(1, sum(sizes)), share, off)
    run = refilling(program, chunks[: len(widths) + 1], batch_size=batch)
    batches = x[: sum(sizes)].split(sizes)
    outs = within(run, batches, in_order, max_wait)
    assert [len(out) for out in outs] == sizes
    if sum(sizes):
        agrees(joined(outs), run.thresholds, program, x)
        check(run, program, x)


def test_several_tensors_cross_a_cut():
    program, x = program_of_several_tensors()
    for chunks in ((4, 7), (16, 3), (5, 5)):
        run = refilling(program, chunks)
        assert set(check(run, program, x).exits.tolist()) == {0, 1}
        for part, out in zip(x.split(7), run.stream(x.split(7)), strict=True):
            agrees(out, run.thresholds, program, part)


@pytest.mark.parametrize("chunks", [(4, 6, 4), (8, 3, 20), (5, 5, 5)], ids=str)
def test_what_passes_through_a_stage_and_what_works_in_place_spoil_nobody(chunks):
    class Pass(nn.Module):
        def forward(self, x, kept):
            return x, kept  # the very memory of the arena before

    class Begin(nn.Module):
        def forward(self, x):
            return x * 2, x  # the caller's own batch goes on

    class End(nn.Module):
        def forward(self, x, kept):
            return x.relu_() + kept.sub_(1)

    x = torch.randn(60, 6)
    staged = StagedModel([Begin(), Pass(), End()]).eval()
    gates = random_gates(staged, x.clone(), classes=6)
    with torch.inference_mode():
        margins = all_margins(staged, gates, x.clone())
    for share in (0.0, 0.3):
        thresholds = thresholds_for(margins, share)
        program = make_program(staged, gates, thresholds, x.clone())
        expected = reference.predict(staged, gates, thresholds, x.clone())
        run = refilling(program, chunks)
        for _ in range(2):
            out = joined(list(run.stream(part.clone() for part in x.split(7))))
            for got, wanted in zip((out.labels, out.scores, out.exits), expected, strict=True):
                torch.testing.assert_close(got, wanted)
            torch.testing.assert_close(run(x.clone()).scores, expected[1])


def test_a_batch_may_be_changed_once_the_next_is_asked_for(program, images):
    buffer = torch.empty(7, 3, 16, 16)

    def batches():
        for part in images[:126].split(7):
            yield buffer.copy_(part)

    out = joined(list(refilling(program, (4, 16, 3, 64)).stream(batches())))
    agrees(out, program.thresholds, program, images[:126])


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
def test_a_broken_image_runs_to_the_end_and_harms_nobody(program, images, value):
    run = refilling(program, (4, 16, 3, 64))
    broken = images.clone()
    broken[5] = value
    clean, out = run(images), run(broken)
    rest = torch.arange(len(images)) != 5
    assert out.exits[5] == 3
    assert torch.equal(out.exits[rest], clean.exits[rest])
    assert torch.equal(out.labels[rest], clean.labels[rest])
    torch.testing.assert_close(out.scores[rest], clean.scores[rest])


def test_distances_stand_behind_each_answer(program, images):
    run = refilling(program, (4, 16, 3, 64), scores=True)
    for out in (run(images), *run.stream(images.split(10))):
        assert torch.equal(out.distances.amax(1), out.scores)
        assert torch.equal(out.distances.argmax(1), out.labels)


def test_every_stage_runs_at_its_chunk_and_the_deepest_that_can_goes_first(tiny_staged, tiny_gates, images, turns):
    program = program_with(tiny_staged, tiny_gates, images, 0.0)
    run = refilling(program, (4, 8, 3, 64))
    turns.clear()
    run(images[:12])
    assert turns == [(0, 4), (0, 4), (1, 8), (2, 3), (2, 3), (0, 4), (1, 4), (2, 3), (2, 3), (3, 12)]


def test_batches_of_a_stream_share_chunks(program, images, turns):
    run = refilling(program, (16, 8, 8, 8))
    turns.clear()
    list(run.stream(images[:128].split(4)))
    assert [rows for stage, rows in turns if stage == 0] == [16] * 8
    deeper = [rows for stage, rows in turns if stage]
    assert sum(rows < 8 for rows in deeper) <= 3  # what is left in the end


def test_what_is_due_runs_with_all_that_waits_beside_it(tiny_staged, tiny_gates, images, turns):
    run = refilling(program_with(tiny_staged, tiny_gates, images, 0.0), (2, 4, 8, 8))
    turns.clear()
    outs = run.stream(images[:12].split(1), max_wait=6)
    next(outs)  # when the seventh batch was taken; four wait before stage 2, two before stage 1, one before stage 0
    assert turns == [(0, 2), (0, 2), (1, 4), (0, 2), (2, 4), (3, 4)]
    assert len(list(outs)) == 11
    assert turns[6:] == [(0, 2), (1, 4), (0, 2), (2, 4), (3, 4), (0, 2), (1, 4), (2, 4), (3, 4)]


def test_with_a_bound_of_none_ahead_a_batch_is_run_as_by_a_call(tiny_staged, tiny_gates, images, turns, copies):
    run = refilling(program_with(tiny_staged, tiny_gates, images, 0.0), (4, 16, 4, 64))
    turns.clear()
    list(run.stream(images[:8].split(4), max_wait=0))
    assert turns == [(stage, 4) for stage in range(4)] * 2
    assert copies == []


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["none", "all"])
def test_one_sample_is_not_copied(tiny_staged, tiny_gates, images, copies, share):
    run = refilling(program_with(tiny_staged, tiny_gates, images, share), (4, 16, 3, 64))
    run(images[:1])
    assert len(copies) == (0 if share == 0.0 else 1)


def test_where_nobody_leaves_equal_chunks_and_divisors_are_passed_on_as_they_are(
    tiny_staged, tiny_gates, images, copies
):
    program = program_with(tiny_staged, tiny_gates, images, 0.0)
    refilling(program, (16, 16, 8, 4))(images[:64])
    refilling(program, (64, 64, 64, 64))(images[:50])
    assert copies == []
    refilling(program, (16, 16, 32, 4))(images[:64])
    assert copies == [16] * 4


def test_a_gate_that_is_off_costs_nothing(tiny_staged, tiny_gates, images, monkeypatch, copies, turns):
    scored, score = [], ops.gate_score
    monkeypatch.setattr(
        ops, "gate_score", lambda f, *rest, **more: (scored.append(f.shape[1]), score(f, *rest, **more))[1]
    )
    run = refilling(make_program(tiny_staged, tiny_gates, (INF, 1000.0, INF), images), (4, 4, 16, 8))
    turns.clear()
    run(images[:32])
    assert set(scored) == {16}
    assert copies == [4] * 8  # before the one stage that waits for more
    assert turns[:2] == [(0, 4), (1, 4)]
    assert len(run._executor._free[0].steps) == 3
    run.set_thresholds([INF] * 3)
    scored.clear()
    check(run, make_program(tiny_staged, tiny_gates, (INF,) * 3, images), images)
    assert scored == []


def test_a_network_without_gates_is_run_in_chunks(turns):
    staged, x = StagedModel([nn.Linear(4, 3)]).eval(), torch.randn(10, 4)
    run = refilling(make_program(staged, nn.ModuleList(), (), x), [3], scores=True)
    expected = staged(x).detach()
    turns.clear()
    torch.testing.assert_close(run(x).distances, expected)
    assert turns == [(0, 3), (0, 3), (0, 3), (0, 1)]
    torch.testing.assert_close(torch.cat([out.distances for out in run.stream(x.split(4))]), expected)


def test_thresholds_hold_from_the_next_batch_and_not_for_those_under_way(tiny_staged, tiny_gates, images):
    run = refilling(make_program(tiny_staged, tiny_gates, (1e6,) * 3, images), (4, 16, 3, 64), batch_size=16)
    outs = run.stream(images[:112].split(16))
    exits = [next(outs).exits]  # that took five batches: 64 samples wait before the last stage
    run.set_thresholds([1e6, INF, -1e6])
    exits += [out.exits for out in outs]
    assert [e.unique().tolist() for e in exits] == [[3]] * 5 + [[2]] * 2


def test_a_batch_comes_as_soon_as_it_is_answered_where_no_order_is_asked_for(tiny_staged, tiny_gates, images):
    margins = all_margins(tiny_staged, tiny_gates, images)[0]
    order = margins.argsort()
    stay, leave = images[order[:8]], images[order[-8:]]
    program = make_program(tiny_staged, tiny_gates, (float(margins.median()), INF, INF), images)
    run = refilling(program, (4, 64, 64, 64))
    batches = [stay[:4], leave[:4], stay[4:], leave[4:]]
    assert [index for index, _ in run.stream(batches, in_order=False)] == [1, 3, 0, 2]
    for x, out in zip(batches, run.stream(batches), strict=True):
        agrees(out, program.thresholds, program, x)


def test_several_threads_may_share_a_runtime(program, images):
    run = refilling(program, (4, 16, 3, 64))
    parts = images.repeat(4, 1, 1, 1).split(43)
    expected = [run(part) for part in parts]
    with ThreadPoolExecutor(4) as pool:
        for got, wanted in zip(pool.map(run, parts), expected, strict=True):
            assert torch.equal(got.exits, wanted.exits)
            assert torch.equal(got.scores, wanted.scores)


def test_batches_of_other_layouts_may_follow(program, images):
    run = refilling(program, (4, 16, 3, 64))
    parts = list(images.split(7))
    parts[1::2] = [part.contiguous(memory_format=torch.channels_last) for part in parts[1::2]]
    for part in parts[:3]:
        check(run, program, part)
    agrees(joined(list(run.stream(parts))), run.thresholds, program, images)


def test_describe_tells_chunks_times_and_memory(program, images):
    run = refilling(program)
    run(images)
    text = run.describe()
    assert "executor refill (asked for)" in text
    assert "ms a sample expected" in text
    assert "arenas hold" in text
    assert "stage 1: chunks of 7, regrouped before\n" in refilling(program, [4, 7, 7, 7]).describe()


@pytest.mark.parametrize("chunks", [[4, 4, 4], [4, 0, 4, 4], [4, 4.0, 4, 4]], ids=str)
def test_chunks_that_do_not_fit_are_refused(program, chunks):
    with pytest.raises(ValueError, match="chunks: expected 'auto' or 4 whole numbers above 0, one a stage, got"):
        refilling(program, chunks)


def test_it_does_not_run_on_a_simulated_gpu(program):
    with pytest.raises(dg.ExecutorError, match="executor: refill runs on cpu, not on cpu-sim"):
        refilling(program, device="cpu-sim")
