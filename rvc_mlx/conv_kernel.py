"""The convolutions of the vocoder's residual blocks as one CUDA kernel each.

One launch computes ``(conv(leaky_relu(x)) + bias + residual + accumulate) * scale``,
rectified once more if asked, on tensor cores: bfloat16 and float16 as they are, float32
arrays as TF32 or as float16. Or, up to 128 channels, a whole step of a block, two of them:
what lies between stays in shared memory; on Hopper ``step_kernel`` does it for more. A
block of threads keeps its input rows, activated, in shared memory. They serve every tap,
shifted by the dilation, while the weights stream through a ring of stages beside them::

    rows in shared memory   0 ......... PAD ................. PAD + M ......... M + 2 PAD
    tap 0 reads             [0 ............ M)
    tap t reads                  [t * dilation ............ t * dilation + M)
    M outputs                           [PAD .............. PAD + M)

In a step the first convolution's outputs take the place of the rows that it has read. The
second then has its M outputs, too; those whose taps reach beyond are left to neighbours.

``ldmatrix`` moves pieces of 8 rows by 16 bytes, and a fragment of m16n8k8 (TF32) has the
same bytes in the same lanes as one of m16n8k16 (16 bits), so only the product itself
depends on the type. Rows are padded by 16 bytes: 8 rows then touch all 32 banks.

Half of this long file is the CUDA source, which is one piece with the sizes around it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import NamedTuple

import mlx.core as mx

from rvc_mlx.cuda_kernel import Constant, CudaKernel, Grid

MAX_SHARED_MEMORY = 227 * 1024  # bytes, of one block on an H100 or H200
CHANNELS = (16, 32, 64, 128, 256)
WIDEST_STEP = 128  # channels of which a block makes all: the next product sees them
LONGEST_STEP = 31  # taps; of more, a block would make too much for its neighbours
DTYPES = (mx.float32, mx.bfloat16, mx.float16)

_USUAL_HALO = 50  # positions: 11 taps, 5 apart

HEADER = r"""
namespace fused_conv {

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
    return (unsigned)__cvta_generic_to_shared(pointer);
}

__device__ __forceinline__ void copy_async(unsigned target, const void* source) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
                 :: "r"(target), "l"(source) : "memory");
}

__device__ __forceinline__ void commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int PENDING>
__device__ __forceinline__ void wait() {
    asm volatile("cp.async.wait_group %0;" :: "n"(PENDING) : "memory");
}

__device__ __forceinline__ uint4 load(const void* source) {
    return __ldg((const uint4*)source);
}

__device__ __forceinline__ void ldmatrix(unsigned (&r)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}

#define FUSED_CONV_MMA(SHAPE, TYPE)                                              \
    asm("mma.sync.aligned." SHAPE ".row.col.f32." TYPE "." TYPE ".f32 "          \
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"        \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                         \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

__device__ __forceinline__ void mma(
    float, float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    FUSED_CONV_MMA("m16n8k8", "tf32");
}
__device__ __forceinline__ void mma(
    bfloat16, float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    FUSED_CONV_MMA("m16n8k16", "bf16");
}
__device__ __forceinline__ void mma(
    float16, float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    FUSED_CONV_MMA("m16n8k16", "f16");
}

// A piece of 16 bytes of input goes to shared memory with the activation applied, in the
// type of the products: float32 as TF32, or as float16, which has the same bits of
// fraction, at half the size.
__device__ __forceinline__ unsigned pair(bfloat16, float low, float high) {
    unsigned word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}
__device__ __forceinline__ unsigned pair(float16, float low, float high) {
    unsigned word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}
__device__ __forceinline__ float rectified(float v, float slope) {
    return fmaxf(v, v * slope);
}
__device__ __forceinline__ float rectified(unsigned word, float slope) {
    return rectified(__uint_as_float(word), slope);
}
__device__ __forceinline__ float in_range(float v) {
    return fminf(fmaxf(v, -65504.f), 65504.f);  // an infinity would spread
}

__device__ __forceinline__ unsigned activate(float, unsigned word, float slope) {
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(word) : "f"(rectified(word, slope)));
    return word;
}
__device__ __forceinline__ unsigned activate(bfloat16, unsigned word, float slope) {
    return pair(bfloat16(), rectified(word << 16, slope),
                rectified(word & 0xffff0000u, slope));
}
__device__ __forceinline__ unsigned activate(float16, unsigned word, float slope) {
    float low, high;
    asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %2;\n"
        "cvt.f32.f16 %0, l;\ncvt.f32.f16 %1, h;\n}"
        : "=f"(low), "=f"(high) : "r"(word));
    return pair(float16(), fmaxf(low, low * slope), fmaxf(high, high * slope));
}

