"""The Triton kernels that score a decision gate; `gate_score` launches them, `score_plan` chooses among them.

``fused_kernel`` does everything for one sample; ``pool_kernel`` and ``product_kernel`` share the work where the weights
are too large to read per sample; ``combine_kernel`` joins what several programs know of a row.

A program knows of some classes of a row their statistics: the peak (the largest distance, NaN if one is NaN), its
label, and ``S = sum exp(d - peak)`` and ``T = sum (d - peak) exp(d - peak)`` for softmax and entropy. A single distance
has the statistics ``(d, its class, 1, 0)``, so one function, `_join`, reduces both classes and tiles of classes.
"""

import triton
import triton.language as tl

_NO_CLASS = tl.constexpr(2**31 - 1)


@triton.jit
def _live_rows(count, rows):
    """Rows before ``count``, which is clamped to [0, rows]; all without one."""
    live = rows
    if count is not None:
        live = tl.minimum(tl.maximum(tl.load(count), 0), rows)
    return live


@triton.jit
def _join(peak, label, s, t, CRITERION: tl.constexpr):
    """Statistics of each row of [R, B] from those of its columns; the lowest label wins a tie, and among NaNs."""
    broken = peak != peak
    top = tl.max(tl.where(broken, float("-inf"), peak), 1)
    attained = tl.min(tl.where(peak == top[:, None], label, _NO_CLASS), 1)
    first_broken = tl.min(tl.where(broken, label, _NO_CLASS), 1)
    any_broken = first_broken != _NO_CLASS
    if CRITERION != "margin":
        shifted = tl.where(peak == top[:, None], 0.0, peak - top[:, None])  # inf - inf is no NaN here: see _confidence
        scale = tl.exp(shifted)
        t = tl.sum(tl.where(scale == 0, 0.0, (t + s * shifted) * scale), 1)  # 0 log 0 = 0
        s = tl.sum(s * scale, 1)
    else:
        s = top
        t = top
    return tl.where(any_broken, float("nan"), top), tl.where(any_broken, first_broken, attained), s, t


@triton.jit
def _confidence(peak, s, t, CRITERION: tl.constexpr):
    """What an exit compares with its threshold."""
    if CRITERION == "margin":
        return peak
    undefined = peak - peak  # NaN unless the peak is finite: then there is no softmax
    if CRITERION == "softmax":
        return 1.0 / s + undefined
    return t / s - tl.log(s) + undefined


@triton.jit
def _join_classes(distances, classes, K: tl.constexpr, CRITERION: tl.constexpr):
    """Statistics of each row of distances [R, B] to ``classes`` [B]; those from ``K`` on are padding."""
    peak = tl.where((classes < K)[None, :], distances, float("-inf"))
    label = tl.broadcast_to(classes[None, :], peak.shape)
    return _join(peak, label, tl.full(peak.shape, 1.0, tl.float32), tl.zeros_like(peak), CRITERION)


@triton.jit
def _store_scores(peak, label, s, t, row, live, rows, margin, labels, CRITERION: tl.constexpr):
    """Write the answer for ``row`` [R]: zero where it is not live."""
    confidence = _confidence(peak, s, t, CRITERION)
    tl.store(margin + row, tl.where(row < live, confidence, 0.0), mask=row < rows)
    tl.store(labels + row, tl.where(row < live, label, 0).to(tl.int64), mask=row < rows)


@triton.jit
def _store_distances(distances, row, classes, live, rows, out, K: tl.constexpr):
    """Write distances [R, B] to ``out`` [N, K]: zero where the row is not live."""
    inside = (row < rows)[:, None] & (classes < K)[None, :]
    at = out + row[:, None] * K + classes[None, :]
    tl.store(at, tl.where((row < live)[:, None], distances, 0.0), mask=inside)


