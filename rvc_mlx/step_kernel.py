"""A step of the vocoder's residual blocks on Hopper's tensor cores, as one CUDA kernel.

One launch computes ``(x + conv2(leaky_relu(conv1(leaky_relu(x)))) + accumulate) * scale``.
``conv_kernel`` does the same for other GPUs, a warp at a time; here a warpgroup multiplies
(``wgmma``), which goes on while its threads wait, so one of a multiprocessor's blocks
multiplies while another loads and stores.

A block keeps the activated rows that its outputs see in shared memory, eight channels of
all rows behind one another. Products read pieces of 8 rows by 16 bytes there, so that a tap
is nothing but another first row. Weights lie in memory as they will in shared memory: a
stage of the ring is one copy. What is between the convolutions takes the place of the rows
that the first has read::

    rows in shared memory   0 ......... PAD ................. PAD + M ......... M + 2 PAD
    tap t of the first           [t * dilation ....... t * dilation + M)
    tap t of the second          [t .................. t + M)     of what is between
    outputs                      [0 ........ M - taps + 1)        the others are neighbours'

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
from rvc_mlx.conv_kernel import DTYPES, LONGEST_STEP, MAX_SHARED_MEMORY, in_order
from rvc_mlx.cuda_kernel import Constant, CudaKernel, Grid, is_hopper

_BARRIERS = 128  # bytes in front of everything
_DEPTH = 64  # input channels of a stage of the ring, or all that there are
_USUAL_HALO = 50  # rows: 11 taps, 5 apart
_PIECE = 8  # numbers of 16 bits in 16 bytes


_HEADER = (
    warpgroup.HEADER
    + r"""
// A factor in two parts: ``v * high + v * low`` is rounded as ``v * factor`` is, but for v
// below .004 in float16, where it may be off by 2.4e-7.
struct Factor { unsigned high, low; };
#define PAIR_RECTIFIED(T, TYPE)                                                       \
    __device__ __forceinline__ unsigned pair_rectified(T, unsigned v, Factor slope) { \
        unsigned word;                                                                \
        asm("{\n.reg .b32 t;\nmul.rn." TYPE " t, %1, %3;\n"                           \
            "fma.rn." TYPE " t, %1, %2, t;\nmax." TYPE " %0, %1, t;\n}"               \
            : "=r"(word) : "r"(v), "r"(slope.high), "r"(slope.low));                  \
        return word;                                                                  \
    }
PAIR_RECTIFIED(float16, "f16x2")
PAIR_RECTIFIED(bfloat16, "bf16x2")
"""
)

_PIECE_TEXT = r"""
// Eight channels of a row as they lie in memory, and as products take them.
template <class T> struct Piece {
    Words words;
    __device__ __forceinline__ void clear() { words = {}; }
    __device__ __forceinline__ void load(const T* from) { words = *(const Words*)from; }
    __device__ __forceinline__ Words activated(Factor factor, float) const {
        const unsigned(&w)[4] = words.w;
        return {pair_rectified(T(), w[0], factor), pair_rectified(T(), w[1], factor),
                pair_rectified(T(), w[2], factor), pair_rectified(T(), w[3], factor)};
    }
};
template <> struct Piece<float> {
    Words low, high;
    __device__ __forceinline__ void clear() { low = high = {}; }
    __device__ __forceinline__ void load(const float* from) {
        low = ((const Words*)from)[0];
        high = ((const Words*)from)[1];
    }
    __device__ __forceinline__ Words activated(Factor, float slope) const {
        float v[8];
        #pragma unroll
        for (int e = 0; e < 8; e++)
            v[e] = in_range(rectified(number(0.f, e < 4 ? low : high, e % 4), slope));
        return packed(float16(), v);
    }
};
"""

_SOURCE = r"""
using namespace warpgroup;
constexpr int M = GROUPS * BLOCKS * 64, THREADS = 128 * GROUPS, PLANES = CHANNELS / 8;
constexpr int PARTS = CHANNELS / DEPTH, STAGE = DEPTH * CHANNELS * 2;  // bytes
constexpr int FRONT = BARRIERS + 2 * CHANNELS * 4;

