"""Images from outside, as a network wants them: folders of image files and ``.npy`` arrays, read batch after batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

Stats = tuple[Sequence[float], Sequence[float]]  # mean and standard deviation of each channel, where white is 1

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


@dataclass(frozen=True)
class Batch:
    """Normalised images with their names, and the files that could not be read on the way."""

    names: list[str]
    images: Tensor  # [N, C, H, W] float32, N >= 0
    unreadable: list[str]  # "file: reason"


class ImageFolder:
    """The image files under a folder, or one file: found recursively, in order of their paths.

    Each is converted to grey or RGB as ``shape`` asks, scaled so that its short side fits, cut to the middle, and
    normalised.

    Args:
        path: the folder or file.
        shape: (C, H, W) of the network's input; C is 1 or 3.
        stats: normalisation of the training data.
        zoom: how much larger than the cut the image is first made; 1 keeps all of a square image.

    Raises:
        FileNotFoundError: if there is nothing at ``path``.
        ValueError: if no file there has the suffix of an image, or the network takes neither 1 nor 3 channels.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], stats: Stats, zoom: float = 1.0) -> None:
        import PIL  # noqa: F401  # a missing package is no damaged file

        if not path.exists():
            raise FileNotFoundError(f"images: no such file or folder: {path}")
        if shape[0] not in (1, 3):
            raise ValueError(
                f"images: image files have 1 or 3 channels, the network takes {shape[0]}; give an .npy file"
            )
        self.shape, self.stats, self.zoom = shape, stats, zoom
        self.root = path if path.is_dir() else path.parent
        self.files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        if not self.files:
            raise ValueError(f"images: no image files ({', '.join(sorted(SUFFIXES))}) under {path}")

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, size: int) -> Iterator[Batch]:
        """Up to ``size`` files at a time; those that cannot be read are named in their batch."""
        for start in range(0, len(self.files), size):
            names, pixels, unreadable = [], [], []
            for file in self.files[start : start + size]:
                name = file.relative_to(self.root).as_posix()
                try:
                    pixels.append(self._read(file))
                    names.append(name)
                except Exception as error:  # decoders raise anything on a damaged file, and the others shall not suffer
                    unreadable.append(f"{name}: {error}")
            stacked = np.stack(pixels) if pixels else np.empty((0, *self.shape), np.uint8)
            yield Batch(names, normalise(stacked, self.stats), unreadable)

    def _read(self, file: Path) -> NDArray[np.uint8]:  # [C, H, W]
        from PIL import Image

        channels, height, width = self.shape
        with Image.open(file) as opened:
            image = _eight_bit(opened).convert("L" if channels == 1 else "RGB")
        scale = self.zoom * max(height / image.height, width / image.width)
        size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
        if size != image.size:
            image = image.resize(size, Image.Resampling.BILINEAR)
        left, top = (size[0] - width) // 2, (size[1] - height) // 2
        pixels = np.asarray(image.crop((left, top, left + width, top + height)))
        return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


class ImageArray:
    """The images of an ``.npy`` file, [N, C, H, W] or [N, H, W]; uint8 is normalised, float32 is taken as it is.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not an array of that shape and dtype.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], stats: Stats) -> None:
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            raise FileNotFoundError(f"images: no such file: {path}") from None
        except (ValueError, EOFError) as error:
            raise ValueError(f"images: {path} is no readable .npy file ({error})") from error
        if array.ndim == 3 and len(shape) == 3:
            array = array[:, None]
        if array.ndim != len(shape) + 1 or array.shape[1:] != shape:
            wanted = f"[N, {', '.join(map(str, shape))}]"
            if len(shape) == 3 and shape[0] == 1:
                wanted += f" or [N, {shape[1]}, {shape[2]}]"
            raise ValueError(f"images: expected shape {wanted}, got {list(array.shape)} in {path}")
        if array.dtype != np.uint8 and array.dtype.kind != "f":
            raise ValueError(f"images: expected uint8 pixels or normalised floats, got {array.dtype} in {path}")
        self.array, self.stats = array, stats

    def __len__(self) -> int:
        return len(self.array)

    def batches(self, size: int) -> Iterator[Batch]:
        """Up to ``size`` images at a time."""
        for start in range(0, len(self), size):
            rows = np.array(self.array[start : start + size])
            images = normalise(rows, self.stats) if rows.dtype == np.uint8 else torch.from_numpy(rows).float()
            yield Batch([str(start + i) for i in range(len(rows))], images, [])


def open_images(path: Path, shape: tuple[int, ...], stats: Stats, zoom: float = 1.0) -> ImageFolder | ImageArray:
    """The images at ``path``: an ``.npy`` file, a folder, or one image file."""
    if path.suffix.lower() == ".npy" and not path.is_dir():
        return ImageArray(path, shape, stats)
    if len(shape) != 3:
        raise ValueError(
            f"images: the network takes samples of shape {list(shape)}, which are no images; give an .npy file"
        )
    channels, height, width = shape
    return ImageFolder(path, (channels, height, width), stats, zoom)


def normalise(
    pixels: NDArray[np.uint8],  # [N, C, H, W]
    stats: Stats,
) -> Tensor:  # [N, C, H, W] float32
    mean, std = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in stats)
    return (torch.from_numpy(np.ascontiguousarray(pixels)).float() / 255 - mean) / std


def _eight_bit(image: Image) -> Image:
    """16-bit grey scaled to 8 bits; Pillow's own conversion would clip it."""
    if not image.mode.startswith("I"):
        return image
    from PIL import Image as pillow

    return pillow.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
