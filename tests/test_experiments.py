"""The framework of the experiments: what is kept and found again, what is refused, that a seed decides every bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from test_cli import dgate, refused

pytest.importorskip("matplotlib")

from dgate_rt import backbones, data
from dgate_rt.experiments import experiment, record, resampling, workbench
from dgate_rt.experiments.store import Store, digest
from dgate_rt.experiments.workbench import GateSpec, Training, Workbench
from dgate_rt.train import fit

TINY = {"data": "digits", "backbone": "resnet18", "width": 0.125, "image_size": 16, "progress": False}
TRAINING = Training(epochs=1, batch_size=32, lr=0.1, augment=False)
FLAGS = ("--data", "digits", "--backbone", "resnet18", "--width", 0.125, "--image-size", 16, "--epochs", 1, "-b", 32)


pytestmark = pytest.mark.usefixtures("one_thread")


def make_bench(folder, **changed) -> Workbench:
    return Workbench(folder, **{**TINY, "training": TRAINING, **changed})


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Workbench:
    return make_bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def network(bench):
    """The file of a trained network."""
    assert bench.model is not None
    return bench.folder / "network.safetensors"


class Interrupted(Exception):
    """Stands for whatever may end a process."""


class Fuse:
    """A function that goes through so often, and then no more."""

    def __init__(self, function, calls: int) -> None:
        self.function, self.left, self.made = function, calls, 0

    def __call__(self, *arguments, **options):
        if self.left == 0:
            raise Interrupted
        self.left -= 1
        self.made += 1
        return self.function(*arguments, **options)


def test_equal_keys_have_equal_names():
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})


def test_store_makes_once(tmp_path):
    fuse = Fuse(lambda: {"x": torch.arange(3)}, 1)
    for _ in range(2):
        assert Store(tmp_path).tensors("kind", {"seed": 1}, fuse)["x"].tolist() == [0, 1, 2]
    values = Fuse(lambda: {"lines": (1.5, float("inf"))}, 1)
    for _ in range(2):
        assert Store(tmp_path).value("kind", {"seed": 1}, values) == {"lines": [1.5, float("inf")]}


def test_store_leaves_no_half_written_file(tmp_path, monkeypatch):
    store, key = Store(tmp_path), {"seed": 1}
    monkeypatch.setattr(os, "replace", Fuse(os.replace, 0))
    for keep in (
        lambda: store.tensors("kind", key, lambda: {"x": torch.ones(2)}),
        lambda: store.value("kind", key, dict),
    ):
        with pytest.raises(Interrupted):
            keep()
    assert all(path.suffix == ".partial" for path in tmp_path.iterdir())
    monkeypatch.undo()
    assert store.value("kind", key, lambda: 7) == 7


def test_store_refuses_what_is_damaged(tmp_path):
    store, key = Store(tmp_path), {"seed": 1}
    store.tensors("kind", key, lambda: {"x": torch.ones(2)})
    store.path("kind", key, ".safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"kind-\w+.safetensors is not a whole safetensors file .*delete it"):
        store.tensors("kind", key, dict)
    store.path("kind", key, ".json").write_text('{"key": {}, "value": 1}')
    with pytest.raises(ValueError, match=r'expected {"seed": 1} in .*json, got {}'):
        store.value("kind", key, dict)


def test_bootstrap_draws_sources_whole():
    sources = np.repeat(np.arange(100), 4)[np.random.default_rng(0).permutation(400)]
    rows = resampling.bootstrap(sources, 3)
    assert len(rows) == 400
    taken = np.bincount(sources[rows], minlength=100)
    assert set(taken % 4) == {0}
    assert 50 < np.count_nonzero(taken) < 75  # 1 - 1/e
    assert not np.array_equal(rows, resampling.bootstrap(sources, 4))


def test_new_splits_keep_sizes_and_sources():
    first, second = np.repeat(np.arange(30), 4), np.repeat(np.arange(50), 4)
    val, test = resampling.split_anew(first, second, 1)
    assert (len(val), len(test)) == (120, 200)
    assert sorted([*val, *test]) == list(range(320))
    sources = np.concatenate([first, 1000 + second])
    assert not set(sources[val]) & set(sources[test])


def test_gates_are_those_of_fit(bench):
    expected = fit(bench.staged(["layer1"]), bench.bundle.loader("train", 128), progress=False)[0]
    ours = bench.gates([GateSpec("layer1")])[0]
    assert torch.equal(ours.weight, expected.weight)
    assert torch.equal(ours.bias, expected.bias)


def test_scores_are_those_of_a_trace(bench):
    from dgate_rt.trace import collect_trace

    specs = [GateSpec(cut) for cut in bench.cuts]
    trace, _ = collect_trace(bench.staged(bench.cuts), bench.gates(specs), bench.bundle.loader("test", 128))
    scores = bench.scores(specs)
    ours = scores.trace(bench.held_out(None)[1])
    np.testing.assert_allclose(ours.margins, trace.margins, rtol=1e-4, atol=1e-4)
    assert np.mean(ours.predictions == trace.predictions) > 0.995
    assert np.array_equal(ours.targets, trace.targets)
    top2 = scores.confidence["top2"]
    assert (top2 >= 0).all()


def test_a_seed_draws_other_data(bench):
    val, test = bench.held_out(0)
    assert (len(val), len(test)) == tuple(len(rows) for rows in bench.held_out(None))
    assert not np.array_equal(val, bench.held_out(1)[0])
    gates = bench.gates([GateSpec("layer1"), GateSpec("layer1", resample=0), GateSpec("layer1", resample=1)])
    assert len({gate.weight.sum().item() for gate in gates}) == 3


def test_interrupted_features_go_on(tmp_path, network, monkeypatch):
    other = Workbench(tmp_path, network=network, progress=False)
    monkeypatch.setattr(workbench, "_FEATURE_BATCH", 64)
    fuse = Fuse(data.ArrayDataset.__getitem__, 5)
    monkeypatch.setattr(data.ArrayDataset, "__getitem__", lambda self, index: fuse(self, index))
    with pytest.raises(Interrupted):
        other.features("train")
    assert not list((tmp_path / "kept").iterdir())
    fuse.left = 1000
    found = other.features("train")
    assert len(found.labels) == other.settings["samples"]["train"]
    made = fuse.made
    assert torch.equal(other.features("train").gates[-1], found.gates[-1])
    assert fuse.made == made


def test_interrupted_fits_go_on(tmp_path, network, monkeypatch):
    specs = [GateSpec(cut) for cut in ("layer1", "layer2", "layer3")]
    fuse = Fuse(workbench.fit_gate, 2)
    monkeypatch.setattr(workbench, "fit_gate", fuse)
    other = Workbench(tmp_path, network=network, progress=False)
    with pytest.raises(Interrupted):
        other.gates(specs)
    fuse.left = 1
    assert len(Workbench(tmp_path, network=network, progress=False).gates(specs)) == 3
    assert fuse.made == 3


def test_interrupted_training_goes_on(tmp_path, monkeypatch):
    longer = replace(TRAINING, epochs=2)
    evaluate = Fuse(backbones.save_backbone, 0)
    monkeypatch.setattr(backbones, "save_backbone", evaluate)
    with pytest.raises(Interrupted):
        make_bench(tmp_path, training=longer).model  # noqa: B018 - it trains
    assert (tmp_path / "training.safetensors").exists()
    evaluate.left = 1
    resumed = make_bench(tmp_path, training=longer).model
    assert not (tmp_path / "training.safetensors").exists()
    again = make_bench(tmp_path, training=longer).model
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), again.parameters(), strict=True))


def test_a_killed_run_goes_on_to_the_same_result(tmp_path):
    """Killed as soon as the first gate is there; what runs after it ends as if nothing had happened."""
    command = [sys.executable, "-m", "dgate_rt", "experiment", "surfaces", *map(str, FLAGS), "--lr", "0.1"]
    command += ["--set", "steps=5", "-o", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    until = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until and not list(tmp_path.glob("kept/gate-*.safetensors")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    made = len(list(tmp_path.glob("kept/gate-*.safetensors")))
    assert made >= 1
    found = json.loads(
        dgate("experiment", "surfaces", *FLAGS, "--lr", 0.1, "--set", "steps=5", "-o", tmp_path, "--json").stdout
    )
    assert not list(tmp_path.rglob("*.partial"))
    fresh = json.loads(
        dgate(
            "experiment", "surfaces", *FLAGS, "--lr", 0.1, "--set", "steps=5", "-o", tmp_path / "fresh", "--json"
        ).stdout
    )
    assert found["surfaces"]["result"] == fresh["surfaces"]["result"]
    for name in ("settings", "options", "commit", "machine", "versions"):
        assert found["surfaces"][name] == fresh["surfaces"][name]


@dataclass(frozen=True)
class Knobs:
    count: int = 3
    least: float = 0.5
    drops: tuple[float, ...] = (0.0, 0.01)


KNOWN = experiment.Experiment(
    "some", "Some", "Figure 0", "", Knobs(), Knobs(1), lambda *_: {}, lambda _: [], lambda _: {}
)


def test_options_are_set_by_name():
    assert KNOWN.configured(True) == Knobs(1)
    assert KNOWN.configured(False, ["count=7", "drops=0.5,1"]) == Knobs(7, drops=(0.5, 1.0))
    assert KNOWN.described() == "count=3, least=0.5, drops=0,0.01"


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("cuont=3", "some has no option 'cuont=3'; near names: count"),
        ("count", "some has no option 'count'"),
        ("count=many", "expected count like 3, got 'many'"),
        ("drops=1,x", "expected drops like 0,0.01, got '1,x'"),
    ],
)
def test_wrong_options_are_named(pair, message):
    with pytest.raises(ValueError, match=message):
        KNOWN.configured(False, [pair])


def test_unknown_experiments_are_refused_with_near_names(tmp_path):
    assert "no experiment 'surface'; near names: surfaces" in refused("experiment", "surface", "-o", tmp_path)


def test_experiments_are_listed():
    shown = dgate("experiment").stdout
    assert all(name in shown for name in experiment.NAMES)
    assert all(experiment.find(name).described() in shown for name in experiment.NAMES)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("surfaces",), "output: expected a folder"),
        (("all", "--set", "steps=3"), "options belong to one experiment"),
        (("surfaces", "-o", "F"), "data: expected a name"),
        (("surfaces", "-o", "F", "--data", "digits"), "backbone: expected a name"),
        (("surfaces", "-o", "F", "--data", "digits", "--backbone", "resnet19"), "near names: resnet"),
        (("surfaces", "-o", "F", "--data", "cifar10", "--backbone", "resnet18"), "root: 'cifar10' needs the folder"),
        (("surfaces", "-o", "F", "--network", "N", "--epochs", 3), "training, image_size, data_seed: expected none"),
        (
            ("surfaces", "-o", "F", "--network", "N", "--backbone", "resnet26"),
            "expected backbone 'resnet26', got 'resnet18'",
        ),
        (("surfaces", "-o", "F", "--network", "N", "--width", 0.5), "expected width 0.5, got 0.125"),
    ],
)
def test_bad_input_is_refused(tmp_path, network, flags, message):
    places = {"F": tmp_path / "f", "N": network}
    assert message in refused("experiment", *(places.get(flag, flag) for flag in flags))


def test_other_numbers_of_classes_are_refused(tmp_path, network):
    _, meta = backbones.load_backbone(network)
    five = replace(meta, num_classes=5, classes=meta.classes[:5], accuracy=None)
    backbones.save_backbone(tmp_path / "five.safetensors", five.build(), five)
    with pytest.raises(ValueError, match=r"data: expected 5 classes for .*five.safetensors, got 10"):
        Workbench(tmp_path / "f", network=tmp_path / "five.safetensors")


def test_a_folder_of_other_settings_is_refused(bench):
    with pytest.raises(ValueError, match=r"results of other settings; \(expected, got\): {'width': \(0.25, 0.125\)}"):
        make_bench(bench.folder, width=0.25)


def test_a_network_of_another_backbone_in_the_folder_is_refused(tmp_path, network):
    other = make_bench(tmp_path, width=0.25)
    (tmp_path / "network.safetensors").write_bytes(network.read_bytes())
    with pytest.raises(ValueError, match=r"folder: expected BackboneMeta.*width=0.25.* got BackboneMeta.*width=0.125"):
        other.model  # noqa: B018


def test_a_checkpoint_of_another_training_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(backbones, "save_backbone", Fuse(backbones.save_backbone, 0))
    with pytest.raises(Interrupted):
        make_bench(tmp_path / "a").model  # noqa: B018
    other = make_bench(tmp_path / "b", training=replace(TRAINING, lr=0.05))
    (tmp_path / "a" / "training.safetensors").rename(tmp_path / "b" / "training.safetensors")
    with pytest.raises(ValueError, match="is of another training"):
        other.model  # noqa: B018


def test_records_are_loaded_from_files_and_folders(tmp_path, bench):
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(ValueError, match="expected files of dgate experiment in"):
        record.load([tmp_path])
    with pytest.raises(ValueError, match="expected a file of dgate experiment, got"):
        record.load([tmp_path / "settings.json"])
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        record.load([tmp_path / "nothing"])
    made = record.run(KNOWN, bench, Knobs(), "dgate")
    assert record.load([bench.folder / "some.json"]) == {bench.folder / "some.json": made}