template <class T>
__device__ __forceinline__ void keep(T, T, unsigned char* to, uint4 v, float slope) {
    *(uint4*)to = make_uint4(activate(T(), v.x, slope), activate(T(), v.y, slope),
                             activate(T(), v.z, slope), activate(T(), v.w, slope));
}
__device__ __forceinline__ void keep(
    float, float16, unsigned char* to, uint4 v, float slope) {
    *(uint2*)to = make_uint2(pair(float16(), in_range(rectified(v.x, slope)),
                                  in_range(rectified(v.y, slope))),
                             pair(float16(), in_range(rectified(v.z, slope)),
                                  in_range(rectified(v.w, slope))));
}

}  // namespace fused_conv
"""

_SOURCE = r"""
using namespace fused_conv;
constexpr int M = WARPS_M * MT * 16, N = WARPS_N * NT * 8;
constexpr int THREADS = 32 * WARPS_M * WARPS_N, BYTES = sizeof(P);
constexpr int X_STRIDE = CHUNK * BYTES + 16, X_PIECES = CHUNK * sizeof(T) / 16;
constexpr int KEPT = 16 * sizeof(P) / sizeof(T);  // bytes that a piece of input becomes
constexpr bool SHORTER = sizeof(R) < sizeof(T);
constexpr int W_STRIDE = DEPTH * BYTES + 16, W_PIECES = DEPTH * BYTES / 16;

extern __shared__ __align__(16) unsigned char shared[];

const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
const int pad = (taps - 1) / 2 * dilation, rows = M + 2 * pad;
const int margin = TWICE ? (taps - 1) / 2 : 0, own = M - 2 * margin;  // outputs of a block
const int first_column = blockIdx.x % (CHANNELS / N) * N;
const int first_row = blockIdx.x / (CHANNELS / N) * own - margin;
const size_t batch_row = (size_t)blockIdx.y * L;
const unsigned x_shared = shared_address(shared);
const unsigned w_shared = x_shared + rows * X_STRIDE;

// A step is DEPTH input channels of one tap of one chunk; its weights, [N, DEPTH], take
// one stage of the ring. Past the last step an empty group keeps the count right.
int next_chunk = 0, next_tap = 0, next_depth = 0, next_stage = 0;
auto fetch = [&]() {
    if (next_chunk < CHANNELS) {
        const P* source = weight + (next_tap * CHANNELS + first_column) * CHANNELS +
                          next_chunk + next_depth;
        const unsigned target = w_shared + next_stage * (N * W_STRIDE);
        #pragma unroll
        for (int i = thread; i < N * W_PIECES; i += THREADS) {
            const int row = i / W_PIECES, piece = i % W_PIECES;
            copy_async(target + row * W_STRIDE + piece * 16,
                       source + row * CHANNELS + piece * (16 / BYTES));
        }
        next_depth += DEPTH;
        if (next_depth == CHUNK) {
            next_depth = 0;
            if (++next_tap == (TWICE ? 2 : 1) * taps) {
                next_tap = 0;
                next_chunk += CHUNK;
            }
        }
    }
    if (++next_stage == STAGES) next_stage = 0;
    commit();
};

