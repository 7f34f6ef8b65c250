"""BatchNorm folded into the convolution before it: one pass over memory less, and none in low precision."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fold_batch_norms(stage: nn.Module) -> int:
    """Fold, in place, every BatchNorm that is all that reads a convolution; how many were.

    They are looked for in traced graphs and in `torch.nn.Sequential`. A module that is called twice is left alone, and
    so is one in train mode, without running statistics, in half precision, or with hooks.
    """
    folded = 0
    for module in list(stage.modules()):
        if isinstance(module, fx.GraphModule):
            folded += _fold_graph(module)
        elif type(module) is nn.Sequential:
            folded += _fold_sequential(module, stage)
    return folded


def _fold_graph(traced: fx.GraphModule) -> int:
    calls = Counter(id(traced.get_submodule(str(n.target))) for n in traced.graph.nodes if n.op == "call_module")
    folded = 0
    for node in list(traced.graph.nodes):
        if node.op != "call_module" or len(node.args) != 1 or not isinstance(node.args[0], fx.Node):
            continue
        before = node.args[0]
        if before.op != "call_module" or len(before.users) != 1:
            continue
        conv, norm = traced.get_submodule(str(before.target)), traced.get_submodule(str(node.target))
        if calls[id(conv)] == calls[id(norm)] == 1 and _foldable(conv, norm):
            traced.set_submodule(str(before.target), _fused(conv, norm))
            node.replace_all_uses_with(before)
            traced.graph.erase_node(node)
            folded += 1
    if folded:
        traced.delete_all_unused_submodules()
        traced.recompile()
    return folded


def _fold_sequential(sequence: nn.Sequential, stage: nn.Module) -> int:
    places = Counter(id(child) for module in stage.modules() for child in module._modules.values())
    folded = 0
    for index in range(len(sequence) - 1):
        conv, norm = sequence[index], sequence[index + 1]
        if places[id(conv)] == places[id(norm)] == 1 and _foldable(conv, norm):
            sequence[index], sequence[index + 1] = _fused(conv, norm), nn.Identity()
            folded += 1
    return folded


def _fused(conv: Any, norm: Any) -> nn.Module:
    fused: nn.Module = fuse_conv_bn_eval(conv, norm)
    return fused


def _foldable(conv: nn.Module, norm: nn.Module) -> bool:
    if type(conv) not in _CONVOLUTIONS or type(norm) not in _NORMS or conv.training or norm.training:
        return False
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in (conv, norm))
    single = conv.weight.dtype is torch.float32  # in half precision the folded weight would be rounded once more
    return single and not hooked and norm.running_mean is not None and norm.num_features == conv.out_channels
