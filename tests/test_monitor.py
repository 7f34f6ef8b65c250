"""The monitor of a runtime: every answer counted once, on the device, whoever runs it."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from captured_checks import random_program
from programs import all_margins, make_program, thresholds_for
from safetensors.torch import load_file, save_file
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils.data import DataLoader, TensorDataset

import dgate_rt as dg
from dgate_rt import StagedModel, ops
from dgate_rt.bench.host_work import HostWork
from dgate_rt.drift import Reference
from dgate_rt.monitor import Window

INF, NAN = math.inf, math.nan
simulated = pytest.mark.skipif(not ops.extension_loaded(), reason="the C++ extension is not built")
PLAIN = ["dense", "eager", "refill"]
EXECUTORS = [*PLAIN, *(pytest.param(name, marks=simulated) for name in ("lag", "graph"))]
SUBMITTING = ["eager", pytest.param("graph", marks=simulated)]


@pytest.fixture
def program(tiny_staged, tiny_gates, tiny_images):
    margins = all_margins(tiny_staged, tiny_gates, tiny_images)
    made = make_program(tiny_staged, tiny_gates, thresholds_for(margins, 0.4), tiny_images)
    with torch.no_grad():
        scores = torch.cat([margins, tiny_staged(tiny_images).amax(1)[None]])
    return replace(made, scores=scores)


def start(program, executor, **options):
    device = "cpu-sim" if executor in ("lag", "graph") else "cpu"
    if executor == "refill":
        options["chunks"] = [4, 16, 8, 16]
    options = {"batch_size": 16, "channels_last": False, "monitor": True, **options}
    return dg.compile(program, executor=executor, device=device, **options)


def tally(run, *outs):
    """What answers come to, counted afterwards."""
    return sum(run.monitor.reference.count(out.exits, out.scores) for out in outs)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0], ids=["none", "mixed", "all"])
def test_calls_are_counted_and_judged(program, tiny_images, executor, share):
    run = start(program, executor)
    run.set_thresholds(thresholds_for(program.scores[:3], share))
    outs = [run(tiny_images), run(tiny_images[:1]), run(tiny_images[:0]), run(tiny_images[5:20])]
    counts = run.monitor.counts()
    assert torch.equal(counts, tally(run, *outs))
    report = run.monitor.report()
    assert report.samples == int(counts.sum()) == 47
    assert report.reference_samples == 31
    assert not report.alarm


@pytest.mark.parametrize("executor", EXECUTORS)
def test_the_samples_of_the_reference_are_counted_as_it_counts_them(program, tiny_images, executor):
    run = start(program, executor)
    run(tiny_images)
    report = run.monitor.report()
    assert [e.share for e in report.exits] == [e.expected_share for e in report.exits]
    assert all(abs(e.score_shift) <= 0.1 for e in report.exits)  # but for float error at an edge


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("in_order", [True, False], ids=["in order", "as finished"])
def test_streams_are_counted(program, tiny_images, executor, in_order):
    run = start(program, executor)
    batches = [tiny_images[:3], tiny_images, tiny_images[:0], tiny_images[7:8], tiny_images[2:19]]
    outs = list(run.stream(batches, in_order))
    outs = outs if in_order else [out for _, out in outs]
    assert torch.equal(run.monitor.counts(), tally(run, *outs))
    assert run.monitor.report().samples == 52


@pytest.mark.parametrize("executor", EXECUTORS)
def test_what_a_closed_stream_did_not_answer_is_not_counted(program, tiny_images, executor):
    run = start(program, executor)
    stream = run.stream([tiny_images[:4]] * 9)
    first = next(stream)
    stream.close()
    assert torch.equal(run.monitor.counts(), tally(run, first))


@pytest.mark.parametrize("executor", SUBMITTING)
def test_tickets_are_counted_when_they_are_done(program, tiny_images, executor):
    run = start(program, executor, early_answers=True)
    tickets = [run.submit(tiny_images[start : start + 5]) for start in (0, 5, 10)] + [run.submit(tiny_images[:0])]
    outs = [ticket.result() for ticket in tickets]
    assert torch.equal(run.monitor.counts(), tally(run, *outs))
    assert torch.equal(run.monitor.counts(), tally(run, *outs))  # and once only


def test_a_ticket_whose_batch_failed_is_not_counted(program, tiny_images):
    class Fails(torch.nn.Module):
        def forward(self, x):
            if not x.isfinite().all():
                raise RuntimeError("no")
            return x

    stages = list(program.staged.stages)
    staged = StagedModel([*stages[:3], torch.nn.Sequential(Fails(), stages[3])]).eval()
    run = start(replace(program, staged=staged, thresholds=(INF,) * 3), "eager", early_answers=True)
    good, bad = run.submit(tiny_images[:4]), run.submit(tiny_images[:4] * INF)
    with pytest.raises(RuntimeError, match="no"):
        bad.result()
    assert torch.equal(run.monitor.counts(), tally(run, good.result()))


@pytest.mark.parametrize("executor", EXECUTORS)
def test_other_thresholds_begin_anew_and_are_compared_with_their_own_reference(program, tiny_images, executor):
    run = start(program, executor)
    run(tiny_images)
    run.set_thresholds(run.thresholds)
    assert run.monitor.report().samples == 31  # the same ones do not
    run.set_thresholds((INF, program.thresholds[1], INF))
    assert run.monitor.report().samples == (31 if executor == "dense" else 0)  # which asks no gate
    out = run(tiny_images)
    report = run.monitor.report()
    assert [e.share for e in report.exits] == [e.expected_share for e in report.exits]
    if executor != "dense":
        assert torch.equal(run.monitor.counts(), tally(run, out))
        assert run.monitor.reference.thresholds == run.thresholds


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_batch_of_a_stream_counts_for_the_thresholds_that_it_began_at(program, tiny_images, executor):
    run, outs = start(program, executor), []

    def batches():
        yield from [tiny_images[:9]] * 3
        run.set_thresholds((INF, INF, -100.0))
        yield from [tiny_images[:9]] * 3

    for out in run.stream(batches()):
        outs.append(out)
        if executor != "dense":  # whatever is in the window left at its thresholds
            counts, off = run.monitor.counts().sum(1), run.thresholds[0] == INF
            assert not off or counts[[0, 1, 3]].sum() == 0
    expected = outs if executor == "dense" else outs[3:]
    assert torch.equal(run.monitor.counts(), tally(run, *expected))


@pytest.mark.parametrize("executor", EXECUTORS)
def test_reset_begins_anew(program, tiny_images, executor):
    run = start(program, executor)
    run(tiny_images)
    run.monitor.reset()
    assert run.monitor.report().samples == 0
    out = run(tiny_images[:5])
    assert torch.equal(run.monitor.counts(), tally(run, out))


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
def test_a_broken_sample_is_counted_at_the_end(program, tiny_images, executor, value):
    run, x = start(program, executor), tiny_images.clone()
    x[3] = value
    out = run(x)
    assert torch.equal(run.monitor.counts(), tally(run, out))
    assert run.monitor.counts()[3, -1] == out.scores.isnan().sum() == 1


@pytest.mark.parametrize("executor", ["eager", "refill"])
def test_threads_lose_no_count(program, tiny_images, executor):
    run = start(program, executor)
    with ThreadPoolExecutor(8) as pool:
        outs = list(pool.map(run, [tiny_images[i % 25 :] for i in range(200)]))
    assert torch.equal(run.monitor.counts(), tally(run, *outs))


@pytest.mark.parametrize("executor", EXECUTORS)
def test_drifted_images_raise_an_alarm(program, tiny_images, executor):
    run = start(program, executor)
    for _ in range(20):
        run(tiny_images * 30 + 5)
    assert run.monitor.report().alarm


def test_the_host_reads_nothing_while_batches_are_counted(program):
    """Fake tensors claim to lie on CUDA; any read of their data raises."""
    window = Window(program.reference(), torch.device("cpu"))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        window._tables["cuda"] = tuple(torch.empty(t.shape, dtype=t.dtype) for t in window._tables["cpu"])
        exits, scores = torch.empty(31, dtype=torch.int64), torch.empty(31)
        window.add(dg.Predictions(exits, scores, exits))
        with pytest.raises(DataDependentOutputException):
            int(exits.sum())


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_monitor_adds_four_operators_to_a_call_and_no_read(program, tiny_images, executor):
    found = []
    for monitor in (False, True):
        run = start(program, executor, batch_size=32, monitor=monitor)
        run(tiny_images)
        with HostWork() as work:
            run(tiny_images)
        found.append((work.operators, work.reads))
    assert found[1] == (found[0][0] + 4, found[0][1])


def test_without_a_monitor_nothing_is_counted(program, tiny_images, monkeypatch):
    run = start(program, "eager", monitor=False)
    monkeypatch.setattr(Window, "add", None)
    monkeypatch.setattr(Reference, "at", None)
    run(tiny_images)
    list(run.stream([tiny_images]))
    run.set_thresholds((0.0,) * 3)
    with pytest.raises(dg.ExecutorError, match="monitor: compile the program with monitor=True"):
        run.monitor  # noqa: B018


def test_answers_may_be_changed_once_they_are_given(program, tiny_images):
    run = start(program, "eager")
    out = run(tiny_images)
    expected = tally(run, out)
    out.exits.zero_()
    out.scores.zero_()
    assert torch.equal(run.monitor.counts(), expected)


def test_a_calibrated_program_keeps_its_reference_on_disk(tiny_staged, tiny_gates, tiny_images, tmp_path):
    loader = DataLoader(TensorDataset(tiny_images, torch.arange(31) % 5), 8)
    program = dg.calibrate(tiny_staged, tiny_gates, loader, max_accuracy_drop=0.1, progress=False)
    with torch.no_grad():
        torch.testing.assert_close(program.scores[3], tiny_staged(tiny_images).amax(1))
    program.save(tmp_path / "p")
    loaded = dg.load(tmp_path / "p", tiny_staged)
    assert torch.equal(loaded.scores, program.scores)
    for point in loaded.frontier.points:  # at every point as the frontier has it
        reference = loaded.reference(point.thresholds)
        torch.testing.assert_close((reference.counts.sum(1) / 31).tolist(), list(point.shares))
    run = start(loaded, "eager", batch_size=8)
    run(tiny_images)
    report = run.monitor.report()
    assert [e.expected_share for e in report.exits] == pytest.approx(list(program.point.shares))
    assert [e.share for e in report.exits] == [e.expected_share for e in report.exits]


def test_an_older_file_has_no_reference(program, tiny_staged, tiny_images, tmp_path):
    program.save(tmp_path / "p")
    tensors = load_file(tmp_path / "p")
    tensors.pop("scores")
    rewrite(tmp_path / "p", tensors)
    run = start(dg.load(tmp_path / "p", tiny_staged), "eager")
    out = run(tiny_images)
    report = run.monitor.report()
    assert [e.samples for e in report.exits] == out.exits.bincount(minlength=4).tolist()
    assert report.reference_samples == 0
    assert "calibrate again" in str(report)
    run.set_thresholds((0.0,) * 3)
    assert run.monitor.report().samples == 0


def test_scores_of_another_number_of_gates_are_refused(program, tiny_staged, tmp_path):
    with pytest.raises(ValueError, match=r"scores: expected shape \[4, N\], got \[3, 31\]"):
        replace(program, scores=program.scores[:3])
    program.save(tmp_path / "p")
    rewrite(tmp_path / "p", {**load_file(tmp_path / "p"), "scores": torch.zeros(2, 5)})
    with pytest.raises(dg.ProgramError, match=r"scores: expected shape \[4, N\], got \[2, 5\]"):
        dg.load(tmp_path / "p", tiny_staged)


def test_a_network_without_gates_is_monitored(tiny_images):
    program, x = random_program(0, [5], 20, 0.5, set())
    staged = StagedModel([torch.nn.Sequential(*program.staged.stages)]).eval()
    bare = make_program(staged, torch.nn.ModuleList(), (), x)
    run = dg.compile(replace(bare, scores=staged(x).detach().amax(1)[None]), executor="eager", monitor=True)
    run(x)
    assert run.monitor.report().exits[0].share == 1


def rewrite(path, tensors):
    """The same file with other tensors."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata)
