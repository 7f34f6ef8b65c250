"""What can be seen of the path on CUDA without a GPU: what compilers trace, and that nothing there reads the device.

Fake tensors claim to lie on CUDA; any read of their data raises.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode

from dgate_rt import ops

pytest.importorskip("triton", reason="needs Triton")

PRELUDE = """
import torch, triton
from functorch.compile import aot_function
from torch._subclasses import FakeTensorMode
from triton.backends.compiler import GPUTarget
from dgate_rt import ops

class Driver:  # so that the compiler can read a kernel for what it writes
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
    def get_active_torch_device(self):
        return torch.device("cuda", 0)

triton.runtime.driver.set_active(Driver())
graphs = []
def note(graph, arguments):
    graphs.append(graph)
    return graph

def triton_kernels(graph):
    return [node for node in graph.graph.nodes if "triton_kernel_wrapper_functional" in str(node.target)]

def written(graph):
    return sorted({name for node in triton_kernels(graph) for name in node.kwargs["tensors_to_clone"]})

def trace(function, *arguments):
    try:
        aot_function(function, fw_compiler=note)(*arguments)
    except Exception:
        if not graphs:
            raise
    return graphs.pop()
"""

TRACE = """
with FakeTensorMode(), torch.device("cuda"):
    features, weight, bias = torch.empty(8, 64, 4, 4, dtype=torch.float16), torch.empty(10, 64), torch.empty(10)
    count = torch.empty((), dtype=torch.int32)
    score = trace(lambda f, w, b, c: ops.gate_score(f, w, b, "avg", c), features, weight, bias, count)
    distances = trace(lambda *a: ops.gate_distances(*a, criterion="entropy"), features, weight, bias)
    wide = trace(lambda *a: ops.gate_score(*a), features, torch.empty(1000, 64), torch.empty(1000))
with FakeTensorMode(), torch.device("cpu"):
    cpu = trace(lambda *a: ops.gate_score(*a), torch.empty(8, 64), torch.empty(10, 64), torch.empty(10))
for graph in (score, distances, wide, cpu):
    print(len(triton_kernels(graph)), graph.code.count("dgate_rt.gate_score"), *written(graph))
"""

THREADS = """
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

together = Barrier(8)
def first_score(_):
    together.wait()
    given = ops._checked_score((torch.empty(0, 4), torch.empty(3, 4), torch.empty(3), "avg"), {})
    return ops._score_by_triton(False, given)

with ThreadPoolExecutor(8) as pool:
    print(len(list(pool.map(first_score, range(8)))))
"""


def run(code: str) -> str:
    """What a Python without Triton's interpreter prints."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_compilers_see_the_triton_kernels_of_a_score_on_cuda_and_one_operator_on_the_cpu() -> None:
    score, distances, wide, cpu = (line.split() for line in run(TRACE).splitlines())
    assert score == ["1", "0", "labels", "margin"]
    assert distances == ["1", "0", "distances", "labels", "margin"]
    assert int(wide[0]) > 1  # pools, multiplies, combines
    assert wide[1:] == ["0", "labels", "margin", "partial", "pooled", "tile_labels"]
    assert cpu == ["0", "1"]


def test_threads_may_score_for_the_first_time_at_once() -> None:
    assert run(THREADS) == "8\n"


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
def test_a_score_by_triton_has_no_gradient() -> None:
    weight = torch.ones(2, 4, requires_grad=True)
    given = ops._checked_score((torch.ones(3, 4), weight, torch.zeros(2), "avg"), {})
    margin, _ = ops._score_by_triton(False, given)
    assert torch.equal(margin, torch.full((3,), 4.0))
    assert not margin.requires_grad


@pytest.mark.parametrize("operator", ["gate_score", "gate_distances", "route_"])
def test_every_operator_has_a_kernel_for_cuda(operator: str) -> None:
    if operator == "route_" and ops.build_info()["cuda"] is None:
        pytest.skip(f"the CUDA half is not built: {ops.build_info()['cuda_error']}")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dgate_rt::{operator}", "CUDA")


def test_a_gate_on_another_device_than_the_features_is_refused_whoever_asks() -> None:
    with (
        FakeTensorMode(),
        pytest.raises(ValueError, match=r"weight: expected \[K, 64\] float32 on cuda:0, got .* on cpu"),
    ):
        ops.gate_score(torch.empty(8, 64, device="cuda"), torch.empty(10, 64), torch.empty(10))
