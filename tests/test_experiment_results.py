"""The experiments on a tiny network: their numbers agree with each other, a seed decides them, and pages show them."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
from test_cli import dgate, refused
from test_experiments import TINY, Fuse, Interrupted

pytest.importorskip("matplotlib")

from dgate_rt import backbones
from dgate_rt.experiments import (
    classes,
    curves,
    depths,
    drift,
    guarantee,
    joint,
    losses,
    page,
    points,
    pools,
    record,
    static,
    surfaces,
)
from dgate_rt.experiments.experiment import NAMES, find
from dgate_rt.experiments.workbench import Workbench
from dgate_rt.gate import Pool

OPTIONS = {
    "losses": losses.Options(seeds=3, gates=1, budgets=5),
    "surfaces": surfaces.Options(steps=4),
    "points": points.Options(gates=2, drops=(0.05, 0.0), batch_sizes=(1, 16), images=16, rounds=2),
    "classes": classes.Options(gates=2, draws=10, shown=5),
    "joint": joint.Options(seeds=3, gates=2, drops=(0.0, 0.02, 0.1), judged=0.02),
    "guarantee": guarantee.Options(calibrations=4, samples=300, gates=2, drops=(0.02, 0.05)),
    "drift": drift.Options(gates=2, windows=7, window=100),
    "depths": depths.Options(drop=0.02, seeds=3, subsets=21),
    "pools": pools.Options(gates=2, budgets=5, widest=1024),
    "static": static.Options(gates=2, drops=(0.05,)),
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def records(bench) -> dict:
    return {name: record.run(find(name), bench, options, f"dgate {name}") for name, options in OPTIONS.items()}


def test_every_experiment_is_covered():
    assert tuple(OPTIONS) == NAMES


@pytest.mark.parametrize("name", [name for name in NAMES if name != "pools"])
def test_gates_read_what_they_are_told_to(name, bench, monkeypatch):
    asked = []
    real = Workbench._gate
    monkeypatch.setattr(Workbench, "_gate", lambda self, spec, cuts: asked.append(spec.pool) or real(self, spec, cuts))
    find(name).run(bench, dataclasses.replace(OPTIONS[name], pool=Pool.AVG))
    assert set(asked) == {"avg"}


def test_a_seed_decides_every_bit(records, bench, tmp_path):
    """In a fresh folder that has the network; but for what is measured."""
    shutil.copy(bench.folder / "network.safetensors", tmp_path)
    again = Workbench(tmp_path, training=bench.training, **TINY)
    for name, options in OPTIONS.items():
        fresh = record.run(find(name), again, options, f"dgate {name}")["result"]
        expected = copy.deepcopy(records[name]["result"])
        for result in (fresh, expected):
            if result.pop("times", None):
                result["claims"].pop()  # on times
        assert fresh == expected, name


@pytest.mark.parametrize("name", NAMES)
def test_records_say_where_they_come_from(records, name):
    found = records[name]
    assert {"command", "commit", "machine", "versions", "seconds", "settings", "options"} < set(found)
    assert found["settings"]["training"]["seed"] == 0
    assert all(set(said) == {"claim", "holds", "seen"} for said in found["result"]["claims"])


@pytest.mark.parametrize("name", NAMES)
def test_tables_are_rectangular(records, name):
    one = find(name)
    for table in (*one.tables(records[name]["result"]), *one.reported):
        assert table.rows
        assert {len(row) for row in table.rows} == {len(table.columns)}


def test_losses_compare_on_one_grid(records):
    result = records["losses"]["result"]
    assert len(result["curves"]) == 2 * 4
    for name, curve in result["curves"].items():
        assert len(curve["mean"]) == len(result["grid"])
        assert (np.array(curve["low"]) <= np.array(curve["high"])).all()
        assert len(curve["area"]) == len(result["ahead"][name]) == 3
    assert result["ahead"][losses.OURS] == [0, 0, 0]
    assert 0 < result["grid"][0] < result["grid"][-1] == 1
    assert len(set(result["network"]["seeds"])) > 1  # each seed has test samples of its own


def test_interrupted_losses_go_on(bench, tmp_path, monkeypatch, records):
    again = Workbench(tmp_path, network=bench.folder / "network.safetensors", progress=False)
    fuse = Fuse(curves.search_frontier, 5)
    monkeypatch.setattr(curves, "search_frontier", fuse)
    with pytest.raises(Interrupted):
        record.run(find("losses"), again, OPTIONS["losses"], "dgate")
    assert not (tmp_path / "losses.json").exists()
    fuse.left = 100
    resumed = record.run(find("losses"), again, OPTIONS["losses"], "dgate")
    assert fuse.made == 2 * 4 * 3
    assert resumed["result"] == records["losses"]["result"]


def test_surfaces_fall_with_the_thresholds(records):
    saved = np.array(records["surfaces"]["result"]["saved"])
    assert (np.diff(saved, axis=0) <= 0).all()
    assert (np.diff(saved, axis=1) <= 0).all()
    assert records["surfaces"]["result"]["at_zero"]["saved"] == saved[0, 0] == saved.max()


@pytest.mark.parametrize(
    ("lost", "expected"), [([0.5, 0.2, 0.0, 0.0], 2), ([0.0, 0.2, 0.0], 2), ([0.0, 0.0], 0), ([0.0, 0.2], None)]
)
def test_accuracy_is_back_where_it_stays(lost, expected):
    assert surfaces._back(np.array(lost), 0.001) == expected


def test_points_keep_to_their_drops(records):
    result = records["points"]["result"]
    chosen = [row["validation"]["accuracy"] for row in result["rows"]]
    assert chosen[1] >= chosen[0]
    assert [row["drop"] for row in result["rows"]] == [0.05, 0.0]
    assert [times["batch_size"] for times in result["times"]] == [1, 16]
    for times in result["times"]:
        for gated in times["gated"]:
            assert gated["realisation"] == pytest.approx(gated["speed_up"] / gated["saved_here"], rel=1e-4)
    assert sum(result["rows"][0]["shares"]) == pytest.approx(1, abs=1e-4)


def test_points_are_timed_once(bench, records, monkeypatch):
    monkeypatch.setattr(points, "interleaved", Fuse(points.interleaved, 0))
    again = record.run(find("points"), bench, OPTIONS["points"], "dgate")
    assert again["result"] == records["points"]["result"]


@pytest.mark.parametrize(
    ("backbone", "expected"), [("resnet101", [False, False, True]), ("densenet201", [True, True, True])]
)
def test_a_network_is_held_against_what_the_paper_says_of_it(backbone, expected):
    """20 % of the FLOPs for nothing and 40 % for 2 points are enough for DenseNet-201 alone."""
    rows = [{"name": "dg", "drop": d, "saved": s, "lost": d} for d, s in ((0.0175, 0.40), (0.0, 0.20))]
    times = [{"batch_size": 32, "gated": [{"realisation": 0.96}] * 2}]
    claims = points._claims({"rows": rows, "network": {"accuracy": 0.95}, "times": times}, backbone)
    assert [said["holds"] for said in claims] == expected


def test_committed_points_are_judged_as_they_would_be_now():
    results = Path(__file__).resolve().parent.parent / "docs" / "experiments" / "results"
    found = [one for one in record.load([results]).values() if one["experiment"] == "points"]
    assert found
    for one in found:
        assert one["result"]["claims"] == points._claims(one["result"], one["settings"]["backbone"])


def test_classes_count_every_sample(bench, records):
    result = records["classes"]["result"]
    counts = np.array(result["counts"])
    assert counts.shape == (10, 3)
    assert counts.sum() == bench.settings["samples"]["test"]
    assert [e["samples"] for e in result["entropy"]] == counts.sum(0).tolist()
    for errors in result["errors"]:
        assert errors["samples"] == sum(value for kind, value in errors.items() if kind != "samples")
    assert len(result["images"]) == 3


def test_entropy_is_in_bits():
    assert classes._bits(np.array([0, 1, 2, 3]), 10) == 2
    assert classes._bits(np.array([], dtype=np.int64), 10) == 0


@pytest.mark.parametrize(
    ("name", "pair", "message"),
    [
        ("losses", "seeds=2", "expected seeds of at least 3"),
        ("losses", "gates=4", "gates: expected 1 to 3 for resnet18, got 4"),
        ("surfaces", "steps=1", "expected steps of at least 2"),
    ],
)
def test_options_out_of_range_are_refused(bench, name, pair, message):
    with pytest.raises(ValueError, match=message):
        find(name).run(bench, find(name).configured(False, [pair]))


def test_what_cannot_be_run_is_refused_and_left_out_of_all(bench, tmp_path, monkeypatch):
    unfit = dataclasses.replace(
        static.EXPERIMENT, unfit=lambda bench: f"expected another network, got {bench.meta.name}"
    )
    monkeypatch.setattr(static, "EXPERIMENT", unfit)
    monkeypatch.setattr("dgate_rt.experiments.experiment.NAMES", ("static", "surfaces"))
    assert not bench.model.training  # so it is trained, and in its file
    flags = ("--network", bench.folder / "network.safetensors", "-o", tmp_path)
    assert "static: expected another network, got resnet18" in dgate("experiment", "static", *flags, code=2).stderr
    shown = dgate("experiment", "all", "--quick", *flags)
    assert "static is left out: expected another network" in shown.stderr
    assert {path.name for path in tmp_path.glob("*.json")} == {"settings.json", "surfaces.json"}


def test_drift_wants_images_in_memory_and_static_a_network_of_any_width(bench):
    assert drift.EXPERIMENT.unfit(bench) == static.EXPERIMENT.unfit(bench) == ""
    files = dataclasses.replace(bench.bundle, test=list(bench.bundle.test))
    assert "got those of 'digits'" in drift.EXPERIMENT.unfit(types.SimpleNamespace(bundle=files))
    trained = types.SimpleNamespace(meta=backbones.BackboneMeta("efficientnet_lite0"))
    assert "whose width is fixed" in static.EXPERIMENT.unfit(trained)


def test_a_page_names_the_command_that_made_the_network(records, tmp_path):
    found = copy.deepcopy(records["surfaces"])
    assert found["origin"] == ""
    page.write_markdown(tmp_path / "page.md", {tmp_path / "surfaces.json": found})
    assert "comes from" not in (tmp_path / "page.md").read_text()
    found["origin"] = "dgate train -o net"
    page.write_markdown(tmp_path / "page.md", {tmp_path / "surfaces.json": found})
    assert "The network comes from `dgate train -o net`." in (tmp_path / "page.md").read_text()


def test_markdown_page(records, bench, tmp_path):
    page.write_markdown(tmp_path / "docs" / "experiments.md", record.load([bench.folder]))
    text = (tmp_path / "docs" / "experiments.md").read_text()
    for name, found in records.items():
        assert f"## {find(name).title}" in text
        for said in found["result"]["claims"]:
            assert said["seen"] in text
    assert "as reported" in text
    missed = text[text.index("## What did not hold") :]
    assert missed.count("**no**") == sum(not said["holds"] for f in records.values() for said in f["result"]["claims"])
    pictures = {path.name for path in (tmp_path / "docs" / "experiments").iterdir()}
    assert len(pictures) == sum(len(find(name).figures(found["result"])) for name, found in records.items())
    assert all(f"experiments/{name})" in text for name in pictures)


def test_the_docs_are_what_their_command_writes(tmp_path):
    docs = Path(__file__).resolve().parent.parent / "docs"
    shutil.copytree(docs / "experiments" / "results", tmp_path / "experiments" / "results")
    page.write_markdown(tmp_path / "experiments.md", record.load([tmp_path / "experiments" / "results"]))
    assert (tmp_path / "experiments.md").read_text() == (docs / "experiments.md").read_text()
    pictures = [{path.name for path in (at / "experiments").glob("*.*")} for at in (docs, tmp_path)]
    assert pictures[0] == pictures[1]


def test_report_of_a_folder_is_one_page(records, bench, tmp_path):
    shown = dgate("report", bench.folder, "-o", tmp_path / "page.html", "--json")
    assert len(json.loads(shown.stdout)["records"]) == len(records)
    text = (tmp_path / "page.html").read_text()
    assert text.count("<svg") == 2 + 2 + 1 + 1 + 1 + 1 + 2 + 1 + 1 + 1
    assert text.count("data:image/png") >= 3
    assert not any(loads in text for loads in ('src="http', 'href="http', "<script"))


def test_gates_that_read_something_else_have_records_of_their_own(records, again, tmp_path):
    found = record.run(
        find("surfaces"), again, dataclasses.replace(OPTIONS["surfaces"], pool=Pool.AVG), "dgate surfaces"
    )
    path = again.folder / "surfaces-avg.json"
    assert json.loads(path.read_text()) == found
    shown = {tmp_path / "one.json": records["surfaces"], path: found}
    text = "".join(str(block) for block in page.contents(shown, tmp_path))
    assert ("gates read avg" in text, "gates read grid2" in text, "Pool." in text) == (True, True, False)


def test_two_records_of_one_kind_are_refused(records, bench, tmp_path):
    (tmp_path / "copy.json").write_text((bench.folder / "surfaces.json").read_text())
    line = refused("report", bench.folder / "surfaces.json", tmp_path / "copy.json", "-o", tmp_path / "page.html")
    assert "got two of surfaces-resnet18-0.125-digits-16" in line
    assert not (tmp_path / "page.html").exists()


def test_report_says_what_it_takes(tmp_path):
    assert "expected a program and its network, or results, got 1 files" in refused(
        "report", tmp_path / "net.safetensors"
    )
