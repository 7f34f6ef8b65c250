"""How long calibration takes for 50,000 samples: ``pytest bench/test_calibration.py``.

Targets on two cores: 2 s for the frontier of three gates, 10 s with a guarantee, a minute for the fit of a gate.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import dgate_rt as dg
from dgate_rt.cost import Costs
from dgate_rt.frontier import search_frontier
from dgate_rt.risk import certify
from dgate_rt.trace import Trace

SAMPLES, CLASSES, DROP = 50_000, 10, 0.01
COSTS = Costs("FLOPs", (0.44, 0.67, 3.38, 0.53), (0.01, 0.02, 0.03))


@pytest.fixture(scope="module")
def trace() -> Trace:
    """Samples of varying difficulty; deeper gates are right more often, margins hint at it."""
    rng = np.random.default_rng(0)
    targets = rng.integers(0, CLASSES, SAMPLES)
    skill = rng.normal(size=(4, SAMPLES)) + 0.7 * np.arange(1, 5)[:, None] - rng.normal(size=SAMPLES)
    margins = (skill + 0.5 * rng.normal(size=skill.shape))[:3].astype(np.float32)
    return Trace(margins, np.where(skill > -0.8, targets, (targets + 1) % CLASSES), targets)


def test_whole_frontier(benchmark, trace):
    benchmark.pedantic(search_frontier, (trace, COSTS), rounds=3, warmup_rounds=1)


def test_frontier_around_a_target(benchmark, trace):
    target = {"min_accuracy": trace.network_accuracy - DROP}
    benchmark.pedantic(search_frontier, (trace, COSTS), target, rounds=3, warmup_rounds=1)


def test_risk_control(benchmark, trace):
    benchmark.pedantic(certify, (trace, COSTS, DROP, 0.95), rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("width", [256, 1024, 4096])
def test_fit_of_one_gate(benchmark, width):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    centres = torch.randn(CLASSES, width, generator=generator) / 8
    features = centres[labels] + torch.randn(SAMPLES, width, generator=generator)
    staged = dg.StagedModel([nn.Identity(), nn.Linear(width, CLASSES)]).eval()
    batches = list(zip(features.split(1_000), labels.split(1_000), strict=True))
    benchmark.pedantic(dg.fit, (staged, batches), {"progress": False}, rounds=1)
