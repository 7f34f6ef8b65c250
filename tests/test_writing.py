"""Files that are written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from dgate_rt.gate import Pool
from dgate_rt.writing import finite, whole_file


def test_interrupted_file_stays_as_it_was(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as file:
        file.writelines(_interrupted())
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("results.json", "old")]
    with whole_file(path) as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("results.json", "new")]


def _interrupted() -> Iterator[str]:
    yield "half"
    raise KeyboardInterrupt


def test_a_file_that_cannot_get_its_name_leaves_nothing(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"), whole_file(tmp_path / "taken") as file:
        file.write("new")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_finite_is_what_json_can_hold():
    found = {1: float("nan"), "pool": Pool.AVG, "rows": ({"ms": float("-inf")}, 2.5), "at": Path("a/b"), "note": None}
    assert finite(found) == {"1": None, "pool": "avg", "rows": [{"ms": None}, 2.5], "at": "a/b", "note": None}
    assert json.loads(json.dumps(finite(found), allow_nan=False)) == finite(found)
