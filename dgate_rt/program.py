"""GateProgram: gates, thresholds and frontier for one backbone, frozen; one safetensors file on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from dgate_rt.cost import Costs
from dgate_rt.errors import ProgramError
from dgate_rt.frontier import Frontier, OperatingPoint
from dgate_rt.gate import Gate
from dgate_rt.staged import StagedModel, split

SCHEMA_VERSION = 1
_FORMAT = "dgate_rt.program"


@dataclass(frozen=True, eq=False)
class GateProgram:
    """Everything a runtime needs beside the backbone; made by `calibrate`, saved and loaded whole."""

    staged: StagedModel
    gates: tuple[Gate, ...]  # length G
    thresholds: tuple[float, ...]  # length G; +inf is a gate that is off
    point: OperatingPoint  # what these thresholds gave on validation data
    frontier: Frontier
    costs: Costs
    network_accuracy: float  # of the whole network on validation data
    input_shape: tuple[int, ...]  # one sample
    input_dtype: torch.dtype

    def at(
        self,
        *,
        max_accuracy_drop: float | None = None,
        min_accuracy: float | None = None,
        max_cost: float | None = None,
    ) -> GateProgram:
        """The same program at another point of its frontier.

        Raises:
            ValueError: unless exactly one target is given.
            UnreachableTargetError: when the frontier has no such point; the message says what is reachable.
        """
        targets = {"max_accuracy_drop": max_accuracy_drop, "min_accuracy": min_accuracy, "max_cost": max_cost}
        given = {name: value for name, value in targets.items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"at: expected one of {', '.join(targets)}, got {' and '.join(given) or 'none'}")
        if max_cost is not None:
            point = self.frontier.most_accurate(max_cost)
        else:
            drop = max_accuracy_drop or 0.0
            point = self.frontier.cheapest(self.network_accuracy - drop if min_accuracy is None else min_accuracy)
        return replace(self, thresholds=point.thresholds, point=point)

    @property
    def cost_reduction(self) -> float:
        """Share of the dense network's cost that is saved on validation data."""
        return 1 - self.point.cost / self.costs.dense

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the program, without the backbone, to one safetensors file; whole or not at all."""
        points = self.frontier.points
        tensors = {
            "frontier.thresholds": torch.tensor([p.thresholds for p in points], dtype=torch.float64),
            "frontier.accuracy": torch.tensor([p.accuracy for p in points], dtype=torch.float64),
            "frontier.cost": torch.tensor([p.cost for p in points], dtype=torch.float64),
            "frontier.shares": torch.tensor([p.shares for p in points], dtype=torch.float64),
            "thresholds": torch.tensor(self.thresholds, dtype=torch.float64),
        }
        for g, gate in enumerate(self.gates):
            tensors[f"gates.{g}.weight"] = gate.weight.detach().cpu().contiguous()
            tensors[f"gates.{g}.bias"] = gate.bias.detach().cpu().contiguous()
        header = {
            "cuts": list(self.staged.cuts),
            "pools": [gate.pool.value for gate in self.gates],
            "costs": asdict(self.costs),
            "point": asdict(replace(self.point, thresholds=())),
            "network_accuracy": self.network_accuracy,
            "input_shape": list(self.input_shape),
            "input_dtype": str(self.input_dtype).removeprefix("torch."),
            "fingerprint": self.staged.fingerprint(),
        }
        metadata = {"format": _FORMAT, "schema": str(SCHEMA_VERSION), "program": json.dumps(header)}
        partial = Path(f"{os.fspath(path)}.partial")
        save_file(tensors, partial, metadata)
        os.replace(partial, path)


def load(path: str | os.PathLike[str], model: nn.Module) -> GateProgram:
    """Read a program and attach it to its backbone, ``model`` (or the `StagedModel` it was made with).

    Nothing is unpickled.

    Raises:
        FileNotFoundError: if there is no such file.
        ProgramError: if the file is damaged, foreign, of another schema, or made for another backbone.
    """
    tensors, header = _read(Path(path))
    try:
        return _attach(tensors, header, model)
    except (KeyError, TypeError, AttributeError) as error:
        raise ProgramError(f"{path}: the program lacks or garbles {error}") from error


def _attach(tensors: dict[str, torch.Tensor], header: dict[str, Any], model: nn.Module) -> GateProgram:
    shape, dtype = tuple(header["input_shape"]), getattr(torch, header["input_dtype"])
    staged = model if isinstance(model, StagedModel) else split(model, header["cuts"], _example(shape, dtype, model))
    fingerprint = staged.fingerprint()
    if fingerprint != header["fingerprint"]:
        raise ProgramError(f"backbone: expected fingerprint {header['fingerprint']}, got {fingerprint}")
    gates = []
    for g, pool in enumerate(header["pools"]):
        weight, bias = tensors[f"gates.{g}.weight"], tensors[f"gates.{g}.bias"]
        if weight.ndim != 2 or bias.shape != weight.shape[:1]:
            raise ProgramError(
                f"gate {g}: expected weight [K, C] and bias [K], got {list(weight.shape)} and {list(bias.shape)}"
            )
        gate = Gate(weight.shape[1], weight.shape[0], pool)
        gate.load_state_dict({"weight": weight, "bias": bias})
        gates.append(gate)
    if not len(gates) == len(tensors["thresholds"]) == staged.gate_count:
        raise ProgramError(
            f"gates: expected {staged.gate_count}, one a cut, got {len(gates)} gates and "
            f"{len(tensors['thresholds'])} thresholds"
        )
    rows = zip(
        *(tensors[f"frontier.{name}"].tolist() for name in ("thresholds", "accuracy", "cost", "shares")), strict=True
    )
    points = tuple(OperatingPoint(tuple(t), accuracy, cost, tuple(shares)) for t, accuracy, cost, shares in rows)
    thresholds = tuple(tensors["thresholds"].tolist())
    at, costs = header["point"], header["costs"]
    return GateProgram(
        staged=staged,
        gates=tuple(gates),
        thresholds=thresholds,
        point=OperatingPoint(thresholds, at["accuracy"], at["cost"], tuple(at["shares"])),
        frontier=Frontier(points),
        costs=Costs(costs["unit"], tuple(costs["stages"]), tuple(costs["gates"])),
        network_accuracy=header["network_accuracy"],
        input_shape=shape,
        input_dtype=dtype,
    )


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"program: no such file: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except SafetensorError as error:
        raise ProgramError(f"{path}: expected a safetensors file, got a damaged or foreign one ({error})") from error
    if metadata.get("format") != _FORMAT:
        raise ProgramError(f"{path}: expected format {_FORMAT!r}, got {metadata.get('format')!r}")
    if metadata.get("schema") != str(SCHEMA_VERSION):
        raise ProgramError(f"{path}: expected schema {SCHEMA_VERSION}, got {metadata.get('schema')}")
    try:
        header: dict[str, Any] = json.loads(metadata["program"])
    except (KeyError, json.JSONDecodeError) as error:
        raise ProgramError(f"{path}: the program's header cannot be read ({error})") from error
    return tensors, header


def _example(shape: Sequence[int], dtype: torch.dtype, model: nn.Module) -> torch.Tensor:
    """Two samples to check the cuts on, where the model is."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if not dtype.is_floating_point:
        return torch.zeros((2, *shape), dtype=dtype, device=device)
    return torch.randn((2, *shape), generator=torch.Generator().manual_seed(0)).to(device, dtype)
