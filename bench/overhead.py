"""What gates cost where nobody leaves; and a gate beside its stage: score and route over the stage's own time."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from dgate_rt import ops
from dgate_rt.bench.cases import Case
from dgate_rt.bench.record import Row
from dgate_rt.bench.ways import GATED, Ways, measure
from dgate_rt.bench.workload import NO_EXIT
from dgate_rt.executors.base import Predictions, row_dense
from dgate_rt.staged import Boundary, as_tuple
from dgate_rt.timing import interleaved


def measure_no_exit(case: Case, engine: str, dtype: str, batch_size: int, images: int, repeats: int) -> list[Row]:
    """Dense, dense in chunks, executors with gates on that let nobody go, and `refill` that switches such gates off."""
    ways = Ways(case, engine, dtype, batch_size, images)
    ways.add_dense()
    ways.add_chunked()
    for executor in GATED:
        ways.add_gated(executor, NO_EXIT)
    ways.add_losing()
    return measure("overhead", [ways], repeats)


@torch.inference_mode()
def measure_gates(case: Case, batch_size: int, repeats: int) -> list[Row]:
    """For each cut the stage before it, its gate's score, and a route that keeps every second sample; eager float32."""
    staged, rows = case.exact, []
    boundary: Boundary = case.images(batch_size)
    for g, gate in enumerate(case.program.gates):
        given = tuple(t.clone() for t in as_tuple(boundary))
        boundary = staged.run_stage(g, boundary)
        stage = functools.partial(staged.run_stage, g, given)
        score = functools.partial(gate.score, staged.gate_features(g, boundary))
        route = _route([row_dense(t) for t in as_tuple(boundary)])
        timings = interleaved([stage, score, route], repeats)
        own = timings[0].per(batch_size)
        shares = {name: t.ratio(timings[0]) for name, t in zip(("score", "route"), timings[1:], strict=True)}
        values = {**shares, "score and route": sum(shares.values())}
        rows.append(Row("gates", case.network.name, "eager", "float32", f"stage {g}", batch_size, (), own, {}, values))
    return rows


def _route(src: list[Tensor]) -> Callable[[], None]:
    """Every second row leaves."""
    ids, dest = torch.arange(len(src[0])), [torch.empty_like(t) for t in src]
    margin, threshold = (ids % 2).float(), torch.tensor([0.5])
    dest_ids, count = torch.empty_like(ids), torch.zeros((), dtype=torch.int32)
    out = Predictions.empty(len(ids), None, ids.device)

    def route() -> None:
        ops.route_(
            src, ids, margin, ids, None, threshold, 0, dest, dest_ids, count, out.labels, out.scores, out.exits
        )  # fmt: skip

    return route
