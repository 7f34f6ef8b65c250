"""The graph executor on the simulated driver: it answers as dense execution with post-hoc gating, in one launch."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
from captured_checks import check, program_of_several_tensors, random_program, simulate
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import all_margins, make_program, thresholds_for
from torch import nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException

import dgate_rt as dg
from dgate_rt import StagedModel, ops
from dgate_rt.executors.captured import Segment, segments
from dgate_rt.executors.captures import SimulatedCaptures
from dgate_rt.graphs import SimulatedCapture, driver_counts, reset_simulation

pytestmark = pytest.mark.skipif(not ops.extension_loaded(), reason="the C++ extension is not built")

INF = math.inf
ARENA = ("ids", "count", "sizes", "bucket")


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0], ids=["none", "mixed", "all"])
@pytest.mark.parametrize("count", [0, 1, 31, 64, 129], ids="N={}".format)
@pytest.mark.parametrize("buckets", ["auto", [1, 7, 32]], ids=["auto", "given"])
def test_it_agrees_with_dense_and_post_hoc_gating(tiny_staged, tiny_gates, count, share, buckets):
    x = torch.randn(129, 3, 16, 16) * torch.linspace(0.2, 2.0, 129)[:, None, None, None]
    thresholds = thresholds_for(all_margins(tiny_staged, tiny_gates, x), share)
    program = make_program(tiny_staged, tiny_gates, thresholds, x)
    run = simulate(program, buckets=buckets)
    if count == 0:
        assert len(run(x[:0])) == 0
        return
    out = check(run, program, x[:count])
    assert share != 1.0 or out.exits.eq(0).all()
    assert share != 0.0 or out.exits.eq(3).all()


@settings(deadline=None, max_examples=300)
@given(
    seed=st.integers(0, 2**31),
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    batch=st.integers(1, 40),
    share=st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]),
    off=st.sets(st.integers(0, 4)),
    buckets=st.just("auto") | st.lists(st.integers(1, 50), max_size=4),
)
def test_it_agrees_on_random_programs(seed, widths, batch, share, off, buckets):
    program, x = random_program(seed, widths, batch, share, off)
    check(simulate(program, batch_size=batch, buckets=buckets), program, x, most=1)


def test_several_tensors_cross_a_cut():
    program, x = program_of_several_tensors()
    out = check(simulate(program), program, x)
    assert set(out.exits.tolist()) == {0, 1}


def test_one_launch_a_batch_no_synchronisation_and_only_stages_that_are_reached(tiny_staged, tiny_gates, tiny_images):
    margins = all_margins(tiny_staged, tiny_gates, tiny_images)
    run = simulate(make_program(tiny_staged, tiny_gates, thresholds_for(margins, 0.4), tiny_images))
    run(tiny_images)
    for thresholds, stages in ((thresholds_for(margins, 0.4), 4), (thresholds_for(margins, 1.0), 1)):
        run.set_thresholds(thresholds)
        reset_simulation()
        run(tiny_images)
        counts = driver_counts()
        assert (counts.launches, counts.host_calls, counts.stages) == (1, 1, stages)
        assert counts.synchronisations == counts.allocations == 0


def test_moving_thresholds_captures_nothing_but_switching_a_gate_does(tiny_staged, tiny_gates, tiny_images):
    margins = all_margins(tiny_staged, tiny_gates, tiny_images)
    program = make_program(tiny_staged, tiny_gates, thresholds_for(margins, 0.4), tiny_images)
    run = simulate(program)
    graph = run._executor.graph
    run.set_thresholds(thresholds_for(margins, 0.7))
    check(run, program, tiny_images)
    assert run._executor.graph is graph
    run.set_thresholds([INF, *thresholds_for(margins, 0.4)[1:]])
    check(run, program, tiny_images)
    assert run._executor.graph is not graph


def test_a_gate_that_is_off_is_not_in_the_graph(tiny_staged, tiny_gates, tiny_images, monkeypatch):
    run = simulate(make_program(tiny_staged, tiny_gates, (INF, 1000.0, INF), tiny_images))
    widths, score = [], ops.gate_score
    monkeypatch.setattr(
        ops,
        "gate_score",
        lambda features, *rest, **more: (widths.append(features.shape[1]), score(features, *rest, **more))[1],
    )
    run(tiny_images)
    assert widths == [16]
    assert segments((False, True, False)) == [Segment(range(2), 1), Segment(range(2, 4), None)]


def test_scores_are_the_distances_behind_each_answer(tiny_staged, tiny_gates, tiny_images):
    margins = all_margins(tiny_staged, tiny_gates, tiny_images)
    program = make_program(tiny_staged, tiny_gates, thresholds_for(margins, 0.4), tiny_images)
    got = simulate(program, scores=True)(tiny_images)
    expected = dg.compile(program, scores=True, channels_last=False)(tiny_images)
    torch.testing.assert_close(got.distances, expected.distances, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [math.nan, INF, -INF], ids=str)
def test_a_broken_image_runs_to_the_end_and_harms_nobody(tiny_staged, tiny_gates, tiny_images, value):
    margins = all_margins(tiny_staged, tiny_gates, tiny_images)
    program = make_program(tiny_staged, tiny_gates, thresholds_for(margins, 0.4), tiny_images)
    run = simulate(program)
    clean, broken = run(tiny_images), tiny_images.clone()
    broken[4] = value
    out = run(broken)
    rest = torch.arange(len(tiny_images)) != 4
    assert out.exits[4] == 3
    assert torch.equal(out.labels[rest], clean.labels[rest])
    assert torch.equal(out.exits[rest], clean.exits[rest])


def test_a_batch_may_be_written_where_the_graph_reads_it(tiny_staged, tiny_gates, tiny_images):
    margins = all_margins(tiny_staged, tiny_gates, tiny_images)
    run = simulate(make_program(tiny_staged, tiny_gates, thresholds_for(margins, 0.4), tiny_images))
    expected = run(tiny_images)
    run.input.zero_()
    rows = run.input[: len(tiny_images)]
    rows.copy_(tiny_images)
    got = run(rows)
    assert torch.equal(got.scores, expected.scores)
    assert torch.equal(got.exits, expected.exits)


def test_two_runtimes_do_not_share_anything(tiny_staged, tiny_gates, tiny_images):
    margins = all_margins(tiny_staged, tiny_gates, tiny_images)
    program = make_program(tiny_staged, tiny_gates, thresholds_for(margins, 0.4), tiny_images)
    one, two = simulate(program), simulate(program, batch_size=31)
    two.set_thresholds(thresholds_for(margins, 0.0))
    first = one(tiny_images)
    assert two(tiny_images).exits.eq(3).all()
    again = one(tiny_images)
    assert torch.equal(first.exits, again.exits)
    assert torch.equal(first.scores, again.scores)


def test_describe_tells_buckets_and_their_waste(tiny_staged, tiny_gates, tiny_images):
    run = simulate(make_program(tiny_staged, tiny_gates, (0.1,) * 3, tiny_images), buckets=[8, 32])
    assert "executor graph (what is simulated) on cpu-sim" in run.describe()
    assert "stage 1: buckets 8, 32, 64; padding is expected to add " in run.describe()


def test_describe_gives_the_graph_of_the_gates_that_are_on(tiny_staged, tiny_gates, tiny_images):
    run = simulate(make_program(tiny_staged, tiny_gates, (0.1,) * 3, tiny_images), buckets=[8])
    for thresholds, names in (
        ((0.1,) * 3, ["stage 0", "stage 1", "stage 2", "stage 3"]),
        ((INF, 0.1, INF), ["stages 0 to 1", "stages 2 to 3"]),
        ((INF,) * 3, ["stages 0 to 3"]),
        ((0.1, INF, 0.1), ["stage 0", "stages 1 to 2", "stage 3"]),
    ):
        run.set_thresholds(thresholds)
        told = run.describe("json")
        assert [node["name"] for node in told["nodes"]] == names
        bodies = [[body["bucket"] for body in node["bodies"]] for node in told["nodes"][1:]]
        assert bodies == [[8, 64]] * (len(names) - 1)
        assert all(f"{name}: buckets 8, 64; " in run.describe() for name in names[1:])
    assert 'label="stages 1 to 2, bucket 64' in run.describe("dot")
    with pytest.raises(ValueError, match="format: expected 'text', 'json' or 'dot', got 'svg'"):
        run.describe("svg")


@pytest.mark.parametrize("executor", ["dense", "eager", "lag"])
@pytest.mark.parametrize("format", ["json", "dot"])
def test_other_executors_assemble_no_graph(tiny_staged, tiny_gates, tiny_images, executor, format):
    program = make_program(tiny_staged, tiny_gates, (0.1,) * 3, tiny_images)
    run = dg.compile(program, executor=executor, device="cpu-sim" if executor == "lag" else "cpu")
    message = f"'{format}' asks for a graph; only the executor 'graph' assembles one, not '{executor}'"
    with pytest.raises(dg.ExecutorError, match=message):
        run.describe(format)


def test_a_capture_is_called_alike_wherever_it_is_named(tiny_staged, tiny_gates, tiny_images, monkeypatch):
    asked = []

    def capture(self, function, what):
        asked.append(what)
        return SimulatedCapture(function)

    monkeypatch.setattr(SimulatedCaptures, "__call__", capture)
    run = simulate(make_program(tiny_staged, tiny_gates, (0.1, INF, 0.1), tiny_images), buckets=[8])
    first, *later = run.describe("json")["nodes"]
    entries = {f"{first['name']}, bucket {size}" for size in (8, 64)}
    assert set(asked) == {*entries, *(body["name"] for node in later for body in node["bodies"])}
    assert "stages 1 to 2, bucket 8" in asked


def test_what_it_cannot_do_is_refused(tiny_staged, tiny_gates, tiny_images):
    program = make_program(tiny_staged, tiny_gates, (0.1,) * 3, tiny_images)
    with pytest.raises(dg.ExecutorError, match="executor: graph runs on cuda and cpu-sim, not on cpu"):
        dg.compile(program, executor="graph")
    with pytest.raises(dg.ExecutorError, match="executor: eager runs on cpu and cuda, not on cpu-sim"):
        simulate(program, executor="eager")
    for wrong in ([0], "all", [2.5]):
        with pytest.raises(ValueError, match="buckets: expected 'auto' or whole numbers of at least 1"):
            simulate(program, buckets=wrong)


def test_a_stage_that_fails_says_why(tiny_staged, tiny_gates, tiny_images):
    class Fails(nn.Module):
        def forward(self, x):
            if self.armed:
                raise RuntimeError("no such luck")
            return x

    fails = Fails()
    fails.armed = False
    staged = StagedModel([*list(tiny_staged.stages)[:3], nn.Sequential(fails, tiny_staged.stages[3])]).eval()
    run = simulate(make_program(staged, tiny_gates, (1e6,) * 3, tiny_images))
    run._model.staged.stages[3][0].armed = True
    with pytest.raises(RuntimeError, match="no such luck"):
        run(tiny_images)


@pytest.mark.parametrize("reads", [False, True], ids=["as it is", "with a deliberate read"])
def test_nothing_on_the_way_reads_the_device(tiny_staged, tiny_gates, tiny_images, reads):
    """The very functions that are captured, on fake tensors that claim to lie on CUDA: a read of their data raises."""
    program = make_program(tiny_staged, tiny_gates, (0.1,) * 3, tiny_images)
    executor = simulate(program)._executor.stages
    mode = FakeTensorMode()
    twin = fake_on_cuda(executor, mode)
    places = twin._places
    if reads:
        twin._places = lambda arena, size: places(arena, int(arena.count.item()))
    with mode, torch.no_grad():
        for index in range(3):
            twin.run_segment(index, 64 if index == 0 else 8)
        if reads:
            with pytest.raises(DataDependentOutputException):
                twin.run_segment(3, 8)
        else:
            twin.run_segment(3, 8)


def fake_on_cuda(executor, mode):
    """The executor with every tensor that it holds made fake, on CUDA."""

    def fake(t):
        with mode:
            return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")

    twin, answers = copy.copy(executor), executor.answers
    for name in ("input", "_live", "status", "_positions", "handles"):
        setattr(twin, name, fake(getattr(executor, name)))
    twin.handles_of = {entry: fake(handles) for entry, handles in executor.handles_of.items()}
    twin.answers = type(answers)(fake(answers.labels), fake(answers.scores), fake(answers.exits))
    twin.arenas = [
        replace(a, rows=tuple(map(fake, a.rows)), **{name: fake(getattr(a, name)) for name in ARENA})
        for a in executor.arenas
    ]
    twin.model = copy.copy(executor.model)
    twin.model.thresholds = fake(executor.model.thresholds)
    twin.model.staged = copy.deepcopy(executor.model.staged)
    twin.model.gates = copy.deepcopy(executor.model.gates)
    for module in itertools.chain(twin.model.staged.modules(), *(gate.modules() for gate in twin.model.gates)):
        for name, parameter in module._parameters.items():
            module._parameters[name] = None if parameter is None else nn.Parameter(fake(parameter), requires_grad=False)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else fake(buffer)
    return twin
