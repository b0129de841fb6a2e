"""The convolutions of the vocoder's residual blocks as one CUDA kernel each.

One launch computes ``(conv(leaky_relu(x)) + bias + residual + accumulate) * scale``, on
tensor cores: TF32 for float32 arrays, bfloat16 and float16 as they are. A block of
threads keeps its input rows, activated, in shared memory. They serve every tap, shifted
by the dilation, while the weights stream through a ring of stages beside them::

    rows in shared memory   0 ......... PAD ................. PAD + M ......... M + 2 PAD
    tap 0 reads             [0 ............ M)
    tap t reads                  [t * dilation ............ t * dilation + M)
    M outputs                           [PAD .............. PAD + M)

``ldmatrix`` moves pieces of 8 rows by 16 bytes, and a fragment of m16n8k8 (TF32) has the
same bytes in the same lanes as one of m16n8k16 (16 bits), so only the product itself
depends on the type. Rows are padded by 16 bytes: 8 rows then touch all 32 banks.

MLX keeps compiled kernels by name, so the name holds a digest of the source. It asks CUDA
for more than 48 KB of shared memory where ``shared_memory`` says so, once per name.

Half of this long file is the CUDA source, which is one piece with the sizes around it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

MAX_SHARED_MEMORY = 227 * 1024  # bytes, of one block on an H100 or H200
CHANNELS = (16, 32, 64, 128, 256)
DTYPES = (mx.float32, mx.bfloat16, mx.float16)

_USUAL_HALO = 50  # positions: 11 taps, 5 apart

_HEADER = r"""
#include <cuda_bf16.h>
#include <cuda_fp16.h>

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
    __nv_bfloat16, float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    FUSED_CONV_MMA("m16n8k16", "bf16");
}
__device__ __forceinline__ void mma(
    __half, float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    FUSED_CONV_MMA("m16n8k16", "f16");
}

// Words of shared memory with the activation applied and, for float32, rounded to TF32.
__device__ __forceinline__ unsigned activate(float, unsigned word, float slope) {
    float v = __uint_as_float(word);
    v = fmaxf(v, v * slope);
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(word) : "f"(v));
    return word;
}
__device__ __forceinline__ unsigned activate(
    __nv_bfloat16, unsigned word, float slope) {
    __nv_bfloat162 pair;
    *(unsigned*)&pair = word;
    const float2 v = __bfloat1622float2(pair);
    pair = __floats2bfloat162_rn(fmaxf(v.x, v.x * slope), fmaxf(v.y, v.y * slope));
    return *(unsigned*)&pair;
}
__device__ __forceinline__ unsigned activate(__half, unsigned word, float slope) {
    __half2 pair;
    *(unsigned*)&pair = word;
    const float2 v = __half22float2(pair);
    pair = __floats2half2_rn(fmaxf(v.x, v.x * slope), fmaxf(v.y, v.y * slope));
    return *(unsigned*)&pair;
}

}  // namespace fused_conv
"""

_SOURCE = r"""
using namespace fused_conv;
constexpr int M = WARPS_M * MT * 16, N = WARPS_N * NT * 8;
constexpr int THREADS = 32 * WARPS_M * WARPS_N, BYTES = sizeof(T);
constexpr int X_STRIDE = CHUNK * BYTES + 16, X_PIECES = CHUNK * BYTES / 16;
constexpr int W_STRIDE = DEPTH * BYTES + 16, W_PIECES = DEPTH * BYTES / 16;

extern __shared__ __align__(16) unsigned char shared[];

const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
const int L = x_shape[1], taps = weight_shape[0], dilation = settings[0];
const bool has_residual = settings[1], has_accumulate = settings[2];
const float slope = __int_as_float(settings[3]), scale = __int_as_float(settings[4]);
const int pad = (taps - 1) / 2 * dilation, rows = M + 2 * pad;
const int first_column = blockIdx.x % (CHANNELS / N) * N;
const int first_row = blockIdx.x / (CHANNELS / N) * M;
const size_t batch_row = (size_t)blockIdx.y * L;
const unsigned x_shared = shared_address(shared);
const unsigned w_shared = x_shared + rows * X_STRIDE;

// A step is DEPTH input channels of one tap of one chunk; its weights, [N, DEPTH], take
// one stage of the ring. Past the last step an empty group keeps the count right.
int next_chunk = 0, next_tap = 0, next_depth = 0, next_stage = 0;
auto fetch = [&]() {
    if (next_chunk < CHANNELS) {
        const T* source = weight + (next_tap * CHANNELS + first_column) * CHANNELS +
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
            if (++next_tap == taps) {
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
                            i % X_PIECES * (16 / BYTES));
        }
        #pragma unroll
        for (int u = 0; u < BATCH; u++) {
            const int i = start + u * THREADS, row = i / X_PIECES;
            if (row < rows)
                *(uint4*)(shared + row * X_STRIDE + i % X_PIECES * 16) = make_uint4(
                    activate(T(), v[u].x, slope), activate(T(), v[u].y, slope),
                    activate(T(), v[u].z, slope), activate(T(), v[u].w, slope));
        }
    }
};

