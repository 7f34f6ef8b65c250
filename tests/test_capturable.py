"""What a stage must not do where it is to be captured is refused by name, and what was taken is freed."""

from __future__ import annotations

import gc
import re
import weakref

import pytest
import torch
import torch.nn.functional as F
from captured_checks import simulate
from programs import make_program
from torch import nn
from torch._subclasses import FakeTensorMode

import dgate_rt as dg
from dgate_rt import Gate, StagedModel, ops
from dgate_rt.executors import captures
from dgate_rt.executors.capturable import refuse_uncapturable
from dgate_rt.executors.captures import SimulatedCaptures, first_cause, reason
from dgate_rt.graphs import driver_counts


class Does(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


FORBIDDEN = {
    "item": (lambda x: x * x.sum().item(), "reads device data on the host (aten._local_scalar_dense.default)"),
    "branch": (lambda x: x if x.sum() > 0 else -x, "reads device data on the host"),
    "equal": (lambda x: x * torch.equal(x, x), "reads device data on the host (aten.equal.default)"),
    "mask": (lambda x: x + x[x > 0].sum(), "has an output whose shape depends on data"),
    "nonzero": (lambda x: x + len(x.nonzero()), "has an output whose shape depends on data"),
    "dropout": (lambda x: F.dropout(x, training=True), "draws random numbers"),
    "noise": (lambda x: x + torch.randn_like(x), "draws random numbers (aten.randn_like.default)"),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1), "draws random numbers"),
    "batch norm": (lambda x: F.batch_norm(x, None, None, training=True), "normalises by the statistics of its batch"),
    "train mode": (nn.BatchNorm2d(3).train(), "normalises by the statistics of its batch"),
    "no statistics": (nn.BatchNorm2d(3, track_running_stats=False).eval(), "normalises by the statistics of its batch"),
}
ALLOWED = {
    "no dropout": lambda x: F.dropout(x, training=False),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "instance norm": F.instance_norm,
    "batch norm": nn.BatchNorm2d(3).eval(),
    "encoder layer": nn.Sequential(nn.Flatten(1, 2), nn.TransformerEncoderLayer(4, 2, batch_first=True)).eval(),
    "LSTM": nn.Sequential(nn.Flatten(1, 2), nn.LSTM(4, 4, batch_first=True)).eval(),
}


def run(function, x):
    stage = nn.Sequential(nn.Identity(), function if isinstance(function, nn.Module) else Does(function))
    with refuse_uncapturable(stage, "stage 2"):
        return stage(x)


@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_is_forbidden_is_named_with_module_and_operator(name, inference):
    function, why = FORBIDDEN[name]
    expected = re.escape(f"executor: stage 2, module '1', {why}")
    with torch.inference_mode() if inference else torch.no_grad(), pytest.raises(dg.ExecutorError, match=expected):
        run(function, torch.randn(4, 3, 4, 4))


@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("name", ALLOWED)
def test_what_only_looks_forbidden_is_not(name, inference):
    with torch.inference_mode() if inference else torch.no_grad():
        run(ALLOWED[name], torch.randn(4, 3, 4, 4))


@pytest.mark.parametrize(
    "function", [lambda x: x.cpu(), lambda x: x + torch.ones(3).to("cuda"), lambda x: torch.ones(4, 3).copy_(x)]
)
def test_a_copy_between_host_and_device_is_refused(function):
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(4, 3, device="cuda")
        with pytest.raises(dg.ExecutorError, match="stage 2, module '1', copies between host and device"):
            run(function, x)


def test_no_hook_stays_behind():
    hooks = nn.modules.module
    before = len(hooks._global_forward_hooks), len(hooks._global_forward_pre_hooks)
    with pytest.raises(dg.ExecutorError), torch.no_grad():
        run(FORBIDDEN["item"][0], torch.randn(4, 3))
    assert (len(hooks._global_forward_hooks), len(hooks._global_forward_pre_hooks)) == before


