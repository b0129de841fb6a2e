"""The end of a HiFi-GAN vocoder on CUDA in one launch: rectifier, convolution and tanh.

The convolution has one output, so memory bounds it: each row is read once, with few
instructions. ``C / 8`` neighbouring threads walk down a run of rows, each with eight
channels and their weights in registers. An output begins with the first row
it sees and moves through ``pending``, a place a row, until it has seen the last::

    row of tap    0           1          ...   TAPS - 1
    pending       [0]   ->    [1]   ->   ...   [TAPS - 1]   ->   summed over the threads
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from rvc_mlx.cuda_kernel import Constant, CudaKernel, Grid
from rvc_mlx.elementwise import PACK, PACK_TYPE
from rvc_mlx.models.nsf_hifigan import LAST_SLOPE

_THREADS = 128
_RUN = 64  # outputs that the threads of a row make one after another
_UNDER_WAY = 128  # bytes that a thread has asked for and not yet used
_CHANNELS = tuple(PACK << i for i in range(6))  # threads of a row are in one warp

_KERNEL = CudaKernel(
    "waveform",
    ("x", "weight", "bias"),
    ("y",),
    PACK_TYPE
    + r"""
// A pack on its way; held as 16-bit numbers it would cost a sixth more instructions.
struct alignas(sizeof(Pack)) Words { unsigned v[sizeof(Pack) / 4]; };
constexpr int LANES = C / PACK, PAD = (TAPS - 1) / 2, ROWS = RUN + TAPS - 1;
const int thread = blockIdx.x * THREADS + threadIdx.x, lane = thread % LANES;
const int first = thread / LANES * RUN, end = min(L, first + RUN + PAD);
const Words* const packs = (const Words*)x + (size_t)blockIdx.y * L * LANES + lane;
float* const audio = y + (size_t)blockIdx.y * L;

const auto load = [&](int row) {
    const int position = first - PAD + row;
    Words in = {};
    if ((unsigned)position < (unsigned)end) in = packs[(size_t)position * LANES];
    return in;
};
Words ahead[AHEAD];
#pragma unroll
for (int u = 0; u < AHEAD; u++) ahead[u] = load(u);

const float offset = has_bias ? float(bias[0]) : 0.f;
float w[TAPS][PACK], pending[TAPS], kept = 0.f;
#pragma unroll
for (int t = 0; t < TAPS; t++) {
    pending[t] = 0.f;
    #pragma unroll
    for (int n = 0; n < PACK; n++) w[t][n] = float(weight[t * C + lane * PACK + n]);
}
#pragma unroll 1
for (int start = 0; start < ROWS; start += AHEAD) {
    #pragma unroll
    for (int u = 0; u < AHEAD; u++) {
        const Pack in = *(const Pack*)&ahead[u];
        ahead[u] = load(start + u + AHEAD);
        #pragma unroll
        for (int t = TAPS - 1; t > 0; t--) pending[t] = pending[t - 1];
        pending[0] = 0.f;
        #pragma unroll
        for (int n = 0; n < PACK; n++) {
            const float v = float(in.v[n]), rectified = fmaxf(v, v * slope);
            #pragma unroll
            for (int t = 0; t < TAPS; t++) pending[t] += w[t][n] * rectified;
        }
        float sum = pending[TAPS - 1];
        #pragma unroll
        for (int far = LANES / 2; far > 0; far /= 2)
            sum += __shfl_xor_sync(0xffffffffu, sum, far);
        // Each thread keeps one output of LANES, and they are stored together.
        const int made = start + u - (TAPS - 1), turn = made & (LANES - 1);
        if (turn == lane) kept = sum;
        const int position = first + made - turn + lane;
        if (turn == LANES - 1 && made >= 0 && made < RUN && position < L)
            audio[position] = tanhf(kept + offset);
    }
}
""",
    (("L", "int"), ("has_bias", "int"), ("slope", "float")),
    attributes=f"__launch_bounds__({_THREADS}, 4)",
)


def waveform(x: mx.array, conv_post: nn.Conv1d) -> mx.array:
    """See ``nsf_hifigan.waveform``; in float32, whatever the types.

    Args:
        x: ``[B, L, C]`` float32, bfloat16 or float16; C is 8, 16, ... or 256.
        conv_post: to one channel; it keeps the length.

    Returns:
        ``[B, L]`` float32 in -1..1.

    Raises:
        ValueError: C or the layer is another one.
    """
    (B, L, C), weight = x.shape, conv_post.weight
    taps, lanes = weight.shape[1], C // PACK
    steps = conv_post.stride, conv_post.dilation
    keeps_length = steps == (1, 1) and 2 * conv_post.padding == taps - 1
    if weight.shape != (1, taps, C) or C not in _CHANNELS or not keeps_length:
        raise ValueError(
            f"x is {x.shape}, the weight {weight.shape}, stride and dilation {steps}, "
            f"padding {conv_post.padding}; want one output, the length kept, C one of "
            f"{_CHANNELS}"
        )
    has_bias = "bias" in conv_post
    runs = -(-L // _RUN)
    (y,) = _KERNEL(
        [x, weight, conv_post.bias if has_bias else weight],
        [((B, L), mx.float32)],
        Grid(-(-runs * lanes // _THREADS), _THREADS, B),
        scalars=[L, has_bias, LAST_SLOPE],
        constants=_constants(x.dtype, C, taps),
    )
    return y


def _constants(dtype: mx.Dtype, channels: int, taps: int) -> dict[str, Constant]:
    return {
        "T": dtype,
        "PACK": PACK,
        "C": channels,
        "TAPS": taps,
        "THREADS": _THREADS,
        "RUN": _RUN,
        "AHEAD": _UNDER_WAY // (PACK * dtype.size),
    }
