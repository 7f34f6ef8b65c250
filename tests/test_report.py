"""The report: one page that needs nothing else, whatever the number of gates and classes."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from torch import nn

from dgate_rt import Gate, GateProgram, StagedModel, ops
from dgate_rt.cost import Costs
from dgate_rt.frontier import Frontier, search_frontier
from dgate_rt.trace import Trace

report = pytest.importorskip("dgate_rt.report", reason="matplotlib is not installed", exc_type=ImportError)

COUNT = 400
VOID = {"meta", "br", "img", "link", "input", "hr"}
SECTIONS = ["table", "frontier", "exits", "classes", "examples"]


class Page(HTMLParser):
    """Tags, texts and attributes of a page; fails where a tag is not closed by its own."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def find(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def make_trace(classes: int, gates: int = 3, count: int = COUNT) -> Trace:
    """Later gates are right more often, and the surer the likelier right."""
    rng = np.random.default_rng(0)
    targets = np.sort(rng.integers(0, classes, count))
    ease = rng.normal(size=count) + targets / classes
    margins = ease + np.arange(gates)[:, None] + rng.normal(size=(gates, count))
    sureness = np.concatenate([margins, np.full((1, count), gates + 2.0)])
    right = rng.random((gates + 1, count)) < 1 / (1 + np.exp(-1 - sureness))
    others = (targets + rng.integers(1, max(classes, 2), (gates + 1, count))) % classes
    return Trace(margins.astype(np.float32), np.where(right, targets, others), targets)


def make_program(trace: Trace, drop: float = 0.02, cuts: list[str] | None = None) -> GateProgram:
    gates = len(trace.margins)
    staged = StagedModel([nn.Identity() for _ in range(gates + 1)], cuts)
    costs = Costs("FLOPs", (1e9,) * (gates + 1), (1e6,) * gates)
    frontier = search_frontier(trace, costs, min_accuracy=trace.network_accuracy - drop)
    point = frontier.cheapest(trace.network_accuracy - drop)
    modules = tuple(Gate(2, 2) for _ in range(gates))
    return GateProgram(
        staged, modules, point.thresholds, point, frontier, costs, trace.network_accuracy, (3, 8, 8), torch.float32
    )


def rows_for(trace: Trace, programs: dict[str, GateProgram]) -> list:
    rows = []
    for program in programs.values():
        replay = trace.replay(program.thresholds, program.costs)
        saved = 1 - replay.cost / program.costs.dense
        name = report.configuration(program.thresholds)
        rows.append(report.TableRow(name, replay.accuracy, replay.cost / 1e9, saved, 1.5, 0.25, tuple(replay.shares)))
    off = (0.0,) * len(trace.margins)
    rows.append(report.TableRow("dense", trace.network_accuracy, 4.0, None, 2.0, None, (*off, 1.0)))
    return rows


def write(tmp_path, trace, programs, classes, images=None, **options) -> str:
    path = tmp_path / "report.html"
    report.write_report(
        path, title="A run", programs=programs, trace=trace, images=images, classes=classes,
        table=rows_for(trace, programs), **options,
    )  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]  # no partial file is left
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def trace():
    return make_trace(10)


@pytest.fixture(scope="module")
def programs(trace):
    return {"no drop": make_program(trace, 0.0), "2 % drop": make_program(trace, 0.02)}


@pytest.fixture(scope="module")
def page(trace, programs, tmp_path_factory):
    images = torch.randn(COUNT, 1, 16, 16)
    names = [str(k) for k in range(10)]
    return write(tmp_path_factory.mktemp("page"), trace, programs, names, images, notes=["seed 7", "a < b"])


def test_page_has_every_section(page):
    assert [s["id"] for s in Page(page).find("section")] == SECTIONS


def test_page_says_what_was_run_where(page):
    text = "".join(Page(page).texts)
    for expected in ("A run", "seed 7", "a < b", f"torch {torch.__version__}", "cores"):
        assert expected in text


def test_page_loads_nothing(page):
    """Every reference is a fragment of the page or a data URI, and no address occurs at all."""
    parsed = Page(page)
    names = {tag for tag, _ in parsed.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base"}
    references = [
        value
        for _, attributes in parsed.tags
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "srcset", "action", "data")
    ]
    assert references
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in references)
    assert all(match.startswith("#") for match in re.findall(r"url\(([^)]*)\)", page))
    assert "@import" not in page
    assert "http://" not in page
    assert "https://" not in page


def test_ids_are_unique_and_references_resolve(page):
    attributes = [a for _, a in Page(page).tags]
    ids = [a["id"] for a in attributes if "id" in a]
    assert len(ids) == len(set(ids))
    wanted = set(re.findall(r"url\(#([^)]*)\)", page)) | {a["xlink:href"][1:] for a in attributes if "xlink:href" in a}
    assert wanted <= set(ids)


