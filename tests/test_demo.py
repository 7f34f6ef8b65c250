"""The demo, in its quick form: every step runs, its figures agree with each other, and nothing is made twice."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from dgate_rt import Predictions, backbones, load, pretrain
from dgate_rt.agreement import check_agreement

demo = pytest.importorskip("dgate_rt.demo", reason="matplotlib is not installed", exc_type=ImportError)
pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    result = demo.run_demo(tmp_path_factory.mktemp("demo") / "out", quick=True, progress=False)
    torch.set_num_threads(threads)
    return result


@pytest.fixture(scope="module")
def results(first):
    return json.loads(first.results.read_text())


def test_leaves_only_whole_files(first):
    names = {path.name for path in first.report.parent.iterdir()}
    assert names == {
        "backbone.safetensors", "no-drop.safetensors", "1-percent-drop.safetensors", "steps.json", "results.json",
        "report.html",
    }  # fmt: skip


def test_json_holds_the_same_table(first, results):
    assert results["rows"] == json.loads(json.dumps([asdict(row) for row in first.rows]))
    assert [row["name"][:3] for row in results["rows"]] == ["dg(", "dg(", "den"]


def test_report_holds_the_same_table(first):
    from dgate_rt.report import cells

    page = first.report.read_text(encoding="utf-8")
    for row in first.rows:
        assert "".join(f"<td>{cell}</td>" for cell in cells(row)) in page


def test_figures_of_a_row_agree(first):
    dense = first.rows[-1]
    assert dense.flops_reduction is None
    assert dense.speed_up is None
    assert dense.shares == (0, 0, 0, 1)
    for row in first.rows[:-1]:
        assert sum(row.shares) == pytest.approx(1)
        assert row.flops_reduction == pytest.approx(1 - row.gflops / dense.gflops)
        assert row.speed_up == pytest.approx(1 - row.ms / dense.ms)
        assert 0 < row.gflops <= dense.gflops * 1.01


def test_results_say_how_they_were_made(results):
    assert results["settings"]["recipe"] == asdict(pretrain.QUICK)
    assert results["settings"]["seed"] == 0
    assert results["machine"]["torch"] == torch.__version__
    assert set(results) >= {"command", "version", "commit", "seconds", "times_ms", "warnings"}
    assert results["times_ms"]["dense"]["median"] == results["rows"][-1]["ms"]


def test_saved_programs_are_the_ones_measured(first, results):
    model, meta = backbones.load_backbone(first.backbone)
    assert meta.accuracy == pytest.approx(first.rows[-1].accuracy, abs=0.02)  # bfloat16 there where it is native
    for (name, path), row in zip(first.programs.items(), first.rows, strict=False):
        program = load(path, model)
        assert row.name == demo.configuration(program.thresholds)
        assert program.point.accuracy >= program.network_accuracy - demo.DROPS[name] - 1e-12
        assert results["programs"][name]["validation"]["accuracy"] == program.point.accuracy


def test_second_call_makes_nothing_again(first, monkeypatch, capsys):
    def refuse(*_, **__):
        raise AssertionError("done again")

    monkeypatch.setattr(pretrain, "train_recipe", refuse)
    monkeypatch.setattr(demo, "fit", refuse)
    before = first.backbone.read_bytes()
    again = demo.run_demo(first.report.parent, quick=True)
    assert again.reused == ("network", "gates")
    assert first.reused == ()
    assert first.backbone.read_bytes() == before
    assert [row.accuracy for row in again.rows] == [row.accuracy for row in first.rows]
    said = capsys.readouterr()
    assert "dg(" in said.out
    assert "network: there already" in said.err
    assert str(again.report) in said.err.replace("\n", "")


@pytest.mark.parametrize("change", ["recipe", "seed", "fresh", "file"])
def test_other_settings_train_again(first, tmp_path, monkeypatch, change):
    class Trained(Exception):
        pass

    def stop(recipe, bundle, *, seed, progress):
        raise Trained(seed)

    for path in first.report.parent.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(pretrain, "train_recipe", stop)
    if change == "recipe":
        monkeypatch.setattr(pretrain, "QUICK", replace(pretrain.QUICK, epochs=1))
    if change == "file":
        (tmp_path / "backbone.safetensors").unlink()
    with pytest.raises(Trained):
        demo.run_demo(tmp_path, quick=True, progress=False, seed=int(change == "seed"), fresh=change == "fresh")
    assert json.loads((tmp_path / "steps.json").read_text()) == {}  # what follows from it is out of date too


def test_no_progress_is_silent(first, capsys):
    demo.run_demo(first.report.parent, quick=True, progress=False)
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")


@pytest.mark.parametrize("what", ["label", "exit"])
def test_a_wrong_answer_stops_the_demo(first, what):
    """An answer that differs from gates applied afterwards is an error, however few there are."""
    model, _ = backbones.load_backbone(first.backbone)
    programs = {name: load(path, model) for name, path in first.programs.items()}
    name, program = next(iter(programs.items()))
    images, trace = demo._test_data(pretrain.QUICK.load_data(), programs, progress=False)
    found = demo._answer(programs, images, trace)[name]
    answers = Predictions(*(t.clone() for t in (found.labels, found.scores, found.exits, found.distances)))
    check_agreement(name, program, trace, answers)
    margins = np.where(np.isfinite(program.thresholds), trace.margins.T - program.thresholds, -9).T
    clear = int(np.abs(margins).min(0).argmax())  # far from every threshold
    if what == "label":
        answers.distances[clear, 0] += 100  # no tie
        answers.labels[clear] = (answers.labels[clear] + 1) % 10
    else:
        answers.exits[clear] = (answers.exits[clear] + 1) % 4
    with pytest.raises(RuntimeError, match=f"no drop: 1 of {len(images)} samples .* sample {clear}: expected exit"):
        check_agreement(name, program, trace, answers)


@pytest.mark.parametrize(
    ("accuracy", "shares", "expected"),
    [
        (0.95, (0.5, 0.2, 0.1, 0.2), []),
        (0.85, (0.5, 0.2, 0.1, 0.2), ["the network is right on 85.00%"]),
        (0.95, (0.1, 0.81, 0.0, 0.09), ["gate 2 takes 81.0%"]),
    ],
    ids=["none", "inaccurate", "too-easy"],
)
def test_missed_limits_are_said(first, accuracy, shares, expected):
    rows = (replace(first.rows[0], shares=shares), first.rows[1], replace(first.rows[-1], accuracy=accuracy))
    found = demo._warnings(rows)
    assert len(found) == len(expected)
    assert all(text.startswith(start) for text, start in zip(found, expected, strict=True))
