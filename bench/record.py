"""What `dgate bench` measures, row by row, and the JSON file that keeps it, written after every group."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dgate_rt.bench.workload import Mix
from dgate_rt.timing import Timing, commit, machine_header
from dgate_rt.versions import package_version
from dgate_rt.writing import finite, whole_file

SAME = ("cpu", "kernels", "bfloat16", "cores", "torch_threads", "freed_memory", "gpu", "torch", "versions")
"""What must agree of the machine where results are resumed."""
PACKAGES = ("openvino", "onnxruntime", "earlyon")
"""What is timed beside torch, if it is installed."""


@dataclass(frozen=True)
class Row:
    """One way to run a network. Times are milliseconds a sample; speed-ups are medians of ratios, round by round."""

    part: str
    network: str
    engine: str  # what runs the stages
    dtype: str
    way: str  # how batches are run: "dense", "dense, chunked", "refill", ...
    batch_size: int
    mix: Mix = ()  # shares of (gate 1, gate 2, gate 3, end); nothing for what has no gates
    ms: Timing | None = None
    over: dict[str, float] = field(default_factory=dict)  # speed-up over other ways of the same rounds
    values: dict[str, float] = field(default_factory=dict)  # what else the part tells, by name
    note: str = ""  # why it was not measured, or what was chosen

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Row:
        """The row of ``asdict``, from JSON."""
        ms = values["ms"] and Timing(**{**values["ms"], "rounds": tuple(values["ms"]["rounds"])})
        return cls(**{**values, "mix": tuple(values["mix"]), "ms": ms})


@dataclass(frozen=True)
class Group:
    """Rows that are measured together, in turn."""

    part: str
    name: str  # what it is known by where results are resumed
    measure: Callable[[], Sequence[Row]]


class Results:
    """Groups that are measured, in memory and in a file.

    Args:
        path: of the JSON file; what it holds already is taken over. None for memory only.
        command: that measures.

    Raises:
        ValueError: if the file is none of ours, or comes from another machine.
    """

    def __init__(self, path: Path | None, command: str) -> None:
        self._path = path
        self._command = command
        self._found: dict[str, Any] = {"machine": {**machine_header(), "versions": versions()}, "groups": {}}
        if path is None or not path.exists():
            return
        try:
            kept = json.loads(path.read_text())
            there, here = ([found["machine"].get(name) for name in SAME] for found in (kept, self._found))
            groups = kept["groups"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"output: expected results of dgate bench in {path}, got something else") from error
        differ = [f"{n} {h}, got {t}" for n, h, t in zip(SAME, here, there, strict=True) if h != t]
        if differ:
            wanted = "; ".join(differ)
            raise ValueError(f"output: expected results of this machine in {path}, with {wanted}; move it away")
        self._found["groups"] = groups

    def __contains__(self, name: str) -> bool:
        return name in self._found["groups"]

    def add(self, group: Group, rows: Sequence[Row]) -> None:
        """Keep a group, in the file as well."""
        found = {"command": self._command, "commit": commit(), "rows": [asdict(row) for row in rows]}
        self._found["groups"][group.name] = found
        if self._path is not None:
            with whole_file(self._path) as file:
                json.dump(finite(self._found), file, indent=1, allow_nan=False)

    def rows(self) -> Iterator[Row]:
        """Every row, group after group."""
        for group in self._found["groups"].values():
            yield from map(Row.from_json, group["rows"])

    def as_json(self) -> dict[str, Any]:
        """What the file holds."""
        return self._found


def versions() -> dict[str, str]:
    """The packages that are timed beside torch and are installed here."""
    return {name: version for name in PACKAGES if (version := package_version(name))}


def machine_words(machine: dict[str, Any]) -> list[str]:
    """The machine header of a file, old or new, as one reads it."""
    flat = {**machine, **machine.get("versions", {}), "versions": None}
    return [f"{name.replace('_', ' ')} {value}" for name, value in flat.items() if value]


def load_rows(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """The machine header and the rows of a file, from whatever machine."""
    kept = json.loads(path.read_text())
    return kept, [Row.from_json(row) for group in kept["groups"].values() for row in group["rows"]]
