"""The pitch net's convolutions over images, as one CUDA kernel each.

One launch computes ``relu(conv2d(x) + bias) + shortcut`` on tensor cores, in float16 or
bfloat16; float32 arrays are cut to float16, which has as many bits of fraction as TF32. No
library has to plan anything: an image of a new size costs what any other does.

It is ``conv_kernel`` for a plane. A block of threads makes a tile of DOWN by ACROSS places
and keeps what they see in shared memory, row after row; a tap is another first place there::

    places kept       (DOWN + 2) x (ACROSS + 2), 8 x 16 of them the tile's own
    tap (i, j) reads  from place (i, j) on, ACROSS of each row

Two taps a side look ahead only: that is what a transposed convolution of stride 2 needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

import mlx.core as mx

from rvc_mlx import conv_kernel
from rvc_mlx.conv_kernel import DTYPES, Tile, in_order
from rvc_mlx.cuda_kernel import Constant, CudaKernel, Grid
from rvc_mlx.steady import OwnRows, told_kernel

_CHUNK = 64  # input channels held in shared memory at a time
PROCESSORS = 132  # that should have two blocks each
_SMALL_TILE = Tile(2, 2, 2, 2, stages=6)  # 64 places, 32 channels
# Bytes; of more, other blocks of a multiprocessor hide barriers.
WHOLE_WEIGHTS = 24 * 1024

_SOURCE = r"""
using namespace fused_conv;
constexpr int M = WARPS_M * MT * 16, N = WARPS_N * NT * 8, BEFORE = (SIDE - 1) / 2;
constexpr int DOWN = M / ACROSS, PITCH = ACROSS + SIDE - 1, PLACES = (DOWN + SIDE - 1) * PITCH;
constexpr int THREADS = 32 * WARPS_M * WARPS_N, BYTES = sizeof(P), TAPS = SIDE * SIDE;
constexpr int X_STRIDE = CHUNK * BYTES + 16, X_PIECES = CHUNK * sizeof(T) / 16;
constexpr int KEPT = 16 * sizeof(P) / sizeof(T);  // bytes that a piece of input becomes
constexpr int W_STRIDE = CHUNK * BYTES + 16, W_PIECES = CHUNK * BYTES / 16;

constexpr int ROW = PITCH * X_STRIDE + SKEW;  // bytes

extern __shared__ __align__(16) unsigned char shared[];

const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
const int columns = padded / N, tiles = (width + ACROSS - 1) / ACROSS;
const int first_column = blockIdx.x % columns * N;
const int left = blockIdx.x / columns % tiles * ACROSS;
const int top = blockIdx.x / columns / tiles * DOWN;
const size_t batch_row = (size_t)blockIdx.y * height;
const int known = apart ? told[0] / apart : height;  // rows that are seen
const unsigned x_shared = shared_address(shared);
const unsigned w_shared = x_shared + (DOWN + SIDE - 1) * ROW;

// A stage of the ring holds one tap's weights of one chunk, [N, CHUNK]; or, if WHOLE, those
// of all taps of the only chunk. Past the last an empty group keeps the count right.
constexpr int TOGETHER = WHOLE ? TAPS : 1, STAGE = TOGETHER * N * W_STRIDE;
int next_chunk = 0, next_tap = 0, next_stage = 0;
auto fetch = [&]() {
    if (next_chunk < inputs) {
        const unsigned target = w_shared + next_stage * STAGE;
        #pragma unroll
        for (int i = thread; i < TOGETHER * N * W_PIECES; i += THREADS) {
            const int tap = i / (N * W_PIECES), row = i / W_PIECES % N, piece = i % W_PIECES;
            const P* source = weight + next_chunk + piece * (16 / BYTES) +
                ((size_t)(next_tap + tap) * padded + first_column + row) * inputs;
            copy_async(target + (tap * N + row) * W_STRIDE + piece * 16, source);
        }
        next_tap += TOGETHER;
        if (next_tap == TAPS) {
            next_tap = 0;
            next_chunk += CHUNK;
        }
    }
    if (++next_stage == STAGES) next_stage = 0;
    commit();
};