@pytest.fixture
def program(tiny_staged, tiny_gates, tiny_images):
    return make_program(tiny_staged, tiny_gates, (0.1,) * 3, tiny_images)


simulated = pytest.mark.skipif(not ops.extension_loaded(), reason="the C++ extension is not built")


@simulated
@pytest.mark.parametrize("executor", ["graph", "lag"])
@pytest.mark.parametrize("stage", range(3))
def test_compile_refuses_such_a_stage(executor, stage):
    linear = [nn.Linear(4, 4) for _ in range(3)]
    linear[stage] = nn.Sequential(linear[stage], Does(lambda x: x + torch.rand(4)))
    staged, x = StagedModel(linear).eval(), torch.randn(3, 4)
    program = make_program(staged, nn.ModuleList([Gate(4, 4), Gate(4, 4)]), (0.1, 0.1), x)
    with pytest.raises(dg.ExecutorError, match=f"stage {stage}, module '1', draws random numbers"):
        simulate(program, executor=executor)


@simulated
def test_a_stage_that_does_not_run_is_named():
    staged, x = StagedModel([nn.Linear(4, 4), nn.Linear(4, 4)]).eval(), torch.randn(3, 4)
    program = make_program(staged, nn.ModuleList([Gate(4, 4)]), (0.1,), x)
    staged.stages[1] = nn.Linear(5, 4)
    with pytest.raises(dg.ExecutorError, match=r"stage 1 does not run on 64 samples: .*shapes cannot be multiplied"):
        simulate(program)


class Limited(SimulatedCaptures):
    """Captures of 3 MiB each, until there is no memory left."""

    def __init__(self, most):
        self.made, self.most = [], most

    def reserved(self):
        return len(self.made) * 3 * 2**20

    def __call__(self, function, what):
        if len(self.made) == self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5.00 GiB")
        capture = super().__call__(function, what)
        self.made.append(weakref.ref(capture))
        return capture


@simulated
@pytest.mark.parametrize("executor", ["graph", "lag"])
def test_out_of_memory_says_what_was_needed_and_frees_it(program, monkeypatch, executor, simulation):
    limited = Limited(most=5)
    module = __import__(f"dgate_rt.executors.{executor}", fromlist=["captures_for"])
    monkeypatch.setattr(module, "captures_for", lambda setup, device: limited)
    with pytest.raises(dg.ExecutorError) as caught:
        simulate(program, executor=executor, buckets=[16, 32])
    text = str(caught.value)
    assert "Tried to allocate 5.00 GiB" in text
    assert "arenas" in text
    assert re.search(r"captures: stage 0, bucket 64: 3\.0 MiB; stage 0, bucket 32: 3\.0 MiB; stage 0, bucket 16", text)
    assert "A smaller batch_size than 64, or fewer buckets, would need less" in text
    gc.collect()
    assert len(limited.made) == 5
    assert not any(capture() for capture in limited.made)  # although the error is still here
    assert driver_counts().live_captures == simulation.live_captures


@simulated
def test_a_second_batch_in_flight_that_does_not_fit_frees_the_first(program, monkeypatch, simulation):
    limited = Limited(most=14)
    monkeypatch.setattr("dgate_rt.executors.lag.captures_for", lambda setup, device: limited)
    with pytest.raises(dg.ExecutorError, match="out of memory"):
        simulate(program, executor="lag", buckets=[16, 32])
    gc.collect()
    assert len(limited.made) == 14  # twelve of the first lane
    assert driver_counts()[-2:] == simulation[-2:]


def test_the_first_error_counts_and_is_explained():
    try:
        try:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
    except RuntimeError as error:
        text = reason(first_cause(error))
    assert text.startswith("it waits for the device, or allocates past torch's allocator (CUDA error: operation not")
    assert reason(RuntimeError("whatever")) == "whatever"


def test_a_capture_inside_another_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(dg.ExecutorError, match="cannot be compiled inside another CUDA graph capture"):
        captures.CudaCaptures(torch.device("cuda"))