def test_table_is_printed_in_the_papers_form(page, trace, programs):
    text = " ".join(Page(page).texts)
    for row in rows_for(trace, programs):
        for cell in report.cells(row):
            assert cell in text
    assert "dg(" in text


def test_exit_counts_come_from_the_trace(page, trace, programs):
    section = page[page.index('<section id="exits"') : page.index('<section id="classes"')]
    body = re.findall(r"<td>(.*?)</td>", section)
    samples = [int(cell) for cell in body[3::7]]
    replayed = [trace.replay(p.thresholds, p.costs).exits for p in programs.values()]
    assert samples == [n for exits in replayed for n in np.bincount(exits, minlength=4)]


def test_wrong_examples_say_truth_and_answer(page, trace, programs):
    shown = [a for a in Page(page).find("figure") if a.get("class") == "wrong"]
    assert shown
    captions = re.findall(r'<figure class="wrong">.*?<figcaption>(.*?)</figcaption>', page)
    assert all(re.fullmatch(r"\d → \d", caption) for caption in captions)
    assert all(caption[0] != caption[-1] for caption in captions)


def test_names_are_escaped(tmp_path):
    trace = make_trace(3)
    program = make_program(trace, cuts=["<i>one</i>", "two & three", "a $x$ b"])
    names = ["<b>", "cat & dog", "$money$"]
    text = write(
        tmp_path, trace, {"<u>p</u>": program}, names, torch.rand(COUNT, 3, 8, 8), notes=["<script>x</script>"]
    )
    parsed = Page(text)
    tags = {tag for tag, _ in parsed.tags}
    assert not tags & {"u", "script"}
    assert "<i>one" not in text
    assert "<b>," not in text
    joined = " ".join(parsed.texts)
    for expected in ("<b>", "cat & dog", "$money$", "<u>p</u>", "two & three", "$x$"):
        assert expected in joined


@pytest.mark.parametrize("classes", [1, 2, 41, 1000], ids=lambda k: f"{k}-classes")
def test_any_number_of_classes(tmp_path, classes):
    trace = make_trace(classes, count=3 * COUNT)
    text = write(tmp_path, trace, {"p": make_program(trace)}, [f"class {k}" for k in range(classes)])
    Page(text)
    assert len(text) < 300_000
    assert "http" not in text


@pytest.mark.parametrize("gates", [0, 1, 3, 7], ids=lambda g: f"{g}-gates")
def test_any_number_of_gates(tmp_path, gates):
    trace = make_trace(10, gates)
    text = write(tmp_path, trace, {"p": make_program(trace)}, list("0123456789"), torch.rand(COUNT, 2, 8, 8))
    assert [s["id"] for s in Page(text).find("section")] == SECTIONS


def test_gates_that_are_off(tmp_path, trace, programs):
    program = programs["no drop"]
    off = replace(program, thresholds=(math.inf,) * 3)
    text = write(tmp_path, trace, {"off": off}, list("0123456789"), torch.rand(COUNT, 1, 8, 8))
    assert "dg(off, off, off)" in text
    assert "None left here." in text


def test_program_that_was_never_calibrated(tmp_path, trace, programs):
    """Accuracy on validation data is unknown, and the frontier the dense network alone."""
    program = programs["no drop"]
    point = replace(program.point, thresholds=(math.inf,) * 3, accuracy=math.nan, cost=program.costs.dense)
    unknown = replace(program, thresholds=point.thresholds, point=point, frontier=Frontier((point,)))
    assert "nan" not in " ".join(Page(write(tmp_path, trace, {"p": unknown}, list("0123456789"))).texts).lower()


def test_without_images_there_are_no_examples(tmp_path, trace, programs):
    text = write(tmp_path, trace, programs, list("0123456789"))
    assert [s["id"] for s in Page(text).find("section")] == SECTIONS[:-1]
    assert "<img" not in text


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.float32, torch.bfloat16], ids=lambda d: str(d).removeprefix("torch.")
)
def test_images_of_any_dtype(tmp_path, trace, programs, dtype):
    images = (255 * torch.rand(COUNT, 3, 120, 200)).to(dtype)
    if dtype.is_floating_point:
        images[0, 0, 0, 0] = math.nan
    assert "<img" in write(tmp_path, trace, programs, list("0123456789"), images)


def graph_of(*buckets: list[int], holds: dict[str, int] | None = None, driver: str = "recording") -> dict:
    """What `Runtime.describe` gives for a graph with a switch for each list of buckets."""
    held = {"type": "child graph", "holds": holds or {"kernel": 1}}
    switches = [
        {"name": f"stage {k}", "bodies": [{"bucket": size, "nodes": [held]} for size in sizes]}
        for k, sizes in enumerate(buckets, 1)
    ]
    return {"driver": driver, "nodes": [{"name": "stage 0", **held}, *switches]}


