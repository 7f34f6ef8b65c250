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
import logging
import torch
from functorch.compile import aot_function
from torch._subclasses import FakeTensorMode
from dgate_rt import ops

logging.disable(logging.WARNING)  # without a driver the compiler cannot tell which tensors a kernel writes, and says so
graphs = []
def note(graph, arguments):
    graphs.append(graph.code)
    return graph

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
    print(graph.count("triton_kernel_wrapper_functional("), graph.count("dgate_rt.gate_score"))
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
    score, distances, wide, cpu = (tuple(map(int, line.split())) for line in run(TRACE).splitlines())
    assert score == distances == (1, 0)
    assert wide[0] > 1  # pools, multiplies, combines
    assert wide[1] == 0
    assert cpu == (0, 1)


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
