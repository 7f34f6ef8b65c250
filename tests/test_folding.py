"""BatchNorm goes into the convolution before it, where that changes nothing."""

from __future__ import annotations

import torch
from conftest import conv_block
from engine_cases import network
from torch import Tensor, nn

from dgate_rt.engines import prepare
from dgate_rt.engines.fold import fold_batch_norms


def agrees(stage: nn.Module, expected: int, channels: int = 3) -> None:
    x = torch.randn(2, channels, 8, 8)
    for norm in (module for module in stage.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_mean, -1, 1)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.uniform_(norm.bias)
    with torch.no_grad():
        before = stage(x)
        assert fold_batch_norms(stage) == expected
        torch.testing.assert_close(stage(x), before, rtol=1e-4, atol=1e-4)


def test_in_a_sequence_and_in_a_graph():
    block = nn.Sequential(conv_block(3, 4), conv_block(4, 4)).eval()
    agrees(torch.fx.symbolic_trace(block), 2)
    agrees(block, 2)


def test_not_where_the_convolution_is_read_elsewhere():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.norm(y) + y

    agrees(torch.fx.symbolic_trace(Both().eval()), 0)


def test_not_where_a_module_is_called_twice():
    conv, norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
    twice = nn.Sequential(conv, norm, conv, nn.BatchNorm2d(3)).eval()
    agrees(torch.fx.symbolic_trace(twice), 0)
    agrees(twice, 0)


def test_not_in_train_mode_nor_without_statistics():
    assert fold_batch_norms(conv_block(3, 4).train()) == 0
    assert fold_batch_norms(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)).eval()) == 0


def test_a_prepared_network_has_none_left_and_the_given_one_has():
    staged = network("conv")
    stages = prepare(staged, sizes=[4], sample_shape=(3, 16, 16))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in stages.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in staged.modules())
