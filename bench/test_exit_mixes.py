"""The same work under pytest-benchmark: ``pytest bench/ --benchmark-group-by=param:batch_size``."""

from __future__ import annotations

import pytest

from dgate_rt import compile
from dgate_rt.bench.exit_mixes import refuse_wrong_answers
from dgate_rt.bench.peers import EarlyonBatched, MaskedLoop
from dgate_rt.bench.workload import PAPER_MIXES, resnet101_workload

MIX = PAPER_MIXES[1]


@pytest.fixture(scope="module")
def workload():
    return resnet101_workload(64)


@pytest.mark.parametrize("batch_size", [1, 8, 32], ids="B={}".format)
@pytest.mark.parametrize("engine", ["dense", "eager", "masked", "earlyon"])
def test_exit_mix(benchmark, workload, engine, batch_size):
    program = workload.at(workload.thresholds(MIX))
    if engine == "masked":
        run = MaskedLoop(program)
    elif engine == "earlyon":
        run = EarlyonBatched(workload, MIX)
    else:
        run = compile(program, batch_size=batch_size, executor=engine)
    if engine == "eager":
        refuse_wrong_answers(workload, run, workload.images.split(batch_size))
    benchmark.pedantic(run, args=(workload.images[:batch_size],), rounds=5, warmup_rounds=1)
