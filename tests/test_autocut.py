"""`split(model, "auto")`: known networks are cut at their main blocks, into stages that compute what they compute."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from dgate_rt import backbones
from dgate_rt.errors import SplitError
from dgate_rt.staged import as_tuple, split

timm = pytest.importorskip("timm")

RESNET = ["layer1", "layer2", "layer3"]
DENSENET = ["features.denseblock1", "features.denseblock2", "features.denseblock3"]
CONVNEXT = ["features.1", "features.3", "features.5"]
ViT = [f"encoder.layers.encoder_layer_{index}" for index in (2, 5, 8)]
BLOCKS = ["blocks.0", "blocks.1", "blocks.3"]

# name: how to build it, how large an image, and where "auto" shall cut it
NETWORKS = {
    "resnet18": (lambda: torchvision.models.resnet18(), 64, RESNET),
    "resnet101": (lambda: torchvision.models.resnet101(), 48, RESNET),
    "densenet121": (lambda: torchvision.models.densenet121(), 48, DENSENET),
    "densenet201": (lambda: torchvision.models.densenet201(), 48, DENSENET),
    "mobilenet_v3_small": (
        lambda: torchvision.models.mobilenet_v3_small(),
        64,
        ["features.1", "features.3", "features.8"],
    ),
    "efficientnet_b0": (lambda: torchvision.models.efficientnet_b0(), 64, ["features.2", "features.3", "features.5"]),
    "convnext_tiny": (lambda: torchvision.models.convnext_tiny(), 64, CONVNEXT),
    "regnet_y_400mf": (
        lambda: torchvision.models.regnet_y_400mf(),
        64,
        [f"trunk_output.block{index}" for index in (1, 2, 3)],
    ),
    "vit_b_16": (lambda: torchvision.models.vit_b_16(image_size=64), 64, ViT),
    "swin_t": (lambda: torchvision.models.swin_t(), 64, CONVNEXT),
    "googlenet": (
        lambda: torchvision.models.googlenet(aux_logits=False, init_weights=False),
        64,
        ["conv3", "inception3b", "inception4e"],
    ),
    "googlenet-aux": (
        lambda: torchvision.models.googlenet(aux_logits=True, init_weights=False),
        64,
        ["conv3", "inception3b", "inception4e"],
    ),
    "timm-resnet10t": (lambda: timm.create_model("resnet10t"), 64, RESNET),
    "timm-mobilenetv3": (lambda: timm.create_model("mobilenetv3_small_100"), 64, BLOCKS),
    "timm-convnext": (lambda: timm.create_model("convnext_atto"), 64, [f"stages.{index}" for index in range(3)]),
    "timm-vit": (
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=64),
        64,
        [f"blocks.{index}" for index in (2, 5, 8)],
    ),
    "timm-untraceable-convolutions": (
        lambda: timm.create_model("tf_efficientnet_b0"),
        64,
        ["blocks.1", "blocks.2", "blocks.4"],
    ),
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_stages_compute_what_the_model_computes(name):
    build, size, expected_cuts = NETWORKS[name]
    model = build().eval()
    x = torch.randn(3, 3, size, size)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    staged = split(model, "auto", example=x[:1])
    assert list(staged.cuts) == expected_cuts
    assert staged.checked
    assert staged.example_shape == (3, size, size)
    assert staged.example_dtype == torch.float32
    expected = model(x)
    torch.testing.assert_close(staged(x), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert {parameter.data_ptr() for parameter in staged.parameters()} <= own
    for index, boundary in enumerate(list(staged.boundaries(x))[:-1]):
        features = staged.gate_features(index, boundary)
        assert len(as_tuple(boundary)) == 1
        assert len(features) == 3
        if name == "swin_t":
            assert features.shape[1] == 96 * 2**index
            assert features.data_ptr() == as_tuple(boundary)[0].data_ptr()


# name: how many blocks but the last there are, the first two and the last of them
BLOCKS_OF = {
    "resnet18": (7, ["layer1.0", "layer1.1"], "layer4.0"),
    "resnet101": (32, ["layer1.0", "layer1.1"], "layer4.1"),
    "densenet121": (3, ["features.denseblock1", "features.denseblock2"], "features.denseblock3"),
    "efficientnet_b0": (15, ["features.1", "features.2.0"], "features.6.3"),
    "convnext_tiny": (17, ["features.1.0", "features.1.1"], "features.7.1"),
    "regnet_y_400mf": (15, ["trunk_output.block1", "trunk_output.block2.block2-0"], "trunk_output.block4.block4-4"),
    "vit_b_16": (
        11,
        ["encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1"],
        "encoder.layers.encoder_layer_10",
    ),
    "swin_t": (11, ["features.1.0", "features.1.1"], "features.7.0"),
    "googlenet": (8, ["inception3a", "inception3b"], "inception5a"),
    "timm-vit": (11, ["blocks.0", "blocks.1"], "blocks.10"),
    "timm-untraceable-convolutions": (15, ["blocks.0", "blocks.1.0"], "blocks.5.3"),
}


@pytest.mark.parametrize("name", BLOCKS_OF)
@torch.no_grad()
def test_every_block_is_found(name):
    build, size, _ = NETWORKS[name]
    count, first, last = BLOCKS_OF[name]
    model, x = build().eval(), torch.randn(2, 3, size, size)
    staged = split(model, "blocks", example=x)
    assert (len(staged.cuts), list(staged.cuts[:2]), staged.cuts[-1]) == (count, first, last)
    expected = model(x)
    torch.testing.assert_close(staged(x), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert all(len(as_tuple(boundary)) == 1 for boundary in staged.boundaries(x))


@pytest.mark.parametrize("name", ["resnet26", "resnet101"])
def test_blocks_of_our_own_are_those_of_the_experiments(name):
    model = backbones.build(name, width=0.125).eval()
    assert split(model, "blocks", example=torch.zeros(1, 3, 32, 32)).cuts == backbones.block_cuts(name)


def test_blocks_say_so_where_there_are_none():
    layers = [layer for _ in range(8) for layer in (nn.Linear(16, 16), nn.ReLU())]
    with pytest.raises(SplitError, match="'blocks' found no blocks of several layers"):
        split(nn.Sequential(*layers, nn.Linear(16, 3)).eval(), "blocks")


@pytest.mark.parametrize("build", [torchvision.models.resnet18, torchvision.models.mobilenet_v3_small])
def test_no_example_is_needed(build):
    model = build(num_classes=7).eval()
    staged = split(model, "auto")
    assert staged.checked
    assert staged.example_shape is None
    x = torch.randn(2, 3, 96, 96)
    torch.testing.assert_close(staged(x), model(x))


@pytest.mark.parametrize("name", ["resnet18", "resnet101"])
def test_auto_finds_the_main_blocks_of_a_cifar_form(name):
    model = getattr(torchvision.models, name)(num_classes=10).eval()
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    assert split(model, "auto", example=torch.zeros(1, 3, 16, 16)).cuts == tuple(RESNET)


def test_auto_cuts_a_chain_of_one_resolution_at_quarters_of_its_cost():
    layers = [layer for _ in range(8) for layer in (nn.Linear(16, 16), nn.ReLU())]
    staged = split(nn.Sequential(*layers, nn.Linear(16, 3)).eval(), "auto")
    assert staged.cuts == ("3", "7", "11")


def test_auto_counts_the_work_of_attention():
    model = torchvision.models.VisionTransformer(32, 16, 2, 2, 64, 64, num_classes=4).eval()
    assert split(model, "auto").cuts == ("encoder.layers.encoder_layer_0",)


def test_auto_says_so_where_there_is_no_place():
    with pytest.raises(SplitError, match="'auto' found no place"):
        split(nn.Sequential(nn.Linear(8, 3)).eval(), "auto")
