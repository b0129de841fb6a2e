"""The pitch net's convolutions over images on Hopper's tensor cores, as one CUDA kernel each.

One launch computes ``relu(conv2d(x) + bias) + shortcut``. ``image_conv`` does the same for
other GPUs, a warp at a time; here a warpgroup multiplies (``warpgroup``).

A block makes a tile of DOWN by ACROSS places. It keeps what they see in shared memory, row
after row, eight channels of all places behind one another; 64 places of a product are 8 of 8
rows each, and a tap is another first place::

    places kept       (DOWN + side - 1) x (ACROSS + side - 1)
    tap (i, j) reads  from place (i, j) on, 8 of each row

Input channels come CHUNK at a time, the next ones while those before are multiplied.
Weights lie in memory as they will in shared memory: a stage of the ring is one copy, of one
tap, or of all where channels are few.

Half of this long file is the CUDA source, which is one piece with the sizes around it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import NamedTuple

import mlx.core as mx

from rvc_mlx import conv_kernel, warpgroup
from rvc_mlx.conv_kernel import in_order
from rvc_mlx.cuda_kernel import Constant, CudaKernel, Grid, is_hopper
from rvc_mlx.image_conv import (
    PROCESSORS,
    WHOLE_WEIGHTS,
    PackedImageWeight,
    check_arrays,
    chunk_of,
    sizes_of,
)
from rvc_mlx.steady import OwnRows, told_kernel

_BARRIERS = 128  # bytes in front of everything
_THREADS = 128
_MOST_IMAGES = 65535  # of a launch
_PIECE = 8  # numbers of 16 bits in 16 bytes

_SOURCE = r"""
using namespace warpgroup;
constexpr int DOWN = 8 * TALL, ACROSS = 8 * WIDE, BLOCKS = TALL * WIDE, TAPS = SIDE * SIDE;
constexpr int PITCH = ACROSS + SIDE - 1, PLACES = (DOWN + SIDE - 1) * PITCH;
constexpr int PLANES = CHUNK / 8, BEFORE = (SIDE - 1) / 2;
constexpr int STAGE = TOGETHER * CHUNK * COLUMNS * 2, BUFFER = PLANES * SPACE * 16;  // bytes
constexpr int LANES = PLANES < 4 ? PLANES : 4, EACH = 32 / LANES;  // planes, places of a warp
constexpr int SPOTS = (PLACES + EACH - 1) / EACH * (PLANES / LANES);

extern __shared__ __align__(16) unsigned char shared[];

const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
const int columns = padded / COLUMNS, tiles = (width + ACROSS - 1) / ACROSS;
const int column_block = blockIdx.x % columns;
const int left = blockIdx.x / columns % tiles * ACROSS;
const int top = blockIdx.x / columns / tiles * DOWN;
const size_t batch_row = (size_t)blockIdx.y * height;
const int known = apart ? told[0] / apart : height;  // rows that are seen
const unsigned barriers = shared_address(shared), ring = barriers + BARRIERS;
unsigned char* const seen = shared + BARRIERS + STAGES * STAGE;

// The first thread keeps the ring full.
const int steps = inputs / CHUNK * (TAPS / TOGETHER);
int ahead = 0;
const auto fetch = [&](int slot) {
    if (ahead < steps)
        copy_bytes(ring + slot * STAGE,
                   (const unsigned char*)weight +
                       ((size_t)column_block * steps + ahead) * STAGE,
                   STAGE, barriers + slot * 8);
    ahead++;
};
if (thread == 0) {
    #pragma unroll
    for (int i = 0; i < STAGES; i++) make_barrier(barriers + i * 8);
    publish();
    #pragma unroll 1
    for (int i = 0; i < STAGES; i++) fetch(i);
}

