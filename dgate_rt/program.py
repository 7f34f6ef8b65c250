"""GateProgram: gates, thresholds and frontier for one backbone, frozen; one safetensors file on disk."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from dgate_rt.cost import Costs
from dgate_rt.drift import Reference
from dgate_rt.errors import ProgramError, SplitError
from dgate_rt.frontier import Frontier, OperatingPoint
from dgate_rt.gate import Gate
from dgate_rt.risk import Guarantee
from dgate_rt.staged import StagedModel, split
from dgate_rt.writing import replacing

SCHEMA_VERSION = 2


def check_thresholds(
    thresholds: Iterable[float] | torch.Tensor,  # [G]
    count: int,
) -> tuple[float, ...]:
    """Thresholds as numbers.

    Raises:
        TypeError: if they are no sequence of numbers.
        ValueError: if there are not ``count`` of them, or one is NaN.
    """
    try:
        values = tuple(float(t) for t in thresholds)
    except TypeError as error:
        raise TypeError(f"thresholds: expected {count} numbers, one a gate, got {thresholds!r}") from error
    if len(values) != count:
        raise ValueError(f"thresholds: expected {count}, one a gate, got {len(values)}")
    if any(map(math.isnan, values)):
        raise ValueError(f"thresholds: expected numbers, got {values}")
    return values


def check_targets(verb: str, targets: Mapping[str, float | None]) -> list[str]:
    """The names of the targets that are given.

    Raises:
        ValueError: if there are several, or one is negative or NaN.
    """
    given = [name for name, value in targets.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{verb}: expected one of {', '.join(targets)}, got {' and '.join(given)}")
    for name, value in targets.items():
        if value is not None and not value >= 0:
            raise ValueError(f"{name}: expected a number of at least 0, got {value}")
    return given


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
    scores: torch.Tensor | None = None  # [G + 1, N] float32; of gates and network on validation samples, if kept
    guarantee: Guarantee | None = None  # of these thresholds; None without a confidence

    def __post_init__(self) -> None:
        check_thresholds(self.thresholds, len(self.gates))
        if len(self.gates) != self.staged.gate_count:
            raise ValueError(f"gates: expected {self.staged.gate_count}, one a cut, got {len(self.gates)}")
        if self.scores is not None and (self.scores.ndim != 2 or len(self.scores) != len(self.gates) + 1):
            raise ValueError(f"scores: expected shape [{len(self.gates) + 1}, N], got {list(self.scores.shape)}")

    def at(
        self,
        *,
        max_accuracy_drop: float | None = None,
        min_accuracy: float | None = None,
        max_cost: float | None = None,
    ) -> GateProgram:
        """The same program at another point of its frontier, for which no guarantee holds.

        Raises:
            ValueError: unless exactly one target is given.
            UnreachableTargetError: when the frontier has no such point; the message says what is reachable.
        """
        targets = {"max_accuracy_drop": max_accuracy_drop, "min_accuracy": min_accuracy, "max_cost": max_cost}
        if not check_targets("at", targets):
            raise ValueError(f"at: expected one of {', '.join(targets)}, got none")
        if max_cost is not None:
            point = self.frontier.most_accurate(max_cost)
        else:
            drop = max_accuracy_drop or 0.0
            point = self.frontier.cheapest(self.network_accuracy - drop if min_accuracy is None else min_accuracy)
        return replace(self, thresholds=point.thresholds, point=point, guarantee=None)

    @property
    def cost_reduction(self) -> float:
        """Share of the dense network's cost that is saved on validation data."""
        return 1 - self.point.cost / self.costs.dense

    def reference(self, thresholds: Sequence[float] | None = None) -> Reference:
        """Where the validation samples leave at any thresholds, and with what scores; by default at its own.

        A program that keeps no scores, as older files do, gives a reference without samples.

        Raises:
            TypeError, ValueError: if the thresholds are not numbers, or not as many as gates.
        """
        point = self.thresholds if thresholds is None else check_thresholds(thresholds, len(self.gates))
        return Reference.unknown(point) if self.scores is None else Reference.at(self.scores, point)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the program, without the backbone, to one safetensors file; whole or not at all.

        Raises:
            FileNotFoundError: if the folder does not exist.
        """
        points = self.frontier.points
        tensors = {
            "frontier.thresholds": torch.tensor([p.thresholds for p in points], dtype=torch.float64),
            "frontier.accuracy": torch.tensor([p.accuracy for p in points], dtype=torch.float64),
            "frontier.cost": torch.tensor([p.cost for p in points], dtype=torch.float64),
            "frontier.shares": torch.tensor([p.shares for p in points], dtype=torch.float64),
            "thresholds": torch.tensor(self.thresholds, dtype=torch.float64),
        }
        if self.scores is not None:
            tensors["scores"] = self.scores.contiguous()
        for g, gate in enumerate(self.gates):
            tensors[f"gates.{g}.weight"] = gate.weight.detach().cpu().clone()  # a gate may serve two cuts
            tensors[f"gates.{g}.bias"] = gate.bias.detach().cpu().clone()
        header = {
            "cuts": list(self.staged.cuts),
            "split_at": list(self.staged.split_at),
            "nhwc": list(self.staged.nhwc),
            "pools": [gate.pool.value for gate in self.gates],
            "criteria": [gate.criterion.value for gate in self.gates],
            "costs": asdict(self.costs),
            "point": asdict(replace(self.point, thresholds=())),
            "network_accuracy": self.network_accuracy,
            "guarantee": asdict(self.guarantee) if self.guarantee else None,
            "input_shape": list(self.input_shape),
            "input_dtype": str(self.input_dtype).removeprefix("torch."),
            "fingerprint": self.staged.fingerprint(),
        }
        metadata = {"format": _FORMAT, "schema": str(SCHEMA_VERSION), "program": json.dumps(header)}
        with replacing(Path(path)) as partial:
            save_file(tensors, partial, metadata)


def load(path: str | os.PathLike[str], model: nn.Module) -> GateProgram:
    """Read a program and attach it to its backbone, ``model`` (or the `StagedModel` it was made with).

    Nothing is unpickled.

    Raises:
        FileNotFoundError: if there is no such file.
        ProgramError: if the file is damaged, foreign, of another schema, or made for another backbone.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    tensors, header = _read(Path(path))
    try:
        staged = _stage(header, model)
        return _attach(tensors, header, staged)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        if isinstance(error, ProgramError):
            raise
        raise ProgramError(f"{path}: the program lacks or garbles {error}") from error


