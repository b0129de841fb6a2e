"""Self-attention of the content encoder on NVIDIA GPUs, of any number of frames.

cuDNN's attention is planned anew for each number of frames, takes queries, keys and values
apart, and a mask, and gives heads that have to be put together. Here q, k and v are read as
their product leaves them, and the heads are written side by side. A block has 64 frames of
one head and goes through the keys in tiles of 64, with the softmax of what it has seen so
far (Dao et al. 2022, "FlashAttention")::

    for each tile:   scores = q k^T;   weights = exp(scores - largest so far)
                     sum and output, both times exp(largest before - largest now), grow
"""

from __future__ import annotations

import math

import mlx.core as mx

from rvc_mlx import conv_kernel
from rvc_mlx.cuda_kernel import CudaKernel, Grid
from rvc_mlx.steady import OwnRows, told_kernel

WIDTH = 64  # channels of a head
_TILE = 64  # queries of a block, and keys that it meets at a time
_WARPS = 4  # of 16 queries
_STRIDE = 2 * WIDTH + 16  # bytes between rows, so that eight of them touch all banks
_STAGES = 2  # tiles of keys and values
_MEMORY = (1 + 2 * _STAGES) * _TILE * _STRIDE
_SIZES = {
    "WIDTH": WIDTH,
    "TILE": _TILE,
    "WARPS": _WARPS,
    "STRIDE": _STRIDE,
    "STAGES": _STAGES,
}
_LOG2_E = math.log2(math.e)

HEADER = r"""
namespace fused_conv {
__device__ __forceinline__ void ldmatrix_turned(unsigned (&r)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}
// The largest, and the sum, over the four lanes that share a row.
__device__ __forceinline__ float largest_of_row(float v) {
    v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 1));
    return fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 2));
}
__device__ __forceinline__ float sum_of_row(float v) {
    v += __shfl_xor_sync(0xffffffffu, v, 1);
    return v + __shfl_xor_sync(0xffffffffu, v, 2);
}
}  // namespace fused_conv
"""
_SOURCE = r"""
using namespace fused_conv;
extern __shared__ __align__(16) unsigned char shared[];
constexpr int THREADS = 32 * WARPS, PIECES = WIDTH / 8, HALVES = WIDTH / 16;
constexpr int TILE_BYTES = TILE * STRIDE;
const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
const int tiles = (frames + TILE - 1) / TILE;  // of queries
const int known = limited ? own[0] : frames, key_tiles = (known + TILE - 1) / TILE;
const int head = blockIdx.x / tiles, first = blockIdx.x % tiles * TILE;
const size_t row = (size_t)3 * heads * WIDTH;
const T* batch = qkv + (size_t)blockIdx.y * frames * row + head * WIDTH;
const unsigned base = shared_address(shared);

// Beyond the end the last frame is there once more: it is given no weight.
auto load_tile = [&](unsigned target, const T* source, int start) {
    for (int i = thread; i < TILE * PIECES; i += THREADS) {
        const int n = i / PIECES, piece = i % PIECES;
        const int frame = start + n < frames ? start + n : frames - 1;
        copy_async(target + n * STRIDE + piece * 16, source + frame * row + piece * 8);
    }
};
auto load_keys = [&](int tile) {
    const unsigned target = base + (1 + tile % STAGES * 2) * TILE_BYTES;
    load_tile(target, batch + heads * WIDTH, tile * TILE);
    load_tile(target + TILE_BYTES, batch + 2 * heads * WIDTH, tile * TILE);
    commit();
};

load_tile(base, batch, first);
load_keys(0);
unsigned q[HALVES][4];
float output[PIECES][4], largest[2], sum[2];
#pragma unroll
for (int n = 0; n < PIECES; n++)
    #pragma unroll
    for (int k = 0; k < 4; k++) output[n][k] = 0;
#pragma unroll
for (int k = 0; k < 2; k++) {
    largest[k] = -INFINITY;
    sum[k] = 0;
}

for (int tile = 0; tile < key_tiles; tile++) {
    if (tile + 1 < key_tiles) {
        load_keys(tile + 1);
        wait<1>();
    } else {
        wait<0>();
    }
    __syncthreads();
    if (tile == 0)
        #pragma unroll
        for (int k = 0; k < HALVES; k++)
            ldmatrix(q[k], base + (16 * warp + lane % 16) * STRIDE + 32 * k + lane / 16 * 16);
    const unsigned keys = base + (1 + tile % STAGES * 2) * TILE_BYTES;
    const unsigned values = keys + TILE_BYTES;

    float scores[TILE / 8][4];
    #pragma unroll
    for (int n = 0; n < TILE / 16; n++) {
        #pragma unroll
        for (int k = 0; k < 4; k++) scores[2 * n][k] = scores[2 * n + 1][k] = 0;
        #pragma unroll
        for (int k = 0; k < HALVES; k++) {
            unsigned b[4];
            ldmatrix(b, keys + (16 * n + lane / 16 * 8 + lane % 8) * STRIDE + 32 * k +
                            lane / 8 % 2 * 16);
            mma(T(), scores[2 * n], q[k], b[0], b[1]);
            mma(T(), scores[2 * n + 1], q[k], b[2], b[3]);
        }
    }
    const int left = known - tile * TILE;
    if (left < TILE)
        #pragma unroll
        for (int n = 0; n < TILE / 8; n++)
            #pragma unroll
            for (int k = 0; k < 4; k++)
                if (8 * n + lane % 4 * 2 + k % 2 >= left) scores[n][k] = -INFINITY;

    // Of this lane's two rows, lane / 4 and eight below.
    #pragma unroll
    for (int r = 0; r < 2; r++) {
        float most = largest[r], total = 0;
        #pragma unroll
        for (int n = 0; n < TILE / 8; n++)
            most = fmaxf(most, fmaxf(scores[n][2 * r], scores[n][2 * r + 1]));
        most = largest_of_row(most);
        const float shrunk = exp2f((largest[r] - most) * scale);
        largest[r] = most;
        #pragma unroll
        for (int n = 0; n < TILE / 8; n++)
            #pragma unroll
            for (int k = 2 * r; k < 2 * r + 2; k++) {
                scores[n][k] = exp2f((scores[n][k] - most) * scale);
                total += scores[n][k];
            }
        sum[r] = sum[r] * shrunk + total;
        #pragma unroll
        for (int n = 0; n < PIECES; n++) {
            output[n][2 * r] *= shrunk;
            output[n][2 * r + 1] *= shrunk;
        }
    }
    #pragma unroll
    for (int n = 0; n < TILE / 16; n++) {
        const float(&a)[4] = scores[2 * n], (&b)[4] = scores[2 * n + 1];
        const unsigned weights[4] = {pair(T(), a[0], a[1]), pair(T(), a[2], a[3]),
                                     pair(T(), b[0], b[1]), pair(T(), b[2], b[3])};
        #pragma unroll
        for (int m = 0; m < HALVES; m++) {
            unsigned v[4];
            ldmatrix_turned(v, values + (16 * n + lane / 8 % 2 * 8 + lane % 8) * STRIDE +
                                   32 * m + lane / 16 * 16);
            mma(T(), output[2 * m], weights, v[0], v[1]);
            mma(T(), output[2 * m + 1], weights, v[2], v[3]);
        }
    }
    __syncthreads();
}

#pragma unroll
for (int r = 0; r < 2; r++) {
    const float factor = 1.f / sum_of_row(sum[r]);
    const int frame = first + 16 * warp + 8 * r + lane / 4;
    if (frame >= frames) continue;
    T* target = y + ((size_t)blockIdx.y * frames + frame) * heads * WIDTH + head * WIDTH;
    #pragma unroll
    for (int n = 0; n < PIECES; n++)
        *(unsigned*)(target + 8 * n + lane % 4 * 2) =
            pair(T(), output[n][2 * r] * factor, output[n][2 * r + 1] * factor);
}
"""
_KERNEL = CudaKernel(
    "self_attention",
    ("qkv", "own"),
    ("y",),
    _SOURCE,
    (("frames", "int"), ("heads", "int"), ("limited", "int"), ("scale", "float")),
    "#define INFINITY __int_as_float(0x7f800000)\n" + conv_kernel.HEADER + HEADER,
    f"__launch_bounds__({32 * _WARPS})",
)


