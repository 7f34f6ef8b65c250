"""What `dgate bench` makes of its rows: a file that resumes, verdicts, and a page."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dgate_rt.bench import page, record, suite, targets, ways
from dgate_rt.bench.record import Group, Results, Row, load_rows
from dgate_rt.bench.workload import NO_EXIT, PAPER_MIXES
from dgate_rt.cli import app
from dgate_rt.timing import Timing

MIXED = PAPER_MIXES[1]
EAGER = ("eager", "float32")


def row(part: str, way: str, mix: tuple[float, ...], over: dict[str, float], ms: float = 2.0, **values: float) -> Row:
    return Row(part, targets.RESNET, *EAGER, way, 64, mix, Timing(ms, ms, ms, (ms,)), over, values)


ROWS = [
    row("mixes", "dense", (), {}, gflops=5.0),
    row("mixes", "refill", MIXED, {"dense": 1.95, "dense, chunked": 1.5}, 1.0, **{"time realisation": 0.9}),
    row("mixes", "refill", NO_EXIT, {"dense": 1.2, "dense, chunked": 0.99}),
    row("contest", "dense", (), {"best dense": 1.0}),
    row("contest", "refill", MIXED, {"dense": 1.7, "best dense": 1.7}, 1.0),
]


def test_targets_are_judged_by_the_worst_row() -> None:
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in targets.verdicts(ROWS)}
    assert (
        "| >= 1.9 | holds | 1.95 (eager float32, B 64, .20 .30 .25 .25; 1 rows) |"
        in lines["refill over dense at B = 64"]
    )
    assert "**missed** | 0.9 (eager float32, B 64, .20 .30 .25 .25; 1 of 1 rows miss)" in lines[ANY_REALISATION]
    assert "| <= 0.02 | holds | 0.0101 (" in lines[ADDED]
    assert "| >= 1.55 | holds | 1.7 (" in lines["the best gated way over the best dense one"]
    assert "not measured" in lines["gated OpenVINO over dense OpenVINO"]


def judged(rows: list[Row], what: str) -> str:
    return next(line for line in targets.verdicts(rows) if line.startswith(f"| {what} |"))


ANY_REALISATION = "time realisation at any B, on eager"
ADDED = "time added to the faster of dense and dense in chunks where nobody leaves, B >= 32"


def test_targets_are_judged_for_every_network_engine_and_part() -> None:
    few = replace(ROWS[1], network="another", engine="openvino", batch_size=4, values={"time realisation": 0.4})
    said = judged([*ROWS, few], ANY_REALISATION)
    assert "0.4 (another, openvino float32, B 4, .20 .30 .25 .25; 2 of 2 rows miss)" in said
    contest = replace(few, part="contest", batch_size=64, values={"realisation over dense": 0.5})
    assert "0.5 (another, openvino" in judged([contest], "realisation over dense at B >= 32")
    assert "not measured" in judged([replace(contest, batch_size=16)], "realisation over dense at B >= 32")


def test_time_is_added_to_the_faster_dense_way() -> None:
    slower = replace(ROWS[2], part="contest", over={"dense": 0.9, "dense, chunked": 0.99})
    assert "**missed** | 0.111 (" in judged([slower], ADDED)
    assert "not measured" in judged([replace(slower, over={"dense": 0.9})], ADDED)
    off = row("overhead", ways.LOSING_OFF, (), {"dense": 1.01, "dense, chunked": 0.995})
    assert "holds | 0.00503 (eager float32, B 64, no gates; 1 rows)" in judged(
        [off], "the same where every gate loses time and is off"
    )


def test_cost_is_linear_if_large_batches_take_no_longer_a_sample() -> None:
    small = row("memory", "refill", MIXED, {}, 2.0)
    what = "time a sample of larger batches beside one of 64"
    large = [replace(row("memory", "refill", MIXED, {}, ms), batch_size=b) for b, ms in ((256, 1.9), (4096, 2.1))]
    assert "| <= 1.1 | holds | 1.05 (eager float32, B 4096, .20 .30 .25 .25; 2 rows) |" in judged([small, *large], what)
    slow = replace(row("memory", "refill", MIXED, {}, 9.0), batch_size=1024)
    assert "**missed** | 4.5 (eager float32, B 1024, .20 .30 .25 .25; 1 of 3 rows miss) |" in judged(
        [small, *large, slow], what
    )
    skipped = replace(small, batch_size=8192, ms=None, note="skipped: too small a machine")
    for missing in ([small], large, [small, *large, skipped]):
        assert "not measured" in judged(missing, what)


def test_the_page_tells_what_does_not_pay(tmp_path: Path) -> None:
    results = Results(None, "dgate bench")
    results.add(Group("mixes", "one", list), ROWS)
    page.write_page(tmp_path / "performance.md", results.as_json(), list(results.rows()), None)
    text = (tmp_path / "performance.md").read_text()
    assert "## Exit mixes" in text
    assert "| .20 .30 .25 .25 | refill | 1.00 [1.00–1.00] | 1.95× | 1.50× |" in text
    assert "1 of 3 gated rows are less than 1.05 times as fast as the same network without\ngates" in text
    assert "| CIFAR ResNet-101 | eager float32 | nobody leaves | 64 | refill | 0.99× |" in text
    assert "Why targets are missed" not in text
    assert "<svg" in (tmp_path / "performance" / "contest.svg").read_text()


def test_rows_that_do_not_pay_are_told_together(tmp_path: Path) -> None:
    loop = replace(ROWS[2], way="masked loop", batch_size=8, over={"dense": 1.2, "dense, chunked": 0.8})
    small = replace(ROWS[1], batch_size=8, over={"dense": 1.0})
    said = list(page._does_not_pay([*ROWS, loop, small]))
    assert said[:3] == [
        "3 of 5 gated rows are less than 1.05 times as fast as the same network without",
        "gates, whole or in chunks, whichever is faster: 2 where nobody leaves,",
        "1 others at B <= 8, and 0 others at larger B.",
    ]
    assert said[6:] == [
        "| CIFAR ResNet-101 | eager float32 | nobody leaves | 8, 64 | refill, masked loop | 0.80–0.99× |",
        "| CIFAR ResNet-101 | eager float32 | .20 .30 .25 .25 | 8 | refill | 1.00× |",
    ]


PAGES = {"performance": "cpu-2-cores", "performance-xeon": "cpu-2-cores-xeon"}
OLD = "performance-xeon"
ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", PAGES)
def test_the_docs_are_what_their_command_writes(name: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "bench" / "results", tmp_path / "bench" / "results")
    results, written = tmp_path / "bench" / "results" / f"{PAGES[name]}.json", tmp_path / "docs" / f"{name}.md"
    page.write_page(written, *load_rows(results), results)
    assert written.read_text() == (ROOT / "docs" / f"{name}.md").read_text()


@pytest.mark.parametrize("name", PAGES)
def test_a_page_says_what_it_was_measured_without(name: str) -> None:
    text = (ROOT / "docs" / f"{name}.md").read_text()
    assert ("Measured before freed memory was kept" in text) == (name == OLD)
    assert ("Ways without gates, memory and `earlyon` were not checked" in text) == (name == OLD)


def test_a_new_page_says_that_dense_ways_were_checked(tmp_path: Path) -> None:
    results = Results(None, "dgate bench")
    results.add(Group("mixes", "one", list), ROWS)
    page.write_page(tmp_path / "page.md", results.as_json(), ROWS, None)
    assert "with every gate\noff for dense ways" in (tmp_path / "page.md").read_text()


def test_a_page_beside_its_results_is_not_told_of_itself(tmp_path: Path) -> None:
    results = Results(tmp_path / "same.json", "dgate bench")
    results.add(Group("mixes", "one", list), ROWS)
    for _ in range(2):
        page.write_page(tmp_path / "same.md", results.as_json(), ROWS, tmp_path / "same.json")
    assert (tmp_path / "same.md").read_text().count("# Performance\n") == 1
    (tmp_path / "same.why.md").write_text("Because.\n")
    page.write_page(tmp_path / "same.md", results.as_json(), ROWS, tmp_path / "same.json")
    assert "## Why targets are missed\n\nBecause.\n" in (tmp_path / "same.md").read_text()


def test_a_page_says_where_there_were_changes_beside_the_commit(tmp_path: Path) -> None:
    results = Results(None, "dgate bench")
    for name, commit in (("one", "a" * 40), ("two", "a" * 40), ("three", "b" * 40 + "-dirty")):
        results.add(Group("mixes", name, list), ROWS)
        results.as_json()["groups"][name]["commit"] = commit
    page.write_page(tmp_path / "page.md", results.as_json(), ROWS, None)
    assert f"; commit {'a' * 12}, {'b' * 12}-dirty. All rows" in (tmp_path / "page.md").read_text()


def test_every_target_that_was_missed_is_accounted_for() -> None:
    """By the file that is written by hand."""
    results = ROOT / "bench" / "results" / "cpu-2-cores.json"
    lines = list(targets.verdicts(load_rows(results)[1]))
    why = results.with_suffix(".why.md").read_text()
    missed = [line.split(" | ")[0].removeprefix("| ") for line in lines if "**missed**" in line]
    assert [what for what in missed if f"**{what}**" not in why] == []
    page_text = (ROOT / "docs" / "performance.md").read_text()
    assert page_text.index(lines[-1]) < page_text.index("## Why targets are missed") < page_text.index("## Exit mixes")
    assert why.strip() in page_text


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two groups in place of the suite; what was measured."""
    measured: list[str] = []

    def group(name: str, rows: list[Row]) -> Group:
        return Group(rows[0].part, name, lambda: (measured.append(name), rows)[1])

    found = [group("first", ROWS[:3]), group("second", ROWS[3:])]
    monkeypatch.setattr(suite, "groups", lambda scale, parts: [g for g in found if g.part in parts])
    return measured


