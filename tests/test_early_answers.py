"""Early answers: what left at a gate is visible on the host while deeper stages still run."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from captured_checks import agrees, random_program
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import all_margins, make_program, thresholds_for
from torch import nn

import dgate_rt as dg
from dgate_rt import StagedModel, ops
from dgate_rt.executors.early import UNANSWERED

simulated = pytest.mark.skipif(not ops.extension_loaded(), reason="the C++ extension is not built")
WAYS = [pytest.param("eager", "cpu", id="eager"), pytest.param("graph", "cpu-sim", id="graph", marks=simulated)]


class Watched(nn.Module):
    """A stage that calls `then` before it runs."""

    def __init__(self, stage):
        super().__init__()
        self.stage, self.then = stage, lambda: None

    def forward(self, x):
        self.then()
        return self.stage(x)


@pytest.fixture
def program(tiny_staged, tiny_gates, tiny_images):
    thresholds = thresholds_for(all_margins(tiny_staged, tiny_gates, tiny_images), 0.4)
    watched = StagedModel([*list(tiny_staged.stages)[:3], Watched(tiny_staged.stages[3])]).eval()
    return make_program(watched, tiny_gates, thresholds, tiny_images)


def start(program, executor, device, **options):
    options = {"batch_size": 64, "channels_last": False, "early_answers": True, **options}
    return dg.compile(program, executor=executor, device=device, **options)


@pytest.mark.parametrize(("executor", "device"), WAYS)
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0], ids=["none", "mixed", "all"])
@pytest.mark.parametrize("count", [0, 1, 31], ids="N={}".format)
def test_a_ticket_ends_with_the_answers_of_a_call(program, tiny_images, executor, device, share, count):
    run, x = start(program, executor, device), tiny_images[:count]
    run.set_thresholds(thresholds_for(all_margins(program.staged, program.gates, tiny_images), share))
    ticket = run.submit(x)
    out = ticket.result()
    assert ticket.done()
    assert ticket.ready().all()
    if count == 0:
        assert len(out) == 0
        return
    agrees(out, run.thresholds, program, x)
    called = run(x)
    assert torch.equal(out.exits, called.exits)
    assert torch.equal(out.labels, called.labels)
    assert ticket.result() is out  # and it is the ticket's own, whatever ran since


@pytest.mark.parametrize("scores", [False, True], ids=["plain", "scores"])
def test_eager_shows_who_left_while_the_last_stage_runs(program, tiny_images, scores):
    run = start(program, "eager", "cpu", scores=scores)
    expected = run(tiny_images)
    reached, go_on = threading.Event(), threading.Event()
    run._model.staged.stages[3].then = lambda: (reached.set(), go_on.wait(60))
    ticket = run.submit(tiny_images)
    assert reached.wait(60)
    ready, early = ticket.ready(), ticket.answers
    assert not ticket.done()
    assert torch.equal(ready, expected.exits < 3)
    assert 0 < ready.sum() < len(ready)
    for field in ("labels", "scores", "exits", *(["distances"] if scores else [])):
        assert torch.equal(getattr(early, field)[ready], getattr(expected, field)[ready])
    go_on.set()
    assert torch.equal(ticket.result().labels, expected.labels)


@simulated
def test_a_graph_shows_who_left_while_the_last_stage_runs(program, tiny_images):
    run = start(program, "graph", "cpu-sim", scores=True)
    expected = run(tiny_images)
    seen, stages = [], run._executor.stages
    run._model.staged.stages[3].then = lambda: seen.append(stages.host.clone())
    ticket = run.submit(tiny_images)
    assert ticket.done()  # the simulated driver has run everything by the time a launch returns
    (host,) = seen
    ready = host.exits[: len(tiny_images)] != UNANSWERED
    assert torch.equal(ready, expected.exits < 3)
    for field in ("labels", "scores", "exits", "distances"):
        assert torch.equal(getattr(host, field)[: len(ready)][ready], getattr(expected, field)[ready])
    assert torch.equal(ticket.result().labels, expected.labels)


@pytest.mark.parametrize(("executor", "device"), WAYS)
def test_tickets_keep_their_answers_and_thresholds_while_others_run(program, tiny_images, executor, device):
    run = start(program, executor, device)
    points = [run.thresholds, (1e6,) * 3, (-1e6,) * 3, (math.inf, *run.thresholds[1:])]
    batches, tickets = [tiny_images, tiny_images[:7], tiny_images[5:], tiny_images], []
    for point, x in zip(points, batches, strict=True):
        run.set_thresholds(point)
        tickets.append(run.submit(x))
    for ticket, point, x in zip(tickets, points, batches, strict=True):
        agrees(ticket.result(), point, program, x)


@pytest.mark.parametrize(("executor", "device"), WAYS)
@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**31),
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    batch=st.integers(1, 40),
    share=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    off=st.sets(st.integers(0, 3)),
)
def test_random_programs_agree(executor, device, seed, widths, batch, share, off):
    program, x = random_program(seed, widths, batch, share, off)
    agrees(start(program, executor, device).submit(x).result(), program.thresholds, program, x, most=1)


def test_what_a_stage_raises_comes_with_the_result(program, tiny_images):
    def fail():
        raise RuntimeError("no such luck")

    run = start(program, "eager", "cpu")
    run._model.staged.stages[3].then = fail
    ticket = run.submit(tiny_images)
    with pytest.raises(RuntimeError, match="no such luck"):
        ticket.result()
    assert ticket.done()
    assert 0 < ticket.ready().sum() < len(tiny_images)
    run._model.staged.stages[3].then = lambda: None
    assert run.submit(tiny_images).result().exits.max() == 3


@simulated
def test_a_ticket_keeps_its_answers_while_a_graph_of_other_gates_is_described(program, tiny_images):
    run = start(program, "graph", "cpu-sim")
    expected, ticket = run(tiny_images), run.submit(tiny_images)
    run.set_thresholds([math.inf] * 3)
    assert [node["name"] for node in run.describe("json")["nodes"]] == ["stages 0 to 3"]
    assert torch.equal(ticket.result().exits, expected.exits)


def test_what_it_cannot_do_is_refused(program, tiny_images):
    with pytest.raises(dg.ExecutorError, match="submit: compile the program with early_answers=True"):
        dg.compile(program).submit(tiny_images)
    with pytest.raises(dg.ExecutorError, match="early_answers: expected the executor eager on cpu, or graph"):
        dg.compile(program, executor="dense", early_answers=True)
    run = start(program, "eager", "cpu", batch_size=8)
    with pytest.raises(ValueError, match="x: expected at most batch_size=8 samples to submit, got 31"):
        run.submit(tiny_images)
    with pytest.raises(TypeError, match=r"x: expected torch\.float32"):
        run.submit(tiny_images.double())
