"""`dgate bench` on a tiny network: every part runs, refuses wrong answers, and says what it cannot measure here."""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torchvision.models import VisionTransformer

from dgate_rt import Predictions, Runtime
from dgate_rt.bench import contest, latency, memory, mixes, overhead, peers, streams, suite, targets, ways
from dgate_rt.bench.cases import NETWORKS, TINY, Case, Network, Work, make_case
from dgate_rt.bench.record import Row
from dgate_rt.bench.workload import NO_EXIT, PAPER_MIXES
from dgate_rt.engines import ENGINES, precision
from dgate_rt.gate import Pool

MIXED = PAPER_MIXES[1]
EAGER = ("eager", "float32")


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case(TINY, "cpu", torch.float32)


def by_way(rows: list[Row]) -> dict[str, Row]:
    return {f"{row.way} {targets.mix_name(row.mix)}": row for row in rows}


def test_mixes_are_beside_dense_and_say_what_was_realised(case: Case) -> None:
    rows = by_way(mixes.measure_mixes(case, *EAGER, 8, 16, (MIXED, NO_EXIT), repeats=2))
    assert list(rows) == [
        "dense no gates",
        "dense, chunked no gates",
        *(f"{way} {targets.mix_name(mix)}" for mix in (MIXED, NO_EXIT) for way in (*ways.GATED, "masked loop")),
    ]
    gated = rows["refill .20 .30 .25 .25"]
    assert set(gated.over) == {"dense", "dense, chunked"}
    assert {"time realisation", "realisation over dense"} <= set(gated.values)
    assert 0 < gated.values["gflops"] < rows["dense no gates"].values["gflops"]
    assert set(rows["refill nobody leaves"].values) == {"gflops"}
    assert all(row.ms is not None and row.ms.median > 0 and len(row.ms.rounds) == 2 for row in rows.values())


def test_a_network_of_tokens_is_measured_too() -> None:
    """Its gates read the first token, in the masked loop as well."""
    vit = Network(
        "tiny ViT",
        lambda: VisionTransformer(16, 8, 3, 1, 16, 32, num_classes=10),
        16,
        ("encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1"),
        Pool.CLS,
    )
    mix = (0.2, 0.3, 0.5)
    rows = mixes.measure_mixes(make_case(vit, "cpu", torch.float32), *EAGER, 8, 16, (mix,), repeats=1)
    assert {row.way for row in rows} == {"dense", "dense, chunked", *ways.GATED, "masked loop"}


def test_the_sweep_goes_from_all_late_to_all_early(case: Case) -> None:
    rows = [r for r in mixes.measure_sweep(case, *EAGER, 8, 16, repeats=1) if r.way == "refill"]
    assert [row.mix[0] for row in rows] == list(mixes.SWEEP)
    assert (rows[0].mix, rows[-1].mix[0]) == (NO_EXIT, 1.0)
    flops = [row.values["gflops"] for row in rows]
    assert flops == sorted(flops, reverse=True)


def test_overhead_and_gates(case: Case) -> None:
    assert [row.way for row in overhead.measure_no_exit(case, *EAGER, 4, 8, 1)] == [
        "dense",
        "dense, chunked",
        *ways.GATED,
        ways.LOSING_OFF,
    ]
    made = ways.Ways(case, *EAGER, 4, 8)
    run = made.compile(made.work.program(NO_EXIT), "refill", losing_gates="off")
    assert run.thresholds == (math.inf,) * 3
    rows = overhead.measure_gates(case, 4, 1)
    assert [row.way for row in rows] == ["stage 0", "stage 1", "stage 2"]
    assert all(row.values["score and route"] == row.values["score"] + row.values["route"] > 0 for row in rows)


def test_one_sample_at_a_time(case: Case) -> None:
    rows = by_way(latency.measure_latency(case, *EAGER, calls=3))
    early = rows[f"refill {targets.mix_name(latency.EARLY)}"]
    assert {"p50 ms", "p95 ms", "p99 ms", latency.BESIDE_EARLYON} == set(early.values)
    assert "earlyon nobody leaves" in rows


def test_the_contest_knows_the_best_dense_way(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "supports_bfloat16", lambda device: True)  # emulated, it is as right
    rows = contest.measure_contest(case, [EAGER, ("eager", "bfloat16")], 4, 8, (MIXED,), 1)
    assert all("best dense" in row.over for row in rows)
    best = [row for row in rows if row.way in (ways.DENSE, ways.CHUNKED) and row.over["best dense"] == 1]
    assert len(best) == 1
    assert {"masked loop", "nonzero_static loop", "earlyon"} <= {row.way for row in rows}


def test_streams_of_every_size(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = streams.measure_streams(case, *EAGER, 64, MIXED, 1, arriving=(5, 64))
    assert [(row.way, row.batch_size) for row in rows] == [
        (way, size) for size in (5, 64) for way in (*ways.GATED, streams.BOUNDED)
    ]
    assert all(row.values["p99 latency ms"] >= row.values["p50 latency ms"] > 0 for row in rows)
    assert [row.values[streams.BESIDE_FULL] for row in rows][3:] == [1, 1, 1]


@pytest.mark.parametrize("way", memory.WAYS)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_measured_once_answers_are_right(
    way: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "RESNET_101", TINY)
    memory._child(way, 8, "float32")
    found = json.loads(capsys.readouterr().out)
    assert found["peak MiB"] >= found["idle MiB"] > 0
    assert ("arenas MiB" in found) == (way in (ways.CHUNKED, "refill"))
    monkeypatch.setattr(Work, "wrong", lambda work, answers, thresholds: 3)
    with pytest.raises(RuntimeError, match=f"will not time wrong answers: {way} answers 3 of 8 differently"):
        memory._child(way, 8, "float32")


def test_memory_is_not_measured_where_the_system_does_not_tell_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "STATUS", Path("/nowhere"))
    row = memory.measure_memory("refill", 64, "float32")
    assert (row.ms, row.note) == (
        None,
        "skipped: only Linux tells a process's peak memory, in /nowhere and /proc/self/clear_refs",
    )


