"""The command line: every command from a shell's point of view, and the whole chain on a tiny network."""

from __future__ import annotations

import ast
import csv
import json
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import dgate_rt
from dgate_rt import bench, data, kernels, ops, pretrain
from dgate_rt.cli import app

COMMANDS = ["demo", "train", "transfer", "fit", "calibrate", "run", "bench", "report", "doctor", "flops", "experiment"]


def dgate(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def refused(*arguments: object) -> str:
    """The one line that a command prints before it leaves with exit code 2."""
    result = dgate(*arguments, code=2)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> types.SimpleNamespace:
    """What the chain makes of digits: the files, and what each command printed as JSON."""
    folder = tmp_path_factory.mktemp("made")
    net, gates, program = (folder / f"{name}.safetensors" for name in ("net", "gates", "program"))
    network = ("--data", "digits", "--backbone", "resnet18", "--width", 0.125)
    with pytest.MonkeyPatch.context() as patch:  # or machines that multiply bfloat16 get another network
        patch.setattr(pretrain, "native_bfloat16", lambda device: False)
        trained = dgate("train", *network, "--epochs", 6, "--lr", 0.1, "--no-augment", "-b", 32, "-o", net, "--json")
    fitted = dgate(
        "fit", net, "--at", "layer1, layer2", "--epochs", 2, "--polish", 20, "--pool", "avg", "-o", gates, "--json"
    )
    chosen = dgate("calibrate", gates, net, "--max-drop", 0.02, "-o", program, "--json")
    printed = {"train": trained, "fit": fitted, "calibrate": chosen}
    return types.SimpleNamespace(folder=folder, net=net, gates=gates, program=program, printed=printed)


@pytest.fixture(scope="module")
def digits() -> torch.Tensor:
    """The first test images, [40, 1, 8, 8] uint8."""
    return data.load("digits").test.images[:40]


@pytest.fixture(scope="module")
def expected(made) -> list[tuple[int, int]]:
    """Label and exit of each of `digits`, by the library."""
    from dgate_rt.backbones import load_backbone

    program = dgate_rt.load(made.program, load_backbone(made.net)[0])
    x, _ = next(iter(data.load("digits").loader("test", 40)))
    out = dgate_rt.compile(program)(x)
    assert len(out.exits.unique()) == 3
    return list(zip(out.labels.tolist(), out.exits.tolist(), strict=True))


def answers(text: str) -> list[tuple[int, int]]:
    return [(int(row["label"]), int(row["exit"])) for row in csv.DictReader(StringIO(text))]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples(command):
    shown = dgate(command, "--help").stdout
    assert "Examples" in shown
    assert f"$ dgate {command}" in shown


def test_help_lists_every_command():
    shown = dgate("--help").stdout
    assert all(command in shown for command in COMMANDS)


def test_module_runs_as_a_command():
    run = subprocess.run([sys.executable, "-m", "dgate_rt", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout == f"dgate {dgate_rt.__version__}\n"


def test_command_line_itself_imports_no_torch():
    """Only the package around it may; so help is as quick as ``import dgate_rt`` lets it be."""
    code = (
        "import sys, types; package = types.ModuleType('dgate_rt'); package.__path__ = [sys.argv[1]];"
        "sys.modules['dgate_rt'] = package; import dgate_rt.cli; sys.exit('torch' in sys.modules)"
    )
    folder = str(Path(dgate_rt.__file__).parent)
    assert subprocess.run([sys.executable, "-c", code, folder], check=False).returncode == 0


def test_nothing_but_the_command_line_imports_it():
    folders = [Path(folder) for package in (dgate_rt, bench, kernels) for folder in package.__path__]
    files = {file.resolve() for folder in folders for file in folder.rglob("*.py")}
    own = {file for file in files if file.parent.name == "cli" or file.name == "__main__.py"}
    assert own
    for file in files - own:
        assert not any(f"{name}.".startswith("dgate_rt.cli.") for name in _imports(file)), file


def _imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("command", ["train", "fit", "calibrate"])
def test_json_is_all_of_standard_output(made, command):
    result = json.loads(made.printed[command].stdout)
    assert Path(result["output"]).is_file()


def test_train_says_what_it_made(made):
    result = json.loads(made.printed["train"].stdout)
    assert (result["name"], result["in_channels"], result["image_size"]) == ("resnet18", 1, 8)
    assert 0 <= result["accuracy"] <= 1
    assert len(result["epochs"]) == 6


def test_gates_read_from_the_shell_what_they_read_in_python():
    import inspect

    from dgate_rt.cli import pipeline

    default = inspect.signature(pipeline.fit).parameters["pool"].default
    assert default.value == inspect.signature(dgate_rt.fit).parameters["pool"].default.value


def test_the_chain_takes_gates_as_they_come(made, tmp_path):
    from dgate_rt.backbones import load_backbone

    gates, program = tmp_path / "gates.safetensors", tmp_path / "program.safetensors"
    dgate("fit", made.net, "--at", "layer1,layer2", "--epochs", 1, "--polish", 0, "-o", gates)
    dgate("calibrate", gates, made.net, "--max-drop", 0.02, "-o", program)
    dgate("report", program, made.net, "-o", tmp_path / "report.html")
    loaded = dgate_rt.load(program, load_backbone(made.net)[0])
    assert [gate.pool.value for gate in loaded.gates] == ["grid2"] * 2


def test_few_gates_of_every_block_are_kept(made, tmp_path):
    from dgate_rt.backbones import load_backbone

    gates, program = tmp_path / "gates.safetensors", tmp_path / "program.safetensors"
    dgate("fit", made.net, "--at", "blocks", "--epochs", 1, "--polish", 0, "-o", gates)
    shown = dgate("calibrate", gates, made.net, "--max-drop", 0.05, "--max-gates", 2, "-o", program).stdout
    model = load_backbone(made.net)[0]
    every, kept = (dgate_rt.load(path, model).staged for path in (gates, program))
    assert len(every.cuts) == 7
    assert 1 <= len(kept.cuts) <= 2
    assert set(kept.cuts) < set(every.cuts)
    assert all((f"after {cut}" in shown) == (cut in kept.cuts) for cut in every.cuts)
    dgate("report", program, made.net, "-o", tmp_path / "report.html")


def test_fitted_gates_are_off(made):
    from dgate_rt.backbones import load_backbone

    program = dgate_rt.load(made.gates, load_backbone(made.net)[0])
    assert program.thresholds == (float("inf"),) * 2
    assert program.staged.cuts == ("layer1", "layer2")
    assert program.cost_reduction == 0


def test_calibrated_point_keeps_to_its_target(made):
    result = json.loads(made.printed["calibrate"].stdout)
    assert result["point"]["accuracy"] >= result["network_accuracy"] - 0.02 - 1e-9
    assert sum(result["point"]["shares"]) == pytest.approx(1)
    assert result["frontier"]


@pytest.mark.parametrize(
    "target", [("--min-accuracy", 0), ("--max-cost", 1e12), ("--cost", "time"), ()], ids=lambda t: " ".join(map(str, t))
)
def test_calibrate_prints_point_and_frontier(made, tmp_path, target):
    shown = dgate("calibrate", made.gates, made.net, *target, "-o", tmp_path / "p.safetensors").stdout
    assert "after layer1" in shown
    assert "Frontier" in shown


def test_calibrate_tells_what_is_guaranteed(made, tmp_path):
    sure = ("--max-drop", 0.5, "--confidence", 0.95, "-o", tmp_path / "p.safetensors")
    assert "accuracy drop at most 50 % with 95 % confidence" in dgate("calibrate", made.gates, made.net, *sure).stdout
    result = json.loads(dgate("calibrate", made.gates, made.net, *sure, "--json").stdout)
    assert result["guarantee"]["confidence"] == 0.95
    none = ("--max-drop", 1e-4, "--confidence", 0.95, "-o", tmp_path / "p.safetensors")
    assert "warning: loader: expected at least" in dgate("calibrate", made.gates, made.net, *none).stderr


def test_run_reads_a_folder_and_loses_only_the_bad_file(made, digits, expected, tmp_path):
    for index, image in enumerate(digits):
        name = tmp_path / f"{index // 10}" / f"{index:02}.png"
        name.parent.mkdir(exist_ok=True)
        Image.fromarray(image[0].numpy()).save(name)
    (tmp_path / "2" / "25b.png").write_bytes((tmp_path / "2" / "25.png").read_bytes()[:50])
    (tmp_path / "notes.txt").write_text("no image")
    result = dgate("run", made.program, made.net, tmp_path, "--batch-size", 7, code=1)
    assert answers(result.stdout) == expected
    rows = list(csv.DictReader(StringIO(result.stdout)))
    assert [row["file"] for row in rows[:2]] == ["0/00.png", "0/01.png"]
    assert all(row["class"] == row["label"] for row in rows)  # digits are named by their figures
    assert "skipped 2/25b.png" in result.stderr
    assert "1 of 41 files could not be read" in result.stderr


def test_run_takes_one_image(made, digits, expected, tmp_path):
    Image.fromarray(digits[0, 0].numpy()).convert("RGB").save(tmp_path / "one.BMP")
    assert answers(dgate("run", made.program, made.net, tmp_path / "one.BMP").stdout) == expected[:1]


@pytest.mark.parametrize("kind", ["pixels [N, H, W]", "pixels [N, C, H, W]", "normalised", "normalised float64"])
def test_run_reads_npy(made, digits, expected, tmp_path, kind):
    arrays = {
        "pixels [N, H, W]": digits[:, 0].numpy(),
        "pixels [N, C, H, W]": digits.numpy(),
        "normalised": next(iter(data.load("digits").loader("test", 40)))[0].numpy(),
    }
    arrays["normalised float64"] = arrays["normalised"].astype(np.float64)
    np.save(tmp_path / "x.npy", arrays[kind])
    assert answers(dgate("run", made.program, made.net, tmp_path / "x.npy", "-b", 16).stdout) == expected


def test_run_writes_json(made, digits, expected, tmp_path):
    np.save(tmp_path / "x.npy", digits.numpy())
    printed = json.loads(dgate("run", made.program, made.net, tmp_path / "x.npy", "--json").stdout)
    assert [(row["label"], row["exit"]) for row in printed] == expected
    assert set(printed[0]) == {"index", "label", "class", "score", "exit"}
    result = dgate("run", made.program, made.net, tmp_path / "x.npy", "-o", tmp_path / "answers.json")
    assert result.stdout == ""
    assert json.loads((tmp_path / "answers.json").read_text()) == printed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["answers.json", "x.npy"]


@pytest.mark.parametrize("json_", [True, False], ids=["json", "csv"])
def test_run_takes_no_images(made, tmp_path, json_):
    np.save(tmp_path / "x.npy", np.empty((0, 1, 8, 8), np.uint8))
    printed = dgate("run", made.program, made.net, tmp_path / "x.npy", *["--json"] * json_).stdout
    assert json.loads(printed) == [] if json_ else printed == "index,label,class,score,exit\n"


def test_run_moves_on_the_frontier(made, digits, tmp_path):
    np.save(tmp_path / "x.npy", digits.numpy())
    exits = {
        drop: [
            e for _, e in answers(dgate("run", made.program, made.net, tmp_path / "x.npy", "--max-drop", drop).stdout)
        ]
        for drop in (0, 1)
    }
    assert sum(exits[1]) < sum(exits[0])
    assert set(exits[1]) == {0}  # with everything allowed the first gate answers all


def test_run_tells_of_drift(made, digits, tmp_path):
    np.save(tmp_path / "x.npy", digits.numpy())
    np.save(tmp_path / "dark.npy", (digits // 4).numpy())
    plain = dgate("run", made.program, made.net, tmp_path / "x.npy")
    same, dark = (dgate("run", made.program, made.net, tmp_path / f"{name}.npy", "--monitor") for name in ("x", "dark"))
    assert same.stdout == plain.stdout
    assert "of validation" not in plain.stderr
    assert re.search(r"^no drift seen: 40 samples against \d+ of validation", same.stderr, re.MULTILINE)
    assert re.search(r"^drift: 40 samples against", dark.stderr, re.MULTILINE)
    uncalibrated = dgate("run", made.gates, made.net, tmp_path / "x.npy", "--monitor").stderr
    assert "no verdict on 40 samples" in uncalibrated


def test_run_dense(made, digits, tmp_path):
    np.save(tmp_path / "x.npy", digits.numpy())
    options = ("--executor", "dense", "--engine", "eager", "--dtype", "float32")
    result = dgate("run", made.program, made.net, tmp_path / "x.npy", *options)
    assert {e for _, e in answers(result.stdout)} == {2}
    assert "executor dense, engine eager" in result.stderr


def test_report_is_one_page(made, tmp_path):
    page = tmp_path / "report.html"
    result = dgate("report", made.program, made.net, "--max-drop", 0, "--max-drop", 0.1, "-o", page, "--json")
    rows = json.loads(result.stdout)["rows"]
    assert [row["name"].partition("(")[0] for row in rows] == ["dense", "dg", "dg"]
    assert rows[0]["flops_reduction"] is None
    assert all(0 <= row["accuracy"] <= 1 and sum(row["shares"]) == pytest.approx(1) for row in rows)
    assert '<section id="graph">' in page.read_text() or not ops.extension_loaded()


@pytest.fixture(scope="module")
def bad(tmp_path_factory) -> Path:
    """A folder of files that `run` cannot take."""
    folder = tmp_path_factory.mktemp("bad")
    np.save(folder / "size.npy", np.zeros((3, 1, 9, 8), np.uint8))
    np.save(folder / "dtype.npy", np.zeros((3, 1, 8, 8), np.int64))
    np.save(folder / "pickle.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(folder / "good.npy", np.zeros((30, 1, 8, 8), np.uint8))
    (folder / "cut.npy").write_bytes((folder / "good.npy").read_bytes()[:500])
    (folder / "empty").mkdir()
    return folder


RUN = "run {program} {net}"
FIT = "fit {net} -o {bad}/gates"
BAD_INPUT = {
    "no network": ("run {program} {bad}/none {bad}", "/none"),
    "no program": ("run {bad}/none {net} {bad}", "/none"),
    "network as program": ("run {net} {net} {bad}", "'dgate_rt.program'"),
    "program as network": ("run {program} {program} {bad}", "'dgate_rt.backbone'"),
    "no images": (f"{RUN} {{bad}}/none", "/none"),
    "no npy": (f"{RUN} {{bad}}/none.npy", "/none.npy"),
    "folder without images": (f"{RUN} {{bad}}/empty", "no image files"),
    "npy of another size": (f"{RUN} {{bad}}/size.npy", "expected shape [N, 1, 8, 8] or [N, 8, 8], got [3, 1, 9, 8]"),
    "npy of another dtype": (f"{RUN} {{bad}}/dtype.npy", "int64"),
    "npy with a pickle": (f"{RUN} {{bad}}/pickle.npy", "pickle.npy"),
    "truncated npy": (f"{RUN} {{bad}}/cut.npy", "cut.npy"),
    "unknown executor": (f"{RUN} {{bad}}/good.npy --executor magic", "'magic'"),
    "unknown engine": (f"{RUN} {{bad}}/good.npy --engine magic", "'magic'"),
    "unknown dtype": (f"{RUN} {{bad}}/good.npy --dtype int8", "'int8'"),
    "unknown device": (f"{RUN} {{bad}}/good.npy --device abacus", "'abacus'"),
    "drop of gates that are off": ("run {gates} {net} {bad}/good.npy --max-drop 0.1", "dgate calibrate"),
    "output in no folder": (f"{RUN} {{bad}}/good.npy -o {{bad}}/none/answers.csv", "no such folder"),
    "unknown cut": (f"{FIT} --at layer7", "'layer7'"),
    "network in no folder": ("train -o {bad}/none/net --data digits", "output: no such folder"),
    "transferred to no folder": ("transfer -o {bad}/none/net --data digits", "output: no such folder"),
    "no pretrained network": ("transfer -o {bad}/n --data digits --backbone resnet18", "efficientnet_lite0"),
    "two targets": ("calibrate {gates} {net} -o {bad}/p --max-drop 0.1 --max-cost 1", "max_cost"),
    "unreachable target": ("calibrate {gates} {net} -o {bad}/p --max-cost 1", "cheapest reachable"),
    "unknown data": ("train -o {bad}/n --data digitz", "digits"),
    "data without root": ("train -o {bad}/n --data cifar10", "root"),
    "unknown backbone to count": ("flops resnet19", "resnet18"),
    "unknown backbone": ("train -o {bad}/n --data digits --backbone resnet19", "resnet18"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_red_line(made, bad, name):
    command, message = BAD_INPUT[name]
    before = sorted(bad.iterdir())
    assert message in refused(*(word.format(**vars(made), bad=bad) for word in command.split()))
    assert sorted(bad.iterdir()) == before


def test_debug_shows_the_error_itself(made, bad):
    result = CliRunner().invoke(app, ["--debug", "run", str(made.program), str(made.net), str(bad / "empty")])
    assert isinstance(result.exception, ValueError)


def test_interrupt_is_quiet(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("dgate_rt.cli.doctor.examine", interrupted)
    assert dgate("doctor", code=130).output == ""


def test_missing_extra_says_what_to_install(made, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert "pip install 'dgate-rt[vision]'" in refused("run", made.program, made.net, tmp_path)


def test_a_network_that_does_not_say_how_images_are_normalised_is_refused(made, tmp_path):
    from dgate_rt.backbones import load_backbone, save_backbone

    model, meta = load_backbone(made.net)
    save_backbone(tmp_path / "net", model, replace(meta, stats=((), ())))
    assert "expected classes and normalisation" in refused("run", made.program, tmp_path / "net", tmp_path)


def test_flops_of_the_paper():
    counted = json.loads(dgate("flops", "resnet101", "--json").stdout)
    assert counted["resnet101"]["total"] == pytest.approx(5.02e9, rel=1e-3)
    assert counted["resnet101"]["stages"] == pytest.approx([0.4397e9, 0.6711e9, 3.3806e9, 0.5285e9], rel=1e-3)


def test_flops_prints_every_backbone(monkeypatch):
    from dgate_rt.backbones import names

    monkeypatch.setattr("dgate_rt.backbones.stage_flops", lambda name: [1e9, 2e9, 0.5e9, 0.25e9])
    shown = dgate("flops").stdout
    assert all(name in shown for name in names())
    assert "3.7500" in shown


@pytest.mark.parametrize("json_", [True, False], ids=["json", "table"])
def test_demo_keeps_json_apart(monkeypatch, tmp_path, json_):
    from dgate_rt import demo

    def run_demo(out, *, quick, seed, progress=True, fresh):
        print("a table")
        return demo.DemoResult((), (), out / "report.html", out / "r.json", out / "b", {"p": out}, {"data": 1.0}, ())

    monkeypatch.setattr(demo, "run_demo", run_demo)
    shown = dgate("demo", "--quick", "--out", tmp_path, *["--json"] * json_).stdout
    if json_:
        assert json.loads(shown)["report"] == str(tmp_path / "report.html")
    else:
        assert shown == "a table\n"
