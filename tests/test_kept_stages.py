"""What OpenVINO and ONNX Runtime read is converted once, and found by the next process that wants the same graph."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from engine_cases import needs, network
from torch import Tensor, nn

from dgate_rt import StagedModel
from dgate_rt.cache import cache_dir
from dgate_rt.engines import prepare

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
    monkeypatch.setattr(sys.modules[engine], "__version__", "0.1")
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


@pytest.mark.parametrize("engine", ENGINES)
def test_where_packages_come_under_other_names_it_works(engine, monkeypatch):
    """onnxruntime-gpu is imported as onnxruntime, say."""
    monkeypatch.setattr("importlib.metadata.version", lambda name: pytest.fail("asked for a distribution by name"))
    assert found(network("conv"), engine) == 0
