"""Corrupted images: the same for a seed, ever farther from the original, bytes as before."""

from __future__ import annotations

import hashlib

import pytest
import torch

from dgate_rt import data
from dgate_rt.corruptions import KINDS, SEVERITIES, corrupt, corrupt_test

STATS = ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
DIGESTS = {"noise": "a60d84dc4a910d11", "blur": "042d2222b4871b30", "contrast": "f98be6f06f766b18"}


@pytest.fixture(scope="module", params=[1, 3], ids=["grey", "colour"])
def images(request) -> torch.Tensor:
    """Bright shapes on a dark ground, [40, C, 32, 32] uint8."""
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(40, request.param, 8, 8, generator=generator)
    return (torch.nn.functional.interpolate(small, 32) ** 3 * 255).byte()


@pytest.mark.parametrize("kind", KINDS)
def test_every_severity_goes_farther(images, kind):
    before = images.clone()
    found = [corrupt(images, kind, severity) for severity in SEVERITIES]
    distances = [float((c.float() - images.float()).square().mean()) for c in found]
    assert distances == sorted(distances)
    assert 0 < distances[0] < distances[-1] / 2
    assert all(c.shape == images.shape and c.dtype == torch.uint8 for c in found)
    assert torch.equal(images, before)


@pytest.mark.parametrize("kind", KINDS)
def test_bits_are_the_same_everywhere(kind):
    images = (torch.arange(2 * 3 * 32 * 32) * 7919 % 256).byte().view(2, 3, 32, 32)
    bits = b"".join(corrupt(images, kind, severity, seed=1).numpy().tobytes() for severity in SEVERITIES)
    assert hashlib.sha256(bits).hexdigest()[:16] == DIGESTS[kind]


def test_a_seed_gives_the_same_noise_and_another_seed_another(images):
    assert torch.equal(corrupt(images, "noise", 3, seed=5), corrupt(images, "noise", 3, seed=5))
    assert not torch.equal(corrupt(images, "noise", 3, seed=5), corrupt(images, "noise", 3, seed=6))


def test_noise_is_centred_and_has_its_deviation():
    grey = torch.full((64, 1, 32, 32), 128, dtype=torch.uint8)
    added = corrupt(grey, "noise", 1).float() - 128
    assert abs(float(added.mean())) < 0.3
    assert float(added.std()) == pytest.approx(0.05 * 255, rel=0.02)


@pytest.mark.parametrize("kind", ["blur", "contrast"])
@pytest.mark.parametrize("severity", SEVERITIES)
def test_blur_and_contrast_leave_plain_images_and_brightness_alone(images, kind, severity):
    for level in (0, 1, 77, 255):
        plain = torch.full((2, 3, 32, 32), level, dtype=torch.uint8)
        assert torch.equal(corrupt(plain, kind, severity), plain)
    drift = corrupt(images, kind, severity).float().mean((2, 3)) - images.float().mean((2, 3))
    assert drift.abs().max() < (1 if kind == "contrast" else 10)  # beyond its border an image is made up


@pytest.mark.parametrize("kind", ["blur", "contrast"])
def test_blur_and_contrast_know_of_no_other_image(images, kind):
    whole = corrupt(images, kind, 4)
    assert torch.equal(whole[7:8], corrupt(images[7:8], kind, 4))


def test_blur_grows_with_the_image():
    """A dot of an eighth of the height is blurred alike at every size."""
    left = []
    for side in (32, 96):
        image = torch.zeros(1, 1, side, side, dtype=torch.uint8)
        inside = slice(side // 2 - side // 16, side // 2 + side // 16)
        image[:, :, inside, inside] = 255
        left.append(int(corrupt(image, "blur", 5)[0, 0, side // 2, side // 2]))
    assert left[0] == pytest.approx(left[1], abs=12)
    assert left[0] < 250


@pytest.mark.parametrize("kind", KINDS)
def test_normalised_images_are_corrupted_as_bytes_are(kind):
    pixels = torch.randint(0, 256, (9, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in STATS)
    x = (pixels.float() / 255 - mean) / std
    expected = (corrupt(pixels, kind, 3, seed=2).float() / 255 - mean) / std
    assert torch.equal(corrupt(x, kind, 3, seed=2, stats=STATS), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_no_images_and_images_of_one_pixel(kind):
    assert corrupt(torch.empty(0, 1, 32, 32, dtype=torch.uint8), kind, 1).shape == (0, 1, 32, 32)
    assert corrupt(torch.full((3, 1, 1, 1), 9, dtype=torch.uint8), kind, 5).shape == (3, 1, 1, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_test_split_of_a_bundle_is_corrupted(kind):
    bundle = data.load("digits", image_size=32)
    made = corrupt_test(bundle, kind, 2)
    assert torch.equal(made.test.images, corrupt(bundle.test.images, kind, 2))
    assert made.test.labels is bundle.test.labels
    assert (made.train, made.val, made.augmented) == (bundle.train, bundle.val, bundle.augmented)
    x, y = next(iter(made.loader("test", 8)))
    assert (x.dtype, x.shape, y.shape) == (torch.float32, (8, 1, 32, 32), (8,))


def test_what_cannot_be_corrupted_is_refused():
    images = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="kind: expected one of noise, blur, contrast, got 'fog'"):
        corrupt(images, "fog", 1)
    for severity in (0, 6):
        with pytest.raises(ValueError, match=f"severity: expected 1 to 5, got {severity}"):
            corrupt(images, "noise", severity)
    with pytest.raises(ValueError, match=r"images: expected shape \[N, C, H, W\], got \[4, 4\]"):
        corrupt(images[0, 0], "noise", 1)
    with pytest.raises(TypeError, match=r"images: expected uint8, or floats with their stats, got torch\.float32"):
        corrupt(images.float(), "noise", 1)
    with pytest.raises(TypeError, match=r"images: expected floats with stats, got torch\.uint8"):
        corrupt(images, "noise", 1, stats=((0.0,), (1.0,)))
    folder = data.DataBundle("folder", None, None, [], None, (), (1, 4, 4), ((0.0,), (1.0,)))
    with pytest.raises(TypeError, match="bundle: expected test images held in memory, got list in 'folder'"):
        corrupt_test(folder, "noise", 1)