def supports(width: int) -> bool:
    """Whether the kernel serves heads of so many channels on this machine's GPU."""
    return width == WIDTH and conv_kernel.supports(16, 3, mx.float16)


def self_attention(
    qkv: mx.array, heads: int, own: OwnRows | None = None, recordings: int = 1
) -> mx.array:
    """Softmax attention of a recording's frames among themselves, scores scaled by 1/8.

    Sums and softmax are in float32; the weights are rounded for their product.

    Args:
        qkv: queries, keys and values ``[B * F, 3 * heads * 64]``, float16 or bfloat16.
        heads: of ``WIDTH`` channels.
        own: frames behind these, of which there are some, are not attended to.
        recordings: ``B``.

    Returns:
        ``[B * F, heads * 64]`` of the dtype of ``qkv``.

    Raises:
        ValueError: shape or dtype do not fit.
    """
    rows, width = qkv.shape
    F = rows // recordings
    if (
        qkv.dtype not in (mx.float16, mx.bfloat16)
        or width != 3 * heads * WIDTH
        or not F
        or rows % recordings
    ):
        raise ValueError(
            f"qkv is {qkv.dtype} {list(qkv.shape)}; the kernel wants float16 or bfloat16 "
            f"[{recordings} * F, {3 * heads * WIDTH}] for {heads} heads"
        )
    (y,) = _KERNEL(
        [qkv, told_kernel(own)],
        [((rows, heads * WIDTH), qkv.dtype)],
        Grid(-(-F // _TILE) * heads, 32 * _WARPS, recordings, _MEMORY),
        scalars=[F, heads, own is not None, WIDTH**-0.5 * _LOG2_E],
        constants={"T": qkv.dtype, **_SIZES},
    )
    return y
