"""The main job: train a network on real images, put gates on it, calibrate, run dense and gated, and report."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

import dgate_rt
from dgate_rt import backbones, pretrain
from dgate_rt.agreement import check_agreement
from dgate_rt.calibrate import calibrate
from dgate_rt.compiling import compile
from dgate_rt.data import DataBundle
from dgate_rt.executors import Predictions
from dgate_rt.gate import DEFAULT_POOL
from dgate_rt.program import GateProgram, load
from dgate_rt.progress import track
from dgate_rt.report import TableRow, configuration, console_table, simulated_graph, write_report
from dgate_rt.staged import StagedModel, split
from dgate_rt.timing import commit, interleaved, machine_header
from dgate_rt.trace import Trace, collect_trace
from dgate_rt.train import fit
from dgate_rt.writing import whole_file

DROPS: Mapping[str, float] = {"no drop": 0.0, "1 % drop": 0.01}
"""The operating points, and how much accuracy each may lose on validation data."""
BATCH_SIZE = 64
MIN_ACCURACY = 0.90
"""A network that is right less often is not worth speeding up."""
MAX_SHARE = 0.80
"""A task of which one gate takes more than this at no drop is too easy to show anything."""
_TIMED_BATCHES, _ROUNDS = 16, 5
_DENSE = "dense"


@dataclass(frozen=True)
class DemoResult:
    """What a demo found, and where it left it."""

    rows: tuple[TableRow, ...]  # one an operating point, the dense network last
    warnings: tuple[str, ...]
    report: Path
    results: Path  # the same figures as JSON
    backbone: Path
    programs: dict[str, Path]
    seconds: dict[str, float]  # of each step
    reused: tuple[str, ...]  # the steps whose results were there already


def run_demo(
    out: str | os.PathLike[str],
    *,
    quick: bool = False,
    seed: int = 0,
    progress: bool = True,
    fresh: bool = False,
) -> DemoResult:
    """Do the whole job and leave network, programs, figures and report in the folder ``out``.

    A network or programs that a demo of the same settings left there are used again; measuring is always done anew.

    Args:
        out: made where it is missing.
        quick: a small data set and little training, to see that it works.
        seed: of the training of network and gates. The split of the data does not depend on it, so that the other
            commands find the same test split.
        progress: say on stderr what is being done, and print the table on stdout.
        fresh: use nothing of an earlier demo.

    Raises:
        RuntimeError: if a gated run answers otherwise than the dense network with the gates applied afterwards.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    recipe = pretrain.QUICK if quick else pretrain.DEMO
    backbone = folder / "backbone.safetensors"
    paths = {name: folder / f"{name.replace(' ', '-').replace('%', 'percent')}.safetensors" for name in DROPS}
    steps = _Steps(folder / "steps.json", fresh, progress)
    key = {"version": dgate_rt.__version__, "recipe": asdict(recipe), "seed": seed}

    with steps.step("data"):
        bundle = recipe.load_data()
    with steps.step("network", key, [backbone]) as there:
        if not there:
            backbones.save_backbone(backbone, *pretrain.train_recipe(recipe, bundle, seed=seed, progress=progress))
    model, meta = backbones.load_backbone(backbone)
    model.to(memory_format=torch.channels_last)
    with steps.step("gates", {**key, "drops": dict(DROPS), "pool": DEFAULT_POOL.value}, list(paths.values())) as there:
        staged = split(model, at=backbones.default_cuts(meta.name), example=bundle.test[0][0][None])
        if not there:
            _save_programs(staged, bundle, paths, seed, progress)
    programs = {name: load(path, staged) for name, path in paths.items()}
    with steps.step("answers"):
        images, trace = _test_data(bundle, programs, progress)
        answers = _answer(programs, images, trace)
    with steps.step("times"):
        times = _times(programs, images, progress)
    rows = _rows(programs, trace, answers, times)
    warnings = _warnings(rows)
    result = DemoResult(
        rows,
        warnings,
        folder / "report.html",
        folder / "results.json",
        backbone,
        paths,
        steps.seconds,
        tuple(steps.reused),
    )
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    with steps.step("report"):
        graph, missing = simulated_graph(next(iter(programs.values())), BATCH_SIZE)
        write_report(
            result.report,
            title=f"Decision gates on {bundle.name}",
            programs=programs,
            trace=trace,
            images=images,
            classes=bundle.classes,
            table=rows,
            notes=[
                f"{meta.name} in its CIFAR form at width {meta.width:g}, trained here (seed {seed}); "
                f"{len(trace.targets)} test images; batches of {BATCH_SIZE}, float32.",
                *missing,
                *warnings,
            ],
            graph=graph,
        )
        _write_json(
            result.results,
            {
                "command": command,
                "version": dgate_rt.__version__,
                "commit": commit(),
                "machine": machine_header(),
                "settings": key,
                "seconds": steps.seconds,
                "reused": steps.reused,
                "programs": {name: _summary(program) for name, program in programs.items()},
                "rows": [asdict(row) for row in rows],
                "times_ms": times,
                "warnings": warnings,
            },
        )
    if progress:
        Console(highlight=False).print(console_table(rows))
        for warning in warnings:
            steps.say(f"warning: {warning}", style="bold yellow")
        steps.say(f"{sum(steps.seconds.values()):.0f} s in all; see {result.report}")
    return result


