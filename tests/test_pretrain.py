"""Training a backbone: it learns, a seed fixes the weights, a checkpoint goes on to the same ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dgate_rt import backbones, data, pretrain


def _network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)
    )


def _same(first: nn.Module, second: nn.Module) -> bool:
    theirs = second.state_dict()
    return all(torch.equal(value, theirs[key]) for key, value in first.state_dict().items())


@pytest.fixture(scope="module")
def digits() -> data.DataBundle:
    return data.load("digits")


def _train(model: nn.Module, source: object, **changes) -> list[pretrain.Epoch]:
    return pretrain.train_backbone(model, source, **{"epochs": 2, "lr": 0.1, "progress": False, **changes})


def test_the_loss_falls_and_the_network_learns(digits):
    model = _network()
    history = _train(model, digits, epochs=4, val_loader=digits.loader("val", 256))
    assert len(history) == 4
    assert history[-1].loss < history[0].loss / 3
    assert history[-1].val_accuracy == pretrain.evaluate(model, digits.loader("val", 64))
    assert pretrain.evaluate(model, digits.loader("test", 256)) > 0.85
    assert not model.training


def test_it_trains_without_gradients_around_it(digits):
    """An experiment may ask for its network, which is then trained, from within ``no_grad``."""
    model, expected = _network(), _network()
    _train(expected, digits)
    with torch.no_grad():
        _train(model, digits)
    assert _same(model, expected)


@pytest.mark.parametrize(("channels", "expected"), [(4, torch.contiguous_format), (8, torch.channels_last)])
def test_narrow_networks_train_in_a_format_that_is_safe_on_every_cpu(channels, expected):
    """A strided 1x1 convolution of fewer than 8 channels, in channels_last, ends the process where AVX2 is all."""
    model = nn.Sequential(
        nn.Conv2d(1, channels, 3, bias=False), nn.Conv2d(channels, 8, 1, 2), nn.Flatten(), nn.LazyLinear(10)
    )
    seen = []
    model[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].is_contiguous(memory_format=expected)))
    x, y = torch.randn(64, 1, 8, 8), torch.arange(64) % 10
    model(x)
    seen.clear()
    _train(model, DataLoader(TensorDataset(x, y), 32))
    assert seen == [True] * 4
    assert model[1].weight.is_contiguous(memory_format=expected)


def test_a_recipe_gives_its_network_and_what_it_is_worth(digits):
    recipe = replace(pretrain.QUICK, image_size=8, epochs=1)
    bundle = recipe.load_data()
    model, meta = pretrain.train_recipe(recipe, bundle, seed=5, progress=False)
    assert (meta.name, meta.dataset, meta.image_size, meta.in_channels) == ("resnet26", "digits", 8, 1)
    assert meta.accuracy == pretrain.evaluate(model, bundle.loader("test", 128))
    again, _ = pretrain.train_recipe(recipe, bundle, seed=5, progress=False)
    assert _same(model, again)


def test_the_demo_is_deep_enough():
    """At least 26 layers, and gates at three places."""
    assert pretrain.DEMO.dataset == "cluttered-mnist"
    assert pretrain.DEMO.name == "resnet26"
    assert len(backbones.default_cuts(pretrain.DEMO.name)) == 3


@pytest.mark.parametrize("changes", [{}, {"augment": True}, {"mixup": 0.4}], ids=["plain", "augmented", "mixed"])
def test_a_seed_fixes_the_weights(digits, changes):
    models = [_network() for _ in range(3)]
    for model, seed in zip(models, (3, 3, 4), strict=True):
        torch.rand(seed)  # what happened before does not matter
        _train(model, digits, seed=seed, epochs=1, **changes)
    assert _same(models[0], models[1])
    assert not _same(models[0], models[2])


def test_training_leaves_the_global_generator_alone(digits):
    model = _network()
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    _train(model, digits, epochs=1)
    assert torch.equal(torch.rand(3), expected)


class _Interrupted(DataLoader):
    """Stops in the middle of its second pass, as a user might."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        for index, batch in enumerate(super().__iter__()):
            if self.passes == 2 and index == 3:
                raise KeyboardInterrupt
            yield batch


def test_an_interrupted_training_goes_on_to_the_same_weights(digits, tmp_path):
    rows = TensorDataset(*digits.train[list(range(512))])
    whole, broken, resumed = _network(), _network(), _network()
    expected = _train(whole, DataLoader(rows, 64, shuffle=True), epochs=3)
    path = tmp_path / "checkpoint"
    with pytest.raises(KeyboardInterrupt):
        _train(broken, _Interrupted(rows, 64, shuffle=True), epochs=3, checkpoint=path)
    assert not broken.training
    history = _train(resumed, DataLoader(rows, 64, shuffle=True), epochs=3, checkpoint=path)
    assert _same(whole, resumed)
    assert history == expected
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize(
    ("damage", "changes", "message"),
    [
        pytest.param(None, {"lr": 0.2}, r"of another training; .* \{'lr': \(0.2, 0.1\)\}", id="other-settings"),
        pytest.param(lambda p: p.write_bytes(p.read_bytes()[:-9]), {}, "not a whole safetensors file", id="truncated"),
        pytest.param(
            lambda p: backbones.save_backbone(p, *_backbone()), {}, "expected 'dgate_rt.pretraining', got", id="foreign"
        ),
    ],
)
def test_a_bad_checkpoint_is_refused(digits, tmp_path, damage, changes, message):
    path = tmp_path / "checkpoint"
    _train(_network(), digits, epochs=1, checkpoint=path)
    if damage:
        damage(path)
    with pytest.raises(ValueError, match=message):
        _train(_network(), digits, **{"epochs": 1, **changes}, checkpoint=path)


