"""What `gpu_acceptance` runs: two networks in bfloat16, every gate's margins on the very images, and the engines.

The last BatchNorm of each residual branch is small, as it is after training, and the images differ in contrast and in
colour: so margins differ from image to image by far more than bfloat16's rounding, and answers can be checked.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torchvision.models as tv
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from dgate_rt import Gate, GateProgram, StagedModel, compile, split
from dgate_rt.backbones import CifarResNet, build
from dgate_rt.bench.workload import Mix, Workload, _settle
from dgate_rt.cli.files import gates_off
from dgate_rt.executors import Predictions
from dgate_rt.gate import margin_and_label, pooled_width
from dgate_rt.staged import as_tuple

CUTS = ("layer1", "layer2", "layer3")
BRANCH_SCALE = 0.05  # of the last BatchNorm of a residual branch
TOLERANCE = 2e-3  # float error of a bfloat16 margin, relative to the largest, where none was measured to be larger
EXACT_BATCH = 64
CUDA_ONLY = ("dense graph", "dense compiled")
DENSE = ("dense", *CUDA_ONLY)
GATED = ("eager", "graph", "lag")

Engine = Callable[[Sequence[Tensor]], list[Predictions]]
"""Answers batches, in order."""


@dataclass(frozen=True)
class Network:
    """A network to measure, and the side of its square images."""

    name: str
    build: Callable[[], nn.Module]
    side: int


NETWORKS = (
    Network("CIFAR ResNet-101", lambda: build("resnet101"), 32),
    Network("ImageNet ResNet-50", tv.resnet50, 224),
)
TINY = Network(
    "tiny ResNet",
    lambda: CifarResNet(Bottleneck, (1, 1, 1, 1), num_classes=10, width=0.125, in_channels=3),
    16,
)


@dataclass(frozen=True)
class Case:
    """A network on its device: as it is deployed, bfloat16 and channels_last, and in float32."""

    network: Network
    program: GateProgram
    exact: StagedModel

    @cached_property
    def compiled(self) -> Callable[[Tensor], Tensor]:
        """``torch.compile`` of the deployed network, made once: from the second batch size on its batch is dynamic."""
        return torch.compile(self.program.staged)

    @property
    def device(self) -> torch.device:
        return next(self.exact.parameters()).device

    def images(self, count: int) -> Tensor:  # [count, 3, side, side] bfloat16, channels_last
        """Noise whose contrast and colour differ from image to image."""
        return _images(count, self.network.side, self.device).bfloat16().contiguous(memory_format=torch.channels_last)


def make_case(network: Network, device: torch.device | str) -> Case:
    """The network with random weights and gates after layer1, layer2 and layer3."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = network.build().eval()
        for module in model.modules():
            if isinstance(module, Bottleneck):
                nn.init.constant_(module.bn3.weight, BRANCH_SCALE)
        exact = split(model, CUTS, example=torch.randn(2, 3, network.side, network.side)).to(device)
        images = _images(32, network.side, torch.device(device))
        _settle(exact, images)
        exact.to(memory_format=torch.channels_last)
        with torch.inference_mode():
            widths = [pooled_width(tuple(f.shape[1:]), "avg") for f in exact.features(images[:1])]
            classes = exact(images[:1]).shape[1]
        gates = [Gate(width, classes) for width in widths]
        for gate in gates:
            nn.init.normal_(gate.weight, std=gate.width**-0.5)
            gate.to(device)
    staged = copy.deepcopy(exact).bfloat16()
    return Case(network, gates_off(staged, gates, images[:1].bfloat16()), exact)