// BATCH loads are on their way before the first is stored.
auto load_chunk = [&](int chunk) {
    for (int start = thread; start < rows * X_PIECES; start += THREADS * BATCH) {
        uint4 v[BATCH];
        #pragma unroll
        for (int u = 0; u < BATCH; u++) {
            const int i = start + u * THREADS, row = i / X_PIECES;
            const int position = first_row - pad + row;
            v[u] = make_uint4(0, 0, 0, 0);
            if (row < rows && position >= 0 && position < L)
                v[u] = load(x + (batch_row + position) * CHANNELS + chunk +
                            i % X_PIECES * (16 / (int)sizeof(T)));
        }
        #pragma unroll
        for (int u = 0; u < BATCH; u++) {
            const int i = start + u * THREADS, row = i / X_PIECES;
            if (row < rows)
                keep(T(), P(), shared + row * X_STRIDE + i % X_PIECES * KEPT, v[u], slope);
        }
    }
};

const int warp_row = warp % WARPS_M * (MT * 16), warp_column = warp / WARPS_M * (NT * 8);
const unsigned a_lane = x_shared + (warp_row + lane % 16) * X_STRIDE + lane / 16 * 16;
const unsigned b_lane = w_shared +
    (warp_column + lane / 16 * 8 + lane % 8) * W_STRIDE + lane / 8 % 2 * 16;
float sum[MT][NT][4];
const auto clear = [&]() {
    #pragma unroll
    for (int m = 0; m < MT; m++)
        #pragma unroll
        for (int n = 0; n < NT; n++)
            #pragma unroll
            for (int e = 0; e < 4; e++) sum[m][n][e] = 0.f;
};

#pragma unroll
for (int i = 0; i < STAGES - 1; i++) fetch();
int stage = 0;
const auto multiply = [&](int apart) {
    #pragma unroll 1
    for (int step = 0; step < taps * (CHUNK / DEPTH); step++) {
        wait<STAGES - 2>();
        __syncthreads();
        fetch();
        const unsigned a = a_lane + step / (CHUNK / DEPTH) * apart * X_STRIDE +
                           step % (CHUNK / DEPTH) * (DEPTH * BYTES);
        const unsigned b = b_lane + stage * (N * W_STRIDE);
        if (++stage == STAGES) stage = 0;
        #pragma unroll
        for (int k = 0; k < DEPTH * BYTES; k += 32) {
            unsigned A[MT][4], B[NT / 2][4];
            #pragma unroll
            for (int m = 0; m < MT; m++) ldmatrix(A[m], a + m * 16 * X_STRIDE + k);
            #pragma unroll
            for (int n = 0; n < NT / 2; n++) ldmatrix(B[n], b + n * 16 * W_STRIDE + k);
            #pragma unroll
            for (int m = 0; m < MT; m++)
                #pragma unroll
                for (int n = 0; n < NT; n++)
                    mma(P(), sum[m][n], A[m], B[n / 2][n % 2 * 2], B[n / 2][n % 2 * 2 + 1]);
        }
    }
};

clear();
#pragma unroll 1
for (int chunk = 0; chunk < CHANNELS; chunk += CHUNK) {
    if (chunk > 0) __syncthreads();
    load_chunk(chunk);
    multiply(dilation);
}
if constexpr (TWICE) {
    constexpr int VECTOR = INNER_GROUP * 2;
    struct alignas(VECTOR * sizeof(P)) Vector { P v[VECTOR]; };
    __syncthreads();
    #pragma unroll
    for (int q = 0; q < NT / INNER_GROUP; q++) {
        const int column = warp_column + q * (INNER_GROUP * 8) + lane % 4 * VECTOR;
        #pragma unroll
        for (int r = 0; r < MT * 2; r++) {
            const int row = warp_row + r * 8 + lane / 4, position = first_row + row;
            const bool inside = position >= 0 && position < L;  // else it is padding
            Vector between;
            #pragma unroll
            for (int e = 0; e < VECTOR; e++) {
                float v = sum[r / 2][q * INNER_GROUP + e / 2][r % 2 * 2 + e % 2];
                v = rectified(v + inner_bias[column + e], slope);
                v = sizeof(P) < sizeof(T) ? in_range(v) : v;
                between.v[e] = P(inside ? v : 0.f);
            }
            *(Vector*)(shared + row * X_STRIDE + column * BYTES) = between;
        }
    }
    clear();
    multiply(1);  // begins with a barrier
}

