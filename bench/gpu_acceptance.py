"""Acceptance on a GPU: the tests that need one, every engine beside the best dense network, and whether targets hold.

    python -m dgate_rt.bench.gpu_acceptance                              # hours, for Inductor compiles every bucket;
                                                                         # goes on where it stopped
    python -m dgate_rt.bench.gpu_acceptance --batch-sizes 128 --mixes 2  # two networks at one size and exit mix
    python -m dgate_rt.bench.gpu_acceptance --quick                      # a tiny network, first
    python -m dgate_rt.bench.gpu_acceptance --quick --device cpu-sim     # what runs without a GPU; times prove nothing

Dense engines are the plain network, the network as one CUDA graph, and the network compiled whole by Inductor for that
batch size, weights frozen, and then captured alike; each round of times is compared with the best of them in that
round. `graph compiled` runs stages that Inductor compiled, one by one, at their buckets. An engine that answers
otherwise than dense execution with post-hoc gating is not timed. Targets, over all rows of both graphs:

    realisation   = (1 - t / t_best_dense) / (1 - F / F_dense), at least 0.95 where B >= 128 and samples leave, of the
                    better of the two; beside it, of each, that of the saving which its stages allow at their buckets
    gate overhead = t / t_without_gates - 1 where nobody leaves, at most 2 %: the same kernels as one graph, less gates
    waits         = none, by torch's synchronisation debug mode
    t <= t_eager  at every batch size and mix, of `graph`
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import re
import shlex
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dgate_rt import Runtime
from dgate_rt.bench import gates
from dgate_rt.bench.acceptance_rows import Row, mix_name, table, verdicts
from dgate_rt.bench.acceptance_stages import stages_ms
from dgate_rt.bench.acceptance_switch import switch_us
from dgate_rt.bench.acceptance_work import CUDA_ONLY, DENSE, GATED, WITHOUT_GATES, Engine, OneByOne, prepare
from dgate_rt.bench.cases import RESNET_50, RESNET_101, TINY, Case, Network, Work, make_case, measure
from dgate_rt.bench.workload import NO_EXIT, PAPER_MIXES, Mix
from dgate_rt.errors import ExecutorError
from dgate_rt.graphs import driver_counts, reset_simulation
from dgate_rt.progress import track
from dgate_rt.timing import Timing, commit, driver_cuda_version, interleaved, machine_header
from dgate_rt.writing import whole_file

MOST_MAY_FLIP = 0.5  # of the samples; where more lie on a threshold, answers prove nothing


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    networks: tuple[Network, ...] = (RESNET_101, RESNET_50)
    batch_sizes: tuple[int, ...] = (1, 8, 32, 128, 256, 512, 1024)
    mixes: tuple[Mix, ...] = (*PAPER_MIXES, NO_EXIT)
    least_images: int = 64
    repeats: int = 5


QUICK = Size((TINY,), (1, 8), (PAPER_MIXES[1], NO_EXIT), least_images=8, repeats=2)


@dataclass
class _Entry:
    """An engine in a group of rows: ready to be timed, or not and why."""

    row: Row
    run: Engine | None = None


def measure_rows(size: Size, simulated: bool, done: Sequence[Row] = ()) -> Iterator[list[Row]]:
    """Measure every group (network, batch size, mix) that is not done, and yield its rows, engine by engine."""
    kept = {row.group for row in done}
    for network in size.networks:
        missing = {b: [m for m in size.mixes if (network.name, b, m) not in kept] for b in size.batch_sizes}
        if any(missing.values()):
            case = make_case(network, "cpu" if simulated else "cuda", torch.bfloat16)
            for batch_size, mixes in missing.items():
                if mixes:
                    yield from _batch_size_rows(case, batch_size, mixes, size, simulated)
                    _clear(simulated)


def _batch_size_rows(
    case: Case, batch_size: int, mixes: Sequence[Mix], size: Size, simulated: bool
) -> Iterator[list[Row]]:
    blank = Row(case.network.name, batch_size, mixes[0], "")
    try:
        work = measure(case, batch_size, size.least_images)
    except torch.OutOfMemoryError:
        for mix in mixes:
            yield [replace(blank, mix=mix, engine=e, status="skipped", note="out of memory") for e in (*DENSE, *GATED)]
        return
    dense = [_enter(replace(blank, engine=engine), case, work, simulated) for engine in DENSE]
    for mix in mixes:
        entries = [replace(entry, row=replace(entry.row, mix=mix)) for entry in dense]
        entries += [_enter(replace(blank, mix=mix, engine=engine), case, work, simulated) for engine in GATED]
        yield _timed(entries, work, size.repeats, simulated)
        del entries
        _clear(simulated)


def _enter(row: Row, case: Case, work: Work, simulated: bool) -> _Entry:
    """Make an engine ready, or say why it is not."""
    if simulated and row.engine in CUDA_ONLY:
        return _Entry(replace(row, status="skipped", note="needs CUDA"))
    try:
        return _checked(row, case, work, simulated)
    except Exception as error:  # whatever it is, the times of the other engines are wanted
        text = f"{type(error).__name__}: {error}"
        if "out of memory" in text.lower():
            status, note = "skipped", "out of memory"
        else:
            traceback.print_exc()
            status, note = "failed", text.splitlines()[0][:200]
    _clear(simulated)
    return _Entry(replace(row, status=status, note=note))


def _checked(row: Row, case: Case, work: Work, simulated: bool) -> _Entry:
    """Make an engine ready, and refuse it if it answers wrongly."""
    program = case.program if row.engine in DENSE else work.program(row.mix)
    if not simulated:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = 0 if simulated else torch.cuda.memory_allocated()
    run = prepare(row.engine, case, program, work.batches[0], simulated)
    answers = run(work.batches)
    peak = None if simulated else (torch.cuda.max_memory_allocated() - before) / 2**20
    wrong, unsure = work.wrong(answers, program.thresholds), float(work.may_flip(program.thresholds).float().mean())
    if wrong:
        return _Entry(replace(row, status="failed", note=f"wrong answers: {wrong} samples differ"))
    if unsure > MOST_MAY_FLIP:
        note = f"cannot be checked: {unsure:.0%} of the samples lie within float error of a threshold"
        return _Entry(replace(row, status="failed", note=note))
    waits = _waits(run, work, simulated) if row.engine in WITHOUT_GATES else None
    return _Entry(replace(row, peak_mib=peak, waits=waits), run)


def _waits(run: Engine, work: Work, simulated: bool) -> bool:
    """Whether a run makes the host wait: torch's calls on CUDA, the driver's in the simulation."""
    if simulated:
        reset_simulation()
        run(work.batches)
        return driver_counts().synchronisations > 0
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(work.batches)
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def _timed(entries: list[_Entry], work: Work, repeats: int, simulated: bool) -> list[Row]:
    """Time the engines of a group in turn."""
    ready = [entry for entry in entries if entry.run is not None]
    timings = _timings(ready, work, repeats)
    ms = {e.row.engine: t.per(len(work.batches)) for e, t in zip(ready, timings, strict=True)}
    for entry in ready:
        if isinstance(entry.run, OneByOne) and isinstance(entry.run.run, Runtime) and entry.row.engine in WITHOUT_GATES:
            with contextlib.suppress(torch.OutOfMemoryError):  # the row is wanted all the same
                entry.row = replace(entry.row, stages_ms=stages_ms(entry.run.run, work.batches[0], simulated))
    dense = [ms[engine].rounds for engine in DENSE if engine in ms]
    best = Timing.of(np.min(dense, axis=0).tolist()) if dense else None
    return [_summarised(entry.row, ms, best, work) for entry in entries]


def _timings(ready: list[_Entry], work: Work, repeats: int) -> list[Timing]:
    """The times of all; where all together need too much memory, the last goes."""
    jobs = [partial(entry.run, work.batches) for entry in ready if entry.run is not None]
    with contextlib.suppress(torch.OutOfMemoryError):
        return interleaved(jobs, repeats) if jobs else []
    entry = ready.pop()
    entry.row = replace(entry.row, status="skipped", note="out of memory beside the other engines")
    entry.run = None
    jobs.clear()  # nothing holds the engine now
    gc.collect()
    return _timings(ready, work, repeats)


def _summarised(row: Row, ms: dict[str, Timing], best: Timing | None, work: Work) -> Row:
    own = ms.get(row.engine)
    if own is None:
        return row

    def ratio(baseline: Timing | None) -> float | None:
        return None if baseline is None else own.ratio(baseline)

    to_dense, realisation = ratio(best), None
    if row.engine in GATED and row.mix != NO_EXIT and to_dense is not None:
        realisation = (1 - to_dense) / (1 - work.cost(work.program(row.mix)))
    without_gates = ratio(ms.get(WITHOUT_GATES.get(row.engine, "")))
    eager = ratio(ms.get("eager")) if row.engine in GATED else None
    baseline, in_time = ms.get(WITHOUT_GATES.get(row.engine, "")), None
    if baseline is not None and without_gates is not None and row.stages_ms and realisation is not None:
        in_time = (1 - without_gates) / (1 - row.stages_ms / baseline.median)
    return replace(
        row, ms=own, to_dense=to_dense, to_without_gates=without_gates, to_eager=eager, realisation=realisation,
        time_realisation=in_time,
    )  # fmt: skip


def _clear(simulated: bool) -> None:
    """Let memory go; a device that an engine has broken shows here."""
    if not simulated:
        gc.collect()  # captures hold themselves
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def gate_rows(quick: bool, simulated: bool) -> list[dict[str, Any]]:
    """The rows of `dgate_rt.bench.gates`."""
    networks, batch_sizes = (
        (gates.NETWORKS[:1], gates.BATCH_SIZES[:1]) if quick else (gates.NETWORKS, gates.BATCH_SIZES)
    )
    shapes = list(gates.gate_shapes(networks))
    found = gates.rows(shapes, batch_sizes, "cpu" if simulated else "cuda")
    return [{**asdict(row), "ratio": row.ratio} for row in track(found, "gates", 4 * len(shapes) * len(batch_sizes))]


def run_tests() -> dict[str, int]:
    """Run ``pytest -m gpu`` in a process of its own; how many passed, failed and were skipped."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--color=no"]
    run = subprocess.run(command, cwd=Path(__file__).resolve().parents[1], capture_output=True, text=True, check=False)
    last = (run.stdout.strip().splitlines() or [""])[-1]
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    failed = counts.get("failed", 0) + counts.get("error", 0)
    if run.returncode not in (0, 1):  # pytest itself did not get through
        failed = max(failed, 1)
    if failed:
        print(run.stdout[-8000:] + run.stderr[-2000:], file=sys.stderr)
    return {"passed": counts.get("passed", 0), "failed": failed, "skipped": counts.get("skipped", 0)}


