"""What all tests share: seeds, threads, the `gpu` marker, and a network small enough to run in a millisecond."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dgate_rt.gate import Gate
from dgate_rt.graphs import DriverCounts, driver_counts, reset_simulation

if TYPE_CHECKING:
    from dgate_rt.experiments.workbench import Workbench

CLASSES = 5

if not torch.cuda.is_available():  # then Triton has nothing to compile for, and its kernels run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

hypothesis.settings.register_profile("dgate", deadline=None, derandomize=True)  # slow machines are no failure
hypothesis.settings.load_profile("dgate")

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers are the parallelism
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Stage times are measured once a session, and the user's own are left alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DGATE_RT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _same_start():
    """Each test starts from the same seeds and hands back the thread count that it found."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries read the global generator
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where a test makes its tensors."""
    with torch.device(request.param):
        yield request.param


@pytest.fixture
def cpu(device: str) -> None:
    """For what is promised or known on the CPU alone."""
    if device != "cpu":
        pytest.skip("said of the CPU kernels only")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For networks too small to share out; on a busy machine the threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bench(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    """A tiny network on digits, trained for a few epochs, and a folder for what experiments make of it."""
    from test_experiments import TINY, TRAINING

    from dgate_rt.experiments.workbench import Workbench

    return Workbench(tmp_path_factory.mktemp("bench"), training=replace(TRAINING, epochs=3), **TINY)


@pytest.fixture
def again(bench: Workbench, tmp_path: Path) -> Workbench:
    """The same network in a folder that keeps nothing yet."""
    from dgate_rt.experiments.workbench import Workbench

    return Workbench(tmp_path, network=bench.folder / "network.safetensors", progress=False)


@pytest.fixture
def simulation() -> Iterator[DriverCounts]:
    """The recording driver with its counts at zero; the test must leave nothing more alive in it than it finds."""
    if max(driver_counts()[-2:]) > 0:
        gc.collect()  # what tests before this one left to it
    reset_simulation()
    before = driver_counts()
    yield before
    if driver_counts()[-2:] != before[-2:]:
        gc.collect()
    reset_simulation()
    assert driver_counts()[-2:] == before[-2:], "graphs or captures were left behind"


def conv_block(channels_in: int, channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
    )


@pytest.fixture
def tiny_staged():
    """Three gates over 8, 16 and 24 channels, then the classifier; input [N, 3, 16, 16], 5 classes, eval mode."""
    from dgate_rt.staged import StagedModel

    head = nn.Sequential(conv_block(24, 24), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, CLASSES))
    model = StagedModel(stages=[conv_block(3, 8), conv_block(8, 16, 2), conv_block(16, 24, 2), head])
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_mean, -0.2, 0.2)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return model.eval()


@pytest.fixture
def tiny_gates() -> nn.ModuleList:
    """Random gates that fit `tiny_staged`; over `tiny_images` their margins differ from sample to sample."""
    gates = nn.ModuleList(Gate(width, CLASSES) for width in (8, 16, 24))
    for gate in gates:
        nn.init.normal_(gate.weight)
        nn.init.normal_(gate.bias, std=0.1)
    return gates


@pytest.fixture
def tiny_images() -> Tensor:  # [31, 3, 16, 16] float32
    """An odd number of images, each of its own brightness."""
    return torch.randn(31, 3, 16, 16) * torch.linspace(0.2, 2.0, 31)[:, None, None, None]


@pytest.fixture
def images() -> Tensor:  # [129, 3, 16, 16] float32
    """As many as make several batches, each of its own brightness, in no order."""
    return torch.randn(129, 3, 16, 16) * torch.linspace(0.2, 2.0, 129)[torch.randperm(129), None, None, None]


@pytest.fixture
def program(tiny_staged, tiny_gates, images):
    """Of which some of `images` leave at every gate."""
    from programs import program_with

    return program_with(tiny_staged, tiny_gates, images, 0.4)