// The packed weights are ordered so that a lane holds VECTOR neighbouring channels.
constexpr int VECTOR = GROUP * 2;
struct alignas(VECTOR * sizeof(R)) Vector { R v[VECTOR]; };
#pragma unroll
for (int q = 0; q < NT / GROUP; q++) {
    const int column = first_column + warp_column + q * (GROUP * 8) + lane % 4 * VECTOR;
    float offset[VECTOR];
    #pragma unroll
    for (int e = 0; e < VECTOR; e++) offset[e] = bias[column + e];
    #pragma unroll
    for (int r = 0; r < MT * 2; r++) {
        const int row = warp_row + r * 8 + lane / 4;
        const int position = first_row + margin + row;
        if (row >= own || position >= L) continue;
        const size_t at = (batch_row + position) * CHANNELS + column;
        Vector added, total, result;
        if (has_residual) added = *(const Vector*)(residual + at);
        if (has_accumulate) total = *(const Vector*)(accumulate + at);
        #pragma unroll
        for (int e = 0; e < VECTOR; e++) {
            float v = sum[r / 2][q * GROUP + e / 2][r % 2 * 2 + e % 2] + offset[e];
            if (has_residual) v += float(added.v[e]);
            if (has_accumulate) v += float(total.v[e]);
            v = rectified(v * scale, out_slope);
            result.v[e] = R(SHORTER ? in_range(v) : v);
        }
        *(Vector*)(y + at) = result;
    }
}
"""

_KERNEL = CudaKernel(
    "fused_conv",
    ("x", "weight", "bias", "residual", "accumulate", "inner_bias"),
    ("y",),
    _SOURCE,
    (
        *(("L", "int"), ("taps", "int"), ("dilation", "int")),
        *(("has_residual", "int"), ("has_accumulate", "int")),
        *(("slope", "float"), ("scale", "float"), ("out_slope", "float")),
    ),
    HEADER,
)


class Tile(NamedTuple):
    """How a block of threads divides its work.

    Attributes:
        warps_m: Warps along the positions.
        warps_n: Warps along the output channels.
        mt: Fragments of 16 positions of each warp.
        nt: Fragments of 8 output channels of each warp.
        chunk: Bytes of each input row held in shared memory at a time.
        depth: Bytes of each row of weights in one stage.
        stages: Stages of weights in shared memory.
        batch: Loads of 16 bytes that a thread has under way; each takes 4 registers.
    """

    warps_m: int
    warps_n: int
    mt: int
    nt: int
    chunk: int = 256
    depth: int = 128
    stages: int = 3
    batch: int = 8

    @property
    def positions(self) -> int:
        """Positions whose products a block makes."""
        return self.warps_m * self.mt * 16

    @property
    def columns(self) -> int:
        """Output channels of a block."""
        return self.warps_n * self.nt * 8

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps_m * self.warps_n

    def shared_memory(self, taps: int, dilation: int) -> int:
        """Bytes of shared memory of a block, the same for all usual convolutions."""
        rows = self.positions + max((taps - 1) * dilation, _USUAL_HALO)
        weights = self.stages * self.columns * (self.depth + 16)
        return rows * (self.chunk + 16) + weights


class Output(NamedTuple):
    """What a convolution gives.

    Attributes:
        dtype: float16 for an input of float32 is cut to its range.
        slope: of a leaky rectifier behind everything, above 0; 1 for none.
    """

    dtype: mx.Dtype
    slope: float = 1.0


@dataclass(frozen=True)
class PackedWeight:
    """Weights in the order of the kernel.

    Attributes:
        array: ``[k, C, C]``.
        tile: to run them with.
        output: what comes of it; the order depends on its type.
    """

    array: mx.array
    tile: Tile
    output: Output


@dataclass(frozen=True)
class PackedStep:
    """A step of a residual block.

    Attributes:
        weight: of both convolutions, one behind the other, ``[2 k, C, C]``.
        bias: of the first and of the second, ``[C]`` float32.
        dilation: of the first.
        slope: of the leaky rectifiers in front of both.
    """

    weight: PackedWeight
    bias: tuple[mx.array, mx.array]
    dilation: int
    slope: float


def supports(channels: int, taps: int, dtype: mx.Dtype) -> bool:
    """Whether the kernel computes such a convolution on this machine's GPU.

    It wants more shared memory than the GPUs of graphics cards have.
    """
    if not mx.cuda.is_available():
        return False
    capability = mx.device_info(mx.gpu).get("compute_capability_major", 0)
    fits = channels in CHANNELS and taps % 2 == 1 and dtype in DTYPES
    return int(capability) in (9, 10) and fits


def default_tile(
    channels: int, products: mx.Dtype, dtype: mx.Dtype | None = None
) -> Tile:
    """The tile for this many channels; two blocks fit a multiprocessor.

    Args:
        channels: of the convolution.
        products: the type in which they are multiplied.
        dtype: of the arrays, if another.
    """
    tiles = candidate_tiles(channels, products)
    if channels < 128 or dtype is None or dtype == products:
        return tiles[0]
    return tiles[-1 if channels == 256 else -2]  # loads weigh more


def candidate_tiles(channels: int, dtype: mx.Dtype) -> list[Tile]:
    """Sensible tiles, the default first; a benchmark tells which is fastest."""
    row = channels * dtype.size  # bytes
    wide, narrow = min(row, 256), min(row, 128)
    if channels >= 128:
        return [
            Tile(2, 4, 4, 4, wide, narrow, 3, 4),
            Tile(2, 2, 4, 8, wide, narrow, 3),
            Tile(2, 2, 4, 8, narrow, narrow, 3),
            Tile(2, 2, 2, 8, wide, narrow, 3),
            Tile(2, 4, 4, 4, narrow, narrow, 3, 4),
            Tile(4, 2, 2, 8, wide, narrow, 3, 4),
        ]
    if channels == 64:
        return [
            Tile(4, 1, 2, 8, wide, narrow, 3),
            Tile(4, 1, 4, 8, narrow, narrow, 3),
            Tile(2, 2, 4, 4, narrow, narrow, 3),
        ]
    fragments = channels // 8
    return [
        Tile(4, 1, 4, fragments, narrow, narrow, 3),
        Tile(4, 1, 2, fragments, narrow, narrow, 3),
        Tile(8, 1, 4, fragments, narrow, narrow, 2),
    ]


def pack_weight(
    weight: mx.array,
    dtype: mx.Dtype,
    tile: Tile | None = None,
    products: mx.Dtype | None = None,
    output: Output | None = None,
) -> PackedWeight:
    """Weights ``[C, k, C]`` of a convolution in the order of the kernel.

    Output channels are permuted within groups so that each lane of a warp ends up with
    16 bytes of neighbours.

    Args:
        weight: of the convolution.
        dtype: of the input that it will meet.
        tile: the default one if None.
        products: the type in which they are multiplied, by default ``dtype``. float32
            means TF32; float16 instead is as exact for numbers between 6e-5 and 65504
            (beyond, it is off by 3e-8, or cut), and about twice as fast.
        output: by default of ``dtype``.
    """
    products = products or dtype
    C, k, C_in = weight.shape
    if C_in != C or C not in CHANNELS or k % 2 == 0:
        raise ValueError(
            f"weight is [{C}, {k}, {C_in}]; the kernel wants [C, odd, C] "
            f"with C one of {CHANNELS}"
        )
    output = output or Output(dtype)
    group = _group(C, output.dtype)
    w = in_order(weight, group)
    if products == mx.float32:
        bits = w.astype(mx.float32).view(mx.uint32)
        w = ((bits + 0x1000) & 0xFFFFE000).view(mx.float32)
    w = mx.contiguous(w.astype(products))
    return PackedWeight(w, tile or default_tile(C, products, dtype), output)


def pack_step(
    weights: tuple[mx.array, mx.array],
    biases: tuple[mx.array, mx.array],
    dtype: mx.Dtype,
    dilation: int,
    slope: float,
    tile: Tile | None = None,
) -> PackedStep:
    """A step of a residual block, for ``fused_step``.

    Args:
        weights: of the first convolution and of the second, ``[C, k, C]``.
        biases: likewise, ``[C]``.
        dtype: of the input; float32 is multiplied in float16.
        dilation: of the first.
        slope: of the leaky rectifiers in front of both, above 0.
        tile: the default one if None.

    Raises:
        ValueError: such convolutions do not go together.
    """
    C, taps, _ = shape = weights[0].shape
    alike = weights[1].shape == shape and biases[0].shape == biases[1].shape == (C,)
    if not alike or C > WIDEST_STEP or taps > LONGEST_STEP:
        raise ValueError(
            f"weights are {shape} and {weights[1].shape}, biases {biases[0].shape} and "
            f"{biases[1].shape}; want two of one shape, with {WIDEST_STEP} channels and "
            f"{LONGEST_STEP} taps at most"
        )
    products = mx.float16 if dtype == mx.float32 else dtype
    tile = tile or candidate_tiles(C, products)[0]
    if (tile.columns, tile.chunk) != (C, C * products.size):
        raise ValueError(f"{tile} does not take all of {C} channels at once")
    parts = [
        pack_weight(weight, dtype, tile, products, Output(out)).array
        for weight, out in zip(weights, (products, dtype), strict=True)
    ]
    packed = PackedWeight(mx.concatenate(parts), tile, Output(dtype))
    first, second = (bias.astype(mx.float32) for bias in biases)
    return PackedStep(packed, (first, second), dilation, slope)


def fused_step(
    x: mx.array,
    step: PackedStep,
    accumulate: mx.array | None = None,
    scale: float = 1.0,
) -> mx.array:
    """``(x + conv2(leaky_relu(conv1(leaky_relu(x)))) + accumulate) * scale``.

    What is between is rounded as products want it; sums and additions are in float32.

    Args:
        x: ``[B, L, C]`` float32, bfloat16 or float16.
        step: From ``pack_step``, for the dtype of ``x``.
        accumulate: as ``x``, added.
        scale: Multiplies everything.

    Returns:
        As ``x``.

    Raises:
        ValueError: Shapes or dtypes do not fit, or a block needs too much memory.
    """
    return _launch(
        x,
        step.weight,
        step.bias[1],
        dilation=step.dilation,
        slope=step.slope,
        added=(x, accumulate),
        scale=scale,
        inner_bias=step.bias[0],
    )


def fused_conv(
    x: mx.array,
    weight: PackedWeight,
    bias: mx.array,
    *,
    dilation: int,
    slope: float,
    residual: mx.array | None = None,
    accumulate: mx.array | None = None,
    scale: float = 1.0,
) -> mx.array:
    """``leaky_relu((conv1d(leaky_relu(x)) + bias + residual + accumulate) * scale)``.

    Sums, bias and additions are in float32, with one rounding at the end. The length
    stays; positions outside count as zeros. The weight tells the output's type and slope.

    Args:
        x: ``[B, L, C]`` float32, bfloat16 or float16.
        weight: From ``pack_weight``, for the dtype of ``x``.
        bias: ``[C]``.
        dilation: Positions between taps.
        slope: Of the leaky rectifier for negative values, above 0; 1 for none.
        residual: ``[B, L, C]`` of the output's dtype, added.
        accumulate: ``[B, L, C]``, likewise.
        scale: Multiplies everything.

    Returns:
        ``[B, L, C]`` of the output's dtype.

    Raises:
        ValueError: Shapes or dtypes do not fit, or a block needs too much memory.
    """
    return _launch(
        x,
        weight,
        bias.astype(mx.float32),
        dilation=dilation,
        slope=slope,
        added=(residual, accumulate),
        scale=scale,
    )


def _launch(
    x: mx.array,
    weight: PackedWeight,
    bias: mx.array,
    *,
    dilation: int,
    slope: float,
    added: tuple[mx.array | None, mx.array | None],
    scale: float,
    inner_bias: mx.array | None = None,
) -> mx.array:
    """A convolution, or with ``inner_bias`` a step."""
    _check(x, weight, bias, added)
    shape, dtype, array = x.shape, x.dtype, weight.array
    tile, output = weight.tile, weight.output
    (B, L, C), step = shape, inner_bias is not None
    taps = array.shape[0] // (2 if step else 1)
    memory = tile.shared_memory(taps, dilation)
    if memory > MAX_SHARED_MEMORY:
        raise ValueError(
            f"{tile} needs {memory} bytes of shared memory at {taps} taps, dilation "
            f"{dilation}; a block has {MAX_SHARED_MEMORY}"
        )
    nothing = x if dtype == output.dtype else mx.zeros((), output.dtype)
    residual, accumulate = added
    positions = tile.positions - (taps - 1 if step else 0)
    blocks = -(-L // positions) * (C // tile.columns)
    (y,) = _KERNEL(
        [
            x,
            array,
            bias,
            nothing if residual is None else residual,
            nothing if accumulate is None else accumulate,
            bias if inner_bias is None else inner_bias,
        ],
        [(shape, output.dtype)],
        Grid(blocks, tile.threads, B, memory),
        scalars=[
            *(L, taps, dilation),
            *(residual is not None, accumulate is not None),
            *(slope, scale, output.slope),
        ],
        constants=_constants(dtype, array.dtype, C, tile, output.dtype, step),
    )
    return y


def in_order(weight: mx.array, group: int) -> mx.array:
    """``[C_out, k, C_in]`` to ``[k, C_out, C_in]`` with its outputs as lanes hold them.

    Args:
        weight: of a convolution.
        group: fragments of 8 output channels whose results are stored together.
    """
    C, k, inputs = weight.shape
    w = weight.reshape(C // (8 * group), 4, group, 2, k, inputs)
    return w.transpose(4, 0, 2, 1, 3, 5).reshape(k, C, inputs)


def _group(channels: int, dtype: mx.Dtype) -> int:
    """Fragments of 8 output channels that are stored together."""
    return min(8 // dtype.size, channels // 8)


@cache
def _constants(
    dtype: mx.Dtype,
    products: mx.Dtype,
    channels: int,
    tile: Tile,
    out_dtype: mx.Dtype | None = None,
    step: bool = False,
) -> Mapping[str, Constant]:
    """What the kernel is compiled for; the rest is told at run time."""
    constants: dict[str, Constant] = {
        "T": dtype,
        "P": products,
        "R": out_dtype or dtype,
        "CHANNELS": channels,
        "WARPS_M": tile.warps_m,
        "WARPS_N": tile.warps_n,
        "MT": tile.mt,
        "NT": tile.nt,
        "CHUNK": tile.chunk // products.size,
        "DEPTH": tile.depth // products.size,
        "STAGES": tile.stages,
        "BATCH": tile.batch,
        "GROUP": _group(channels, out_dtype or dtype),
        "TWICE": step,
        "INNER_GROUP": _group(channels, products),
    }
    return MappingProxyType(constants)


def _check(
    x: mx.array,
    weight: PackedWeight,
    bias: mx.array,
    added: tuple[mx.array | None, mx.array | None],
) -> None:
    """Refuse arrays that the kernel would read wrongly."""
    shape, dtype, w = x.shape, x.dtype, weight.array
    C, out = shape[-1], weight.output.dtype
    if len(shape) != 3 or 0 in shape or dtype not in DTYPES:
        raise ValueError(f"x is {dtype} {shape}; want [B, L, C] of {DTYPES}")
    allowed = (mx.float32, mx.float16) if dtype == mx.float32 else (dtype,)
    if w.dtype not in allowed or w.shape[1:] != (C, C) or bias.shape != (C,):
        raise ValueError(
            f"weight is {w.dtype} {w.shape} and bias {bias.shape} for x {dtype} {shape}"
        )
    if dtype != out and mx.bfloat16 in (dtype, out):
        raise ValueError(
            f"a result of {out} for x {dtype}; bfloat16 goes with "
            "itself, float32 and float16 with each other"
        )
    for a in added:
        if a is not None and (a.shape != shape or a.dtype != out):
            raise ValueError(f"cannot add {a.dtype} {a.shape} to {out} {shape}")