@triton.jit
def _first(cell, size: tl.constexpr, SIDE: tl.constexpr):
    """Where a cell begins: ``cell * size / SIDE``, rounded down, and a multiple of what ``size / SIDE`` is one of."""
    return cell * (size // SIDE) + cell * (size % SIDE) // SIDE


@triton.jit
def _extent(cell, size: tl.constexpr, SIDE: tl.constexpr):
    """How long a cell is: it ends at ``(cell + 1) * size / SIDE``, rounded up."""
    return ((cell + 1) * size + SIDE - 1) // SIDE - _first(cell, size, SIDE)


@triton.jit
def _pooled(
    sample,  # pointer to its features
    channel,  # [BLOCK_C]
    used,  # [BLOCK_C] bool: the others are not read
    cell,  # of the grid, row after row
    stride_c,
    stride_h,
    stride_p,
    P: tl.constexpr,
    WIDTH: tl.constexpr,
    SIDE: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    ALIGN_C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Mean over all positions of some channels, or over those of one cell, [BLOCK_C] float32.

    ``stride_c`` counts ``ALIGN_C`` elements, so that rows of 14 x 14 are known to be aligned to 4. With ``WIDTH``,
    position p lies at ``(p // WIDTH, p % WIDTH)``; without, at one stride. With ``SIDE``, a map of H x W has
    SIDE x SIDE cells, as those of adaptive_avg_pool2d, and P and WIDTH are of the largest.
    """
    total = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    at_channel = sample + (channel.to(tl.int64) * stride_c * ALIGN_C)[:, None]
    elements = P
    if SIDE:
        at_channel += _first(cell // SIDE, H, SIDE).to(tl.int64) * stride_h
        at_channel += _first(cell % SIDE, W, SIDE).to(tl.int64) * stride_p
    for start in range(0, P, BLOCK_P):
        position = start + tl.arange(0, BLOCK_P)
        inside = used[:, None] & (position < P)[None, :]
        if WIDTH:
            place = (position // WIDTH).to(tl.int64) * stride_h + (position % WIDTH).to(tl.int64) * stride_p
        else:
            place = position.to(tl.int64) * stride_p
        if SIDE and H % SIDE + W % SIDE > 0:  # not all cells are alike
            rows, columns = _extent(cell // SIDE, H, SIDE), _extent(cell % SIDE, W, SIDE)
            inside &= ((position // WIDTH < rows) & (position % WIDTH < columns))[None, :]
            elements = rows * columns
        total += tl.load(at_channel + place[None, :], mask=inside, other=0.0).to(tl.float32)
    return tl.sum(total, 1) / elements


@triton.jit
def _block(number, C: tl.constexpr, SIDE: tl.constexpr, BLOCK_C: tl.constexpr):
    """Channels [BLOCK_C] of a block, which of them there are, and its cell: all blocks of a cell, then the next's."""
    channel = tl.arange(0, BLOCK_C)
    if SIDE:
        blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
        cell = number // blocks
        channel += number % blocks * BLOCK_C
        used = (channel < C) & (cell < SIDE * SIDE)
    else:
        cell = 0
        channel += number * BLOCK_C
        used = channel < C
    return channel, used, cell


@triton.jit
def _value(channel, cell, SIDE: tl.constexpr):
    """Where a pooled vector has the mean of a cell: channel after channel."""
    place = channel
    if SIDE:
        place = channel * (SIDE * SIDE) + cell
    return place


@triton.jit(do_not_specialize=["rows"])
def fused_kernel(
    features,  # [N, C, P]
    weight,  # [K, C * cells] float32
    bias,  # [K] float32
    count,  # [] int32, or None
    partial,  # [SPLITS, N, K] float32, or None
    margin,  # [N] float32
    labels,  # [N] int64
    distances,  # [N, K] float32
    rows,  # N
    stride_n,
    stride_c,
    stride_h,
    stride_p,
    weight_stride_k,
    weight_stride_c,
    bias_stride,
    C: tl.constexpr,
    P: tl.constexpr,
    WIDTH: tl.constexpr,
    SIDE: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    ALIGN_C: tl.constexpr,
    K: tl.constexpr,
    CRITERION: tl.constexpr,
    KEEP: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCKS: tl.constexpr,  # of the channels of one cell after another, in one program
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """One program per (sample, 1, split of the channels): distances to all classes stay in registers."""
    sample = tl.program_id(0).to(tl.int64)
    split = tl.program_id(2)
    live = _live_rows(count, rows)
    classes = tl.arange(0, TILE_K)
    products = tl.zeros([TILE_K, BLOCK_C], tl.float32)
    if sample < live:
        for block in range(BLOCKS):
            channel, used, cell = _block(split * BLOCKS + block, C, SIDE, BLOCK_C)
            pooled = _pooled(
                features + sample * stride_n, channel, used, cell, stride_c, stride_h, stride_p,
                P, WIDTH, SIDE, H, W, ALIGN_C, BLOCK_C, BLOCK_P,
            )  # fmt: skip
            at_class = weight + (classes.to(tl.int64) * weight_stride_k)[:, None]
            inside = (classes < K)[:, None] & used[None, :]
            place = _value(channel, cell, SIDE).to(tl.int64) * weight_stride_c
            weights = tl.load(at_class + place[None, :], mask=inside, other=0.0)
            products += weights * pooled[None, :]
    row = sample + tl.arange(0, 1)
    distance = tl.sum(products, 1)
    if SPLITS > 1:
        at = partial + (split.to(tl.int64) * rows + sample) * K + classes
        tl.store(at, distance, mask=(classes < K) & (sample < live))
    else:
        distance += tl.load(bias + classes.to(tl.int64) * bias_stride, mask=classes < K, other=0.0)
        if KEEP:
            _store_distances(distance[None, :], row, classes, live, rows, distances, K)
        peak, label, s, t = _join_classes(distance[None, :], classes, K, CRITERION)
        _store_scores(peak, label, s, t, row, live, rows, margin, labels, CRITERION)


@triton.jit(do_not_specialize=["rows"])
def pool_kernel(
    features,  # [N, C, P]
    count,  # [] int32, or None
    pooled,  # [N, C * cells] float32
    rows,  # N
    stride_n,
    stride_c,
    stride_h,
    stride_p,
    C: tl.constexpr,
    P: tl.constexpr,
    WIDTH: tl.constexpr,
    SIDE: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    ALIGN_C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One program per (sample, block of channels, cell); rows from ``count`` on are left as they are."""
    sample = tl.program_id(0).to(tl.int64)
    cells = tl.num_programs(2)
    if sample < _live_rows(count, rows):
        channel, cell = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C), tl.program_id(2)
        mean = _pooled(
            features + sample * stride_n, channel, channel < C, cell, stride_c, stride_h, stride_p,
            P, WIDTH, SIDE, H, W, ALIGN_C, BLOCK_C, BLOCK_P,
        )  # fmt: skip
        tl.store(pooled + sample * C * cells + _value(channel, cell, SIDE), mean, mask=channel < C)


@triton.jit(do_not_specialize=["rows"])
def product_kernel(
    vectors,  # [N, C]: pooled, or the features themselves
    weight,  # [K, C] float32
    bias,  # [K] float32
    count,  # [] int32, or None
    partial,  # [SPLITS, N, K], or statistics [1 or 3, N, tiles] float32, or None
    tile_labels,  # [N, tiles] int8: the class, counted from the first of its tile; or None
    margin,  # [N] float32
    labels,  # [N] int64
    distances,  # [N, K] float32
    rows,  # N
    stride_n,
    stride_a,
    stride_b,
    stride_c,
    weight_stride_k,
    weight_stride_c,
    bias_stride,
    C: tl.constexpr,
    B_SIZE: tl.constexpr,
    C_SIZE: tl.constexpr,
    K: tl.constexpr,
    CRITERION: tl.constexpr,
    KEEP: tl.constexpr,
    SPLITS: tl.constexpr,
    TILES: tl.constexpr,  # of classes
    BLOCKS: tl.constexpr,  # of channels, in one program
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """One program per (tile of samples, tile of classes, split of the channels).

    With ``C_SIZE``, channel c lies at ``(c // (B_SIZE * C_SIZE), c // C_SIZE % B_SIZE, c % C_SIZE)``: a flattened
    sample whose memory is not one run. Without, at one stride.
    """
    row = tl.program_id(0).to(tl.int64) * TILE_N + tl.arange(0, TILE_N)
    tile = tl.program_id(1)
    split = tl.program_id(2)
    live = _live_rows(count, rows)
    classes = tile * TILE_K + tl.arange(0, TILE_K)
    distance = tl.zeros([TILE_N, TILE_K], tl.float32)
    if tl.program_id(0) * TILE_N < live:
        at_row = vectors + (row * stride_n)[:, None]
        at_class = weight + (classes.to(tl.int64) * weight_stride_k)[None, :]
        for block in range(BLOCKS):
            channel = (split * BLOCKS + block) * TILE_C + tl.arange(0, TILE_C)
            wide = channel.to(tl.int64)
            if C_SIZE:
                place = wide // (B_SIZE * C_SIZE) * stride_a + wide // C_SIZE % B_SIZE * stride_b
                place += wide % C_SIZE * stride_c
            else:
                place = wide * stride_c
            vector = tl.load(
                at_row + place[None, :], mask=(row < live)[:, None] & (channel < C)[None, :], other=0.0
            ).to(tl.float32)
            weights = tl.load(
                at_class + (wide * weight_stride_c)[:, None],
                mask=(channel < C)[:, None] & (classes < K)[None, :],
                other=0.0,
            )
            distance = tl.dot(vector, weights, distance, input_precision="ieee")
    if SPLITS > 1:
        at = partial + ((split.to(tl.int64) * rows + row) * K)[:, None] + classes[None, :]
        tl.store(at, distance, mask=(row < live)[:, None] & (classes < K)[None, :])
    else:
        distance += tl.load(bias + classes.to(tl.int64) * bias_stride, mask=classes < K, other=0.0)[None, :]
        if KEEP:
            _store_distances(distance, row, classes, live, rows, distances, K)
        peak, label, s, t = _join_classes(distance, classes, K, CRITERION)
        if TILES == 1:
            _store_scores(peak, label, s, t, row, live, rows, margin, labels, CRITERION)
        else:
            tl.store(tile_labels + row * TILES + tile, label - tile * TILE_K, mask=row < live)
            tl.store(partial + row * TILES + tile, peak, mask=row < live)
            if CRITERION != "margin":
                tl.store(partial + (row + rows) * TILES + tile, s, mask=row < live)
                tl.store(partial + (row + rows + rows) * TILES + tile, t, mask=row < live)


@triton.jit(do_not_specialize=["rows"])
def combine_kernel(
    partial,  # [SPLITS, N, K], or statistics [1 or 3, N, TILES] float32
    tile_labels,  # [N, TILES] int8: the class, counted from the first of its tile; or None
    bias,  # [K] float32
    count,  # [] int32, or None
    margin,  # [N] float32
    labels,  # [N] int64
    distances,  # [N, K] float32
    rows,  # N
    bias_stride,
    K: tl.constexpr,
    CRITERION: tl.constexpr,
    KEEP: tl.constexpr,
    SPLITS: tl.constexpr,
    TILES: tl.constexpr,
    TILE_K: tl.constexpr,
    BLOCK_S: tl.constexpr,  # SPLITS, padded
    BLOCK_K: tl.constexpr,  # K, or TILES where channels are not split; padded
):
    """One program per row: add the partial distances of split channels, or join the statistics of tiles of classes."""
    sample = tl.program_id(0).to(tl.int64)
    live = _live_rows(count, rows)
    row = sample + tl.arange(0, 1)
    column = tl.arange(0, BLOCK_K)
    if SPLITS > 1:
        split = tl.arange(0, BLOCK_S)
        at = partial + ((split.to(tl.int64) * rows + sample) * K)[:, None] + column[None, :]
        inside = (split < SPLITS)[:, None] & (column < K)[None, :] & (sample < live)
        distance = tl.sum(tl.load(at, mask=inside, other=0.0), 0)
        distance += tl.load(bias + column.to(tl.int64) * bias_stride, mask=column < K, other=0.0)
        if KEEP:
            _store_distances(distance[None, :], row, column, live, rows, distances, K)
        peak, label, s, t = _join_classes(distance[None, :], column, K, CRITERION)
    else:
        tile = column[None, :]
        inside = ((column < TILES) & (sample < live))[None, :]
        peaks = tl.load(partial + sample * TILES + tile, mask=inside, other=float("-inf"))
        in_tile = tl.load(tile_labels + sample * TILES + tile, mask=inside, other=0).to(tl.int32)
        sums = peaks
        moments = peaks
        if CRITERION != "margin":
            sums = tl.load(partial + (sample + rows) * TILES + tile, mask=inside, other=0.0)
            moments = tl.load(partial + (sample + rows + rows) * TILES + tile, mask=inside, other=0.0)
        peak, label, s, t = _join(peaks, tile * TILE_K + in_tile, sums, moments, CRITERION)
    _store_scores(peak, label, s, t, row, live, rows, margin, labels, CRITERION)