// BATCH loads are on their way before the first is stored.
auto load_chunk = [&](int chunk) {
    for (int start = thread; start < PLACES * X_PIECES; start += THREADS * BATCH) {
        uint4 v[BATCH];
        #pragma unroll
        for (int u = 0; u < BATCH; u++) {
            const int i = start + u * THREADS, place = i / X_PIECES;
            const int t = top - BEFORE + place / PITCH, m = left - BEFORE + place % PITCH;
            v[u] = make_uint4(0, 0, 0, 0);
            if (place < PLACES && t >= 0 && t < known && m >= 0 && m < width)
                v[u] = load(x + ((batch_row + t) * width + m) * inputs + chunk +
                            i % X_PIECES * (16 / (int)sizeof(T)));
        }
        #pragma unroll
        for (int u = 0; u < BATCH; u++) {
            const int i = start + u * THREADS, place = i / X_PIECES;
            unsigned char* to = shared + place / PITCH * ROW + place % PITCH * X_STRIDE;
            if (place < PLACES) keep(T(), P(), to + i % X_PIECES * KEPT, v[u], 1.f);
        }
    }
};

const int warp_row = warp % WARPS_M * (MT * 16), warp_column = warp / WARPS_M * (NT * 8);
const int own = warp_row + lane % 16;  // of the first fragment's places, this lane's
const unsigned a_lane = x_shared + lane / 16 * 16 + own / ACROSS * ROW +
    own % ACROSS * X_STRIDE;
const unsigned b_lane = w_shared +
    (warp_column + lane / 16 * 8 + lane % 8) * W_STRIDE + lane / 8 % 2 * 16;
float sum[MT][NT][4];
#pragma unroll
for (int m = 0; m < MT; m++)
    #pragma unroll
    for (int n = 0; n < NT; n++)
        #pragma unroll
        for (int e = 0; e < 4; e++) sum[m][n][e] = 0.f;

const auto multiply = [&](unsigned a, unsigned b) {
    #pragma unroll
    for (int k = 0; k < CHUNK * BYTES; k += 32) {
        unsigned A[MT][4], B[NT / 2][4];
        #pragma unroll
        for (int m = 0; m < MT; m++) ldmatrix(A[m], a + m * (16 / ACROSS) * ROW + k);
        #pragma unroll
        for (int n = 0; n < NT / 2; n++) ldmatrix(B[n], b + n * 16 * W_STRIDE + k);
        #pragma unroll
        for (int m = 0; m < MT; m++)
            #pragma unroll
            for (int n = 0; n < NT; n++)
                mma(P(), sum[m][n], A[m], B[n / 2][n % 2 * 2], B[n / 2][n % 2 * 2 + 1]);
    }
};
if constexpr (WHOLE) {
    fetch();
    load_chunk(0);
    wait<0>();
    __syncthreads();
    #pragma unroll
    for (int tap = 0; tap < TAPS; tap++)
        multiply(a_lane + tap / SIDE * ROW + tap % SIDE * X_STRIDE,
                 b_lane + tap * (N * W_STRIDE));
} else {
    #pragma unroll
    for (int i = 0; i < STAGES - 1; i++) fetch();
    int stage = 0;
    #pragma unroll 1
    for (int chunk = 0; chunk < inputs; chunk += CHUNK) {
        if (chunk > 0) __syncthreads();
        load_chunk(chunk);
        #pragma unroll 1
        for (int tap = 0; tap < TAPS; tap++) {
            wait<STAGES - 2>();
            __syncthreads();
            fetch();
            multiply(a_lane + tap / SIDE * ROW + tap % SIDE * X_STRIDE,
                     b_lane + stage * STAGE);
            if (++stage == STAGES) stage = 0;
        }
    }
}

