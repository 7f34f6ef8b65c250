"""The same ways under pytest-benchmark: ``pytest bench/ --benchmark-group-by=param:batch_size``."""

from __future__ import annotations

import pytest
import torch

from dgate_rt.bench.cases import RESNET_101, make_case
from dgate_rt.bench.peers import MaskedLoop
from dgate_rt.bench.ways import GATED, Ways
from dgate_rt.bench.workload import NO_EXIT, PAPER_MIXES

BATCH_SIZES = (1, 8, 32, 64)
MIXES = (*PAPER_MIXES, NO_EXIT)
WAYS = [("dense", ()), ("dense, chunked", ()), *((way, mix) for mix in MIXES for way in (*GATED, MaskedLoop.name))]


@pytest.fixture(scope="module")
def case():
    return make_case(RESNET_101, "cpu", torch.float32)


@pytest.mark.parametrize("batch_size", BATCH_SIZES, ids="B={}".format)
@pytest.mark.parametrize(("way", "mix"), WAYS, ids=lambda v: v if isinstance(v, str) else "/".join(map(str, v)))
def test_way(benchmark, case, way, mix, batch_size):
    ways = Ways(case, "eager", "float32", batch_size, images=64)
    if way == "dense":
        ways.add_dense()
    elif way == "dense, chunked":
        ways.add_chunked()
    elif way in GATED:
        ways.add_gated(way, mix)
    else:
        ways.add_peer(way, mix, MaskedLoop)
    benchmark.pedantic(ways.ways[0].run, rounds=3, warmup_rounds=1)