extern __shared__ __align__(16) unsigned char shared[];

const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
const int margin = (taps - 1) / 2, pad = margin * dilation, rows = M + 2 * pad;
const int own = M - 2 * margin, first_row = blockIdx.x * own;  // outputs of a block
const size_t batch_row = (size_t)blockIdx.y * L;
const unsigned barriers = shared_address(shared), ring = barriers + FRONT;
float* const biases = (float*)(shared + BARRIERS);
unsigned char* const seen = shared + FRONT + STAGES * STAGE;
const unsigned seen_address = shared_address(seen);

// The first thread keeps the ring full.
int ahead = 0;
const auto fetch = [&](int slot) {
    if (ahead < 2 * taps * PARTS)
        copy_bytes(ring + slot * STAGE, (const unsigned char*)weight + ahead * STAGE, STAGE,
                   barriers + slot * 8);
    ahead++;
};
if (thread == 0) {
    #pragma unroll
    for (int i = 0; i < STAGES; i++) make_barrier(barriers + i * 8);
    publish();
    #pragma unroll 1
    for (int i = 0; i < STAGES; i++) fetch(i);
}
for (int i = thread; i < 2 * CHANNELS; i += THREADS)
    biases[i] = i < CHANNELS ? inner_bias[i] : bias[i - CHANNELS];

// A warp moves eight channels of 8 rows by 4 planes; BATCH loads are on their way at once.
struct Spot { int row, plane; };
const auto spot = [&](int i) {
    return Spot{i / (PLANES / 4) * 8 + lane % 8, i % (PLANES / 4) * 4 + lane / 8};
};
const float high = float(P(slope)), low = slope - high;
const Factor factor{pair(P(), high, high), pair(P(), low, low)};
const int spots = (rows + 7) / 8 * (PLANES / 4);
#pragma unroll 1
for (int start = warp; start < spots; start += THREADS / 32 * BATCH) {
    Piece<T> pieces[BATCH];
    #pragma unroll
    for (int u = 0; u < BATCH; u++) {
        const Spot s = spot(start + u * (THREADS / 32));
        const int position = first_row - margin - pad + s.row;
        pieces[u].clear();
        if (s.row < rows && position >= 0 && position < L)
            pieces[u].load(x + (batch_row + position) * CHANNELS + s.plane * 8);
    }
    #pragma unroll
    for (int u = 0; u < BATCH; u++) {
        const Spot s = spot(start + u * (THREADS / 32));
        if (s.row < rows)
            *(Words*)(seen + (s.plane * pitch + s.row) * 16) =
                pieces[u].activated(factor, slope);
    }
}
publish();
__syncthreads();

float sum[BLOCKS][CHANNELS / 2];
const int group_row = warp / 4 * (BLOCKS * 64);
int slot = 0;
unsigned parity = 0;
const auto multiply = [&](int apart) {
    #pragma unroll
    for (int m = 0; m < BLOCKS; m++) {
        #pragma unroll
        for (int i = 0; i < CHANNELS / 2; i++) sum[m][i] = 0.f;
        settle(sum[m]);
    }
    // All have read what the products before those under way wanted: its place is free.
    const auto refill = [&]() {
        __syncthreads();
        if (thread == 0) fetch(slot == 0 ? STAGES - 1 : slot - 1);
    };
    unsigned from = seen_address + group_row * 16;
    int part = 0;
    #pragma unroll 1
    for (int step = 0; step < taps * PARTS; step++) {
        wait_for(barriers + slot * 8, parity);
        begin_products();
        #pragma unroll
        for (int k = 0; k < DEPTH / 8; k += 2) {
            const unsigned weights = ring + slot * STAGE + k * CHANNELS * 16;
            #pragma unroll
            for (int m = 0; m < BLOCKS; m++)
                product(P(), sum[m], described(from + (k * pitch + m * 64) * 16, pitch),
                        described(weights, CHANNELS));
        }
        end_products();
        from += DEPTH / 8 * pitch * 16;
        if (++part == PARTS) {  // of the next tap
            part = 0;
            from += (apart - PLANES * pitch) * 16;
        }
        if (step > 0) {
            wait_for_products<1>();
            refill();
        }
        if (++slot == STAGES) {
            slot = 0;
            parity ^= 1;
        }
    }
    wait_for_products<0>();
    #pragma unroll
    for (int m = 0; m < BLOCKS; m++) settle(sum[m]);
    refill();
};