def svg_texts(text: str) -> list[str]:
    return [unescape(found).replace("\u00a0", " ") for found in re.findall(r"<text[^>]*>(.*?)</text>", text)]


def test_the_graph_is_drawn_where_one_is_given(tmp_path, trace, programs):
    graph = graph_of([8, 64], [64], [16, 32, 64], holds={"kernel": 43, "memory copy": 1, "empty node": 2})
    text = write(tmp_path, trace, programs, list("0123456789"), graph=graph)
    assert [s["id"] for s in Page(text).find("section")] == [*SECTIONS[:-1], "graph"]
    section = text[text.index('<section id="graph"') :]
    shown = svg_texts(section)
    assert [t for t in shown if t.startswith("exit")] == [f"exit {k}" for k in range(4)]
    assert [t for t in shown if t.startswith("stage")] == [f"stage {k}" for k in range(4)]
    assert [t for t in shown if t.startswith("bucket")] == [f"bucket {n}" for n in (8, 64, 64, 16, 32, 64)]
    for line in ("43 kernels,", "1 memory copy,", "2 empty nodes"):
        assert shown.count(line) == 1 + 6
    assert shown.count("none") == shown.count("switch") == 3
    assert "It has not run on a GPU." in section
    assert "It has not run" not in write(
        tmp_path, trace, programs, list("0123456789"), graph=graph | {"driver": "cuda"}
    )


def test_the_graph_shows_exits_that_are_on(tmp_path, trace, programs):
    program = replace(programs["no drop"], thresholds=(math.inf, 0.5, math.inf))
    text = write(tmp_path, trace, {"p": program}, list("0123456789"), graph=graph_of([8]))
    shown = svg_texts(text[text.index('<section id="graph"') :])
    assert [t for t in shown if t.startswith("exit")] == ["exit 1", "exit 3"]
    off = replace(program, thresholds=(math.inf,) * 3)
    text = write(tmp_path, trace, {"p": off}, list("0123456789"), graph=graph_of())
    assert svg_texts(text[text.index('<section id="graph"') :])[-4:] == [
        "exit 3",
        "whole network",
        "stage 0",
        "1 kernel",
    ]


@pytest.mark.skipif(not ops.extension_loaded(), reason="the C++ extension is not built")
def test_the_graph_of_a_program_is_that_of_the_recording_driver(tmp_path, trace, programs):
    staged = StagedModel([nn.Flatten(), nn.Linear(192, 2), nn.Identity(), nn.Linear(2, 10)])
    gates = (Gate(192, 10), Gate(2, 10), Gate(2, 10))
    program = replace(programs["no drop"], staged=staged, gates=gates, thresholds=(0.1, math.inf, 0.1))
    graph, notes = report.simulated_graph(program, batch_size=16)
    assert notes == []
    assert [node["name"] for node in graph["nodes"]] == ["stage 0", "stages 1 to 2", "stage 3"]
    assert "stages 1 to 2" in write(tmp_path, trace, {"p": program}, list("0123456789"), graph=graph)


def test_a_graph_that_cannot_be_had_is_a_note(programs, monkeypatch):
    monkeypatch.setattr(ops, "extension_error", lambda name: "not built")
    graph, (note,) = report.simulated_graph(programs["no drop"], batch_size=4)
    assert graph is None
    assert note.startswith("The assembled graph is not shown: driver: expected the extension")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"programs": {}}, r"programs: expected at least one, got none"),
        ({"images": torch.rand(3, 1, 8, 8)}, r"images: expected \[400, C, H, W\].* got \[3, 1, 8, 8\]"),
        ({"classes": ["a", "b"]}, r"classes: expected at least 10 names, got 2"),
        ({"trace": make_trace(10, gates=2)}, r"programs: expected 2 gates, as the trace has, got 3 in 'no drop'"),
        ({"trace": Trace(np.empty((3, 0)), np.empty((4, 0), int), np.empty(0, int))}, r"trace: expected at least one"),
        ({"graph": graph_of([8])}, r"graph: expected 4 nodes, one for each exit of 'no drop' that is on, got 2"),
    ],
    ids=["no-program", "images", "classes", "gates", "no-sample", "graph"],
)
def test_what_does_not_belong_together_is_refused(tmp_path, trace, programs, change, message):
    arguments = {"programs": programs, "trace": trace, "images": None, "classes": list("0123456789"), **change}
    with pytest.raises(ValueError, match=message):
        report.write_report(tmp_path / "report.html", title="t", table=[], **arguments)
    assert list(tmp_path.iterdir()) == []


def test_console_table_has_a_line_a_row(trace, programs):
    rows = rows_for(trace, programs)
    table = report.console_table(rows)
    assert table.row_count == len(rows)
    assert [str(c.header).split() for c in table.columns] == [h.split() for h in report.HEADINGS]
