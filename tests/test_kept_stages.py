"""What OpenVINO and ONNX Runtime read is converted once, and found by the next process that wants the same graph."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest
import torch
from engine_cases import needs, network
from torch import Tensor, nn

from dgate_rt import StagedModel, versions
from dgate_rt.cache import cache_dir
from dgate_rt.engines import export, prepare

ENGINES = [needs("openvino"), needs("onnxruntime")]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DGATE_RT_CACHE", str(tmp_path))


def found(staged: StagedModel, engine: str, **options) -> int:
    """How many stages were found on the disk; every one answers as it should."""
    options = {"sizes": [4], "sample_shape": (3, 16, 16), **options}
    prepared = prepare(staged, engine, **options)
    x = torch.randn(3, *options["sample_shape"], generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(prepared(x), staged(x), rtol=1e-4, atol=1e-4)
    kept = sum(stage.run.found for stage in prepared.stages)
    said = f"{kept} of {len(prepared.stages)} stages found on disk" in "\n".join(prepared.describe())
    assert said == (kept > 0)
    return kept


@pytest.mark.parametrize("engine", ENGINES)
def test_the_same_graph_is_found_at_any_batch_size(engine):
    assert [found(network("residual"), engine, sizes=sizes) for sizes in ([4], [4], [1], [2, 8])] == [0, 2, 2, 2]


@pytest.mark.parametrize("engine", ENGINES)
def test_other_weights_layouts_shapes_and_versions_are_not(engine, monkeypatch):
    staged = network("conv")
    found(staged, engine)
    assert found(staged, engine, sample_shape=(3, 24, 24)) == 0
    assert found(staged, engine, channels_last=True) == 0
    with torch.no_grad():
        next(staged.stages[1].parameters()).mul_(1.5)
    assert found(staged, engine) == 1
    monkeypatch.setattr(export, "package_version", lambda name: "0.1" if name == engine else "1")
    assert found(staged, engine) == 0


def _activated(activation) -> StagedModel:
    """A network whose modules tell nothing of what it computes."""

    class Activated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return activation(self.linear(x))

    torch.manual_seed(0)
    return StagedModel([Activated()]).eval()


@pytest.mark.parametrize("engine", ENGINES)
def test_the_same_weights_under_other_code_are_another_graph(engine):
    options = {"engine": engine, "sample_shape": (4,)}
    assert _activated(torch.relu).fingerprint() == _activated(torch.tanh).fingerprint()
    assert found(_activated(torch.relu), **options) == 0
    assert found(_activated(torch.tanh), **options) == 0
    assert found(_activated(torch.relu), **options) == 1
    for scale in (1.0, 2.0):
        assert found(_activated(lambda x, scale=scale: x * scale), **options) == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_a_damaged_file_is_converted_anew(engine):
    found(network("conv"), engine)
    for graph in (cache_dir() / "stages").glob(f"{engine}-*/stage.*"):
        graph.write_bytes(graph.read_bytes()[:-7])
    assert [found(network("conv"), engine) for _ in range(2)] == [0, 2]


_PREPARE = """
import sys, torch
from torch import nn
from dgate_rt import StagedModel
from dgate_rt.engines import precision, prepare

torch.manual_seed(0)
precision.supports_bfloat16 = lambda device: True
staged = StagedModel([nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Sequential(nn.Flatten(), nn.Linear(144, 5))])
prepared = prepare(staged.eval(), sys.argv[1], sizes=[4], sample_shape=(3, 8, 8), dtype=sys.argv[2])
print(sum(stage.run.found for stage in prepared.stages))
"""


@pytest.mark.parametrize(("engine", "dtype"), [needs("openvino", "bfloat16"), needs("onnxruntime", "float32")])
def test_the_next_process_finds_it(engine, dtype):
    command = [sys.executable, "-c", _PREPARE, engine, dtype]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert [run.splitlines()[-1] for run in runs] == ["0", "2"]


def test_packages_have_versions_whatever_they_are_installed_as(monkeypatch):
    assert versions.package_version("torch") == metadata.version("torch")
    assert versions.package_version("no_such_package") is None
    monkeypatch.setattr(versions, "_distributions", lambda: {"runtime": ["runtime-gpu", "runtime-gpu"]})
    monkeypatch.setattr(metadata, "version", {"runtime-gpu": "1.2"}.__getitem__)
    assert versions.package_version("runtime") == "runtime-gpu 1.2"


@pytest.mark.parametrize("engine", [needs("openvino")])
def test_openvino_needs_no_disk(engine, monkeypatch):
    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(export, "kept_files", full)
    assert found(network("conv"), engine) == 0


@pytest.mark.parametrize("engine", ["eager", needs("openvino")])
def test_a_limit_that_is_no_number_is_told_before_an_engine_is_tried(engine, monkeypatch):
    monkeypatch.setenv("DGATE_RT_CACHE_GIB", "much")
    with pytest.raises(ValueError, match="DGATE_RT_CACHE_GIB: expected a number of GiB"):
        prepare(network("conv"), engine, sizes=[4], sample_shape=(3, 16, 16))