// A warp moves eight channels of EACH places by LANES planes: 16 bits in the background.
const auto load_chunk = [&](int chunk, unsigned char* to) {
    struct Spot { int at; const T* from; bool kept; };
    const auto spot = [&](int i) {
        const int place = i / (PLANES / LANES) * EACH + lane % EACH;
        const int plane = i % (PLANES / LANES) * LANES + lane / EACH;
        const int t = top - BEFORE + place / PITCH, m = left - BEFORE + place % PITCH;
        const bool inside = t >= 0 && t < known && m >= 0 && m < width;
        const size_t at = ((batch_row + t) * width + m) * inputs + chunk * CHUNK + plane * 8;
        return Spot{(plane * SPACE + place) * 16, inside ? x + at : 0, place < PLACES};
    };
    if constexpr (sizeof(T) == 2) {
        #pragma unroll 4
        for (int i = warp; i < SPOTS; i += THREADS / 32) {
            const Spot s = spot(i);
            if (s.kept && s.from) copy_async(shared_address(to) + s.at, s.from);
            else if (s.kept) *(Words*)(to + s.at) = {};
        }
        commit();
    } else {
        #pragma unroll 1
        for (int start = warp; start < SPOTS; start += THREADS / 32 * BATCH) {
            Floats<4> low[BATCH], high[BATCH];
            #pragma unroll
            for (int u = 0; u < BATCH; u++) {
                const Spot s = spot(start + u * (THREADS / 32));
                low[u] = high[u] = {};
                if (!s.kept || !s.from) continue;
                low[u] = ((const Floats<4>*)s.from)[0];
                high[u] = ((const Floats<4>*)s.from)[1];
            }
            #pragma unroll
            for (int u = 0; u < BATCH; u++) {
                const Spot s = spot(start + u * (THREADS / 32));
                float v[8];
                #pragma unroll
                for (int e = 0; e < 8; e++)
                    v[e] = in_range(e < 4 ? low[u].v[e % 4] : high[u].v[e % 4]);
                if (s.kept) *(Words*)(to + s.at) = packed(float16(), v);
            }
        }
    }
};

float sum[BLOCKS][COLUMNS / 2];
#pragma unroll
for (int m = 0; m < BLOCKS; m++) {
    #pragma unroll
    for (int i = 0; i < COLUMNS / 2; i++) sum[m][i] = 0.f;
    settle(sum[m]);
}
int slot = 0, step = 0;
unsigned parity = 0;
load_chunk(0, seen);
#pragma unroll 1
for (int chunk = 0; chunk < inputs / CHUNK; chunk++) {
    wait<0>();
    publish();
    __syncthreads();
    const unsigned read = shared_address(seen) + chunk % 2 * BUFFER;
    #pragma unroll 1
    for (int first = 0; first < TAPS; first += TOGETHER) {
        wait_for(barriers + slot * 8, parity);
        begin_products();
        #pragma unroll
        for (int u = 0; u < TOGETHER; u++) {
            const unsigned from = read +
                ((first + u) / SIDE * PITCH + (first + u) % SIDE) * 16;
            #pragma unroll
            for (int k = 0; k < PLANES; k += 2) {
                const unsigned weights = ring + slot * STAGE +
                    (u * PLANES + k) * COLUMNS * 16;
                #pragma unroll
                for (int m = 0; m < BLOCKS; m++)
                    product(P(), sum[m],
                            described(from + (k * SPACE + m / WIDE * 8 * PITCH +
                                              m % WIDE * 8) * 16, SPACE, PITCH),
                            described(weights, COLUMNS));
            }
        }
        end_products();
        if (step++ > 0) {
            wait_for_products<1>();
            __syncthreads();
            if (thread == 0) fetch(slot == 0 ? STAGES - 1 : slot - 1);
            __syncwarp();
        }
        // All have read the chunk before: its place is free.
        if (first == 0 && (chunk + 1) * CHUNK < inputs)
            load_chunk(chunk + 1, seen + (chunk + 1) % 2 * BUFFER);
        if (++slot == STAGES) {
            slot = 0;
            parity ^= 1;
        }
    }
}
wait_for_products<0>();
#pragma unroll
for (int m = 0; m < BLOCKS; m++) settle(sum[m]);

// The packed weights are ordered so that a lane holds VECTOR neighbouring channels.
constexpr int VECTOR = GROUP * 2, VECTORS = COLUMNS / (4 * VECTOR);
struct alignas(VECTOR * sizeof(T)) Vector { T v[VECTOR]; };
const int across = anew(left + lane / 4), down = anew(top + warp * 2);
const int column = column_block * COLUMNS + lane % 4 * VECTOR;
float offset[VECTORS][VECTOR];
#pragma unroll
for (int q = 0; q < VECTORS; q++)
    #pragma unroll
    for (int e = 0; e < VECTOR; e++) {
        const int c = column + q * 4 * VECTOR + e;
        offset[q][e] = c < outputs ? bias[c] : 0.f;
    }
