"""What holds of streams whatever the executor: answers, order, how long a batch waits, errors, what stays behind."""

from __future__ import annotations

import itertools
import math
from contextlib import nullcontext

import pytest
import torch
from captured_checks import agrees, check
from programs import make_program
from stream_checks import Late, within
from torch import nn

import dgate_rt as dg
from dgate_rt import StagedModel, ops

INF = math.inf
CHUNKS = (4, 16, 3, 64)


@pytest.fixture(params=["eager", "refill", "lag", "graph"])
def streaming(request):
    """What compiles a program for one executor; counts of `lag` arrive only when they are waited for."""
    executor, device = request.param, "cpu-sim" if request.param in ("lag", "graph") else "cpu"
    if device == "cpu-sim" and not ops.extension_loaded():
        pytest.skip("the C++ extension is not built")

    def compiled(program, **options):
        chunks = CHUNKS[: len(program.staged.stages)]
        given = {"batch_size": 16, "device": device, "channels_last": False, "chunks": chunks, **options}
        return dg.compile(program, executor=executor, **given)

    with Late(INF).installed() if executor == "lag" else nullcontext():
        yield compiled


def only(*executors):
    return pytest.mark.parametrize("streaming", executors, indirect=True)


@pytest.mark.parametrize("max_wait", [None, 0, 2], ids="max_wait={}".format)
@pytest.mark.parametrize("scores", [False, True], ids=["", "scores"])
def test_a_stream_answers_each_batch_as_a_call_does(streaming, program, images, scores, max_wait):
    run = streaming(program, scores=scores)
    assert list(run.stream([], max_wait=max_wait)) == []
    sizes = [5, 0, 0, 16, 17, 70, 0, 21, 0]
    for x, out in zip(images.split(sizes), run.stream(images.split(sizes), max_wait=max_wait), strict=True):
        whole = run(x)  # while others are under way
        assert torch.equal(out.labels, whole.labels)
        assert torch.equal(out.exits, whole.exits)
        torch.testing.assert_close(out.scores, whole.scores)
        if scores:
            torch.testing.assert_close(out.distances, whole.distances)
        out.scores.add_(1)  # ordinary tensors


@only("dense", "eager", "lag", "graph")
def test_batches_that_share_no_chunk_finish_in_order(streaming, program, images):
    outs = streaming(program).stream(images.split(50), in_order=False)
    assert [(index, len(out)) for index, out in outs] == [(0, 50), (1, 50), (2, 29)]


@pytest.mark.parametrize("in_order", [True, False], ids=["in order", "as finished"])
@pytest.mark.parametrize("max_wait", [0, 1, 3, 100], ids="max_wait={}".format)
@pytest.mark.parametrize("size", [1, 7, 40], ids="B={}".format)
def test_no_batch_is_answered_later_than_the_bound_says(streaming, program, images, size, max_wait, in_order):
    run, batches = streaming(program), images.split(size)
    for x, out in zip(batches, within(run, batches, in_order, max_wait), strict=True):
        agrees(out, program.thresholds, program, x)


@only("refill")
def test_empty_batches_count_and_let_others_be_answered(streaming, program, images):
    taken = []

    def batches():
        for x in (images[:3], images[:0], images[:0], images[3:4]):
            taken.append(x)
            yield x

    outs = streaming(program).stream(batches(), max_wait=2)
    assert len(next(outs)) == 3
    assert len(taken) == 3
    assert [len(out) for out in outs] == [0, 0, 1]


@only("eager", "refill")
@pytest.mark.parametrize(
    ("max_wait", "error", "message"),
    [
        (-1, ValueError, "max_wait: expected at least 0, got -1"),
        (1.5, TypeError, "max_wait: expected a whole number or None, got float"),
    ],
)
def test_a_bound_that_is_none_is_refused_at_once(streaming, program, max_wait, error, message):
    with pytest.raises(error, match=message):
        streaming(program).stream([], max_wait=max_wait)