def test_without_earlyon_the_others_are_timed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "earlyon", None)
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    for rows in (latency.measure_latency(case, *EAGER, 2), contest.measure_contest(case, [EAGER], 4, 8, (MIXED,), 1)):
        (skipped,) = (row for row in rows if row.way == "earlyon")
        assert skipped.note == 'skipped: earlyon is not installed: pip install "dgate-rt[bench]"'
        assert {"dense", "refill"} <= {row.way for row in rows if row.ms}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run(command: list[str], **_: object) -> object:
        asked.append(command[3:])
        text = json.dumps({"idle MiB": 1.0, "peak MiB": 3.0, "above idle MiB": 2.0, "ms": [4.0, 5.0]})
        return type("Done", (), {"stdout": text})

    monkeypatch.setattr(memory.subprocess, "run", run)
    row = memory.measure_memory("refill", 64, "float32")
    assert asked == [["refill", "64", "float32"]]
    assert (row.values["above idle MiB"], row.mix) == (2.0, MIXED)


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_that_compiles_once_is_still_that_engine(name: str) -> None:
    engine, kept = ENGINES[name](), ways.kept(name)
    for what in ("name", "any_size", "own_threads"):
        assert getattr(kept, what) == getattr(engine, what, False)


WAYS: dict[str, Callable[[ways.Ways], None]] = {
    "dense": lambda made: made.add_dense(),
    "dense, chunked": lambda made: made.add_chunked(),
    "refill": lambda made: made.add_gated("refill", MIXED),
    "refill, all leave at gate 2": lambda made: made.add_leaving(1),
    ways.LOSING_OFF: lambda made: made.add_losing(),
    "mine": lambda made: made.add_peer("mine", MIXED, lambda program: made.compile(program, "eager")),
}


@pytest.mark.parametrize("name", WAYS)
def test_right_answers_are_timed(case: Case, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "supports_bfloat16", lambda device: True)  # emulated, it is as right
    for dtype in ("float32", "bfloat16"):
        made = ways.Ways(case, "eager", dtype, 4, 8)
        WAYS[name](made)
        assert [way.name for way in made.ways] == [name]


def wrong(run: Callable[[torch.Tensor], Predictions], x: torch.Tensor) -> Predictions:
    answers = run(x)
    answers.labels += 1
    return answers


@pytest.mark.parametrize("name", WAYS)
def test_wrong_answers_are_not_timed(case: Case, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ways.Ways.compile
    monkeypatch.setattr(ways.Ways, "compile", lambda *given, **more: functools.partial(wrong, right(*given, **more)))
    made = ways.Ways(case, *EAGER, 4, 8)
    with pytest.raises(RuntimeError, match=f"will not time wrong answers: {name} answers 8 of 8 differently"):
        WAYS[name](made)
    assert made.ways == []


def test_wrong_answers_of_a_stream_are_not_timed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Runtime.stream
    monkeypatch.setattr(Runtime, "stream", lambda run, batches, **more: right(run, reversed([*batches]), **more))
    with pytest.raises(RuntimeError, match="will not time wrong answers: eager in batches of 5 answers"):
        streams.measure_streams(case, *EAGER, 64, MIXED, 1, arriving=(5,))


def test_an_engine_that_is_missing_and_a_machine_too_small_are_said(
    monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    monkeypatch.setattr(suite, "case_of", lambda network: case)
    monkeypatch.setattr(suite, "why_not", lambda engine, dtype: "install it" if engine == "openvino" else None)
    scale = replace(suite.QUICK, engines=(("openvino", "float32"),), batch_sizes=(4,))
    (group,) = suite.groups(scale, ["mixes"])
    assert [row.note for row in group.measure()] == ["skipped: install it"]
    (small,) = suite.groups(replace(scale, engines=(EAGER,), batch_sizes=(10**9,)), ["mixes"])
    assert small.measure()[0].note.startswith("skipped: expected ")


def test_every_part_has_groups_of_different_names() -> None:
    for scale in (suite.QUICK, suite.FULL):
        names = [group.name for group in suite.groups(scale)]
        assert len(set(names)) == len(names)
    assert {group.part for group in suite.groups(suite.FULL)} == {*suite.PARTS, "gates"}


def test_every_network_runs_at_every_mix(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    monkeypatch.setattr(suite, "case_of", lambda network: case)
    monkeypatch.setattr(suite, "why_not", lambda engine, dtype: None)
    monkeypatch.setattr(suite, "too_small", lambda case, batch_size: None)
    asked: list[object] = []
    monkeypatch.setattr(mixes, "measure_mixes", lambda *given: asked.append(given[5]) or [])
    found = suite.groups(suite.FULL, ["mixes"])
    for group in found:
        group.measure()
    assert {name.split(",")[0].split(": ")[1] for name in (g.name for g in found)} == {n.name for n in NETWORKS}
    assert asked == [(*PAPER_MIXES, NO_EXIT)] * len(found)