def dgate(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["bench", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_goes_on_where_it_stopped(few: list[str], tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    dgate("-o", file, "-p", "mixes")
    shown = dgate("-o", file, "--page", tmp_path / "page.md")
    assert few == ["first", "second"]
    assert "refill over dense at B = 64" in shown
    assert list(json.loads(file.read_text())["groups"]) == ["first", "second"]
    assert "All rows are in\n[results.json](results.json)" in (tmp_path / "page.md").read_text()
    assert json.loads(dgate("--json"))["groups"]["second"]["rows"][1]["over"]["best dense"] == 1.7


@pytest.mark.parametrize("content", ["{}", "not JSON", '{"machine": {}}'])
def test_results_of_something_else_are_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "results.json"
    file.write_text(content)
    with pytest.raises(ValueError, match="output: expected results of dgate bench in"):
        Results(file, "")


def test_results_name_the_versions_of_what_they_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"openvino": "2025.3", "earlyon": "0.3"}

    monkeypatch.setattr(record, "package_version", installed.get)
    file = tmp_path / "results.json"
    Results(file, "").add(Group("mixes", "one", list), ROWS)
    machine = json.loads(file.read_text())["machine"]
    assert machine["versions"] == installed
    assert record.machine_words(machine)[-2:] == ["openvino 2025.3", "earlyon 0.3"]
    assert "one" in Results(file, "")


def test_results_without_versions_are_read_but_not_resumed(tmp_path: Path) -> None:
    file = ROOT / "bench" / "results" / "cpu-2-cores-xeon.json"
    found, rows = load_rows(file)
    assert rows
    assert record.machine_words(found["machine"])[-1] == "system Linux"
    with pytest.raises(ValueError, match=r"expected results of this machine in .*, with .*versions .*, got None"):
        Results(file, "")


@pytest.mark.parametrize("what", ["cpu", "kernels", "versions"])
def test_results_of_another_machine_are_refused(tmp_path: Path, what: str) -> None:
    file = tmp_path / "results.json"
    Results(file, "").add(Group("mixes", "one", list), ROWS)
    found = json.loads(file.read_text())
    found["machine"][what] = "another"
    file.write_text(json.dumps(found))
    with pytest.raises(
        ValueError, match=f"output: expected results of this machine in .*, with {what} .*, got another; move it away"
    ):
        Results(file, "")
