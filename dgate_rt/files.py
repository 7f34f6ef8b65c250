"""The files that pass between commands: a network with where it comes from, and gates or programs for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dgate_rt import backbones, data, program
from dgate_rt.backbones import BackboneMeta
from dgate_rt.cost import measure_costs
from dgate_rt.data import DataBundle
from dgate_rt.frontier import Frontier, OperatingPoint
from dgate_rt.gate import Gate
from dgate_rt.program import GateProgram
from dgate_rt.staged import StagedModel

_FOLDER_ZOOM = 256 / 224  # torchvision's evaluation of ImageNet: a short side of 256, cut to 224


@dataclass(frozen=True)
class Network:
    """A trained network from a file, in eval mode."""

    path: Path
    model: nn.Module
    meta: BackboneMeta

    @property
    def zoom(self) -> float:
        """How much larger than the network's input an image is first made."""
        return _FOLDER_ZOOM if self.meta.dataset == "folder" else 1.0


def open_network(path: Path, device: torch.device | str = "cpu") -> Network:
    """Read a network that ``dgate train``, ``dgate transfer`` or the demo wrote.

    Raises:
        ValueError: if the file does not say what images the network takes.
    """
    model, meta = backbones.load_backbone(path)
    if len(meta.classes) != meta.num_classes or len(meta.stats[0]) != meta.in_channels:
        raise ValueError(
            f"network: expected classes and normalisation in {path}, got none; save it with BackboneMeta.of"
        )
    return Network(path, model.to(device), meta)


def open_program(path: Path, network: Network) -> GateProgram:
    """The gates or the program at ``path``, where the network that they were made for is."""
    loaded = program.load(path, network.model)
    device = next(network.model.parameters()).device
    return replace(loaded, gates=tuple(gate.to(device) for gate in loaded.gates))


def open_data(network: Network, name: str | None, root: Path | None, download: bool) -> DataBundle:
    """The images that the network was trained on, split alike, or others; normalised as the network wants them.

    Raises:
        ValueError: if the other images differ in shape or number of classes.
    """
    meta = network.meta
    how: Any = {"root": root, "image_size": meta.image_size, "seed": meta.data_seed, "download": download}
    bundle = data.load(name or meta.dataset, **how)
    expected = (meta.in_channels, meta.image_size, meta.image_size)
    if bundle.image_shape != expected:
        raise ValueError(f"data: expected images of shape {expected} for {network.path}, got {bundle.image_shape}")
    if len(bundle.classes) != meta.num_classes:
        raise ValueError(f"data: expected {meta.num_classes} classes for {network.path}, got {len(bundle.classes)}")
    return bundle if bundle.stats == meta.stats else data.load(name or meta.dataset, **how, stats=meta.stats)


def gates_off(
    staged: StagedModel,
    gates: Iterable[Gate],
    example: Tensor,  # [N, ...]
) -> GateProgram:
    """A program that is not calibrated: every gate is off, and the frontier is the dense network, accuracy unknown."""
    gates = tuple(gates)
    costs = measure_costs(staged, gates, example)
    count, unknown = len(gates), float("nan")
    point = OperatingPoint((float("inf"),) * count, unknown, costs.dense, (0.0,) * count + (1.0,))
    return GateProgram(
        staged=staged,
        gates=gates,
        thresholds=point.thresholds,
        point=point,
        frontier=Frontier((point,)),
        costs=costs,
        network_accuracy=unknown,
        input_shape=tuple(example.shape[1:]),
        input_dtype=example.dtype,
    )


def device_of(name: str) -> torch.device:
    """The device of an option.

    Raises:
        ValueError: if there is none of that name here.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: expected cpu or cuda, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {name} was asked for, but torch sees no CUDA device here; see dgate doctor")
    return device
