"""How long it takes to put ResNet-101 on engines that keep what they convert: ``pytest bench/test_preparation.py``.

The first time, and when it is found again. Inductor is not here: a second run in one process says nothing of the next.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import dgate_rt as dg
from dgate_rt.bench.cases import RESNET_101
from dgate_rt.cache import VARIABLE
from dgate_rt.engines import check_engine, prepare, supports_bfloat16

SIZES = (1, 4, 16, 32, 64)  # what `refill` prepares for batches of 64


@pytest.fixture(scope="module")
def staged() -> dg.StagedModel:
    torch.manual_seed(0)
    return dg.split(RESNET_101.build().eval(), RESNET_101.cuts)


@pytest.mark.parametrize("again", [False, True], ids=["first", "again"])
@pytest.mark.parametrize(
    ("engine", "dtype"), [("openvino", "float32"), ("openvino", "bfloat16"), ("onnxruntime", "float32")]
)
def test_preparation(benchmark, staged, engine, dtype, again, tmp_path: Path, monkeypatch):
    check_engine(engine, torch.device("cpu"))
    if dtype == "bfloat16" and not supports_bfloat16(torch.device("cpu")):
        pytest.skip("this CPU does not multiply bfloat16")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "kept"))

    def run() -> None:
        prepare(staged, engine, sizes=SIZES, sample_shape=(3, 32, 32), dtype=dtype, channels_last=True)

    def forget() -> None:
        shutil.rmtree(tmp_path / "kept", ignore_errors=True)

    benchmark.pedantic(run, setup=None if again else forget, rounds=3, warmup_rounds=1)