const int warp_row = warp % WARPS_M * (MT * 16), warp_column = warp / WARPS_M * (NT * 8);
const unsigned a_lane = x_shared + (warp_row + lane % 16) * X_STRIDE + lane / 16 * 16;
const unsigned b_lane = w_shared +
    (warp_column + lane / 16 * 8 + lane % 8) * W_STRIDE + lane / 8 % 2 * 16;
float sum[MT][NT][4];
#pragma unroll
for (int m = 0; m < MT; m++)
    #pragma unroll
    for (int n = 0; n < NT; n++)
        #pragma unroll
        for (int e = 0; e < 4; e++) sum[m][n][e] = 0.f;

#pragma unroll
for (int i = 0; i < STAGES - 1; i++) fetch();
int stage = 0;
#pragma unroll 1
for (int chunk = 0; chunk < CHANNELS; chunk += CHUNK) {
    if (chunk > 0) __syncthreads();
    load_chunk(chunk);
    #pragma unroll 1
    for (int step = 0; step < taps * (CHUNK / DEPTH); step++) {
        wait<STAGES - 2>();
        __syncthreads();
        fetch();
        const unsigned a = a_lane + step / (CHUNK / DEPTH) * dilation * X_STRIDE +
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
                    mma(T(), sum[m][n], A[m], B[n / 2][n % 2 * 2], B[n / 2][n % 2 * 2 + 1]);
        }
    }
}

