"""The JSON file of an experiment: what was found, and everything that tells where it comes from."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import dgate_rt
from dgate_rt.experiments.experiment import Experiment
from dgate_rt.experiments.workbench import Workbench
from dgate_rt.gate import DEFAULT_POOL, Pool
from dgate_rt.timing import commit, machine_header
from dgate_rt.writing import finite, whole_file

Record = dict[str, Any]
"""``experiment``, ``settings``, ``options``, ``result``; the others say by what, where and when.

``origin`` is the command that made a network which the experiment was given.
"""
_FORMAT = "dgate_rt.experiment"
_DIGITS = 6


def run(experiment: Experiment, bench: Workbench, options: Any, command: str) -> Record:
    """Run an experiment and keep its record in the folder of the workbench, whole or not at all.

    For one machine and one commit the settings and options decide every number of the result, but for measured times:
    to the bit, interrupted and resumed or not.

    Raises:
        ValueError: if the experiment cannot be run on this network and data.
    """
    if reason := experiment.unfit(bench):
        raise ValueError(f"{experiment.name}: {reason}")
    start = time.perf_counter()
    result = experiment.run(bench, options)
    record = {
        "format": _FORMAT,
        "experiment": experiment.name,
        "command": command,
        "commit": commit(),
        "machine": machine_header(),
        "versions": {"dgate_rt": dgate_rt.__version__, "numpy": np.__version__},
        "seconds": round(time.perf_counter() - start, 1),
        "settings": bench.settings,
        "origin": bench.origin,
        "options": asdict(options),
        "result": _rounded(result),
    }
    record = finite(record)
    with whole_file(bench.folder / file_name(record)) as file:
        json.dump(record, file, indent=1, allow_nan=False)
        file.write("\n")
    return record


def pool(found: Record) -> str:
    """What the gates of a record read, nothing where it compares that; before it was an option they read one mean."""
    return "" if found["experiment"] == "pools" else found["options"].get("pool", Pool.AVG.value)


def file_name(found: Record) -> str:
    """What the file of a record is called."""
    return f"{found['experiment']}{suffix(found['options'].get('pool', ''))}.json"


def suffix(read: str) -> str:
    """What names have behind that of an experiment: what its gates read, where it is not the default."""
    return "" if read in ("", DEFAULT_POOL.value) else f"-{read}"


def load(sources: Iterable[Path]) -> dict[Path, Record]:
    """The records in files, and in folders those of all files that hold one, by their file.

    Raises:
        FileNotFoundError: if there is nothing of that name.
        ValueError: if a file holds no record, or a folder none.
    """
    records: dict[Path, Record] = {}
    for source in sources:
        if not source.exists():
            raise FileNotFoundError(f"results: no such file or folder: {source}")
        paths = sorted(source.glob("*.json")) if source.is_dir() else [source]
        found = {path: record for path in paths if (record := _read(path)) is not None}
        if not found:
            wanted = "files of dgate experiment in" if source.is_dir() else "a file of dgate experiment, got"
            raise ValueError(f"results: expected {wanted} {source}")
        records |= found
    return records


def _read(path: Path) -> Record | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"results: {path} is no whole JSON file ({error})") from error
    return record if isinstance(record, dict) and record.get("format") == _FORMAT else None


def _rounded(value: Any) -> Any:
    """Plain numbers, to so many digits as there is sense in."""
    if isinstance(value, dict):
        return {str(key): _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_rounded(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.{_DIGITS}g}")
    return value.item() if isinstance(value, np.generic) else value
