"""How a gate is scored on a GPU: where features lie, which kernels, their blocks and grids, and the bytes they move.

Plain Python, so that a bench and a test can ask without Triton or a GPU. All sizes follow from shapes alone and nothing
is tuned at run time: a launch is settled before a CUDA graph captures it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dgate_rt.gate import GRIDS

Variant = Literal["fused", "pooled", "direct"]

FLOAT = 4  # bytes of a float32
MAX_FUSED_CLASSES = 128  # distances of a fused program stay in registers
TILE = 4096  # features of a block of channels and positions: 4 warps, 4 to 8 16-byte loads a thread in flight
PROGRAMS_PER_SM = 8  # with blocks of that size, enough loads in flight to saturate memory
LINE = 128  # bytes that memory hands out at once
PARTIAL_SHARE = 64  # partial distances are written and read: each way at most 1/64 of what is read anyway
COMBINE_TILE = 8192  # elements that the combine kernel keeps in registers: splits times classes


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(x: int) -> int:
    """The smallest power of 2 that is not below ``x``."""
    return 1 << max(0, x - 1).bit_length()


@dataclass(frozen=True)
class Layout:
    """Where the features of a sample lie: channels, and positions over which the mean goes; strides in elements."""

    channels: int
    positions: int
    sample_stride: int
    channel_stride: int
    position_stride: int = 0
    row_stride: int = 0  # from one line of an image to the next
    width: int = 0  # of an image or a cell; 0 where all positions lie at one stride
    flat_shape: tuple[int, int] = (0, 0)  # inner two of three sizes that make up the channels; 0 where one stride does
    flat_strides: tuple[int, int] = (0, 0)  # of the outer two; the innermost is the channel stride
    side: int = 0  # of a grid of cells, over each of which a mean goes: positions are those of the largest
    image: tuple[int, int] = (0, 0)  # rows and columns that the cells share

    @property
    def elements(self) -> int:
        """Positions of the whole map: cells may share some."""
        return math.prod(self.image) if self.side else self.positions

    @property
    def channel_align(self) -> int:
        """The largest power of 2, up to 16, that divides the stride of channels: loads of planes may be that wide."""
        return math.gcd(self.channel_stride, 16)


def lay_out(
    sizes: Sequence[int],  # of a sample: C, H, W; T, C; or C
    strides: Sequence[int],  # of the features, that of a sample first
    pool: str,
) -> Layout:
    """Where `pool` finds its features."""
    sample_stride, *steps = (int(stride) for stride in strides)
    if pool == "flat":
        return _flat_layout(sizes, sample_stride, steps)
    if len(sizes) == 1:
        return Layout(sizes[0], 1, sample_stride, steps[0])
    if len(sizes) == 2:
        return Layout(sizes[1], 1 if pool == "cls" else sizes[0], sample_stride, steps[1], steps[0])
    (channels, height, width), (channel_stride, row_stride, position_stride) = sizes, steps
    if (side := GRIDS.get(pool)) and height * width > 1:
        rows, columns = longest_cell(height, side), longest_cell(width, side)
        grid = {"row_stride": row_stride, "width": columns, "side": side, "image": (height, width)}
        return Layout(channels, rows * columns, sample_stride, channel_stride, position_stride, **grid)
    if width == 1:
        height, width, position_stride = 1, height, row_stride
    one_stride = height == 1 or row_stride == width * position_stride
    image = (0, 0) if one_stride else (row_stride, width)
    return Layout(channels, height * width, sample_stride, channel_stride, position_stride, *image)


def longest_cell(size: int, side: int) -> int:
    """Elements along the longest of so many cells, each of which begins rounded down and ends rounded up."""
    return max(ceil_div((cell + 1) * size, side) - cell * size // side for cell in range(side))


def _flat_layout(sizes: Sequence[int], sample_stride: int, steps: Sequence[int]) -> Layout:
    """All that a sample has, as channels in ``flatten(1)`` order."""
    width = math.prod(sizes)
    dims = [(size, step) for size, step in zip(sizes, steps, strict=True) if size != 1] or [(1, 1)]
    if all(step == inner_size * inner for (_, step), (inner_size, inner) in itertools.pairwise(dims)):
        return Layout(width, 1, sample_stride, dims[-1][1])
    (_, outer), (middle_size, middle), (inner_size, inner) = [(1, 0)] * (3 - len(dims)) + dims
    return Layout(width, 1, sample_stride, inner, flat_shape=(middle_size, inner_size), flat_strides=(outer, middle))


@dataclass(frozen=True)
class ScorePlan:
    """The launches that score ``n`` rows.

    Variants:
        fused: One program per sample and split of the channels pools, multiplies and decides. Nothing but the features
            touches memory, and it is one launch (two if split). Each program reads all its weights, from L2, so it is
            chosen where they are at most twice its features: ``4 K <= 2 positions element_size``; and where
            the distances to all classes fit in registers.
        pooled: Pool to float32 [N, C], then a tiled product that reads the weights once per tile of samples. The
            pooled vectors cost ``8 / (positions element_size)`` of the features: 2 % at 14 x 14 in bfloat16, but 8 %
            at 7 x 7, where 1.05 times the least bytes cannot be met.
        direct: The product straight from the features, where there is one position (``cls``, ``flat``, [N, C]).

    Splits:
        Channels are split over programs where samples (fused) or tiles (product) do not fill the GPU. Partial distances
        [splits, N, K] are added in a fixed order by a combine kernel: no atomics, the same bits in each run. The number
        of splits is bound so that they cost at most 1/32 of the bytes read anyway.
        Classes of a product are always split over programs: its tiles shrink until they fill the GPU. Each tile hands
        5 bytes a row (13 for softmax and entropy) to the combine kernel. With 1000 classes and 1024 ``cls`` tokens
        of width 768 in bfloat16 that is 4 % of the least bytes, but 9 % for softmax and entropy.
    """

    variant: Variant
    n: int
    channels: int
    positions: int  # over which a mean goes: of the map, or of the largest cell of a grid
    cells: int  # of the grid; 1 without
    elements: int  # positions of the map
    classes: int
    element_size: int
    statistics: int  # float32 values of a row in a tile of classes: 1, or 3 with the sums of softmax and entropy
    keep_distances: bool
    block_c: int  # channels of a block: fused and pool kernel
    block_p: int  # positions of a block
    tile_n: int  # samples of a tile: product kernel; 1 in the fused kernel
    tile_k: int  # classes of a tile; all, padded, in the fused kernel
    tile_c: int  # channels that a product or fused program takes at a time
    splits: int  # of the channels

    @property
    def sample_tiles(self) -> int:
        return ceil_div(self.n, self.tile_n)

    @property
    def class_tiles(self) -> int:
        return ceil_div(self.classes, self.tile_k)

    @property
    def width(self) -> int:
        """Values of a pooled vector."""
        return self.channels * self.cells

    @property
    def blocks_per_split(self) -> int:
        """Blocks of ``tile_c`` values that one program goes through."""
        return ceil_div(_blocks(self.variant, self.channels, self.cells, self.tile_c), self.splits)

    @property
    def combines(self) -> bool:
        """Whether parts of a row come from several programs."""
        return self.splits > 1 or self.class_tiles > 1

    @property
    def grid(self) -> tuple[int, int, int]:
        """Programs of the fused or product kernel: samples, classes, splits of the channels."""
        return self.sample_tiles, self.class_tiles, self.splits

    @property
    def pool_grid(self) -> tuple[int, int, int]:
        return self.n, ceil_div(self.channels, self.block_c), self.cells

    @property
    def product_warps(self) -> int:
        return 8 if self.tile_n * self.tile_k > 2048 else 4

    @property
    def combine_splits(self) -> int:
        """Partial distances of a class, padded."""
        return power_of_2(self.splits)

    @property
    def combine_width(self) -> int:
        """Columns that the combine kernel reduces, padded: classes if channels are split, else tiles of classes."""
        return power_of_2(self.classes if self.splits > 1 else self.class_tiles)

    @property
    def combine_warps(self) -> int:
        return min(8, max(1, self.combine_splits * self.combine_width // 256))

    def launches(self) -> int:
        """Kernels launched."""
        return 0 if self.n == 0 else 1 + (self.variant == "pooled") + self.combines

    def memory_bytes(self, live: int | None = None) -> int:
        """Bytes from and to memory if each tensor is read once: what a perfect cache cannot save.

        Args:
            live: rows before ``count``; all where None.
        """
        return self._bytes(live, requested=False)

    def l2_bytes(self, live: int | None = None) -> int:
        """Bytes that programs ask for, with what several of them read again.

        Args:
            live: rows before ``count``; all where None.
        """
        return self._bytes(live, requested=True)

    def _bytes(self, live: int | None, requested: bool) -> int:
        if self.n == 0:
            return 0
        live = self.n if live is None else max(0, min(live, self.n))
        sample_tiles, class_tiles = ceil_div(live, self.tile_n), self.class_tiles
        features = live * self.channels * self.elements * self.element_size
        weights = (self.classes * self.width + self.classes) * FLOAT * (sample_tiles if requested else live > 0)
        pooled = 0
        if self.variant == "pooled":  # written, and read by each tile of classes
            pooled = live * self.width * FLOAT * (1 + (class_tiles if requested else 1))
        if requested:
            read_by = 1 if self.variant == "pooled" else class_tiles
            features = live * self.width * self.positions * self.element_size * read_by
        partials = 0
        if self.splits > 1:
            partials = 2 * self.splits * live * self.classes * FLOAT
        elif class_tiles > 1:
            partials = 2 * class_tiles * live * (self.statistics * FLOAT + 1)
        outputs = self.n * (FLOAT + 8 + self.keep_distances * self.classes * FLOAT)
        return features + weights + pooled + partials + outputs


def plan_score(
    n: int,  # rows, live or not
    channels: int,  # C; with pool='flat' all that a sample has
    positions: int,  # over which a mean goes; 1 if there is none
    classes: int,
    element_size: int,  # bytes of a feature
    sms: int,  # multiprocessors of the GPU
    *,
    side: int = 0,  # of a grid of cells, the largest of which has so many positions
    elements: int = 0,  # positions of the map, where cells share some; by default those of all cells
    channels_adjacent: bool = False,
    criterion: str = "margin",
    keep_distances: bool = False,
    variant: Variant | None = None,
) -> ScorePlan:
    """Choose the launches for a shape; see `ScorePlan` for the rules.

    ``channels_adjacent`` says whether a sample's channels are next to each other in memory (channels_last, tokens):
    then blocks are wide in channels, else in positions. ``variant`` forces one, for tests and benches; ``direct`` needs
    one position.
    """
    cells = max(1, side * side)
    elements = elements or cells * positions
    if variant is None:
        variant = _choose_variant(positions, cells, classes, element_size)
    adjacent = LINE // element_size if channels_adjacent else None
    tile = TILE if elements == cells * positions else TILE // 2  # a mask by row and column takes registers
    block_c, block_p = _feature_block(channels, positions, classes, adjacent, tile)
    if variant == "fused":
        tile_n, tile_k, tile_c = 1, power_of_2(classes), block_c
    else:
        tile_n, tile_k = _product_tile(n, classes, sms)
        tile_c = 16 if tile_n * tile_k > 1024 else 64  # 4 x 4 distances a thread: more channels would spill
    programs = max(1, ceil_div(n, tile_n) * ceil_div(classes, tile_k))
    wanted = PROGRAMS_PER_SM * sms if variant == "fused" else sms
    read = n * channels * elements * element_size + classes * channels * cells * FLOAT
    blocks = max(1, _blocks(variant, channels, cells, tile_c))
    splits = min(
        wanted // programs,
        blocks,
        read // (PARTIAL_SHARE * max(1, n) * classes * FLOAT),
        COMBINE_TILE // power_of_2(classes),
    )
    return ScorePlan(
        variant=variant,
        n=n,
        channels=channels,
        positions=positions,
        cells=cells,
        elements=elements,
        classes=classes,
        element_size=element_size,
        statistics=1 if criterion == "margin" else 3,
        keep_distances=keep_distances,
        block_c=block_c,
        block_p=block_p,
        tile_n=tile_n,
        tile_k=tile_k,
        tile_c=tile_c,
        splits=ceil_div(blocks, ceil_div(blocks, max(1, splits))),  # none without a block
    )


def _blocks(variant: Variant, channels: int, cells: int, tile_c: int) -> int:
    """Blocks of a pooled vector; a fused program reads the features of one cell at a time."""
    return cells * ceil_div(channels, tile_c) if variant == "fused" else ceil_div(channels * cells, tile_c)


def _choose_variant(positions: int, cells: int, classes: int, element_size: int) -> Variant:
    if positions == cells == 1:
        return "direct"
    cheap_weights = classes * FLOAT <= 2 * positions * element_size
    return "fused" if cheap_weights and classes <= MAX_FUSED_CLASSES else "pooled"


def _feature_block(channels: int, positions: int, classes: int, adjacent: int | None, tile: int) -> tuple[int, int]:
    """Channels and positions of a block: ``tile`` features, wide in what is adjacent in memory.

    ``adjacent`` channels make up a line of memory, None where they are not next to each other. On an H100 whole lines
    and 8 programs an SM took 0.78 of the time of half lines and 4, over the gates of ResNet-101 in bfloat16 at B = 128
    (docs/gpu.md).
    """
    if adjacent is not None:
        block_c = min(adjacent, power_of_2(channels))
    else:
        block_c = max(1, tile // min(256, power_of_2(positions)))
    # The weights of a fused block, [K, block_c], are in registers too.
    block_c = min(block_c, power_of_2(channels), 128, max(1, tile // power_of_2(min(classes, MAX_FUSED_CLASSES))))
    return block_c, min(tile // block_c, power_of_2(positions))


def _product_tile(n: int, classes: int, sms: int) -> tuple[int, int]:
    """Samples and classes of a tile: 64 x 64, halved on the longer side (samples first) until tiles fill the GPU.

    No more than 127 classes: ``tile_labels`` are int8.
    """
    tile_n, tile_k = (min(64, max(16, power_of_2(size))) for size in (n, classes))
    while ceil_div(n, tile_n) * ceil_div(classes, tile_k) < sms and max(tile_n, tile_k) > 16:
        if tile_n >= tile_k:
            tile_n //= 2
        else:
            tile_k //= 2
    return tile_n, tile_k