// Of a block of 64 rows a lane has sums of two, 8 apart; weights are in such an order that
// they are 16 bytes of neighbours, four lanes side by side.
const int lane_row = group_row + warp % 4 * 16 + lane / 4;

multiply(dilation);
{
    const int row = anew(lane_row), quarter = anew(lane % 4);
    const int begin = margin - first_row, end = begin + L;  // others are padding
    unsigned char* const to = seen + (quarter * pitch + row) * 16;
    #pragma unroll
    for (int i = 0; i < 2 * BLOCKS; i++) {
        const int down = i / 2 * 64 + i % 2 * 8;
        const bool inside = row + down >= begin && row + down < end;
        #pragma unroll
        for (int q = 0; q < CHANNELS / 32; q++) {
            const Floats<8> offset = *(const Floats<8>*)(biases + (q * 4 + quarter) * 8);
            float v[8];
            #pragma unroll
            for (int e = 0; e < 8; e++) {
                v[e] = sum[i / 2][(q * 4 + e / 2) * 4 + i % 2 * 2 + e % 2];
                v[e] = rectified(v[e] + offset.v[e], slope);
                if (sizeof(T) == 4) v[e] = in_range(v[e]);
            }
            Words between = packed(P(), v);
            if (!inside) between = {};
            *(Words*)(to + (q * 4 * pitch + down) * 16) = between;
        }
        not_before();
    }
}
publish();
__syncthreads();
multiply(1);