def test_a_checkpoint_of_another_network_is_refused(digits, tmp_path):
    path = tmp_path / "checkpoint"
    _train(_network(), digits, epochs=1, checkpoint=path)
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(ValueError, match="does not fit the model"):
        _train(other, digits, epochs=1, checkpoint=path)


def _backbone() -> tuple[nn.Module, backbones.BackboneMeta]:
    meta = backbones.BackboneMeta("resnet18", 0.125)
    return meta.build(), meta


class _Last(nn.Module):
    """Keeps the batch that it was given last, and answers with logits that do not depend on it."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([2.0, 0.0, 0.0]))

    def forward(self, x):
        self.x = x
        return self.logits.expand(len(x), 3)


def test_mixup_mixes_pairs_of_images_and_their_losses_alike():
    """Image i is i everywhere, so an image that was mixed tells of what, and the loss has to be mixed likewise."""
    x, y = torch.arange(4.0)[:, None].expand(4, 3), torch.tensor([0, 0, 0, 1])
    model = _Last()
    surprise = -model.logits.detach().log_softmax(0)
    (epoch,) = _train(model, [(x, y)], epochs=1, mixup=1.0, seed=2)
    image = model.x[:, 0].reshape(-1)
    with torch.random.fork_rng():
        torch.manual_seed(2 * 1_000_003)
        share, order = float(torch.distributions.Beta(1.0, 1.0).sample()), torch.randperm(4)
    assert 0.05 < share < 0.95
    assert order.tolist() != [0, 1, 2, 3]
    torch.testing.assert_close(image, share * torch.arange(4.0) + (1 - share) * order)
    expected = share * surprise[y].mean() + (1 - share) * surprise[y[order]].mean()
    assert epoch.loss == pytest.approx(float(expected), rel=1e-5)


def test_label_smoothing_keeps_the_network_from_being_sure(digits):
    x = digits.val[list(range(64))][0]
    sure = []
    for smoothing in (0.0, 0.3):
        model = _network()
        _train(model, digits, epochs=4, label_smoothing=smoothing)
        sure.append(float(model(x).detach().softmax(1).amax(1).mean()))
    assert sure[1] < sure[0] - 0.1


def test_only_matrices_and_kernels_decay(digits):
    """With a rate too small to learn by, weight decay is all that moves the weights."""
    model, start = _network(), _network()
    _train(model, digits, epochs=1, lr=1e-6, weight_decay=1e5, momentum=0.0)
    kept = [
        torch.allclose(after, before, atol=1e-3)
        for after, before in zip(model.parameters(), start.parameters(), strict=True)
    ]
    assert kept == [p.ndim == 1 for p in start.parameters()]


def test_the_learning_rate_rises_for_a_quarter_and_falls_to_nothing():
    settings = pretrain._Settings(10, 10, 0.4, 0.9, 0, 0, 0, 0, False)
    rates = [settings.learning_rate(step) for step in range(100)]
    peak = rates.index(max(rates))
    assert peak == 25
    assert rates[peak] == 0.4
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert 0 < rates[-1] < 1e-3


def test_bfloat16_trains_too(digits):
    history = _train(_network(), digits, bfloat16=True)
    assert history[-1].loss < history[0].loss


def test_bfloat16_is_chosen_where_the_hardware_has_it(monkeypatch):
    for probe in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda: False, raising=False)
    assert not pretrain.native_bfloat16("cpu")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert pretrain.native_bfloat16("cpu")


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        pytest.param([], {}, "source: expected a loader of known length, one batch at least, got length 0", id="empty"),
        pytest.param(iter([]), {}, "got length None", id="no-length"),
        pytest.param([(0, 0)], {"epochs": 0}, "must be positive, got epochs=0", id="epochs"),
        pytest.param([(0, 0)], {"lr": 0.0}, "must be positive, .*lr=0", id="lr"),
        pytest.param([(0, 0)], {"label_smoothing": 1.0}, r"label_smoothing in \[0, 1\)", id="smoothing"),
        pytest.param([(0, 0)], {"mixup": -1.0}, "mixup >= 0, got .*mixup=-1", id="mixup"),
        pytest.param(
            [(torch.full((2, 1, 8, 8), float("nan")), torch.tensor([0, 1]))], {}, "loss: nan at step 0", id="nan"
        ),
    ],
)
def test_bad_arguments_are_named(source, changes, message):
    with pytest.raises(ValueError, match=message):
        _train(_network(), source, **changes)


def test_nothing_to_evaluate_on_is_an_error():
    with pytest.raises(ValueError, match="loader: expected at least one batch"):
        pretrain.evaluate(_network(), [])