#pragma unroll
for (int m = 0; m < BLOCKS; m++)
    #pragma unroll
    for (int r = 0; r < 2; r++) {
        const int t = down + m / WIDE * 8 + r, place = across + m % WIDE * 8;
        if (t >= height || place >= width) continue;
        const size_t at = ((batch_row + t) * width + place) * outputs + column;
        Vector added[VECTORS];
        #pragma unroll
        for (int q = 0; q < VECTORS; q++)
            if (SHORTCUT && column + q * 4 * VECTOR < outputs)
                added[q] = *(const Vector*)(shortcut + at + q * 4 * VECTOR);
        #pragma unroll
        for (int q = 0; q < VECTORS; q++) {
            Vector result;
            #pragma unroll
            for (int e = 0; e < VECTOR; e++) {
                float v = sum[m][(q * GROUP + e / 2) * 4 + r * 2 + e % 2] + offset[q][e];
                if (rectify) v = fmaxf(v, 0.f);
                if (SHORTCUT) v += float(added[q].v[e]);
                result.v[e] = T(v);
            }
            if (column + q * 4 * VECTOR < outputs)
                *(Vector*)(y + at + q * 4 * VECTOR) = result;
        }
        not_before();
    }
"""


class Tile(NamedTuple):
    """How a block of threads divides its work.

    Attributes:
        tall: times 8 rows of its tile.
        wide: times 8 places of each.
        columns: output channels.
        stages: of weights in shared memory.
        batch: pieces of eight channels that a thread has under way; half as many of
            float32.
    """

    tall: int
    wide: int
    columns: int
    stages: int = 3
    batch: int = 8


@dataclass(frozen=True)
class PackedPlaneWeight(PackedImageWeight):
    """Weights in the order of this kernel.

    Attributes:
        array: ``[blocks of columns, chunks, taps, CHUNK / 8, columns, 8]``.
    """

    @property
    def inputs(self) -> int:
        """``C_in``."""
        _, chunks, _, pieces, _, _ = self.array.shape
        return chunks * pieces * _PIECE

    @property
    def columns(self) -> int:
        """Output channels of a block."""
        return self.array.shape[4]


def supports() -> bool:
    """Whether this machine's GPU is a Hopper."""
    return is_hopper()


