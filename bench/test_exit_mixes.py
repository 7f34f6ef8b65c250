"""The same work under pytest-benchmark: ``pytest bench/ --benchmark-group-by=param:batch_size``."""

from __future__ import annotations

import pytest

from dgate_rt import compile
from dgate_rt.bench.exit_mixes import BATCH_SIZES, MIXES, refuse_wrong_answers
from dgate_rt.bench.peers import EarlyonBatched, MaskedLoop
from dgate_rt.bench.workload import NO_EXIT, resnet101_workload

ENGINES = [("dense", NO_EXIT), ("earlyon", MIXES[0]), *((name, mix) for mix in MIXES for name in ("eager", "masked"))]


@pytest.fixture(scope="module")
def workload():
    return resnet101_workload(max(BATCH_SIZES))


@pytest.mark.parametrize("batch_size", BATCH_SIZES, ids="B={}".format)
@pytest.mark.parametrize(("engine", "mix"), ENGINES, ids=lambda v: v if isinstance(v, str) else "/".join(map(str, v)))
def test_exit_mix(benchmark, workload, engine, mix, batch_size):
    work = workload.first(max(64, batch_size))
    batches = work.images.split(batch_size)
    program = work.at(work.thresholds(mix))
    if engine == "masked":
        run = MaskedLoop(program)
    elif engine == "earlyon":
        run = EarlyonBatched(work, mix)
    else:
        run = compile(program, batch_size=batch_size, executor=engine)
    if engine in ("eager", "masked"):
        refuse_wrong_answers(work, program, run, batches)
    benchmark.pedantic(lambda: [run(batch) for batch in batches], rounds=3, warmup_rounds=1)
