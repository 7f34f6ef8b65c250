"""Exit mixes: the four of the paper's Table 1, and a sweep from all late to all early; realised against ideal.

*Realisation* is the share of the FLOPs saving that became time. *Time realisation* is the share of what the stages'
own times allow: the ideal is then the mean, over the exits of the mix, of what it takes to let all images leave there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dgate_rt.bench.cases import Case
from dgate_rt.bench.peers import MaskedLoop
from dgate_rt.bench.record import Row
from dgate_rt.bench.ways import CHUNKED, GATED, Ways, measure
from dgate_rt.bench.workload import Mix

SWEEP = tuple(round(share / 10, 1) for share in range(11))


def sweep_mix(share: float, gates: int = 3) -> Mix:
    """Every gate lets go ``share`` of those who reach it."""
    reach = [(1 - share) ** g for g in range(gates)]
    return (*(share * r for r in reach), (1 - share) ** gates)


def measure_mixes(
    case: Case, engine: str, dtype: str, batch_size: int, images: int, mixes: Sequence[Mix], repeats: int
) -> list[Row]:
    """Dense, dense in chunks, and each mix with every executor; the masked loop too where stages run eagerly."""
    ways = Ways(case, engine, dtype, batch_size, images)
    ways.add_dense()
    ways.add_chunked()
    for mix in mixes:
        for executor in GATED:
            ways.add_gated(executor, mix)
        if engine == "eager" and dtype == "float32":
            ways.add_peer("masked loop", mix, MaskedLoop)
    return _rows(ways, "mixes", repeats)


def measure_sweep(case: Case, engine: str, dtype: str, batch_size: int, images: int, repeats: int) -> list[Row]:
    """Dense, dense in chunks, and eleven mixes from all late to all early."""
    ways = Ways(case, engine, dtype, batch_size, images)
    ways.add_dense()
    ways.add_chunked()
    for share in SWEEP:
        ways.add_gated("refill", sweep_mix(share))
    return _rows(ways, "sweep", repeats)


def _rows(ways: Ways, part: str, repeats: int) -> list[Row]:
    """A row for each way, those of `refill` with their time realisation."""
    gates = len(ways.case.program.gates)
    for gate in range(gates):
        ways.add_leaving(gate)
    rows = measure(part, [ways], repeats)
    shown, leaving = rows[:-gates], rows[-gates:]
    chunked = next(row for row in shown if row.way == CHUNKED)
    exits = [np.array(row.ms.rounds) for row in (*leaving, chunked) if row.ms]
    for row in shown:
        if row.way == "refill" and row.mix[-1] < 1 and row.ms:
            ideal = sum(share * rounds for share, rounds in zip(row.mix, exits, strict=True)) / exits[-1]
            saved = 1 - np.median(np.array(row.ms.rounds) / exits[-1])
            row.values["time realisation"] = float(saved / (1 - np.median(ideal)))
    return shown
