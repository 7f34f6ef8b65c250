"""What ``dgate doctor`` finds, here and on machines that lack things."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from typer.testing import CliRunner

from dgate_rt import executors, ops
from dgate_rt.cli import app, doctor

BAD_CALL = doctor._BAD_CALL


@pytest.fixture
def found():
    """Findings by section and name, looked at anew when called."""

    def look() -> dict[tuple[str, str], doctor.Finding]:
        return {(f.section, f.name): f for f in doctor.examine()}

    return look


@pytest.fixture(autouse=True)
def bad_call(request, monkeypatch):
    """The program of the child process; it does nothing, sooner than importing torch, where a test gives no other."""
    monkeypatch.setattr(doctor, "_BAD_CALL", getattr(request, "param", ""))


class Broken:
    """An executor that cannot be made."""

    name, devices = "eager", ("cpu", "cuda", "cpu-sim")

    def __init__(self, model, setup):
        raise RuntimeError("no such luck")


class Liar:
    """An executor that answers class 0 for everything."""

    name, devices = "eager", ("cpu", "cuda")

    def __init__(self, model, setup):
        pass

    def run(self, x, out):
        out.labels.zero_()
        out.scores.zero_()
        out.exits.zero_()


def test_json_holds_every_section():
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0
    shown = json.loads(result.stdout)
    assert shown["cpu_works"] is True
    assert set(shown) == {
        "cpu_works", "Software", "CPU", "Extension", "GPU", "Executors", "Optional packages"
    }  # fmt: skip
    assert shown["Software"]["torch"]["detail"].startswith(torch.__version__)


def test_every_executor_is_tried_wherever_it_runs_without_a_gpu(found):
    findings = found()
    for name, executor in executors.EXECUTORS.items():
        for device in {"cpu", "cpu-sim"}.intersection(executor.devices):
            assert findings["Executors", f"{name} on {device}"].works


@pytest.mark.parametrize(
    ("kind", "reason"), [(Broken, "no such luck"), (Liar, "wrong answers")], ids=["broken", "liar"]
)
def test_bad_executor_is_found(found, monkeypatch, kind, reason):
    monkeypatch.setitem(executors.EXECUTORS, "eager", kind)
    finding = found()["Executors", "eager on cpu"]
    assert not finding.works
    assert reason in finding.detail


def test_exit_code_tells_of_a_broken_cpu_path(monkeypatch):
    for name in executors.EXECUTORS:
        monkeypatch.setitem(executors.EXECUTORS, name, Broken)
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 1


def test_missing_package_says_what_to_install(found, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "earlyon" else real(name))
    finding = found()["Optional packages", "earlyon"]
    assert not finding.works
    assert "pip install 'dgate-rt[bench]'" in finding.detail


def test_missing_extension_is_explained(found, monkeypatch):
    info = {"extension": None, "error": "not built", "cuda_extension": None, "cuda_error": "not built"}
    monkeypatch.setattr(ops, "build_info", lambda: info)
    findings = found()
    finding = findings["Extension", "C++ operators"]
    assert not finding.works
    assert "not built" in finding.detail
    assert "PyTorch reference" in finding.detail
    assert ("Extension", "C++ errors") not in findings


@pytest.mark.skipif(not ops.extension_loaded(), reason="the C++ extension is not built")
@pytest.mark.parametrize(
    ("bad_call", "works", "words"),
    [
        (BAD_CALL, True, "become errors in Python"),
        (BAD_CALL.replace("graph_destroy(0)", "graph_destroy"), False, "a bad argument was no error"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", False, "end the process (SIGKILL); build dgate-rt"),
    ],
    ids=["error", "none", "killed"],
    indirect=["bad_call"],
)
def test_error_of_the_extension_must_reach_python(found, bad_call, works, words):
    finding = found()["Extension", "C++ errors"]
    assert finding.works is works
    assert words in finding.detail


@pytest.mark.parametrize(
    ("driver", "enough", "words"),
    [(None, False, "none"), ((12, 4), False, "too old: 12.8"), ((12, 8), True, "new enough"), ((13, 0), True, "13.0")],
    ids=["no driver", "12.4", "12.8", "13.0"],
)
def test_driver_is_judged_for_graphs(found, monkeypatch, driver, enough, words):
    monkeypatch.setattr(doctor, "driver_cuda_version", lambda: driver)
    finding = found()["GPU", "driver"]
    assert finding.works is enough
    assert words in finding.detail


@pytest.mark.gpu
def test_executors_run_on_the_gpu(found):
    assert found()["GPU", "device"].works
    for name, executor in executors.EXECUTORS.items():
        assert "cuda" not in executor.devices or found()["Executors", f"{name} on cuda"].works
