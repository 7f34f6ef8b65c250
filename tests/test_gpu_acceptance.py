"""The acceptance command runs without a GPU but for CUDA's own engines; it resumes, refuses, skips, and judges."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dgate_rt import Runtime, ops
from dgate_rt.bench import acceptance_rows, acceptance_stages, acceptance_switch, gates, gpu_acceptance
from dgate_rt.bench.acceptance_rows import Row, verdicts
from dgate_rt.bench.acceptance_stages import stages_ms
from dgate_rt.bench.acceptance_work import CUDA_ONLY, DENSE, GATED, Engine, OneByOne, prepare
from dgate_rt.bench.cases import TINY, Case, make_case, measure
from dgate_rt.bench.gpu_acceptance import Size, main, measure_rows
from dgate_rt.bench.roofline import GateShape
from dgate_rt.bench.workload import NO_EXIT, PAPER_MIXES
from dgate_rt.errors import ExecutorError
from dgate_rt.executors import Predictions
from dgate_rt.timing import Timing

needs_extension = pytest.mark.skipif(not ops.extension_loaded(), reason="the C++ extension is not built")

MIXED = PAPER_MIXES[1]
SMALL = Size((TINY,), (1, 4), (MIXED, NO_EXIT), least_images=4, repeats=1)
ONE = replace(SMALL, batch_sizes=(4,), mixes=(MIXED,))
GATE = GateShape("net", "cut", "avg", channels=8, positions=16, classes=3, row_bytes=256, pieces=1, gflops=1.0)
SIMULATED = ["--device", "cpu-sim", "--quick", "--no-tests", "--json"]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_acceptance, "QUICK", SMALL)
    monkeypatch.setattr(acceptance_switch, "LAUNCHES", 2)
    monkeypatch.setattr(gpu_acceptance, "commit", lambda: "c0ffee")
    monkeypatch.setattr(gates, "gate_shapes", lambda networks: [GATE])
    monkeypatch.setitem(gates.COPY_BYTES, "cpu", 2**12)


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case(TINY, "cpu", torch.bfloat16)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    monkeypatch.setattr(gpu_acceptance, "make_case", lambda *_: case)


def run_small(path: Path) -> dict[str, Any]:
    assert main([*SIMULATED, str(path)]) == 0
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@needs_extension
@pytest.mark.usefixtures("small")
def test_the_command_measures_every_engine_and_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "gpu.json"
    results = run_small(path)
    rows, out = results["rows"], capsys.readouterr().out
    assert [r["engine"] for r in rows] == [*DENSE, *GATED] * 4
    assert [r["batch_size"] for r in rows] == [1] * 14 + [4] * 14
    skipped = [r for r in rows if r["status"] == "skipped"]
    assert {(r["engine"], r["note"]) for r in skipped} == {(e, "needs CUDA") for e in CUDA_ONLY}
    measured = [r for r in rows if r["status"] == "measured"]
    assert len(measured) + len(skipped) == len(rows)
    assert all(r["ms"]["median"] > 0 and r["to_dense"] > 0 for r in measured)
    assert all((r["realisation"] is None) == (r["engine"] == "dense" or r["mix"] == list(NO_EXIT)) for r in measured)
    assert [r["waits"] for r in rows if r["engine"] == "graph"] == [False] * 4
    assert all((r["stages_ms"] or 0) > 0 for r in rows if r["engine"] == "graph")
    assert (results["commit"], results["device"], results["gpu"]) == ("c0ffee", "cpu-sim", None)
    assert results["command"].startswith("python -m dgate_rt.bench.gpu_acceptance --device cpu-sim")
    assert "| tiny ResNet | 4 | .20 .30 .25 .25 | graph |" in out
    assert "| skipped: needs CUDA |" in out
    assert "a switch, not taken: " in out
    assert "holds: every engine runs and answers as dense with post-hoc gating (16 rows)" in out
    assert "unknown: realisation of graph on its best engine >= 0.95 at B >= 128 (no row measured it)" in out

    for name in ("make_case", "switch_us", "gate_rows"):
        monkeypatch.setattr(gpu_acceptance, name, lambda *_: pytest.fail("measured again"))
    assert run_small(path) == results
    assert "| tiny ResNet | 4 | nobody leaves | lag |" in capsys.readouterr().out
    again = {**results, "rows": [r for r in rows if (r["batch_size"], r["mix"]) != (1, list(MIXED))]}
    again["rows"][0] |= {"status": "failed", "note": "an error"}  # and its group is measured again
    path.write_text(json.dumps(again))
    monkeypatch.setattr(gpu_acceptance, "make_case", make_case)
    resumed = run_small(path)["rows"]
    changed = [new["ms"] != old["ms"] for new, old in zip(resumed, rows, strict=True)]
    assert [any(changed[start : start + 7]) for start in range(0, 28, 7)] == [True, True, False, False]
    assert all(r["status"] != "failed" for r in resumed)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("change", ["commit", "gpu", "dirty"])
def test_results_from_elsewhere_are_moved_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    path = tmp_path / "gpu.json"
    header = {"commit": "c0ffee-dirty" if change == "dirty" else "c0ffee", "gpu": None}
    old = {**header, "rows": [1]}
    path.write_text(json.dumps(old))
    if change != "dirty":
        assert gpu_acceptance.load_results(path, header) == old
        header[change] = "another"
    assert gpu_acceptance.load_results(path, header) == {}
    assert json.loads((tmp_path / "gpu.old.json").read_text()) == old
    assert not path.exists()


def spoiled(monkeypatch: pytest.MonkeyPatch, engine: str, change: Engine) -> None:
    """Let one engine do something else."""

    def prepared(name: str, *arguments: Any) -> Engine:
        return change if name == engine else prepare(name, *arguments)

    monkeypatch.setattr(gpu_acceptance, "prepare", prepared)


def by_engine(size: Size = ONE) -> dict[str, Row]:
    (rows,) = measure_rows(size, simulated=True)
    return {row.engine: row for row in rows}


@needs_extension
@pytest.mark.usefixtures("small", "tiny")
def test_it_measures_only_what_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    assert main([*SIMULATED, str(path), "--batch-sizes", "4", "--mixes", "5"]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert {(row["batch_size"], tuple(row["mix"])) for row in rows} == {(4, NO_EXIT)}


@needs_extension
def test_the_stages_alone_take_what_their_buckets_do(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    work = measure(case, 16, 16)
    program = work.program(MIXED)
    run = prepare("graph", case, program, work.batches[0], True)
    assert isinstance(run, OneByOne)
    assert isinstance(run.run, Runtime)
    sizes = iter([(16,), *(plan.sizes for plan in run.run._executor.stages.buckets)])
    expected = [plan.expected for plan in run.run._executor.stages.buckets]

    def as_many_ms_as_rows(jobs: Sequence[object], repeats: int) -> list[Timing]:
        return [Timing.of([float(size)]) for size in next(sizes)]

    monkeypatch.setattr(acceptance_stages, "interleaved", as_many_ms_as_rows)
    assert stages_ms(run.run, work.batches[0], True) == pytest.approx(16 + sum(expected))


@needs_extension
@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("part", ["labels", "exits", "scores"])
def test_wrong_answers_are_refused(monkeypatch: pytest.MonkeyPatch, case: Case, part: str) -> None:
    work = measure(case, 4, 8)
    right = prepare("eager", case, work.program(MIXED), work.batches[0], True)
    assert work.wrong(right(work.batches), work.program(MIXED).thresholds) == 0

    def wrong(batches: Sequence[Tensor]) -> list[Predictions]:
        answers = right(batches)
        getattr(answers[0], part)[:] += 1
        return answers

    spoiled(monkeypatch, "eager", wrong)
    rows = by_engine()
    assert rows["eager"].status == "failed"
    assert rows["eager"].note.startswith("wrong answers: ")
    assert (rows["eager"].ms, rows["graph"].to_eager) == (None, None)
    assert rows["graph"].ms is not None
    assert verdicts(list(rows.values()))[0].holds is False


@needs_extension
def test_only_margins_within_float_error_may_flip(case: Case) -> None:
    work = measure(case, 4, 8)
    thresholds = list(work.program(MIXED).thresholds)
    expected = work.workload.expected(thresholds)
    leaver = int((expected.exits == 0).nonzero()[0])
    margin, label = work.workload.margins[1, leaver], work.workload.labels[1, leaver]

    def flipped() -> Predictions:
        answers = work.workload.expected(thresholds)
        answers.exits[leaver], answers.scores[leaver], answers.labels[leaver] = 1, margin, label
        return answers

    assert work.wrong([flipped()], thresholds) == 1
    thresholds[0] = float(work.workload.margins[0, leaver] - work.band[0] / 2)
    near = flipped()
    assert work.wrong([near], thresholds) == 0
    near.scores[leaver] += 2 * work.band.max()
    assert work.wrong([near], thresholds) == 1
    assert work.wrong([near.rows(0, 3)], thresholds) > 0


@needs_extension
@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("error", "status", "note"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "skipped", "out of memory"),
        (
            ExecutorError("graph: stage 1, bucket 4 cannot be captured: CUDA out of memory"),
            "skipped",
            "out of memory",
        ),
        (ExecutorError("graph: not here\nat all"), "failed", "ExecutorError: graph: not here"),
    ],
    ids=["memory", "memory in a capture", "another"],
)
def test_an_engine_that_cannot_run_is_a_row_that_says_so(
    monkeypatch: pytest.MonkeyPatch, error: Exception, status: str, note: str
) -> None:
    def fails(batches: Sequence[Tensor]) -> list[Predictions]:
        raise error

    spoiled(monkeypatch, "graph", fails)
    rows = by_engine()
    assert (rows["graph"].status, rows["graph"].note, rows["graph"].ms) == (status, note, None)
    assert rows["eager"].status == "measured"


@needs_extension
@pytest.mark.usefixtures("tiny")
def test_without_memory_for_all_the_last_engine_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    def most_two(jobs: Sequence[object], repeats: int) -> list[Timing]:
        if len(jobs) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [Timing.of([4.0, 6.0]), Timing.of([2.0, 3.0])]

    monkeypatch.setattr(gpu_acceptance, "interleaved", most_two)
    rows = by_engine()
    assert rows["lag"].note == rows["graph"].note == "out of memory beside the other engines"
    assert rows["eager"].to_dense == 0.5
    assert rows["dense"].ms == Timing.of([1.0, 1.5])  # a batch, of four

    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu_acceptance, "measure", no_memory)
    assert {(row.status, row.note) for row in by_engine().values()} == {("skipped", "out of memory")}


@needs_extension
@pytest.mark.usefixtures("tiny")
def test_a_row_is_kept_where_its_stages_alone_need_too_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu_acceptance, "stages_ms", no_memory)
    graph = by_engine()["graph"]
    assert (graph.status, graph.stages_ms, graph.time_realisation) == ("measured", None, None)


def row(**values: Any) -> Row:
    return Row(**{"network": "net", "batch_size": 256, "mix": MIXED, "engine": "graph", **values})


GOOD = [
    row(realisation=0.96, to_eager=0.9, waits=False),
    row(realisation=0.5, to_eager=1.0, waits=False, batch_size=32),
    row(mix=NO_EXIT, to_without_gates=1.019, to_eager=0.99, waits=False),
    row(engine="graph compiled", realisation=0.7, waits=False),  # another engine is better here
    row(engine="eager", realisation=0.1, to_without_gates=2.0, to_eager=1.0),
]


def test_targets_hold_over_the_worst_row() -> None:
    assert [str(verdict) for verdict in verdicts(GOOD)] == [
        "holds: every engine runs and answers as dense with post-hoc gating (5 rows)",
        "holds: realisation of graph on its best engine >= 0.95 at B >= 128 "
        "(worst of 1: 0.960, graph, net, B 256, .20 .30 .25 .25)",
        "holds: gates cost <= 2% of the same kernels as one graph, nobody leaving "
        "(worst of 1: +1.9%, graph, net, B 256, nobody leaves)",
        "holds: the host never waits in graph (worst of 4: waits: False, graph, net, B 256, .20 .30 .25 .25)",
        "holds: graph at least as fast as eager (worst of 3: 1.000 of its time, graph, net, B 32, .20 .30 .25 .25)",
    ]
    assert [verdict.holds for verdict in verdicts([])] == [None] * 5


@pytest.mark.parametrize(
    ("index", "bad"),
    [
        (0, row(status="failed", note="wrong answers: 1 samples differ")),
        (1, row(realisation=0.949, batch_size=128)),
        (2, row(mix=NO_EXIT, to_without_gates=1.021)),
        (3, row(waits=True)),
        (4, row(to_eager=1.01)),
    ],
    ids=["answers", "realisation", "overhead", "waits", "eager"],
)
def test_one_bad_row_fails_its_target_alone(index: int, bad: Row) -> None:
    holds = [verdict.holds for verdict in verdicts([*GOOD, bad])]
    assert holds == [position != index for position in range(5)]
    assert bad.where in str(verdicts([*GOOD, bad])[index])


def test_the_table_says_what_was_skipped() -> None:
    skipped = row(status="skipped", note="out of memory")
    measured = row(ms=Timing.of([1.0, 2.0, 3.0]), to_dense=0.5, realisation=0.9, peak_mib=12.4)
    _, _, first, second = acceptance_rows.table([skipped, measured])
    assert first == "| net | 256 | .20 .30 .25 .25 | graph |  |  |  |  |  | skipped: out of memory |"
    assert second == "| net | 256 | .20 .30 .25 .25 | graph | 2.000 (1.400 to 2.600) | 2.00 | 0.900 |  | 12 |  |"


@pytest.mark.parametrize(
    ("last", "code", "expected"),
    [
        ("7 passed, 2 skipped, 300 deselected in 9.10s", 0, (7, 0, 2)),
        ("2 failed, 5 passed, 1 error in 9.10s", 1, (5, 3, 0)),
        ("INTERNALERROR", 3, (0, 1, 0)),
    ],
    ids=["passed", "failed", "broken"],
)
def test_pytest_is_run_apart_and_its_counts_are_read(
    monkeypatch: pytest.MonkeyPatch, last: str, code: int, expected: tuple[int, int, int]
) -> None:
    commands: list[list[str]] = []

    def fake(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        assert (options["cwd"] / "pyproject.toml").is_file()
        return subprocess.CompletedProcess(command, code, f"...\n{last}\n", "")

    monkeypatch.setattr(subprocess, "run", fake)
    passed, failed, skipped = expected
    assert gpu_acceptance.run_tests() == {"passed": passed, "failed": failed, "skipped": skipped}
    assert commands[0][1:5] == ["-m", "pytest", "-m", "gpu"]


def test_the_simulation_is_quick_only() -> None:
    with pytest.raises(ExecutorError, match="whose times prove nothing; give --quick with it"):
        main(["--device", "cpu-sim"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(ExecutorError, match="torch sees no CUDA device here; try --device cpu-sim --quick"):
        main([])


@pytest.mark.gpu
def test_the_quick_command_on_a_gpu(tmp_path: Path) -> None:
    main(["--quick", "--no-tests", "--json", str(tmp_path / "gpu.json")])  # 1 where a time misses its target
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert [r for r in results["rows"] if r["status"] != "measured"] == []
    assert {"switch_us", "gates"} <= results.keys()
