"""What is measured: networks with random weights, gates after some stages, images, and every gate's margins on them.

The last BatchNorm of each residual branch is small, as it is after training, and the images differ in contrast and in
colour: so margins differ from image to image by far more than bfloat16's rounding, and answers can be checked.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torchvision.models as tv
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from dgate_rt import Gate, GateProgram, Pool, StagedModel, split
from dgate_rt.backbones import CifarResNet, build
from dgate_rt.bench.workload import Mix, Workload
from dgate_rt.executors import Predictions
from dgate_rt.files import gates_off
from dgate_rt.gate import margin_and_label, pooled_width
from dgate_rt.staged import as_tuple

BRANCH_SCALE = 0.05  # of the last BatchNorm of a residual branch
TOLERANCE = 2e-3  # float error of a margin, relative to the largest, where none was measured to be larger
EXACT_BATCH = 64


@dataclass(frozen=True)
class Network:
    """A network to measure, the side of its square images, where it is cut, and what its gates read."""

    name: str
    build: Callable[[], nn.Module]
    side: int
    cuts: tuple[str, ...] = ("layer1", "layer2", "layer3")
    pool: Pool = Pool.AVG


RESNET_101 = Network("CIFAR ResNet-101", lambda: build("resnet101"), 32)
DENSENET_201 = Network(
    "CIFAR DenseNet-201", lambda: build("densenet201"), 32, tuple(f"features.denseblock{i}" for i in (1, 2, 3))
)
RESNET_50 = Network("ImageNet ResNet-50", tv.resnet50, 224)
VIT_B = Network(
    "ImageNet ViT-B/16", tv.vit_b_16, 224, tuple(f"encoder.layers.encoder_layer_{i}" for i in (2, 5, 8)), Pool.CLS
)
NETWORKS = (RESNET_101, DENSENET_201, RESNET_50, VIT_B)
TINY = Network(
    "tiny ResNet",
    lambda: CifarResNet(Bottleneck, (1, 1, 1, 1), num_classes=10, width=0.125, in_channels=3),
    16,
)


@dataclass(frozen=True)
class Case:
    """A network on its device: as it is deployed, channels_last, and in float32."""

    network: Network
    model: nn.Module  # before it was split, with the same parameters
    program: GateProgram
    exact: StagedModel

    @property
    def device(self) -> torch.device:
        return next(self.exact.parameters()).device

    def images(self, count: int) -> Tensor:  # [count, 3, side, side], of the program's dtype, channels_last
        """Noise whose contrast and colour differ from image to image."""
        images = _images(count, self.network.side, self.device).to(self.program.input_dtype)
        return images.contiguous(memory_format=torch.channels_last)


def make_case(network: Network, device: torch.device | str, dtype: torch.dtype) -> Case:
    """The network with random weights and a gate after each cut, deployed in ``dtype``."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = network.build().eval()
        for module in model.modules():
            if isinstance(module, Bottleneck):
                nn.init.constant_(module.bn3.weight, BRANCH_SCALE)
        exact = split(model, network.cuts, example=torch.randn(2, 3, network.side, network.side)).to(device)
        images = _images(32, network.side, torch.device(device))
        _settle(exact, images)
        exact.to(memory_format=torch.channels_last)
        with torch.inference_mode():
            widths = [pooled_width(tuple(f.shape[1:]), network.pool) for f in exact.features(images[:1])]
            classes = exact(images[:1]).shape[1]
        gates = [Gate(width, classes, network.pool) for width in widths]
        for gate in gates:
            nn.init.normal_(gate.weight, std=gate.width**-0.5)
            gate.to(device)
    staged = copy.deepcopy(exact).to(dtype)
    return Case(network, model, gates_off(staged, gates, images[:1].to(dtype)), exact)


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


def measure(
    case: Case, batch_size: int, least_images: int, least_batches: int = 4, dtype: torch.dtype | None = None
) -> Work:
    """Run the deployed network; the float error is what float32 answers differently.

    Args:
        case: the network.
        batch_size: of the batches.
        least_images: how many images there are at least.
        least_batches: how many batches.
        dtype: what the program will be compiled to compute in, where that is not its own.
    """
    images = case.images(batch_size * max(least_batches, -(-least_images // batch_size)))
    batches = images.split(batch_size)
    staged = case.program.staged if dtype is None else copy.deepcopy(case.exact).to(dtype)
    dtype = dtype or case.program.input_dtype
    margins, labels, gaps = _scores(staged, case.program.gates, (batch.to(dtype) for batch in batches))
    exact, _, _ = _scores(case.exact, case.program.gates, (batch.float() for batch in images.split(EXACT_BATCH)))
    band = torch.maximum(2 * (margins - exact).abs().amax(1), TOLERANCE * margins.abs().amax(1).clamp_min(1.0))
    return Work(Workload(case.model, case.program, images, margins, labels), batches, gaps, band)


def _settle(model: nn.Module, images: Tensor) -> nn.Module:
    """Give every BatchNorm the statistics of some images, so that 101 random layers do not blow up."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # cumulative average
    with torch.no_grad():
        model(images)
    return model.eval()


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