def load_results(path: Path, header: dict[str, Any]) -> dict[str, Any]:
    """What an earlier run of the same commit on the same machine wrote; empty where there is none.

    Results from elsewhere are moved aside. A checkout with changes has no commit to go by.
    """
    if not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text())
    known = header["commit"] is not None and not header["commit"].endswith("-dirty")
    if known and all(found.get(name) == value for name, value in json.loads(json.dumps(header)).items()):
        return found
    path.replace(path.with_suffix(".old.json"))
    return {}


def save_results(path: Path, results: dict[str, Any]) -> None:
    """Write whole or not at all."""
    with whole_file(path) as file:
        file.write(json.dumps(results) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 if a test failed, or on CUDA a target."""
    given = _parser().parse_args(arguments)
    simulated = given.device == "cpu-sim"
    if simulated and not given.quick:
        raise ExecutorError("device: cpu-sim was asked for, whose times prove nothing; give --quick with it")
    if not simulated and not torch.cuda.is_available():
        raise ExecutorError(
            "device: cuda was asked for, but torch sees no CUDA device here; try --device cpu-sim --quick"
        )
    size = _size(given)
    header = {**machine_header(), "cuda": torch.version.cuda, "driver": driver_cuda_version(), "device": given.device}
    header |= {"commit": commit(), "quick": given.quick}
    results = load_results(given.json, header)
    command = shlex.join(
        ["python", "-m", "dgate_rt.bench.gpu_acceptance", *(sys.argv[1:] if arguments is None else arguments)]
    )
    results |= {**header, "command": command}
    save_results(given.json, results)  # or fail before anything is measured
    print(*(f"{name}: {results[name]}" for name in (*header, "command")), sep="\n")
    if not given.no_tests:
        print("running pytest -m gpu", flush=True)
        results["tests"] = run_tests()
    if "tests" in results:
        print("tests: " + ", ".join(f"{count} {name}" for name, count in results["tests"].items()), flush=True)
    whole = _measure_parts(results, given.quick, simulated)
    rows = _measure_rows(results, size, given.json, simulated)
    print("\nbfloat16, channels_last; speed-up over the best dense engine of each round\n", *table(rows), "", sep="\n")
    print(*_summary(results, rows), sep="\n")
    found = verdicts(rows)
    print("", *found, sep="\n")
    if simulated:
        print("on cpu-sim: answers are checked, times prove nothing")
    failed = not whole or results.get("tests", {}).get("failed", 0) > 0 or found[0].holds is False
    return int(failed or (not simulated and any(verdict.holds is False for verdict in found)))


def _size(given: argparse.Namespace) -> Size:
    """The default, or --quick, less what was not asked for."""
    size = QUICK if given.quick else Size()
    if given.networks:
        size = replace(size, networks=tuple(n for n in Size().networks if n.name in given.networks))
    if given.batch_sizes:
        size = replace(size, batch_sizes=tuple(given.batch_sizes))
    if given.mixes:
        size = replace(size, mixes=tuple(Size().mixes[index - 1] for index in given.mixes))
    return size


def _measure_parts(results: dict[str, Any], quick: bool, simulated: bool) -> bool:
    """Measure switches and gates, where ``results`` lacks them; whether both are there now."""
    for name, function in (
        ("switch_us", lambda: switch_us(simulated)),
        ("gates", lambda: gate_rows(quick, simulated)),
    ):
        if name not in results:
            try:
                results[name] = function()
            except Exception:  # the rows are wanted all the same
                traceback.print_exc()
                _clear(simulated)
    return "switch_us" in results and "gates" in results


def _measure_rows(results: dict[str, Any], size: Size, path: Path, simulated: bool) -> list[Row]:
    """Measure what ``results`` lacks; they are written after every group, so that a run can be cut off."""
    rows = [Row.from_json(row) for row in results.get("rows", [])]
    failed = {row.group for row in rows if row.status == "failed"}
    rows = [row for row in rows if row.group not in failed]
    order = [(n.name, b, mix) for n in size.networks for b in size.batch_sizes for mix in size.mixes]
    kept = {row.group for row in rows}
    order += sorted(kept - set(order))  # of a run that was asked for more
    for group in track(measure_rows(size, simulated, rows), "rows", len(order) - len(kept)):
        rows = sorted(rows + group, key=lambda row: order.index(row.group))
        results["rows"] = [asdict(row) for row in rows]
        save_results(path, results)
    save_results(path, results)
    return rows


def _summary(results: dict[str, Any], rows: Sequence[Row]) -> Iterator[str]:
    """What the table does not show."""
    for name, us in results.get("switch_us", {"not measured": math.nan}).items():
        yield f"a switch, {name}: {us:.2f} us"
    for row in sorted(results.get("gates", []), key=lambda row: -row["ratio"])[:1]:
        where = f"{row['operator']} of {row['gate']} at B {row['batch_size']}"
        yield f"gate operators: at most {row['ratio']:.2f} times the time of their bytes, {where}"
    for engine in WITHOUT_GATES:
        idle = [(r.to_dense, r) for r in rows if r.engine == engine and r.mix == NO_EXIT and r.to_dense is not None]
        for ratio, r in sorted(idle, key=lambda pair: -pair[0])[:1]:
            yield f"worst case, nobody leaving: {engine} takes at most {ratio:.3f} of the best dense time, {r.where}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dgate_rt.bench.gpu_acceptance",
        description="Run the tests that need a GPU, time every engine, and say whether the targets hold.",
        epilog="example: python -m dgate_rt.bench.gpu_acceptance --batch-sizes 128 512 --mixes 2 5 --json gpu.json",
    )
    parser.add_argument("--device", choices=("cuda", "cpu-sim"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="a tiny network, two batch sizes, two exit mixes")
    full = Size()
    parser.add_argument(
        "--networks", nargs="+", metavar="NAME", choices=[network.name for network in full.networks],
        help=f"only these, of {' and '.join(repr(network.name) for network in full.networks)}",
    )  # fmt: skip
    parser.add_argument("--batch-sizes", type=int, nargs="+", metavar="B", help=f"instead of {full.batch_sizes}")
    parser.add_argument(
        "--mixes", type=int, nargs="+", metavar="I", choices=range(1, len(full.mixes) + 1),
        help="; ".join(f"{i}: {mix_name(mix)}" for i, mix in enumerate(full.mixes, 1)).replace("%", "%%"),
    )  # fmt: skip
    parser.add_argument("--no-tests", action="store_true", help="do not run pytest -m gpu first")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", default=Path("gpu_acceptance.json"),
        help="read and write results there (default: %(default)s)",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
