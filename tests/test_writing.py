"""Files that are written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

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


def test_finite_is_what_json_can_hold():
    found = {1: float("nan"), "rows": ({"ms": float("-inf")}, 2.5), "at": Path("a/b"), "note": None}
    assert finite(found) == {"1": None, "rows": [{"ms": None}, 2.5], "at": "a/b", "note": None}
    assert json.loads(json.dumps(finite(found), allow_nan=False)) == finite(found)
