"""The tables of docs/executors.md are what their command prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from dgate_rt import ops
from dgate_rt.bench import launches

DOCS = Path(__file__).resolve().parent.parent / "docs" / "executors.md"


@pytest.mark.skipif(not ops.extension_loaded(), reason="the C++ extension is not built")
def test_the_command_prints_what_the_docs_say(capsys: pytest.CaptureFixture[str]) -> None:
    launches.main([])
    tables = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    written = DOCS.read_text().splitlines()
    assert [line for line in tables if line not in written] == []
    graph = next(line for line in tables if "`graph`" in line)
    assert graph.split("|")[2:8] == [" 1 ", " 4 ", " 3 ", " 1 ", " 0 ", " 0 "]  # one launch, no wait