constexpr int PIECE = 16 / sizeof(T), AT_ONCE = 4;
const int row = anew(lane_row), quarter = anew(lane % 4), end = min(own, L - first_row);
const size_t at = (batch_row + first_row + row) * CHANNELS + quarter * PIECE;
const float* const offsets = biases + CHANNELS + quarter * PIECE;
constexpr int PIECES = CHANNELS / (4 * PIECE), COUNT = PIECES < AT_ONCE ? PIECES : AT_ONCE;
#pragma unroll
for (int i = 0; i < 2 * BLOCKS; i++) {
    const int down = i / 2 * 64 + i % 2 * 8;
    if (row + down >= end) continue;
    #pragma unroll
    for (int start = 0; start < PIECES; start += COUNT) {
        Words residual[COUNT], total[COUNT];
        #pragma unroll
        for (int u = 0; u < COUNT; u++) {
            const size_t here = at + down * CHANNELS + (start + u) * 4 * PIECE;
            residual[u] = *(const Words*)(x + here);
            if (ACCUMULATE) total[u] = *(const Words*)(accumulate + here);
        }
        #pragma unroll
        for (int u = 0; u < COUNT; u++) {
            const int q = start + u;
            const Floats<PIECE> offset = *(const Floats<PIECE>*)(offsets + q * 4 * PIECE);
            float v[PIECE];
            #pragma unroll
            for (int e = 0; e < PIECE; e++) {
                v[e] = sum[i / 2][(q * PIECE + e) / 2 * 4 + i % 2 * 2 + e % 2];
                v[e] += offset.v[e] + number(T(), residual[u], e);
                if (ACCUMULATE) v[e] += number(T(), total[u], e);
                v[e] *= scale;
            }
            *(Words*)(y + at + down * CHANNELS + q * 4 * PIECE) = packed(T(), v);
        }
        not_before();
    }
}
"""


class Tile(NamedTuple):
    """How a block of threads divides its work.

    Attributes:
        groups: warpgroups, each with rows of its own.
        blocks: of 64 rows, of each.
        stages: of weights in shared memory.
        together: blocks of threads that a multiprocessor has registers for.
        batch: pieces of eight channels that a thread has under way; half as many of
            float32.
    """

    groups: int
    blocks: int
    stages: int
    together: int
    batch: int

    @property
    def rows(self) -> int:
        """Rows whose products a block makes."""
        return self.groups * self.blocks * 64

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 128 * self.groups


TILES: Mapping[int, Tile] = MappingProxyType(
    {
        32: Tile(groups=1, blocks=4, stages=4, together=4, batch=10),
        64: Tile(groups=1, blocks=4, stages=4, together=3, batch=8),
        128: Tile(groups=1, blocks=3, stages=3, together=2, batch=16),
        256: Tile(groups=2, blocks=1, stages=3, together=1, batch=24),
    }
)


@dataclass(frozen=True)
class PackedStep:
    """A step of a residual block.

    Attributes:
        weight: of the first convolution, and of the second: each ``[k, C / 8, C, 8]``, a
            tap's input channels by eights, output channels in the kernel's order.
        bias: likewise, ``[C]`` float32.
        dtype: of the input.
        dilation: of the first.
        slope: of the leaky rectifiers in front of both.
    """

    weight: mx.array
    bias: tuple[mx.array, mx.array]
    dtype: mx.Dtype
    dilation: int
    slope: float

    @property
    def taps(self) -> int:
        """Of each convolution."""
        return self.weight.shape[0] // 2

    @property
    def channels(self) -> int:
        """Of input and output."""
        return self.weight.shape[2]


def supports(channels: int, taps: int, dilation: int, dtype: mx.Dtype) -> bool:
    """Whether the kernel computes such a step on this machine's GPU: a Hopper."""
    return is_hopper() and fits(channels, taps, dilation, dtype)


def fits(channels: int, taps: int, dilation: int, dtype: mx.Dtype) -> bool:
    """Whether the kernel is made for such a step."""
    if channels not in TILES or taps % 2 == 0 or dtype not in DTYPES:
        return False
    _, memory = _layout(channels, taps, dilation)
    return taps <= LONGEST_STEP and dilation > 0 and memory <= MAX_SHARED_MEMORY