@dataclass(frozen=True)
class Work:
    """Batches, and what dense execution with post-hoc gating answers, with its float error."""

    workload: Workload
    batches: tuple[Tensor, ...]
    gaps: Tensor  # [G + 1, N] float32; the largest distance less the second
    band: Tensor  # [G + 1] float32; within it margins are the same

    def program(self, mix: Mix) -> GateProgram:
        """The program at thresholds that give the mix, which its buckets are planned for."""
        program = self.workload.at(self.workload.thresholds(mix))
        shares = self.workload.shares(program.thresholds)
        return replace(program, point=replace(program.point, thresholds=program.thresholds, shares=shares))

    def cost(self, program: GateProgram) -> float:
        """FLOPs of the program, gates included, as a share of the dense network's."""
        reach = [1.0]
        for share in program.point.shares[:-1]:
            reach.append(reach[-1] - share)
        stages = sum(r * flops for r, flops in zip(reach, program.costs.stages, strict=True))
        gates = sum(r * flops for r, flops in zip(reach, program.costs.gates, strict=False))
        return (stages + gates) / program.costs.dense

    def may_flip(self, thresholds: Sequence[float]) -> Tensor:  # [N] bool
        """Samples with a margin within float error of its threshold."""
        distance = (self.workload.margins[:-1] - torch.tensor(thresholds)[:, None]).abs()
        return (distance <= self.band[:-1, None]).any(0)

    def wrong(self, answers: Sequence[Predictions], thresholds: Sequence[float]) -> int:
        """How many answers are not those of dense execution with post-hoc gating."""
        exits, labels, scores = (
            torch.cat([getattr(a, n) for a in answers]).cpu() for n in ("exits", "labels", "scores")
        )
        expected = self.workload.expected(thresholds)
        if len(exits) != len(expected):
            return abs(len(exits) - len(expected))
        taken = exits.clamp(0, len(thresholds)), torch.arange(len(exits))  # what flipped must answer as its own exit
        band = self.band[taken[0]]
        right = (exits == expected.exits) | ((exits == taken[0]) & self.may_flip(thresholds))
        right &= (labels == self.workload.labels[taken]) | (self.gaps[taken] <= 2 * band)
        right &= (scores - self.workload.margins[taken]).abs() <= band
        return int((~right).sum())


def measure(case: Case, batch_size: int, least_images: int) -> Work:
    """Run the deployed network on four batches or more; the float error is what float32 answers differently."""
    images = case.images(batch_size * max(4, -(-least_images // batch_size)))
    batches = images.split(batch_size)
    margins, labels, gaps = _scores(case.program.staged, case.program.gates, batches)
    exact, _, _ = _scores(case.exact, case.program.gates, (batch.float() for batch in images.split(EXACT_BATCH)))
    band = torch.maximum(2 * (margins - exact).abs().amax(1), TOLERANCE * margins.abs().amax(1).clamp_min(1.0))
    return Work(Workload(case.exact, case.program, images, margins, labels), batches, gaps, band)


def prepare(engine: str, case: Case, program: GateProgram, batch: Tensor, simulated: bool) -> Engine:
    """An engine that is ready to run batches like ``batch``."""
    if engine in CUDA_ONLY:
        network = case.compiled if engine == "dense compiled" else case.program.staged
        return _one_by_one(OneGraph(network, batch, len(program.gates)))
    device = "cpu-sim" if simulated and engine in ("graph", "lag") else str(case.device)
    run = compile(program, batch_size=len(batch), device=device, executor=engine, channels_last=True)
    return (lambda batches: list(run.stream(batches))) if engine == "lag" else _one_by_one(run)


class OneGraph:
    """A dense network as one CUDA graph at one batch size, answers included."""

    @torch.inference_mode()
    def __init__(self, network: Callable[[Tensor], Tensor], batch: Tensor, exit_index: int) -> None:
        self._input, self._exit, stream = batch.clone(), exit_index, torch.cuda.Stream()
        self._network = network  # kept, for the graph reads its weights
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles, and lets libraries make their choices
            for _ in range(3):
                margin_and_label(network(self._input).float())
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._scores, self._labels = margin_and_label(network(self._input).float())

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> Predictions:
        self._input.copy_(x)
        self._graph.replay()
        return Predictions(self._labels.clone(), self._scores.clone(), torch.full_like(self._labels, self._exit))


def _one_by_one(run: Callable[[Tensor], Predictions]) -> Engine:
    return lambda batches: [run(batch) for batch in batches]


def _images(count: int, side: int, device: torch.device) -> Tensor:  # [count, 3, side, side] float32
    generator = torch.Generator(device).manual_seed(1)
    noise = torch.randn(count, 3, side, side, generator=generator, device=device)
    contrast = torch.rand(count, 1, 1, 1, generator=generator, device=device) * 0.75 + 0.25
    return noise * contrast + torch.randn(count, 3, 1, 1, generator=generator, device=device)


@torch.inference_mode()
def _scores(staged: StagedModel, gates: Sequence[Gate], batches: Iterable[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Margins, labels and gaps, each [G + 1, N] on the CPU, from stock operators."""
    found: list[list[Tensor]] = [[], [], []]
    for batch in batches:
        scored = []
        for g, boundary in enumerate(staged.boundaries(batch)):  # one by one: the next stage may work in place
            last = g == len(gates)
            distances = as_tuple(boundary)[0].float() if last else gates[g](staged.gate_features(g, boundary))
            first, second = distances.topk(2, 1).values.unbind(1)
            scored.append((*margin_and_label(distances), first - second))
        for kept, values in zip(found, zip(*scored, strict=True), strict=True):
            kept.append(torch.stack(values).cpu())
    margins, labels, gaps = (torch.cat(kept, 1) for kept in found)
    return margins, labels, gaps