def pack_image_weight(weight: mx.array, dtype: mx.Dtype) -> PackedPlaneWeight:
    """Weights ``[C_out, side, side, C_in]`` of a convolution in the order of the kernel.

    Args:
        weight: of the convolution; float32 is cut to float16.
        dtype: of the input that it will meet.

    Raises:
        ValueError: the kernel is not made for such a convolution.
    """
    outputs, side, inputs = sizes_of(weight)
    products = mx.float16 if dtype == mx.float32 else dtype
    columns = 16 if outputs <= 16 else 32 if outputs <= 32 else 64
    padded, chunk = -(-outputs // columns) * columns, chunk_of(inputs)
    w = mx.pad(weight, [(0, padded - outputs), (0, 0), (0, 0), (0, 0)])
    w = in_order(w.flatten(1, 2), _group(columns, dtype)).astype(products)
    w = w.reshape(side * side, padded // columns, columns, inputs // chunk, -1, _PIECE)
    return PackedPlaneWeight(
        mx.contiguous(w.transpose(1, 3, 0, 4, 2, 5)), outputs, side
    )


def image_conv(
    x: mx.array,
    weight: PackedPlaneWeight,
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
        x: ``[B, T, M, C_in]`` float32, bfloat16 or float16.
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
    check_arrays(x, weight, bias, shortcut)
    B, T, M, inputs = x.shape
    if B > _MOST_IMAGES:
        raise ValueError(f"x is {B} images; want {_MOST_IMAGES} at most")
    shape, dtype, side = (B, T, M, weight.outputs), x.dtype, weight.side
    padded = weight.array.shape[0] * weight.columns
    tile = choose_tile(B, T, M, weight.columns, padded // weight.columns)
    blocks = (
        padded // tile.columns * -(-M // (8 * tile.wide)) * -(-T // (8 * tile.tall))
    )
    (y,) = _kernel(tile.columns)(
        [
            *(x, weight.array, bias, x if shortcut is None else shortcut),
            told_kernel(own),
        ],
        [(shape, dtype)],
        Grid(blocks, _THREADS, B, _memory(tile, side, inputs)),
        scalars=[
            *(T, M, inputs, weight.outputs, padded, rectify),
            0 if own is None else own.of // T,
        ],
        constants=_constants(
            *(dtype, weight.array.dtype, tile, side, inputs), shortcut is not None
        ),
    )
    return y


def choose_tile(images: int, height: int, width: int, columns: int, times: int) -> Tile:
    """The largest tile of which every multiprocessor has two, or the smallest."""
    shapes = ((2, 2), (2, 1), (1, 1)) if width > 8 else ((2, 1), (1, 1))
    for tall, wide in shapes:
        down, across = -(-height // (8 * tall)), -(-width // (8 * wide))
        if images * down * across * times >= 2 * PROCESSORS:
            break
    return Tile(tall, wide, columns, batch=16 if tall == 1 else 8)


def _group(columns: int, dtype: mx.Dtype) -> int:
    """Fragments of 8 output channels that are stored together."""
    return min(8 // dtype.size, columns // 8)


def _together(tile: Tile, side: int, inputs: int) -> int:
    """Taps of a stage."""
    chunk = chunk_of(inputs)
    whole = side * side * chunk * tile.columns * 2 <= WHOLE_WEIGHTS
    return side * side if whole and chunk == inputs else 1


def _stages(tile: Tile, side: int, inputs: int) -> int:
    one = chunk_of(inputs) == inputs and _together(tile, side, inputs) == side * side
    return 1 if one else tile.stages


def _space(tile: Tile, side: int) -> int:
    """Places from one plane to the next: two of four planes then touch all banks."""
    places = (8 * tile.tall + side - 1) * (8 * tile.wide + side - 1)
    return places + (2 - places) % 8


@cache
def _memory(tile: Tile, side: int, inputs: int) -> int:
    """Bytes of shared memory that a block asks for."""
    chunk = chunk_of(inputs)
    stage = _together(tile, side, inputs) * chunk * tile.columns * 2
    buffers = 1 if chunk == inputs else 2
    ring = _stages(tile, side, inputs) * stage
    return _BARRIERS + ring + buffers * chunk * 2 * _space(tile, side)


@cache
def _kernel(columns: int) -> CudaKernel:
    return CudaKernel(
        "plane_conv",
        ("x", "weight", "bias", "shortcut", "told"),
        ("y",),
        _SOURCE,
        (
            *(("height", "int"), ("width", "int"), ("inputs", "int")),
            *(("outputs", "int"), ("padded", "int"), ("rectify", "int")),
            ("apart", "int"),
        ),
        conv_kernel.HEADER
        + warpgroup.HEADER
        + warpgroup.product(columns)
        + warpgroup.WORDS
        + "}  // namespace warpgroup\n",
        f"__launch_bounds__({_THREADS})",
    )


@cache
def _constants(
    dtype: mx.Dtype,
    products: mx.Dtype,
    tile: Tile,
    side: int,
    inputs: int,
    shortcut: bool,
) -> Mapping[str, Constant]:
    """What the kernel is compiled for; the rest is told at run time."""
    return MappingProxyType(
        {
            "T": dtype,
            "P": products,
            "TALL": tile.tall,
            "WIDE": tile.wide,
            "COLUMNS": tile.columns,
            "SIDE": side,
            "CHUNK": chunk_of(inputs),
            "TOGETHER": _together(tile, side, inputs),
            "STAGES": _stages(tile, side, inputs),
            "SPACE": _space(tile, side),
            "GROUP": _group(tile.columns, dtype),
            "SHORTCUT": shortcut,
            "BATCH": tile.batch * products.size // dtype.size,
            "THREADS": _THREADS,
            "BARRIERS": _BARRIERS,
        }
    )