class _Steps:
    """Says what is being done and how long it took; a record on disk says whose results are there already."""

    def __init__(self, record: Path, fresh: bool, progress: bool) -> None:
        self.record, self.progress = record, progress
        self.done: dict[str, Any] = json.loads(record.read_text()) if record.is_file() and not fresh else {}
        self.seconds: dict[str, float] = {}
        self.reused: list[str] = []
        self.console = Console(stderr=True, highlight=False)

    def say(self, message: str, style: str | None = None) -> None:
        if self.progress:
            self.console.print(message, style=style, markup=False, soft_wrap=True)

    @contextmanager
    def step(self, name: str, key: object = None, files: list[Path] | None = None) -> Iterator[bool]:
        """One step; yields whether its results are there, made with the same ``key``."""
        there = key is not None and self.done.get(name) == key and all(f.is_file() for f in files or [])
        if key is not None and not there:  # what follows from it is out of date too
            self.done = {earlier: self.done[earlier] for earlier in self.seconds if earlier in self.done}
            _write_json(self.record, self.done)
        self.say(f"{name}: {'there already' if there else '...'}")
        start = time.perf_counter()
        yield there
        self.seconds[name] = time.perf_counter() - start
        if there:
            self.reused.append(name)
            return
        if key is not None:
            self.done[name] = key
            _write_json(self.record, self.done)
        self.say(f"{name}: {self.seconds[name]:.1f} s")


def _save_programs(
    staged: StagedModel, bundle: DataBundle, paths: Mapping[str, Path], seed: int, progress: bool
) -> None:
    gates = fit(staged, bundle.loader("train", BATCH_SIZE), seed=seed, progress=progress)
    program = calibrate(staged, gates, bundle.loader("val", BATCH_SIZE), max_accuracy_drop=0.0, progress=progress)
    for name, path in paths.items():
        program.at(max_accuracy_drop=DROPS[name]).save(path)


def _test_data(bundle: DataBundle, programs: Mapping[str, GateProgram], progress: bool) -> tuple[Tensor, Trace]:
    """The test images, and what the dense network and every gate say about them."""
    program = next(iter(programs.values()))
    loader = bundle.loader("test", BATCH_SIZE)
    trace, _ = collect_trace(program.staged, program.gates, loader, progress=progress)
    return torch.cat([x for x, _ in loader]), trace


def _answer(programs: Mapping[str, GateProgram], images: Tensor, trace: Trace) -> dict[str, Predictions]:
    """Every program's answers to all images, which have to be those of the trace; and the dense network's."""
    answers = {}
    for name, program in programs.items():
        run = compile(program, batch_size=BATCH_SIZE, scores=True)
        answers[name] = run(images)
        check_agreement(name, program, trace, answers[name])
    answers[_DENSE] = compile(program, batch_size=BATCH_SIZE, executor="dense")(images)
    return answers


def _times(programs: Mapping[str, GateProgram], images: Tensor, progress: bool) -> dict[str, dict[str, float]]:
    """Milliseconds a sample, the dense network and all programs in turn on the same images, in random order."""
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[: _TIMED_BATCHES * BATCH_SIZE]
    sample = images[chosen]
    runs = {name: compile(program, batch_size=BATCH_SIZE) for name, program in programs.items()}
    runs[_DENSE] = compile(next(iter(programs.values())), batch_size=BATCH_SIZE, executor="dense")
    ticks = track(range(_ROUNDS + 1), "dense and gated in turn", enabled=progress)
    jobs = [lambda run=run: run(sample) for run in runs.values()]
    timings = interleaved(jobs, repeats=_ROUNDS, on_round=lambda: next(ticks, None))
    per_sample = [timing.per(len(sample)) for timing in timings]
    return {
        name: {"median": ms.median, "p20": ms.p20, "p80": ms.p80} for name, ms in zip(runs, per_sample, strict=True)
    }


def _rows(
    programs: Mapping[str, GateProgram],
    trace: Trace,
    answers: Mapping[str, Predictions],
    times: Mapping[str, Mapping[str, float]],
) -> tuple[TableRow, ...]:
    rows = []
    for name, found in answers.items():
        program = programs.get(name)
        costs = next(iter(programs.values())).costs
        thresholds = program.thresholds if program else (math.inf,) * len(costs.gates)
        cost = float(costs.to_exits(thresholds)[found.exits.numpy()].mean())
        ms = times[name]["median"]
        rows.append(
            TableRow(
                name=configuration(thresholds) if program else _DENSE,
                accuracy=float(np.mean(found.labels.numpy() == trace.targets)),
                gflops=cost / 1e9,
                flops_reduction=1 - cost / costs.dense if program else None,
                ms=ms,
                speed_up=1 - ms / times[_DENSE]["median"] if program else None,
                shares=tuple((found.exits.bincount(minlength=len(thresholds) + 1) / len(found)).tolist()),
            )
        )
    return tuple(rows)


def _warnings(rows: tuple[TableRow, ...]) -> tuple[str, ...]:
    no_drop, dense = rows[0], rows[-1]
    warnings = []
    if dense.accuracy < MIN_ACCURACY:
        warnings.append(f"the network is right on {dense.accuracy:.2%} of the test data only, below {MIN_ACCURACY:.0%}")
    warnings += [
        f"gate {g + 1} takes {share:.1%} of the samples at no drop, above {MAX_SHARE:.0%}: the task is too easy"
        for g, share in enumerate(no_drop.shares[:-1])
        if share > MAX_SHARE
    ]
    return tuple(warnings)


def _summary(program: GateProgram) -> dict[str, Any]:
    return {
        "thresholds": [None if t == math.inf else t for t in program.thresholds],
        "validation": {key: value for key, value in asdict(program.point).items() if key != "thresholds"},
        "network_accuracy": program.network_accuracy,
        "costs": asdict(program.costs),
    }


def _write_json(path: Path, value: object) -> None:
    with whole_file(path) as file:
        file.write(json.dumps(value, indent=2, allow_nan=False) + "\n")