// The packed weights are ordered so that a lane holds VECTOR neighbouring channels.
constexpr int VECTOR = GROUP * 2;
struct alignas(VECTOR * sizeof(T)) Vector { T v[VECTOR]; };
#pragma unroll
for (int q = 0; q < NT / GROUP; q++) {
    const int column = first_column + warp_column + q * (GROUP * 8) + lane % 4 * VECTOR;
    if (column >= outputs) continue;
    float offset[VECTOR];
    #pragma unroll
    for (int e = 0; e < VECTOR; e++) offset[e] = bias[column + e];
    #pragma unroll
    for (int r = 0; r < MT * 2; r++) {
        const int place = warp_row + r * 8 + lane / 4;
        const int t = top + place / ACROSS, m = left + place % ACROSS;
        if (t >= height || m >= width) continue;
        const size_t at = ((batch_row + t) * width + m) * outputs + column;
        Vector added, result;
        if (has_shortcut) added = *(const Vector*)(shortcut + at);
        #pragma unroll
        for (int e = 0; e < VECTOR; e++) {
            float v = sum[r / 2][q * GROUP + e / 2][r % 2 * 2 + e % 2] + offset[e];
            if (rectify) v = fmaxf(v, 0.f);
            if (has_shortcut) v += float(added.v[e]);
            result.v[e] = T(v);
        }
        *(Vector*)(y + at) = result;
    }
}
"""

_KERNEL = CudaKernel(
    "image_conv",
    ("x", "weight", "bias", "shortcut", "told"),
    ("y",),
    _SOURCE,
    (
        *(("height", "int"), ("width", "int"), ("inputs", "int"), ("outputs", "int")),
        *(("padded", "int"), ("has_shortcut", "int"), ("rectify", "int")),
        ("apart", "int"),
    ),
    conv_kernel.HEADER,
)


@dataclass(frozen=True)
class PackedImageWeight:
    """Weights in the order of the kernel.

    Attributes:
        array: ``[side * side, C_out + padding, C_in]``.
        outputs: ``C_out``.
        side: taps along each side: 3 around a place, 2 from it on, or 1.
    """

    array: mx.array
    outputs: int
    side: int

    @property
    def inputs(self) -> int:
        """``C_in``."""
        return self.array.shape[-1]


def sizes_of(weight: mx.array) -> tuple[int, int, int]:
    """``C_out``, taps along each side and ``C_in`` of ``[C_out, side, side, C_in]``.

    Raises:
        ValueError: no kernel is made for such a convolution.
    """
    outputs, side, other, inputs = weight.shape
    if side != other or side not in (1, 2, 3) or inputs % 16 or outputs % 8:
        raise ValueError(
            f"weight is {list(weight.shape)}; the kernel wants [C_out, side, side, C_in], "
            "side 1, 2 or 3, C_in a multiple of 16 and C_out of 8"
        )
    return outputs, side, inputs


def pack_image_weight(weight: mx.array, dtype: mx.Dtype) -> PackedImageWeight:
    """Weights ``[C_out, side, side, C_in]`` of a convolution in the order of the kernel.

    Args:
        weight: of the convolution; float32 is cut to float16.
        dtype: of the input that it will meet.

    Raises:
        ValueError: the kernel is not made for such a convolution.
    """
    outputs, side, _ = sizes_of(weight)
    products = mx.float16 if dtype == mx.float32 else dtype
    padded = 16 if outputs <= 16 else 32 if outputs <= 32 else -(-outputs // 64) * 64
    w = mx.pad(weight, [(0, padded - outputs), (0, 0), (0, 0), (0, 0)])
    w = in_order(w.flatten(1, 2), _group(padded, dtype)).astype(products)
    return PackedImageWeight(mx.contiguous(w), outputs, side)


def image_conv(
    x: mx.array,
    weight: PackedImageWeight,
    bias: mx.array,
    *,
    shortcut: mx.array | None = None,
    rectify: bool = True,
    own: OwnRows | None = None,
) -> mx.array:
    """``relu(conv2d(x) + bias) + shortcut``, as large as ``x``.

    Sums and additions are in float32, with one rounding at the end. Places outside count
    as zeros.

    Args:
        x: ``[B, T, M, C_in]`` float32, bfloat16 or float16; M is 4, 8 or a multiple of 16.
        weight: From ``pack_image_weight``, for the dtype of ``x``.
        bias: ``[C_out]`` float32.
        shortcut: ``[B, T, M, C_out]`` as ``x``, or None.
        rectify: whether there is a rectifier.
        own: what is behind these counts as zeros, too; of ``x`` they may be fewer by a
            whole factor than of the network's inputs.

    Returns:
        ``[B, T, M, C_out]`` of the dtype of ``x``.

    Raises:
        ValueError: Shapes or dtypes do not fit.
    """
    dtype, outputs, side = x.dtype, weight.outputs, weight.side
    shape = (*x.shape[:-1], outputs)
    check_arrays(x, weight, bias, shortcut)
    if x.shape[2] not in (4, 8) and x.shape[2] % 16:
        raise ValueError(f"x is {x.shape[2]} wide; want 4, 8 or a multiple of 16")
    B, T, M, _ = shape
    array = weight.array
    _, padded, inputs = sizes = array.shape
    across = min(M, 16)
    tile = choose_tile(B * T * M, padded)
    down = tile.positions // across
    blocks = (padded // tile.columns) * (M // across) * -(-T // down)
    (y,) = _KERNEL(
        [
            *(x, array, bias, x if shortcut is None else shortcut),
            told_kernel(own),
        ],
        [(shape, dtype)],
        Grid(blocks, tile.threads, B, _memory(tile, across, side, inputs)),
        scalars=[
            *(T, M, inputs, outputs, padded, shortcut is not None, rectify),
            0 if own is None else own.of // T,
        ],
        constants=_constants(dtype, array.dtype, sizes, side, tile, across),
    )
    return y


def choose_tile(places: int, padded: int) -> Tile:
    """How blocks divide the work; ``chunk``, ``depth`` of it are not used."""
    columns = min(padded, 64)
    for large in _large_tiles(columns):
        blocks = -(-places // large.positions) * (padded // columns)
        if blocks >= 2 * PROCESSORS:
            return large
    return large if columns < 32 else _SMALL_TILE


@cache
def _large_tiles(columns: int) -> list[Tile]:
    """256 places where channels are few and their weights come at once, and 128."""
    each = [4, 2] if columns <= 32 else [2]
    return [Tile(4, 1, n, columns // 8, stages=3) for n in each]


def _group(padded: int, dtype: mx.Dtype) -> int:
    """Fragments of 8 output channels that are stored together; tiles have two or more."""
    return min(8 // dtype.size, 2, padded // 8)


def chunk_of(inputs: int) -> int:
    """Input channels that are held in shared memory at a time."""
    return max(n for n in (16, 32, _CHUNK) if inputs % n == 0)


def _whole(tile: Tile, side: int, inputs: int) -> bool:
    """Whether all weights of a block's outputs lie in shared memory: no barrier a tap."""
    chunk = chunk_of(inputs)
    weights = side * side * tile.columns * (2 * chunk + 16)
    return inputs == chunk and weights <= WHOLE_WEIGHTS


