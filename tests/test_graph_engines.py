"""The graph executor on stages that an engine compiled: at the captured sizes, which it alone is asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from captured_checks import agrees, check, simulate
from programs import all_margins, make_program, thresholds_for
from torch import Tensor, nn

import dgate_rt as dg
from dgate_rt import StagedModel, compiling, ops
from dgate_rt.engines.base import Run
from dgate_rt.errors import ExecutorError
from dgate_rt.graphs import driver_counts, reset_simulation

pytestmark = pytest.mark.skipif(not ops.extension_loaded(), reason="the C++ extension is not built")


class Spy:
    """An engine that runs what it was prepared for, and nothing else."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, ...]] = []
        self.ran: set[tuple[int, int]] = set()

    def __call__(self, stage: nn.Module, example: tuple[Tensor, ...], sizes: Sequence[int]) -> Run:
        index = len(self.asked)
        self.asked.append(tuple(sizes))

        def run(*tensors: Tensor) -> Tensor:
            assert len(tensors[0]) in sizes
            self.ran.add((index, len(tensors[0])))
            return stage(*tensors)

        return run


def padded(run):
    """The memory that each stage pads in, if it had to."""
    return [stage.padding() for stage in run._executor.model.staged.stages]


@pytest.fixture
def moderate(tiny_staged, tiny_gates, images):
    """Four in ten leave at every gate, and the program says so."""
    thresholds = thresholds_for(all_margins(tiny_staged, tiny_gates, images), 0.4)
    program = make_program(tiny_staged, tiny_gates, thresholds, images)
    return replace(program, point=replace(program.point, shares=(0.4, 0.24, 0.144, 0.216)))


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


@pytest.fixture
def noisy(tiny_staged, tiny_gates, images):
    """The second stage cannot be captured."""
    stages = [tiny_staged.stages[0], nn.Sequential(tiny_staged.stages[1], Noisy()), *tiny_staged.stages[2:]]
    return make_program(StagedModel(stages).eval(), tiny_gates, (0.5, 0.5, 0.5), images)


@pytest.mark.parametrize("buckets", ["auto", [7, 32]], ids=["auto", "given"])
def test_stages_are_compiled_at_the_captured_sizes_and_need_no_padding(moderate, images, buckets):
    spy = Spy()
    run = simulate(moderate, engine=spy, buckets=buckets)
    executor = run._executor
    assert spy.asked[0] == executor.stages.entries == ((1, 4, 16, 64) if buckets == "auto" else (7, 32, 64))
    assert spy.asked[1:] == [plan.sizes for plan in executor.stages.buckets]
    assert buckets == "auto" or spy.asked[1:] == [(7, 32, 64)] * 3
    check(run, moderate, images)
    assert not any(padded(run))
    assert {stage for stage, _ in spy.ran} == {0, 1, 2, 3}


def test_buckets_are_those_of_the_eager_engine(moderate):
    eager = simulate(moderate)._executor.stages.buckets
    assert [plan.sizes for plan in simulate(moderate, engine=Spy())._executor.stages.buckets] == [
        plan.sizes for plan in eager
    ]


def test_stages_between_two_gates_share_their_sizes(moderate, images):
    thresholds = (math.inf, moderate.thresholds[1], math.inf)
    program = replace(moderate, thresholds=thresholds, point=replace(moderate.point, thresholds=thresholds))
    spy = Spy()
    run = simulate(program, engine=spy)
    assert spy.asked[:2] == [(1, 4, 16, 64)] * 2
    assert spy.asked[2] == spy.asked[3]
    check(run, program, images)
    assert not any(padded(run))


def test_a_gate_that_is_switched_later_makes_stages_pad(moderate, images):
    run = simulate(moderate, engine=Spy())
    thresholds = (moderate.thresholds[0], math.inf, moderate.thresholds[2])
    run.set_thresholds(thresholds)
    agrees(run(images), thresholds, moderate, images)
    assert any(padded(run))


def test_inductor_answers_as_dense_execution_with_post_hoc_gating(moderate, images):
    run = simulate(moderate, engine="inductor", buckets=[16])
    check(run, moderate, images)
    assert "engine inductor" in run.describe()


def test_what_cannot_be_captured_is_refused_before_it_is_compiled(noisy):
    spy = Spy()
    with pytest.raises(ExecutorError, match="stage 1, module '1', draws random numbers"):
        simulate(noisy, engine=spy)
    assert not spy.asked


def test_lag_runs_on_eager_only(moderate):
    with pytest.raises(ExecutorError, match="the executor lag runs on eager only, got 'inductor'"):
        dg.compile(moderate, executor="lag", device="cpu-sim", engine="inductor")


@pytest.mark.parametrize(("count", "entry"), [(1, 1), (3, 4), (4, 4), (5, 16), (64, 64)])
def test_a_small_batch_enters_at_a_small_size(moderate, images, count, entry):
    spy = Spy()
    run = simulate(moderate, engine=spy)
    spy.ran.clear()
    reset_simulation()
    check(run, moderate, images[:count])
    assert {size for stage, size in spy.ran if stage == 0} == {entry}
    assert (driver_counts().launches, driver_counts().host_calls) == (1, 1)


def test_batches_of_all_sizes_in_turn_keep_to_their_own_graph(moderate, images):
    run = simulate(moderate)
    for count in (64, 3, 64, 1, 17, 5, 64):
        check(run, moderate, images[:count])
    run.set_thresholds((*moderate.thresholds[:2], math.inf))
    for count in (2, 64, 2):
        agrees(run(images[:count]), run.thresholds, moderate, images[:count])


@pytest.mark.parametrize(("able", "executor"), [(True, "graph"), (False, "eager")], ids=["new driver", "old driver"])
def test_cuda_gets_the_graph_where_the_driver_has_it(moderate, monkeypatch, able, executor):
    def driver(name: str) -> int:
        if not able:
            raise ExecutorError("driver: expected CUDA 12.8 or newer, got 12.4")
        return 1

    monkeypatch.setattr(compiling, "graph_driver", driver)
    chosen, why = compiling._choice("cuda", moderate, early_answers=False)
    assert chosen == executor
    assert able or why.endswith("graph cannot run here: driver: expected CUDA 12.8 or newer, got 12.4")


def test_cuda_gets_no_graph_of_what_cannot_be_captured(noisy, monkeypatch):
    monkeypatch.setattr(compiling, "graph_driver", lambda name: 1)
    chosen, why = compiling._choice("cuda", noisy, early_answers=False)
    assert chosen == "eager"
    assert "draws random numbers" in why
