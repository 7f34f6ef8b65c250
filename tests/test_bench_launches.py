"""The tables and the picture of docs/executors.md are what their command prints and draws."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dgate_rt import ops
from dgate_rt.bench import launches
from dgate_rt.bench.host_work import HostWork
from dgate_rt.executors import EXECUTORS
from dgate_rt.graphs import AssembledGraph, SimulatedCapture

DOCS = Path(__file__).resolve().parent.parent / "docs"

needs_extension = pytest.mark.skipif(not ops.extension_loaded(), reason="the C++ extension is not built")


@needs_extension
def test_the_command_prints_what_the_docs_say(capsys: pytest.CaptureFixture[str]) -> None:
    launches.main([])
    tables = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    written = (DOCS / "executors.md").read_text().splitlines()
    assert [line for line in tables if line not in written] == []


@needs_extension
def test_every_executor_is_counted_and_waits_as_often_as_it_says() -> None:
    counted = {
        str(name).strip("`"): dict(zip(launches.COUNTED[1:], row, strict=True)) for name, *row in launches.count_rows()
    }
    assert list(counted) == list(EXECUTORS)
    assert {name: counted[name]["host reads"] for name in counted} == {
        "dense": 0, "eager": 3, "lag": 3, "graph": 0, "refill": 3,
    }  # fmt: skip
    graph = counted["graph"]
    assert list(graph.values())[2:] == [1, 4, 3, 1, 0, 0]  # one launch, no wait
    assert 0 < graph["operators launched"] < min(row["operators launched"] for row in counted.values() if row != graph)


def draw(path: Path) -> str:
    pytest.importorskip("dgate_rt.figures", reason="matplotlib is not installed", exc_type=ImportError)
    launches.main(["--picture", str(path)])
    return path.read_text(encoding="utf-8")


def structure(svg: str) -> tuple[list[str], list[str]]:
    """Every text in order, and the look of every shape: where they lie is for matplotlib's version to say."""
    return re.findall(r"<text[^>]*>(.*?)</text>", svg), re.findall(r'<path [^>]*style="([^"]*)"', svg)


@needs_extension
def test_the_command_draws_the_picture_of_the_docs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn, kept = draw(tmp_path / "graph.svg"), (DOCS / "assembled-graph.svg").read_text(encoding="utf-8")
    assert structure(drawn) == structure(kept)
    assert capsys.readouterr().out == ""
    texts, _ = structure(kept)
    assert [text for text in texts if text.startswith("stage")] == [f"stage {k}" for k in range(4)]
    assert sum(text.startswith("bucket") for text in texts) == 3 * 6
    assert texts.count("none") == 3
    assert kept.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    command = "python -m dgate_rt.bench.launches --picture docs/assembled-graph.svg"
    written = (DOCS / "executors.md").read_text()
    assert command in written
    assert "](assembled-graph.svg)" in written


X, ROWS = torch.arange(6.0).view(2, 3), torch.tensor([1])
WORK: dict[str, tuple[Callable[[Tensor], object], int, int]] = {  # operators, reads
    "views and allocations": (
        lambda x: (x[0], x.view(-1).detach(), x.t(), x.expand(4, 2, 3), torch.empty(3), x.new_empty(2)),
        0,
        0,
    ),
    "an operator made of others": (lambda x: torch.nn.functional.linear(x, x), 1, 0),
    "a number": (lambda x: int(x.sum()), 1, 1),
    "a truth": (lambda x: bool(x[0, 0]), 0, 1),
    "a comparison": (lambda x: torch.equal(x, x), 0, 1),
    "rows by a mask": (lambda x: x[x[:, 0] > 1], 1, 1),
    "rows by their numbers": (lambda x: x[ROWS], 1, 0),
    "where a mask holds": (lambda x: x.nonzero(), 0, 1),
}


@pytest.mark.parametrize("name", WORK)
@pytest.mark.parametrize("inference", [False, True], ids=["", "inference mode"])
def test_the_hosts_work_is_counted(name: str, inference: bool) -> None:
    function, operators, reads = WORK[name]
    with torch.inference_mode(inference), HostWork() as work:
        function(X)
    assert (work.operators, work.reads) == (operators, reads)


@needs_extension
def test_what_a_simulated_capture_does_is_not_the_hosts_work() -> None:
    with AssembledGraph(SimulatedCapture(lambda: int(X.sum())), driver="recording") as graph, HostWork() as work:
        graph.launch()
    assert (work.operators, work.reads) == (0, 0)