@pytest.mark.parametrize("wrong", ["raises", "shape", "type"])
def test_when_a_batch_is_wrong_those_before_are_answered_first(streaming, program, images, wrong):
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
    run = streaming(program)
    outs, answered = run.stream(batches()), []
    with pytest.raises(error, match=message):
        answered.extend(outs)
    assert list(map(len, answered)) == [10, 20]
    assert list(outs) == []
    check(run, program, images[:10])


def test_inference_mode_does_not_leak_out_of_a_stream(streaming, program, images):
    def batches():
        for x in images[:48].split(6):
            assert not torch.is_inference_mode_enabled()
            assert torch.is_grad_enabled()
            yield x.clone().requires_grad_()

    for out in streaming(program).stream(batches()):
        assert not torch.is_inference_mode_enabled()
        assert not out.scores.requires_grad
        assert not out.scores.is_inference()


def test_thresholds_may_be_moved_by_the_source_of_the_batches(streaming, tiny_staged, tiny_gates, images):
    run = streaming(make_program(tiny_staged, tiny_gates, (1e6,) * 3, images))

    def batches():
        for gate, x in enumerate(images[:48].split(16)):
            run.set_thresholds([-1e6 if g == gate else INF for g in range(3)])
            yield x

    assert [out.exits.unique().tolist() for out in run.stream(batches())] == [[0], [1], [2]]


def test_a_network_without_gates_streams(streaming):
    staged, x = StagedModel([nn.Linear(4, 3)]).eval(), torch.randn(10, 4)
    run = streaming(make_program(staged, nn.ModuleList(), (), x), batch_size=3, scores=True)
    out = torch.cat([out.distances for out in run.stream(x.split(4))])
    torch.testing.assert_close(out, staged(x).detach())


def test_calls_and_streams_side_by_side_do_not_mix(streaming, program, images):
    run = streaming(program)
    one, two = run.stream(images.split(16)), run.stream(images.flip(0).split(16), max_wait=1)
    for x, out, y, other in zip(images.split(16), one, images.flip(0).split(16), two, strict=True):
        agrees(out, run.thresholds, program, x)
        agrees(other, run.thresholds, program, y)
        check(run, program, x)


@only("refill", "lag")
@pytest.mark.parametrize("in_order", [True, False], ids=["in order", "as finished"])
@pytest.mark.parametrize("closed", ["closed", "dropped"])
def test_a_stream_that_is_closed_early_leaves_nothing_under_way(streaming, program, images, closed, in_order):
    run = streaming(program)
    run(images[:1])
    free = len(run._executor._free)
    outs = run.stream(itertools.cycle([images[:16], images[16:32]]), in_order=in_order)
    next(outs)
    assert len(run._executor._free) == free - 1
    if closed == "closed":
        outs.close()
    del outs
    assert len(run._executor._free) == free
    check(run, program, images[:40])
    for x, out in zip(images.split(16), run.stream(images.split(16)), strict=True):
        agrees(out, run.thresholds, program, x)


@only("eager", "refill", "lag")
def test_a_stage_that_fails_says_why_and_the_runtime_goes_on(streaming, tiny_staged, tiny_gates, images):
    class Fails(nn.Module):
        armed = False

        def forward(self, x):
            if self.armed:
                raise RuntimeError("no such luck")
            return x

    staged = StagedModel([*list(tiny_staged.stages)[:3], nn.Sequential(Fails(), tiny_staged.stages[3])]).eval()
    program = make_program(staged, tiny_gates, (1e6,) * 3, images)
    run = streaming(program)
    fails = run._model.staged.stages[3][0]
    fails.armed = True
    with pytest.raises(RuntimeError, match="no such luck"):
        run(images[:16])
    with pytest.raises(RuntimeError, match="no such luck"):
        list(run.stream(images.split(16)))
    fails.armed = False
    check(run, program, images[:40])