def pack_step(
    weights: tuple[mx.array, mx.array],
    biases: tuple[mx.array, mx.array],
    dtype: mx.Dtype,
    dilation: int,
    slope: float,
) -> PackedStep:
    """A step of a residual block, for ``fused_step``.

    Args:
        weights: of the first convolution and of the second, ``[C, k, C]``.
        biases: likewise, ``[C]``.
        dtype: of the input; float32 is multiplied in float16.
        dilation: of the first.
        slope: of the leaky rectifiers in front of both, above 0, at most 1.

    Raises:
        ValueError: such convolutions do not go together, or the kernel has no such step.
    """
    C, taps, _ = shape = weights[0].shape
    alike = weights[1].shape == shape and biases[0].shape == biases[1].shape == (C,)
    if not (alike and fits(C, taps, dilation, dtype) and 0 < slope <= 1):
        raise ValueError(
            f"weights are {shape} and {weights[1].shape}, biases {biases[0].shape} and "
            f"{biases[1].shape}, dilation {dilation}, slope {slope:g}; want two of one "
            f"shape, an odd number of taps up to {LONGEST_STEP}, {list(TILES)} channels, "
            "what they see within a block's memory, and a slope of 1 at most"
        )
    products = mx.float16 if dtype == mx.float32 else dtype
    parts = [
        in_order(weight, 8 // out.size)  # so a lane has 16 bytes of neighbours
        .reshape(taps, C, C // _PIECE, _PIECE)
        .swapaxes(1, 2)
        .astype(products)
        for weight, out in zip(weights, (products, dtype), strict=True)
    ]
    packed = mx.contiguous(mx.concatenate(parts))
    first, second = (bias.astype(mx.float32) for bias in biases)
    return PackedStep(packed, (first, second), dtype, dilation, slope)


def fused_step(
    x: mx.array,
    step: PackedStep,
    accumulate: mx.array | None = None,
    scale: float = 1.0,
) -> mx.array:
    """``(x + conv2(leaky_relu(conv1(leaky_relu(x)))) + accumulate) * scale``.

    What is between is rounded as products want it; sums and additions are in float32.

    Args:
        x: ``[B, L, C]``.
        step: From ``pack_step``, for the dtype of ``x``.
        accumulate: as ``x``, added.
        scale: Multiplies everything.

    Returns:
        As ``x``.

    Raises:
        ValueError: Shapes or dtypes do not fit.
    """
    added = x if accumulate is None else accumulate
    if (
        (x.ndim, x.shape[-1:], x.dtype) != (3, (step.channels,), step.dtype)
        or 0 in x.shape
        or (added.shape, added.dtype) != (x.shape, x.dtype)
    ):
        raise ValueError(
            f"x is {x.dtype} {x.shape}, accumulate {added.dtype} {added.shape}; want "
            f"both {step.dtype} [B, L, {step.channels}]"
        )
    B, L, C = x.shape
    tile = TILES[C]
    pitch, memory = _layout(C, step.taps, step.dilation)
    (y,) = _kernel(C)(
        [x, step.weight, step.bias[1], step.bias[0], added],
        [(x.shape, x.dtype)],
        Grid(-(-L // (tile.rows - step.taps + 1)), tile.threads, B, memory),
        scalars=[L, step.taps, step.dilation, pitch, step.slope, scale],
        constants=_constants(x.dtype, step.weight.dtype, C, accumulate is not None),
    )
    return y


@cache
def _kernel(channels: int) -> CudaKernel:
    tile = TILES[channels]
    return CudaKernel(
        "residual_step",
        ("x", "weight", "bias", "inner_bias", "accumulate"),
        ("y",),
        _SOURCE,
        (
            *(("L", "int"), ("taps", "int"), ("dilation", "int"), ("pitch", "int")),
            *(("slope", "float"), ("scale", "float")),
        ),
        conv_kernel.HEADER
        + _HEADER
        + warpgroup.product(channels)
        + warpgroup.WORDS
        + _PIECE_TEXT
        + "}  // namespace warpgroup\n",
        f"__launch_bounds__({tile.threads}, {tile.together})",
    )


@cache
def _constants(
    dtype: mx.Dtype, products: mx.Dtype, channels: int, accumulate: bool
) -> Mapping[str, Constant]:
    """What the kernel is compiled for; the rest is told at run time."""
    tile = TILES[channels]
    return MappingProxyType(
        {
            "T": dtype,
            "P": products,
            "CHANNELS": channels,
            "GROUPS": tile.groups,
            "BLOCKS": tile.blocks,
            "STAGES": tile.stages,
            "DEPTH": min(_DEPTH, channels),
            "BATCH": tile.batch * products.size // dtype.size,
            "BARRIERS": _BARRIERS,
            "ACCUMULATE": accumulate,
        }
    )


def _layout(channels: int, taps: int, dilation: int) -> tuple[int, int]:
    """Rows from plane to plane, and bytes of a block: the same for all usual steps."""
    tile, halo = TILES[channels], (taps - 1) * dilation
    ring = tile.stages * min(_DEPTH, channels) * channels * 2
    planes = _pitch(tile.rows + max(halo, _USUAL_HALO)) * channels * 2
    return _pitch(tile.rows + halo), _BARRIERS + 2 * channels * 4 + ring + planes


def _pitch(rows: int) -> int:
    """Rows, and some more: then two rows of four planes touch all banks."""
    return rows + (2 - rows) % 8
