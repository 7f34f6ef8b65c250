"""All engines and all peers in one run: is a gated network faster than the best dense engine a user could pick?"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dgate_rt.backbones import build
from dgate_rt.bench.cases import RESNET_101, Case, Network, make_case
from dgate_rt.bench.peers import EarlyonBatched, MaskedLoop, NonzeroLoop, no_earlyon
from dgate_rt.bench.record import Row
from dgate_rt.bench.ways import Ways, measure
from dgate_rt.bench.workload import Mix

SMALLER = Network("CIFAR ResNet-101, width 0.75", lambda: build("resnet101", width=0.75), 32)
"""2.82 GFLOPs: what the gated ResNet-101 costs at the second mix of the paper's Table 1."""


def measure_contest(
    case: Case, engines: Sequence[tuple[str, str]], batch_size: int, images: int, mixes: Sequence[Mix], repeats: int
) -> list[Row]:
    """Every engine and dtype, dense and gated, in turn with what a user could write and with a smaller network."""
    groups: list[Ways] = []
    skipped: list[Row] = []
    for engine, dtype in engines:
        ways = Ways(case, engine, dtype, batch_size, images)
        ways.add_dense()
        ways.add_chunked()
        for mix in mixes:
            ways.add_gated("refill", mix)
        if (engine, dtype) == ("eager", "float32"):
            for mix in mixes:
                ways.add_gated("eager", mix)
                ways.add_peer(MaskedLoop.name, mix, MaskedLoop)
                ways.add_peer(NonzeroLoop.name, mix, NonzeroLoop)
            if why := no_earlyon():
                skipped.append(
                    Row("contest", case.network.name, engine, dtype, EarlyonBatched.name, batch_size, note=why)
                )
            else:
                ways.add_unchecked(EarlyonBatched.name, mixes[0], EarlyonBatched(ways.work.workload, mixes[0]))
        groups.append(ways)
    if case.network == RESNET_101:
        smaller = make_case(SMALLER, "cpu", torch.float32)
        for engine, dtype in engines:
            ways = Ways(smaller, engine, dtype, batch_size, images)
            ways.add_dense()
            groups.append(ways)
    return [*measure("contest", groups, repeats), *skipped]
