"""What only a GPU can show: streams, captured graphs, compilation, the sanitizers, and times beside their floor.

The operators' own tests (test_score.py, test_route.py) run there as well: ``make gpu`` runs all of them.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import all_margins, make_program, random_gates, thresholds_for
from torch import Tensor

import dgate_rt as dg
from dgate_rt import ops, reference

pytestmark = pytest.mark.gpu


class Gate:
    """One gate of at least 20 rows with everything allocated: score, then route into an arena."""

    def __init__(self, n: int = 300, channels: int = 64, classes: int = 10) -> None:
        def i32(value: int) -> Tensor:
            return torch.tensor(value, dtype=torch.int32, device="cuda")

        self.features = torch.randn(n, channels, 8, 8, device="cuda").to(memory_format=torch.channels_last)
        self.weight, self.bias = torch.randn(classes, channels, device="cuda"), torch.randn(classes, device="cuda")
        self.count, self.thresholds = i32(n), torch.tensor([0.5], device="cuda")
        self.ids = torch.arange(n, device="cuda")
        self.dest, self.dest_ids = torch.empty_like(self.features), torch.empty_like(self.ids)
        self.dest_count, self.bucket, self.status = i32(0), i32(0), i32(0)
        self.buckets = torch.tensor([n // 4, n // 2, n], dtype=torch.int32, device="cuda")
        self.labels, self.exits = torch.full_like(self.ids, -1), torch.full_like(self.ids, -1)
        self.scores = torch.full((n,), math.nan, device="cuda")

    def run(self) -> None:
        margin, label = ops.gate_score(self.features, self.weight, self.bias, "avg", self.count)
        ops.route_(
            [self.features], self.ids, margin, label, self.count, self.thresholds, 0, [self.dest], self.dest_ids,
            self.dest_count, self.labels, self.scores, self.exits,
            buckets=self.buckets, bucket=self.bucket, status=self.status,
        )  # fmt: skip

    def check(self) -> None:
        """Compare what is in the arena and the outputs with the reference, for the rows that are live."""
        live = int(self.count)
        margin, _ = reference.gate_score(self.features[:live], self.weight, self.bias)
        threshold = float(self.thresholds)
        assert ((margin - threshold).abs() > 1e-5).all(), "a margin on the threshold proves nothing"
        stay = margin < threshold
        survivors = int(stay.sum())
        assert int(self.status) == 0
        assert int(self.dest_count) == survivors
        assert torch.equal(self.dest[:survivors], self.features[:live][stay])
        assert torch.equal(self.dest_ids[:survivors], self.ids[:live][stay])
        assert self.exits[:live][~stay].eq(0).all()
        assert int(self.bucket) == (int((self.buckets < survivors).sum()) if survivors else len(self.buckets))


@pytest.fixture(params=["fused", "split", "pooled"])
def gate(request: pytest.FixtureRequest) -> Gate:
    """A gate whose score is one launch; one whose channels are split; one that pools, multiplies and combines."""
    made = {"fused": {}, "split": {"n": 20, "channels": 512}, "pooled": {"classes": 1000}}[request.param]
    gate = Gate(**made)
    gate.run()  # compiles and loads the kernels
    torch.cuda.synchronize()
    return gate


def test_a_gate_never_waits_for_the_device(gate: Gate) -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        gate.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    gate.check()


def test_a_gate_runs_on_the_current_stream(gate: Gate) -> None:
    stream = torch.cuda.Stream()
    gate.exits.fill_(-1)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # so that work on another stream would run too early
        gate.thresholds.fill_(-math.inf)
        gate.run()
        everyone = gate.exits.eq(0).all()
    stream.synchronize()
    assert bool(everyone)


def test_a_captured_gate_obeys_count_and_thresholds_that_change(gate: Gate) -> None:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gate.run()
    n = len(gate.ids)
    for count, threshold in ((n, 0.5), (17, 0.1), (0, 0.5), (n - 1, math.inf), (n // 2, -math.inf), (n, 0.7)):
        gate.count.fill_(count)
        gate.thresholds.fill_(threshold)
        gate.exits.fill_(-1)
        graph.replay()
        torch.cuda.synchronize()
        gate.check()


def test_compilers_take_a_gate_whole(gate: Gate) -> None:
    def score(features: Tensor) -> tuple[Tensor, Tensor]:
        return ops.gate_score(features * 2, gate.weight, gate.bias)

    compiled = torch.compile(score, fullgraph=True)(gate.features)
    for got, expected in zip(compiled, score(gate.features), strict=True):
        torch.testing.assert_close(got, expected)


def test_the_largest_batch() -> None:
    n = 65_536
    margin, ids = torch.rand(n, device="cuda"), torch.arange(n, device="cuda")
    arguments: dict[str, Any] = {
        "src": [torch.randn(n, 24, device="cuda"), torch.randint(0, 255, (n, 13), dtype=torch.uint8, device="cuda")],
        "ids": ids,
        "margin": margin,
        "label": ids % 7,
        "count": None,
        "thresholds": torch.tensor([0.3], device="cuda"),
        "gate": 0,
    }

    def outputs() -> dict[str, Any]:
        made = {name: torch.full_like(ids, -1) for name in ("dest_ids", "out_labels", "out_exits")}
        made |= {"out_scores": torch.zeros_like(margin), "dest": [torch.zeros_like(t) for t in arguments["src"]]}
        return {**made, "dest_count": torch.zeros((), dtype=torch.int32, device="cuda")}

    got, expected = outputs(), outputs()
    ops.route_(**arguments, **got)
    reference.route_(**arguments, **expected)
    for name, tensor in expected.items():
        pairs = zip(got[name], tensor, strict=True) if name == "dest" else [(got[name], tensor)]
        assert all(torch.equal(a, b) for a, b in pairs), name
    too_many = {name: [] if name in ("src", "dest") else t for name, t in {**arguments, **outputs()}.items()}
    longer = torch.zeros(n + 1, device="cuda")
    too_many |= {"ids": longer.long(), "margin": longer, "label": longer.long()}
    with pytest.raises(ValueError, match="ids: expected at most 65536 rows on cuda, got 65537"):
        ops.route_(**too_many)


def routes() -> None:
    """A few routes for the sanitizers; all that is read was copied from the CPU, which initcheck can follow."""

    def cuda(values: Any, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).cuda()

    for n, live, waiting, shape, dtype in (
        (300, 300, 0, (24,), torch.float32),
        (300, 257, 5, (13,), torch.uint8),
        (33, 1, 0, (4097,), torch.bfloat16),
        (5, 0, 2, (3, 2), torch.float64),
    ):
        capacity = n + waiting
        arena = torch.zeros(capacity, *shape, dtype=dtype).cuda()
        out = {name: torch.zeros(n, dtype=torch.int64).cuda() for name in ("out_labels", "out_exits")}
        ops.route_(
            [torch.ones(n, *shape, dtype=dtype).cuda()], torch.arange(n).cuda(), torch.rand(n).cuda(),
            torch.arange(n).cuda(), cuda(live, torch.int32), cuda([0.5], torch.float32), 0, [arena],
            torch.zeros(capacity, dtype=torch.int64).cuda(), cuda(0, torch.int32),
            out_scores=torch.zeros(n).cuda(), waiting=cuda(waiting, torch.int32),
            buckets=cuda([capacity // 2, capacity], torch.int32), bucket=cuda(0, torch.int32),
            status=cuda(0, torch.int32), **out,
        )  # fmt: skip
    torch.cuda.synchronize()


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_the_compute_sanitizer_finds_nothing(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer, from a CUDA toolkit")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--kernel-regex", "kns=route_kernel"]
    if tool == "memcheck":
        command += ["--report-api-errors", "no"]  # torch asks for things that may fail
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from test_gpu import routes; routes()"
    apart = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor an allocation of its own
    command += [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, env=apart, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


def test_times_beside_their_floor(capsys: pytest.CaptureFixture[str]) -> None:
    from dgate_rt.bench import gates

    with capsys.disabled():  # a table to read, not an assertion: time proves nothing on a shared machine
        gates.main(["--quick"])


def test_early_answers_reach_the_host_while_the_last_stage_runs() -> None:
    torch.manual_seed(0)
    late = torch.nn.Sequential(Sleeps(), torch.nn.Linear(8, 4))
    staged, x = dg.StagedModel([torch.nn.Linear(8, 8), late]).eval(), torch.randn(64, 8)
    gates = random_gates(staged, x, classes=4)
    program = make_program(staged, gates, thresholds_for(all_margins(staged, gates, x), 0.5), x)
    run = dg.compile(program, batch_size=64, device="cuda", executor="graph", early_answers=True)
    expected = run(x.cuda()).exits.cpu()
    ticket = run.submit(x.cuda())
    seen = []
    while not ticket.done():
        seen.append(int(ticket.ready().sum()))
    assert int(expected.eq(0).sum()) in seen
    assert torch.equal(ticket.result().exits, expected)


class Sleeps(torch.nn.Module):
    """Keeps the device busy for about half a second."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            torch.cuda._sleep(1_000_000_000)
        return x
