"""Torch leaves the cores to an engine that has threads of its own."""

from __future__ import annotations

import threading

import pytest
import torch
from engine_cases import network
from programs import make_program, random_gates

import dgate_rt as dg
from dgate_rt.threads import _omp_set_num_threads, alone


@pytest.fixture(autouse=True)
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def staged(own_threads: bool):
    made = network("conv")
    made.own_threads = own_threads
    return made


needs_openmp = pytest.mark.skipif(_omp_set_num_threads() is None, reason="torch runs without OpenMP here")


@needs_openmp
def test_one_thread_inside_and_as_many_as_before_outside():
    with alone(staged(True)):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    with pytest.raises(KeyError), alone(staged(True)):
        raise KeyError
    assert torch.get_num_threads() == 2


@needs_openmp
def test_other_threads_keep_theirs():
    seen: list[int] = []
    with alone(staged(True)):
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
    assert seen == [2]


def test_nothing_changes_for_stages_on_torch_own_threads():
    with alone(staged(False)), alone(network("conv")):
        assert torch.get_num_threads() == 2


@needs_openmp
@pytest.mark.parametrize("executor", ["eager", "refill"])
@pytest.mark.parametrize("own_threads", [True, False])
def test_executors_run_around_stages_on_one_thread(executor, own_threads):
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    plain, seen = network("conv"), set[int]()
    program = make_program(plain, random_gates(plain, images, 5), (0.5,), images)

    def engine(stage, example, sizes):
        def run(*tensors):
            seen.add(torch.get_num_threads())
            return stage(*tensors)

        return run

    engine.own_threads = own_threads
    run = dg.compile(program, engine=engine, executor=executor, batch_size=8, chunks=[8, 8])
    seen.clear()
    run(images)
    list(run.stream([images[:3], images[3:]]))
    assert seen == {1 if own_threads else 2}
    assert torch.get_num_threads() == 2
