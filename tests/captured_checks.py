"""What executors that launch captures are tested with: the simulated device, the agreement, and programs."""

from __future__ import annotations

import math

import torch
from programs import all_margins, in_band, make_program, random_gates, thresholds_for
from torch import nn

import dgate_rt as dg
from dgate_rt import StagedModel, reference


def simulate(program, **options):
    return dg.compile(program, **{"batch_size": 64, "device": "cpu-sim", "channels_last": False, **options})


def check(run, program, x, dtype=torch.float32, most=0.1):
    """`agrees`, of one call."""
    return agrees(run(x), run.thresholds, program, x, dtype, most)


def agrees(out, thresholds, program, x, dtype=torch.float32, most=0.1):
    """Every answer is that of dense execution with post-hoc gating, but for margins within float error.

    Those may be one sample and a share of ``most``; a random network can make all samples alike.
    """
    with torch.inference_mode():
        labels, scores, exits = reference.predict(program.staged, program.gates, thresholds, x)
        band = in_band(all_margins(program.staged, program.gates, x), thresholds, dtype)
    assert len(out) == len(x)
    same = out.exits == exits
    assert (same | band).all()
    assert band.sum() <= 1 + most * len(x)
    assert torch.equal(out.labels[same], labels[same])
    torch.testing.assert_close(out.scores[same], scores[same], rtol=1e-4, atol=1e-4)
    return out


def random_program(seed, widths, batch, share, off):
    """A network of linear layers with a gate behind each but the last, some of them off; and a batch for it."""
    torch.manual_seed(seed)
    layers = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in zip([6, *widths], widths, strict=False)]
    staged = StagedModel([*layers, nn.Linear(widths[-1], 4)]).eval()
    x = torch.randn(batch, 6)
    gates = random_gates(staged, x, classes=4)
    thresholds = thresholds_for(all_margins(staged, gates, x), share)
    thresholds = [math.inf if g in off else t for g, t in enumerate(thresholds)]
    return make_program(staged, gates, thresholds, x), x


class Two(nn.Module):
    def forward(self, x):
        return x * 2, x.unsqueeze(1).expand(-1, 3, -1), (x[:, :1] > 0)


class Join(nn.Module):
    def forward(self, a, b, c):
        return a + b.sum(1) + c


def program_of_several_tensors():
    """A network whose cut three tensors cross, one of them expanded and one of bools; and a batch for it."""
    torch.manual_seed(0)
    staged, x = StagedModel([Two(), Join()]).eval(), torch.randn(30, 4)
    gates = random_gates(staged, x, classes=4)
    return make_program(staged, gates, thresholds_for(all_margins(staged, gates, x), 0.5), x), x
