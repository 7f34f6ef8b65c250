"""The contract of all executors, over every backbone: eager equals dense with post-hoc gating."""

from __future__ import annotations

import pytest
import torch
from networks import NETWORKS
from programs import all_margins, in_band, make_program, random_gates, thresholds_for

import dgate_rt as dg
from dgate_rt import reference

COUNT = 24


@pytest.mark.parametrize("name", NETWORKS)
def test_eager_agrees_with_dense_and_post_hoc_gating(name):
    network = NETWORKS[name]
    model, x = network.make(), network.images(COUNT)
    staged = dg.split(model, network.cuts, example=x[:2])
    gates = random_gates(staged, x, classes=10)
    margins = all_margins(staged, gates, x)
    run = dg.compile(make_program(staged, gates, (0.0,) * len(gates), x), batch_size=16)
    seen = set()
    for share in (0.0, 0.3, 0.7, 1.0):
        thresholds = thresholds_for(margins, share)
        if 0 < share < 1:  # halfway between two samples, so that few lie in the band
            ordered = margins.sort(1, descending=True).values
            k = round(share * COUNT)
            thresholds = tuple(((ordered[:, k - 1] + ordered[:, k]) / 2).tolist())
        run.set_thresholds(thresholds)
        out = run(x)
        with torch.inference_mode():
            labels, scores, exits = reference.predict(staged, gates, thresholds, x)
        same, band = out.exits == exits, in_band(margins, thresholds)
        assert (same | band).all(), f"share {share}: {(~(same | band)).sum()} samples took another exit"
        assert band.sum() <= 2
        torch.testing.assert_close(out.scores[same], scores[same], rtol=1e-3, atol=1e-3)
        assert torch.equal(out.labels[same], labels[same])
        seen |= set(out.exits.tolist())
    assert seen == set(range(len(gates) + 1))
