"""The contract of all executors, on real networks: they answer as dense execution with post-hoc gating does."""

from __future__ import annotations

import pytest
import torch
from networks import NETWORKS
from programs import all_margins, in_band, make_program, random_gates, thresholds_for

import dgate_rt as dg
from dgate_rt import ops, reference

COUNT = 24
CAPTURED = ("resnet18", "resnet101", "densenet121", "vit_b_16", "resnet18 inside a residual branch")
"""What executors are simulated on that launch captures."""
HERE = [executor for executor in ("graph", "lag") if ops.extension_loaded()]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_executor_agrees_with_dense_and_post_hoc_gating(name):
    network = NETWORKS[name]
    model, x = network.make(), network.images(COUNT)
    staged = dg.split(model, network.cuts, example=x[:2])
    gates = random_gates(staged, x, classes=10)
    margins, program = all_margins(staged, gates, x), make_program(staged, gates, (0.0,) * len(gates), x)
    chunks = [4, 16, 8, 16][: len(gates) + 1]  # by hand, so that nothing has to be timed
    runs = {
        "eager": dg.compile(program, batch_size=16, executor="eager"),
        "refill": dg.compile(program, batch_size=16, executor="refill", chunks=chunks),
    }
    for executor in HERE if name in CAPTURED else []:
        runs[executor] = dg.compile(
            program, batch_size=16, executor=executor, device="cpu-sim", buckets=[4, 8], channels_last=False
        )
    seen = set()
    for share in (0.0, 0.3, 0.7, 1.0):
        thresholds = thresholds_for(margins, share)
        with torch.inference_mode():
            labels, scores, exits = reference.predict(staged, gates, thresholds, x)
        band = in_band(margins, thresholds)
        assert band.sum() <= 2
        for executor, run in runs.items():
            run.set_thresholds(thresholds)
            out = run(x)
            same = out.exits == exits
            assert (same | band).all(), f"{executor}, share {share}: {(~(same | band)).sum()} took another exit"
            torch.testing.assert_close(out.scores[same], scores[same], rtol=1e-3, atol=1e-3)
            assert torch.equal(out.labels[same], labels[same])
            seen |= set(out.exits.tolist())
    assert seen == set(range(len(gates) + 1))