@cache
def _memory(tile: Tile, across: int, side: int, inputs: int) -> int:
    """Bytes of shared memory that a block asks for."""
    halo, stride = side - 1, 2 * chunk_of(inputs) + 16
    row = (across + halo) * stride + _skew(across)
    rows = tile.positions // across + halo
    taps = side * side if _whole(tile, side, inputs) else tile.stages
    return rows * row + taps * tile.columns * stride


def _skew(across: int) -> int:
    """Bytes between rows of places, so that those of a fragment touch all banks."""
    return 96 if across == 4 else 0


@cache
def _constants(
    dtype: mx.Dtype,
    products: mx.Dtype,
    sizes: tuple[int, int, int],
    side: int,
    tile: Tile,
    across: int,
) -> Mapping[str, Constant]:
    """What the kernel is compiled for; the rest is told at run time.

    Args:
        dtype: of the images.
        products: the type of the packed weights.
        sizes: their shape.
        side: taps along each side.
        tile: of a block.
        across: places of a tile along a row.
    """
    _, padded, inputs = sizes
    constants: dict[str, Constant] = {
        "T": dtype,
        "P": products,
        "WARPS_M": tile.warps_m,
        "WARPS_N": tile.warps_n,
        "MT": tile.mt,
        "NT": tile.nt,
        "CHUNK": chunk_of(inputs),
        "STAGES": tile.stages,
        "BATCH": tile.batch,
        "GROUP": _group(padded, dtype),
        "ACROSS": across,
        "SKEW": _skew(across),
        "SIDE": side,
        "WHOLE": _whole(tile, side, inputs),
    }
    return MappingProxyType(constants)


def check_arrays(
    x: mx.array,
    weight: PackedImageWeight,
    bias: mx.array,
    shortcut: mx.array | None,
) -> None:
    """Refuse arrays that a kernel would read wrongly."""
    given, dtype, array = x.shape, x.dtype, weight.array
    products = mx.float16 if dtype == mx.float32 else dtype
    if len(given) != 4 or 0 in given or dtype not in DTYPES:
        raise ValueError(f"x is {dtype} {given}; want [B, T, M, C] of {DTYPES}")
    if array.dtype != products or weight.inputs != given[3]:
        raise ValueError(f"weight is {array.dtype} {array.shape} for x {dtype} {given}")
    if bias.shape != (weight.outputs,) or bias.dtype != mx.float32:
        raise ValueError(f"bias is {bias.dtype} {bias.shape}; want [{weight.outputs}]")
    shape = (*given[:3], weight.outputs)
    if shortcut is not None and (shortcut.shape != shape or shortcut.dtype != dtype):
        raise ValueError(
            f"cannot add {shortcut.dtype} {shortcut.shape} to {dtype} {shape}"
        )