// The packed weights are ordered so that a lane holds VECTOR neighbouring channels.
constexpr int VECTOR = GROUP * 2;
struct alignas(VECTOR * BYTES) Vector { T v[VECTOR]; };
#pragma unroll
for (int q = 0; q < NT / GROUP; q++) {
    const int column = first_column + warp_column + q * (GROUP * 8) + lane % 4 * VECTOR;
    float offset[VECTOR];
    #pragma unroll
    for (int e = 0; e < VECTOR; e++) offset[e] = bias[column + e];
    #pragma unroll
    for (int r = 0; r < MT * 2; r++) {
        const int position = first_row + warp_row + r * 8 + lane / 4;
        if (position >= L) continue;
        const size_t at = (batch_row + position) * CHANNELS + column;
        Vector added, total, result;
        if (has_residual) added = *(const Vector*)(residual + at);
        if (has_accumulate) total = *(const Vector*)(accumulate + at);
        #pragma unroll
        for (int e = 0; e < VECTOR; e++) {
            float v = sum[r / 2][q * GROUP + e / 2][r % 2 * 2 + e % 2] + offset[e];
            if (has_residual) v += float(added.v[e]);
            if (has_accumulate) v += float(total.v[e]);
            result.v[e] = T(v * scale);
        }
        *(Vector*)(y + at) = result;
    }
}
"""


@dataclass(frozen=True)
class Tile:
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
        """Output positions of a block."""
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


@dataclass(frozen=True)
class PackedWeight:
    """Weights in the order of the kernel, ``[k, C, C]``, and the tile to run them with."""

    array: mx.array
    tile: Tile


def supports(channels: int, taps: int, dtype: mx.Dtype) -> bool:
    """Whether the kernel computes such a convolution on this machine's GPU.

    It wants more shared memory than the GPUs of graphics cards have.
    """
    if not mx.cuda.is_available():
        return False
    capability = mx.device_info(mx.gpu).get("compute_capability_major", 0)
    fits = channels in CHANNELS and taps % 2 == 1 and dtype in DTYPES
    return int(capability) in (9, 10) and fits


def default_tile(channels: int, dtype: mx.Dtype) -> Tile:
    """The tile for this many channels; two blocks fit a multiprocessor."""
    return candidate_tiles(channels, dtype)[0]


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
    weight: mx.array, dtype: mx.Dtype, tile: Tile | None = None
) -> PackedWeight:
    """Weights ``[C, k, C]`` of a convolution in the order of the kernel.

    Output channels are permuted within groups so that each lane of a warp ends up with
    16 bytes of neighbours; float32 weights are rounded to TF32.
    """
    C, k, C_in = weight.shape
    if C_in != C or C not in CHANNELS or k % 2 == 0:
        raise ValueError(
            f"weight is [{C}, {k}, {C_in}]; the kernel wants [C, odd, C] "
            f"with C one of {CHANNELS}"
        )
    group = _group(C, dtype)
    w = weight.reshape(C // (8 * group), 4, group, 2, k, C)
    w = w.transpose(4, 0, 2, 1, 3, 5).reshape(k, C, C)
    if dtype == mx.float32:
        bits = w.astype(mx.float32).view(mx.uint32)
        w = ((bits + 0x1000) & 0xFFFFE000).view(mx.float32)
    return PackedWeight(mx.contiguous(w.astype(dtype)), tile or default_tile(C, dtype))


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
    """``(conv1d(leaky_relu(x)) + bias + residual + accumulate) * scale``.

    Sums, bias and additions are in float32, with one rounding at the end. The length
    stays; positions outside count as zeros.

    Args:
        x: ``[B, L, C]`` float32, bfloat16 or float16.
        weight: From ``pack_weight``, for the dtype of ``x``.
        bias: ``[C]``.
        dilation: Positions between taps.
        slope: Of the leaky rectifier for negative values, above 0; 1 for none.
        residual: ``[B, L, C]``, added.
        accumulate: ``[B, L, C]``, added.
        scale: Multiplies everything.

    Returns:
        ``[B, L, C]`` of the dtype of ``x``.

    Raises:
        ValueError: Shapes or dtypes do not fit, or a block needs too much memory.
    """
    _check(x, weight, bias, [a for a in (residual, accumulate) if a is not None])
    B, L, C = x.shape
    taps, tile = weight.array.shape[0], weight.tile
    memory = tile.shared_memory(taps, dilation)
    if memory > MAX_SHARED_MEMORY:
        raise ValueError(
            f"{tile} needs {memory} bytes of shared memory at {taps} taps, dilation "
            f"{dilation}; a block has {MAX_SHARED_MEMORY}"
        )
    added = residual is not None, accumulate is not None
    blocks = -(-L // tile.positions) * (C // tile.columns)
    (y,) = _kernel(memory)(
        inputs=[
            x,
            weight.array,
            bias.astype(mx.float32),
            x if residual is None else residual,
            x if accumulate is None else accumulate,
            _settings(dilation, *added, slope, scale),
        ],
        template=_constants(x.dtype, C, tile, memory),
        grid=(blocks * tile.threads, B, 1),
        threadgroup=(tile.threads, 1, 1),
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
    )
    return y


def _group(channels: int, dtype: mx.Dtype) -> int:
    """Fragments of 8 output channels that are stored together."""
    return min(8 // dtype.size, channels // 8)


def _constants(
    dtype: mx.Dtype, channels: int, tile: Tile, shared_memory: int
) -> list[tuple[str, Any]]:
    """What the kernel is compiled for.

    Few things, since each set takes NVRTC a second or more and MLX keeps none on disk.
    The shared memory is not read, but MLX sets it once per kernel name.
    """
    return [
        ("T", dtype),
        ("CHANNELS", channels),
        ("WARPS_M", tile.warps_m),
        ("WARPS_N", tile.warps_n),
        ("MT", tile.mt),
        ("NT", tile.nt),
        ("CHUNK", tile.chunk // dtype.size),
        ("DEPTH", tile.depth // dtype.size),
        ("STAGES", tile.stages),
        ("BATCH", tile.batch),
        ("GROUP", _group(channels, dtype)),
        ("SHARED_MEMORY", shared_memory),
    ]


@cache
def _kernel(shared_memory: int) -> Any:
    """The kernel that MLX compiles for each set of constants."""
    digest = hashlib.sha256((_HEADER + _SOURCE).encode()).hexdigest()[:12]
    return mx.fast.cuda_kernel(
        name=f"fused_conv_{digest}",
        input_names=["x", "weight", "bias", "residual", "accumulate", "settings"],
        output_names=["y"],
        source=_SOURCE,
        header=_HEADER,
        shared_memory=shared_memory,
    )


@cache
def _settings(
    dilation: int, residual: bool, accumulate: bool, slope: float, scale: float
) -> mx.array:
    """What the kernel reads at run time; the last two are the bits of floats."""
    bits = np.array([slope, scale], np.float32).view(np.int32)
    return mx.array(np.array([dilation, residual, accumulate, *bits], np.int32))


def _check(
    x: mx.array, weight: PackedWeight, bias: mx.array, extra: list[mx.array]
) -> None:
    """Refuse arrays that the kernel would read wrongly."""
    C, w = x.shape[-1], weight.array
    if x.ndim != 3 or 0 in x.shape or x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype} {x.shape}; want [B, L, C] of {DTYPES}")
    if w.dtype != x.dtype or w.shape[1:] != (C, C) or bias.shape != (C,):
        raise ValueError(
            f"weight is {w.dtype} {w.shape} and bias {bias.shape} for x {x.dtype} {x.shape}"
        )
    for a in extra:
        if a.shape != x.shape or a.dtype != x.dtype:
            raise ValueError(f"cannot add {a.dtype} {a.shape} to {x.dtype} {x.shape}")