def _stage(header: dict[str, Any], model: nn.Module) -> StagedModel:
    """The backbone, cut as it was when the program was made."""
    split_at = header.get("split_at", header["cuts"])  # which files from before `StagedModel.keeping` lack
    if isinstance(model, StagedModel):
        staged = model
    else:
        try:
            example = _example(header["input_shape"], getattr(torch, header["input_dtype"]), model)
            staged = split(model, split_at, example)
        except SplitError as error:
            raise ProgramError(
                f"backbone: expected a model with cuts {split_at}, got {type(model).__name__}: {error}; "
                "a program for a hand-made StagedModel wants that StagedModel"
            ) from error
    if list(staged.split_at) == header["cuts"] != split_at:
        raise ProgramError(
            f"backbone: expected the model itself, or a StagedModel with the cuts {split_at}, of which this program "
            f"keeps {header['cuts']}; got one that was split at these alone"
        )
    if list(staged.cuts) == split_at != header["cuts"]:
        staged = staged.keeping(header["cuts"])
    if list(staged.cuts) != header["cuts"]:
        raise ProgramError(f"backbone: expected cuts {header['cuts']}, got {list(staged.cuts)}")
    if list(staged.nhwc) != header["nhwc"]:
        raise ProgramError(f"backbone: expected nhwc {header['nhwc']}, got {list(staged.nhwc)}")
    fingerprint = staged.fingerprint()
    if fingerprint != header["fingerprint"]:
        raise ProgramError(f"backbone: expected fingerprint {header['fingerprint']}, got {fingerprint}")
    return staged


def _attach(tensors: dict[str, torch.Tensor], header: dict[str, Any], staged: StagedModel) -> GateProgram:
    gates = []
    for g, (pool, criterion) in enumerate(zip(header["pools"], header["criteria"], strict=True)):
        weight, bias = tensors[f"gates.{g}.weight"], tensors[f"gates.{g}.bias"]
        if weight.ndim != 2 or bias.shape != weight.shape[:1]:
            raise ProgramError(
                f"gate {g}: expected weight [K, C] and bias [K], got {list(weight.shape)} and {list(bias.shape)}"
            )
        gate = Gate(weight.shape[1], weight.shape[0], pool, criterion)
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
    if not len(tensors["frontier.accuracy"]) or tensors["frontier.thresholds"].shape[1] != len(gates):
        got = list(tensors["frontier.thresholds"].shape)
        raise ProgramError(f"frontier: expected points of {len(gates)} thresholds, got shape {got}")
    points = tuple(OperatingPoint(tuple(t), accuracy, cost, tuple(shares)) for t, accuracy, cost, shares in rows)
    thresholds = tuple(tensors["thresholds"].tolist())
    at, costs = header["point"], header["costs"]
    guarantee = header.get("guarantee")  # which files from before there were any lack
    return GateProgram(
        staged=staged,
        gates=tuple(gates),
        thresholds=thresholds,
        point=OperatingPoint(thresholds, at["accuracy"], at["cost"], tuple(at["shares"])),
        frontier=Frontier(points),
        costs=Costs(costs["unit"], tuple(costs["stages"]), tuple(costs["gates"])),
        network_accuracy=header["network_accuracy"],
        input_shape=tuple(header["input_shape"]),
        input_dtype=getattr(torch, header["input_dtype"]),
        scores=tensors.get("scores"),
        guarantee=Guarantee(**guarantee) if guarantee else None,
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
