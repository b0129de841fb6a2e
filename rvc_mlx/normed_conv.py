"""The content encoder's first layer: a convolution of the audio, normalised over time.

The norm needs mean and variance of every channel over all frames. A channel is a sum of
``taps`` samples, weighted, so both follow from the mean and the covariance of what the taps
see, which are few numbers; the norm then is another weight and another bias::

    mean = w . m      variance = w' C w      y = (w s) . seen + (beta - mean s)

On CUDA that is three launches: one writes what each frame sees, and a one for the bias, side
by side, and sums; one makes the weights; one multiplies.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from rvc_mlx.cuda_kernel import Constant, CudaKernel, Grid
from rvc_mlx.elementwise import on_cuda
from rvc_mlx.steady import OwnRows, own_rows, told_kernel, within

_COLUMNS = 16  # of the product: what taps see, a one, zeros up to whole 32 bytes
_THREADS = 256
_EACH = 4  # frames of a thread: then few blocks' sums are left
_MOST_ROWS = 65535  # of blocks, so of recordings together

_HEADER = r"""
// Products of two taps, each pair once; sums of the taps themselves come first.
constexpr __device__ int pair_of(int i, int j, int taps) {
    return taps + i * taps - i * (i - 1) / 2 + j - i;
}
"""
_COUNTED = r"""
constexpr int SUMS = TAPS + TAPS * (TAPS + 1) / 2;
const int counted = limited ? min(own[1], frames) : frames;
const T* const audio = x + (size_t)blockIdx.y * L;
float middle = 0.f;  // about the mean: squares of what is far from it would hide the others
#pragma unroll
for (int i = 0; i < 16; i++)
    middle += float(audio[(long long)counted * i / 16 * STRIDE]) * (1.f / 16);
"""
_SEEN = CudaKernel(
    "seen_samples",
    ("x", "own"),
    ("y", "sums"),
    _COUNTED
    + r"""
struct alignas(16) Row { T v[COLUMNS]; };
__shared__ float of_warps[THREADS / 32][SUMS];
float sum[SUMS];
#pragma unroll
for (int i = 0; i < SUMS; i++) sum[i] = 0.f;
#pragma unroll 1
for (int u = 0; u < EACH; u++) {
    const int frame = (blockIdx.x * EACH + u) * THREADS + threadIdx.x;
    if (frame >= frames) break;
    Row row;
    float v[TAPS];
    #pragma unroll
    for (int i = 0; i < COLUMNS; i++) row.v[i] = T(i == TAPS ? 1.f : 0.f);
    #pragma unroll
    for (int i = 0; i < TAPS; i++) {
        row.v[i] = audio[frame * STRIDE + i];
        v[i] = float(row.v[i]) - middle;
    }
    *(Row*)(y + ((size_t)blockIdx.y * frames + frame) * COLUMNS) = row;
    if (frame >= counted) continue;
    #pragma unroll
    for (int i = 0; i < TAPS; i++) {
        sum[i] += v[i];
        #pragma unroll
        for (int j = i; j < TAPS; j++) sum[pair_of(i, j, TAPS)] += v[i] * v[j];
    }
}
#pragma unroll
for (int i = 0; i < SUMS; i++) {
    #pragma unroll
    for (int far = 16; far > 0; far /= 2)
        sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], far);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32][i] = sum[i];
}
__syncthreads();
for (int i = threadIdx.x; i < SUMS; i += THREADS) {
    float all = 0.f;
    #pragma unroll
    for (int w = 0; w < THREADS / 32; w++) all += of_warps[w][i];
    sums[((size_t)blockIdx.y * gridDim.x + blockIdx.x) * SUMS + i] = all;
}
""",
    (("L", "int"), ("frames", "int"), ("limited", "int")),
    _HEADER,
    f"__launch_bounds__({_THREADS})",
)
_WEIGHTS = CudaKernel(
    "normed_weights",
    ("x", "own", "sums", "weight", "gamma", "beta"),
    ("y",),
    _COUNTED
    + r"""
__shared__ float mean_of[SUMS];
for (int i = threadIdx.x; i < SUMS; i += THREADS) {
    float all = 0.f;
    #pragma unroll 16
    for (int k = 0; k < blocks; k++)
        all += sums[((size_t)blockIdx.y * blocks + k) * SUMS + i];
    mean_of[i] = all / counted;
}
__syncthreads();
const int channel = blockIdx.x * THREADS + threadIdx.x;
if (channel >= channels) return;
float w[TAPS], mean = 0.f, variance = 0.f;
#pragma unroll
for (int i = 0; i < TAPS; i++) {
    w[i] = float(weight[channel * TAPS + i]);
    mean += w[i] * (mean_of[i] + middle);
}
#pragma unroll
for (int i = 0; i < TAPS; i++)
    #pragma unroll
    for (int j = i; j < TAPS; j++)
        variance += (i == j ? 1.f : 2.f) * w[i] * w[j] *
            (mean_of[pair_of(i, j, TAPS)] - mean_of[i] * mean_of[j]);
