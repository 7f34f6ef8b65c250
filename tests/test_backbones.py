"""The CIFAR forms: the paper's FLOPs, torchvision's names, the width factor, and their files."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision import models

from dgate_rt import backbones
from dgate_rt.backbones import BackboneMeta

SMALL = BackboneMeta("resnet26", 0.125, num_classes=7, in_channels=1, image_size=16, dataset="digits", accuracy=0.5)


def test_resnet101_costs_what_the_paper_says():
    """Table 1: 5.02 GFLOPs for the original network at 32x32 with 10 classes; a command prints it."""
    command = [sys.executable, "-m", "dgate_rt.backbones"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    table = dict(line.split() for line in printed.splitlines())
    assert list(table) == backbones.names()
    assert table["resnet101"] == "5.020"
    depths = ["resnet18", "resnet26", "resnet34", "resnet50", "resnet101", "resnet152"]
    assert [float(table[name]) for name in depths] == sorted(float(table[name]) for name in depths)


@pytest.mark.parametrize("name", backbones.names())
def test_every_backbone_classifies_and_has_its_cuts(name):
    width = 1.0 if name == "efficientnet_lite0" else 0.125
    model = backbones.build(name, num_classes=7, width=width, in_channels=1).eval()
    assert model(torch.randn(2, 1, 16, 16)).shape == (2, 7)
    modules = dict(model.named_modules())
    assert all(cut in modules for cut in backbones.default_cuts(name))


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "densenet121"])
def test_weights_are_named_and_shaped_as_in_torchvision(name):
    """Only the stem differs: torchvision's is 7x7 with a stride of 2."""
    with torch.device("meta"):
        ours = backbones.build(name, num_classes=1000).state_dict()
        theirs = getattr(models, name)(weights=None).state_dict()
    assert list(ours) == list(theirs)
    assert [key for key in ours if ours[key].shape != theirs[key].shape] in (
        ["conv1.weight"],
        ["features.conv0.weight"],
    )


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_forward_is_that_of_torchvision(name):
    """torchvision's network with its stem replaced, given our weights, gives our logits."""
    ours = backbones.build(name, num_classes=10, width=1.0).eval()
    theirs = getattr(models, name)(weights=None, num_classes=10).eval()
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


def test_resnet26_has_26_layers():
    model = backbones.build("resnet26", width=0.125)
    layers = [
        module
        for path, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and "downsample" not in path
    ]
    assert len(layers) == 26


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "densenet161"])
@pytest.mark.parametrize("width", [0.01, 0.125, 0.3, 0.5, 1.5])
def test_width_scales_every_channel_count(name, width):
    with torch.device("meta"):
        scaled, full = (
            [m for m in backbones.build(name, width=w).modules() if isinstance(m, nn.Conv2d)] for w in (width, 1.0)
        )
    if name.startswith("resnet"):
        assert all(conv.out_channels % 8 == 0 for conv in scaled)
        ratios = {conv.out_channels / whole.out_channels for conv, whole in zip(scaled, full, strict=True)}
        assert len(ratios) == 1
        assert abs(ratios.pop() - width) <= 4 / 64 or scaled[0].out_channels == 8
    else:
        assert scaled[-1].out_channels == max(8, round(48 * width / 8 + 1e-9) * 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(lambda: backbones.build("resnet110"), "no backbone 'resnet110'; near names: resnet1", id="near"),
        pytest.param(lambda: backbones.build("???"), "near names: resnet18, resnet26", id="hopeless"),
        pytest.param(lambda: backbones.default_cuts("vgg"), "no backbone 'vgg'", id="cuts"),
        pytest.param(lambda: backbones.build("resnet18", num_classes=0), "must be positive, got num_classes=0", id="k"),
        pytest.param(lambda: backbones.build("resnet18", width=0), "must be positive, .*width=0", id="width"),
        pytest.param(
            lambda: backbones.build("efficientnet_lite0", width=0.5),
            "width: .* the width of its weights, 1",
            id="trained",
        ),
        pytest.param(lambda: backbones.build("resnet18", in_channels=0), "must be positive, .*in_channels=0", id="c"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    path, model = tmp_path / "net.safetensors", SMALL.build()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
    backbones.save_backbone(path, model, SMALL)
    return path, model


def test_a_saved_network_comes_back_bit_for_bit(saved, tmp_path):
    path, model = saved
    loaded, meta = backbones.load_backbone(path)
    assert meta == SMALL
    assert not loaded.training
    expected = model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_channels_last_weights_are_saved_too(saved, tmp_path):
    _, model = saved
    backbones.save_backbone(tmp_path / "last", model.to(memory_format=torch.channels_last), SMALL)
    loaded, _ = backbones.load_backbone(tmp_path / "last")
    assert torch.equal(loaded.conv1.weight, model.conv1.weight)


def test_a_description_of_another_network_is_refused(saved, tmp_path):
    _, model = saved
    with pytest.raises(
        ValueError, match=r"model: tensor 'fc.weight': expected \(\(10, 64\), torch.float32\), got \(\(7"
    ):
        backbones.save_backbone(tmp_path / "wrong", model, BackboneMeta("resnet26", 0.125, 10, 1))
    assert not (tmp_path / "wrong").exists()


def _rewritten(path, tensors=None, **changes):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        header = {**file.metadata(), **changes}
    save_file(load_file(path) if tensors is None else tensors, path, header)


def _without_classifier(path):
    tensors = load_file(path)
    del tensors["fc.weight"]
    _rewritten(path, tensors)


def _meta(**changes):
    return json.dumps({"name": "resnet26", "width": 0.125, "num_classes": 7, "in_channels": 1, **changes})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(lambda p: p.write_bytes(p.read_bytes()[:-100]), "not a whole safetensors file", id="truncated"),
        pytest.param(lambda p: p.write_bytes(b""), "not a whole safetensors file", id="empty"),
        pytest.param(lambda p: p.write_bytes(b"\x80\x04K\x01."), "not a whole safetensors file", id="pickle"),
        pytest.param(lambda p: save_file({"a": torch.ones(1)}, p), "expected format .* got None", id="foreign"),
        pytest.param(lambda p: _rewritten(p, version="99"), "version '1', got .* version '99'", id="version"),
        pytest.param(lambda p: _rewritten(p, meta="{"), "no usable description", id="json"),
        pytest.param(lambda p: _rewritten(p, meta="[]"), "no usable description", id="json-list"),
        pytest.param(lambda p: _rewritten(p, meta='{"depth": 3}'), "no usable description", id="field"),
        pytest.param(lambda p: _rewritten(p, meta=_meta(name="resnet27")), "no backbone 'resnet27'", id="name"),
        pytest.param(lambda p: _rewritten(p, meta=_meta(num_classes=9)), "tensor 'fc.weight': expected", id="classes"),
        pytest.param(_without_classifier, r"tensor 'fc.weight': expected .* got None", id="missing-tensor"),
    ],
)
def test_a_bad_file_is_refused(saved, damage, message):
    path, _ = saved
    damage(path)
    with pytest.raises(ValueError, match=message):
        backbones.load_backbone(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere"):
        backbones.load_backbone(tmp_path / "nowhere")
