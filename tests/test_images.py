"""Images from folders and arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dgate_rt.images import ImageArray, ImageFolder, open_images

PLAIN = ((0.0,), (1.0,))
RGB = ((0.0,) * 3, (1.0,) * 3)


def only(source) -> torch.Tensor:
    (batch,) = source.batches(100)
    assert not batch.unreadable
    return batch.images


def test_values_are_normalised_channel_by_channel(tmp_path):
    Image.new("RGB", (4, 4), (255, 51, 0)).save(tmp_path / "a.png")
    images = only(ImageFolder(tmp_path, (3, 4, 4), ((0.5, 0.1, 0.0), (0.5, 0.1, 2.0))))
    assert images.dtype == torch.float32
    torch.testing.assert_close(images[0, :, 0, 0], torch.tensor([1.0, 1.0, 0.0]))


def test_order_is_that_of_the_paths(tmp_path):
    for name in ("b/1.png", "a/2.png", "a/1.jpg", "c.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (4, 4)).save(tmp_path / name)
    batches = list(ImageFolder(tmp_path, (1, 4, 4), PLAIN).batches(3))
    assert [batch.names for batch in batches] == [["a/1.jpg", "a/2.png", "b/1.png"], ["c.webp"]]


def test_middle_is_kept_of_an_oblong_image(tmp_path):
    pixels = np.zeros((4, 8), np.uint8)
    pixels[:, 2:6] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert only(ImageFolder(tmp_path, (1, 4, 4), PLAIN)).eq(1).all()


@pytest.mark.parametrize("side", [1, 3, 4, 50])
def test_images_are_scaled_to_fit(tmp_path, side):
    Image.new("L", (side, side + 1), 255).save(tmp_path / "a.png")
    images = only(ImageFolder(tmp_path, (1, 4, 4), PLAIN))
    assert images.shape == (1, 1, 4, 4)
    assert images.eq(1).all()


def test_zoom_cuts_the_border_away(tmp_path):
    pixels = np.zeros((8, 8), np.uint8)
    pixels[2:6, 2:6] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert only(ImageFolder(tmp_path, (1, 4, 4), PLAIN, zoom=2.0)).eq(1).all()


def test_sixteen_bits_are_scaled(tmp_path):
    Image.fromarray(np.full((4, 4), 32896, np.uint16)).save(tmp_path / "a.png")
    torch.testing.assert_close(only(ImageFolder(tmp_path, (1, 4, 4), PLAIN)), torch.full((1, 1, 4, 4), 128 / 255))


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_becomes_grey_or_rgb(tmp_path, mode, channels):
    Image.new(mode, (5, 6)).save(tmp_path / "a.tiff")
    stats = PLAIN if channels == 1 else RGB
    assert only(ImageFolder(tmp_path, (channels, 4, 4), stats)).shape == (1, channels, 4, 4)


def test_damaged_files_are_named(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "good.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("no picture")
    (batch,) = ImageFolder(tmp_path, (1, 4, 4), PLAIN).batches(5)
    assert batch.names == ["good.png"]
    assert [problem.partition(":")[0] for problem in batch.unreadable] == ["empty.png", "text.jpg"]


def test_arrays_come_in_batches(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(5 * 4, dtype=np.uint8).reshape(5, 2, 2))
    batches = list(ImageArray(tmp_path / "x.npy", (1, 2, 2), ((0.0,), (1 / 255,))).batches(2))
    assert [batch.names for batch in batches] == [["0", "1"], ["2", "3"], ["4"]]
    torch.testing.assert_close(torch.cat([b.images for b in batches]).flatten(), torch.arange(20.0))


def test_floats_are_taken_as_they_are(tmp_path):
    array = np.array([[[[np.nan, -2.0], [np.inf, 0.5]]]], np.float32)
    np.save(tmp_path / "x.npy", array)
    read = only(open_images(tmp_path / "x.npy", (1, 2, 2), ((0.3,), (0.2,))))
    assert np.array_equal(read.numpy(), array, equal_nan=True)


def test_images_of_other_channel_counts_need_npy(tmp_path):
    with pytest.raises(ValueError, match=r"1 or 3 channels, the network takes 4; give an \.npy"):
        open_images(tmp_path, (4, 8, 8), ((0.0,) * 4, (1.0,) * 4))