const float scale = float(gamma[channel]) * rsqrtf(fmaxf(variance, 0.f) + eps);
T* const to = y + (size_t)blockIdx.y * COLUMNS * channels + channel;
#pragma unroll
for (int i = 0; i < COLUMNS; i++) {
    const float bias = float(beta[channel]) - mean * scale;
    to[i * channels] = T(i < TAPS ? w[i < TAPS ? i : 0] * scale : i == TAPS ? bias : 0.f);
}
""",
    (
        *(("L", "int"), ("frames", "int"), ("limited", "int")),
        *(("channels", "int"), ("blocks", "int"), ("eps", "float")),
    ),
    _HEADER,
    f"__launch_bounds__({_THREADS})",
)


def normed_convolution(
    audio: mx.array, conv: nn.Conv1d, norm: nn.Module, *, slopes: bool = False
) -> mx.array:
    """``norm(conv(audio))``.

    Args:
        audio: ``[B, L, 1]``, L a multiple of the stride.
        conv: from one channel, its kernel two strides long.
        norm: ``TimeNorm``.
        slopes: whether its slopes are asked for, as in training; the kernels have none.

    Returns:
        ``[B, L', C]``.

    Raises:
        ValueError: the sizes are others.
    """
    B, L, _ = audio.shape
    stride, taps = conv.stride, conv.weight.shape[1]
    if L % stride or taps != 2 * stride or taps >= _COLUMNS or taps > L:
        raise ValueError(
            f"{L} samples, {taps} taps and stride {stride} do not fit; want two strides "
            f"or more, as many taps as two strides have, less than {_COLUMNS}"
        )
    given, own = audio.reshape(B, L), own_rows()
    if on_cuda() and B <= _MOST_ROWS and not slopes:
        seen, weights = _on_cuda(given, conv, norm, own)
    else:
        seen, weights = _plain(given, conv, norm, own)
    return seen @ weights


def _on_cuda(
    audio: mx.array, conv: nn.Conv1d, norm: nn.Module, own: OwnRows | None
) -> tuple[mx.array, mx.array]:
    """What frames see ``[B, L', 16]``, and weights ``[B, 16, C]``."""
    (B, L), dtype = audio.shape, audio.dtype
    (C, taps, _), stride = conv.weight.shape, conv.stride
    frames, sums = L // stride - 1, taps + taps * (taps + 1) // 2
    blocks = -(-frames // (_THREADS * _EACH))
    count = told_kernel(own)
    constants: dict[str, Constant] = {"T": dtype, "TAPS": taps, "STRIDE": stride}
    constants |= {"COLUMNS": _COLUMNS, "THREADS": _THREADS}
    seen, partial = _SEEN(
        [audio, count],
        [((B, frames, _COLUMNS), dtype), ((B, blocks, sums), mx.float32)],
        Grid(blocks, _THREADS, B),
        scalars=[L, frames, own is not None],
        constants=constants | {"EACH": _EACH},
    )
    (weights,) = _WEIGHTS(
        [audio, count, partial, conv.weight, norm.weight, norm.bias],
        [((B, _COLUMNS, C), dtype)],
        Grid(-(-C // _THREADS), _THREADS, B),
        scalars=[L, frames, own is not None, C, blocks, norm._eps],
        constants=constants,
    )
    return seen, weights


def _plain(
    audio: mx.array, conv: nn.Conv1d, norm: nn.Module, own: OwnRows | None
) -> tuple[mx.array, mx.array]:
    """As ``_on_cuda``, with MLX's operations."""
    (B, L), stride, taps = audio.shape, conv.stride, conv.weight.shape[1]
    blocks = audio.reshape(B, L // stride, stride)
    seen = mx.concatenate([blocks[:, :-1], blocks[:, 1:]], axis=-1)  # [B, n, taps]
    exact = seen.astype(mx.float32)
    mean, covariance = _moments(exact, None if own is None else own.count[1:])
    weight = conv.weight[..., 0].astype(mx.float32)  # [C, taps]
    variance = ((weight @ covariance) * weight).sum(axis=-1)  # [B, C]
    scale = norm.weight * mx.rsqrt(variance + norm._eps)
    shift = norm.bias - (mean @ weight.T) * scale
    rows = [weight.T * scale[:, None], shift[:, None]]  # [B, taps, C], [B, 1, C]
    rows.append(mx.zeros((B, _COLUMNS - taps - 1, len(weight))))
    ones = mx.ones((B, seen.shape[1], 1), seen.dtype)
    zeros = mx.zeros((B, seen.shape[1], _COLUMNS - taps - 1), seen.dtype)
    seen = mx.concatenate([seen, ones, zeros], axis=-1)
    return seen, mx.concatenate(rows, axis=1).astype(seen.dtype)


def _moments(x: mx.array, count: mx.array | None) -> tuple[mx.array, mx.array]:
    """Mean ``[B, C]`` and covariance ``[B, C, C]`` of the rows of ``[B, T, C]``.

    Args:
        x: float32.
        count: of the rows that count, int32 ``[1]``; None for all.
    """
    if count is None:
        mean, rows = x.mean(axis=1), mx.array(x.shape[1])
        centred = x - mean[:, None]
    else:
        rows = count[0]
        mean = within(x, count).sum(axis=1) / rows
        centred = within(x - mean[:, None], count)
    return mean, centred.swapaxes(1, 2) @ centred / rows
