"""The refill executor on engines that are mean to it, and with gates that take more time than they save."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from captured_checks import agrees, check
from programs import program_with
from stream_checks import joined, refilling

import dgate_rt as dg
from dgate_rt import ops
from dgate_rt.chunks import StageTimes
from dgate_rt.executors import refill
from dgate_rt.stage_times import gate_times

INF, NAN = math.inf, math.nan


class Mean:
    """An engine that takes prepared sizes only, and answers in memory that its next call writes."""

    name = "mean"

    def __call__(self, stage, example, sizes):
        memory: list[torch.Tensor] = []

        def run(*tensors):
            assert len(tensors[0]) in sizes
            made = stage(*(t.clone() for t in tensors))
            if not memory:
                memory.append(torch.empty((sizes[-1], *made.shape[1:])))
            memory[0].fill_(NAN)
            return memory[0][: len(made)].copy_(made)

        return run


@pytest.mark.parametrize("buckets", ["auto", [3, 7]], ids=["auto", "given"])
@pytest.mark.parametrize("chunks", ["auto", [64, 3, 16, 5], [4, 64, 4, 4]], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.4], ids=["none", "mixed"])
def test_it_runs_on_engines_that_write_where_they_wrote_before(tiny_staged, tiny_gates, images, chunks, buckets, share):
    program = program_with(tiny_staged, tiny_gates, images, share)
    run = refilling(program, chunks, engine=Mean(), buckets=buckets)
    for count in (1, 31, 129):
        check(run, program, images[:count])
    streamed = list(run.stream(images.split(10)))
    agrees(joined(streamed), program.thresholds, program, images)
    assert "engine mean" in run.describe()


def test_an_engine_of_prepared_sizes_gets_chunks_among_them(tiny_staged, tiny_gates, images):
    run = refilling(program_with(tiny_staged, tiny_gates, images, 0.4), engine=Mean(), buckets=[3, 7])
    assert set(run._executor.plan.chunks) <= {3, 7, 64}


@pytest.fixture
def known_times(monkeypatch):
    """Stages of 1, 1, 4 and 1 ms a sample, whatever the size; gates of which the second takes 3 ms."""
    ms = tuple((t, 64 * t) for t in (1.0, 1.0, 4.0, 1.0))
    monkeypatch.setattr(refill, "stage_times", lambda *_: StageTimes((1, 64), ms, (0.0,) * 3))
    monkeypatch.setattr(refill, "gate_times", lambda *_: (0.1, 3.0, 0.1))


def with_shares(program, *shares):
    return replace(program, point=replace(program.point, shares=shares))


@pytest.mark.usefixtures("known_times")
def test_a_gate_that_loses_time_is_told_of_and_off_if_so_wished(program, images):
    program = with_shares(program, 0.4, 0.1, 0.3, 0.2)
    kept = refilling(program)
    assert kept.thresholds == program.thresholds
    told = "gate 1 takes 1.8 ms of a sample and saves 0.41 ms"  # of .6 that come, .1 are spared 4 ms and the next gate
    assert f"{told}; it loses time" in kept.describe()
    assert "gate 0 takes 0.1 ms of a sample and saves 1.6 ms\n" in kept.describe()
    run = refilling(program, losing_gates="off")
    assert run.thresholds == (program.thresholds[0], INF, program.thresholds[2])
    assert f"{told}, so it is off" in run.describe()
    check(run, program, images[:64])
    run.set_thresholds(program.thresholds)  # a user may know better
    check(run, program, images[:64])
    assert "what gates take and save was reckoned at other thresholds" in run.describe()
    assert "gate 0 takes" not in run.describe()


@pytest.mark.usefixtures("known_times")
def test_where_every_gate_loses_time_the_network_is_dense(program, images, monkeypatch):
    run = refilling(with_shares(program, 0.001, 0.001, 0.001, 0.997), losing_gates="off")
    assert run.thresholds == (INF,) * 3
    monkeypatch.setattr(ops, "gate_score", lambda *_: pytest.fail("a gate that is off was scored"))
    monkeypatch.setattr(ops, "route_", lambda *_: pytest.fail("a gate that is off was routed"))
    assert run(images[:64]).exits.eq(3).all()
    assert run._executor.plan.chunks == (64,) * 4  # one step, no copy


def test_losing_gates_are_known_only_where_times_are(program):
    with pytest.raises(dg.ExecutorError, match="losing_gates: expected the executor refill with chunks='auto'"):
        refilling(program, (64,) * 4, losing_gates="off")
    with pytest.raises(dg.ExecutorError, match="losing_gates: expected the executor refill"):
        dg.compile(program, executor="eager", losing_gates="off")
    with pytest.raises(ValueError, match="losing_gates: expected 'keep' or 'off', got 'drop'"):
        dg.compile(program, losing_gates="drop")


def test_gates_are_timed_on_what_they_read(program):
    times = gate_times(program.staged, program.gates, program.input_shape, program.input_dtype, False, (1, 8, 64))
    assert len(times) == 3
    assert all(ms > 0 for ms in times)
