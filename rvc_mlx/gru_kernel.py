"""The recurrent layer of RMVPE as one CUDA kernel that never leaves the GPU.

Each step of a recurrence needs the whole state of the one before. Sixteen blocks stay
on the GPU for the whole sequence, eight per direction; each of their warps keeps the
recurrent weights of four units in registers. The states travel through the output array
itself: it starts as NaN, so a value that is a number is ready to be read::

    block 0 of a direction   units   0.. 31   h[t-1] --read 256--> dot --> h[t][ 0.. 31]
    ...
    block 7                  units 224..255   h[t-1] --read 256--> dot --> h[t][224..255]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from rvc_mlx.models.rmvpe import GRU

HIDDEN_SIZE = 256  # what the kernel is laid out for

_BLOCKS_PER_DIRECTION = 8
_THREADS = 256

_SOURCE = r"""
const int direction = blockIdx.x / 8, part = blockIdx.x % 8;
const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
const int first_unit = part * 32 + warp * 4;
const int T = steps[0];

// Rows of the recurrent weights of gates r, z, n of four units; a lane has 8 columns.
float weight[12][8];
#pragma unroll
for (int row = 0; row < 12; row++) {
    const int unit = first_unit + row % 4;
    const float* source =
        recurrent + ((size_t)direction * 768 + (row / 4) * 256 + unit) * 256 + lane * 8;
    #pragma unroll
    for (int c = 0; c < 8; c++) weight[row][c] = source[c];
}
// Lanes 0 to 3 own a unit each: its biases and its state.
float bias[3] = {0.f, 0.f, 0.f}, state = 0.f;
if (lane < 4)
    for (int gate = 0; gate < 3; gate++)
        bias[gate] = biases[direction * 768 + gate * 256 + first_unit + lane];
volatile float* out = (volatile float*)states;

for (int step = 0; step < T; step++) {
    const int t = direction ? T - 1 - step : step;
    float input[3] = {0.f, 0.f, 0.f};
    if (lane < 4)
        for (int gate = 0; gate < 3; gate++)
            input[gate] =
                projected[((size_t)t * 2 + direction) * 768 + gate * 256 + first_unit + lane];
    float sum[12];
    #pragma unroll
    for (int row = 0; row < 12; row++) sum[row] = 0.f;
    if (step > 0) {
        const int before = direction ? t + 1 : t - 1;
        volatile float* previous = out + ((size_t)before * 2 + direction) * 256 + lane * 8;
        float h[8];
        bool ready;
        do {
            ready = true;
            #pragma unroll
            for (int c = 0; c < 8; c++) {
                h[c] = previous[c];
                ready = ready && (h[c] == h[c]);
            }
        } while (!ready);
        __syncwarp();
        #pragma unroll
        for (int row = 0; row < 12; row++)
            #pragma unroll
            for (int c = 0; c < 8; c++) sum[row] += weight[row][c] * h[c];
        #pragma unroll
        for (int offset = 16; offset > 0; offset >>= 1)
            #pragma unroll
            for (int row = 0; row < 12; row++)
                sum[row] += __shfl_xor_sync(0xffffffffu, sum[row], offset);
    }
    if (lane < 4) {
        float r = 0.f, z = 0.f, n = 0.f;
        #pragma unroll
        for (int unit = 0; unit < 4; unit++)
            if (lane == unit) {
                r = sum[unit];
                z = sum[4 + unit];
                n = sum[8 + unit];
            }
        r = 1.f / (1.f + expf(-(input[0] + r + bias[0])));
        z = 1.f / (1.f + expf(-(input[1] + z + bias[1])));
        n = tanhf(input[2] + r * (n + bias[2]));
        state = (1.f - z) * n + z * state;
        // NaN means "not ready": a broken input must not make the others wait for ever.
        if (state != state) state = INFINITY;
        out[((size_t)t * 2 + direction) * 256 + first_unit + lane] = state;
    }
}
"""


def supports(gru: GRU) -> bool:
    """Whether the kernel fits this layer here."""
    return mx.cuda.is_available() and gru.hidden_size == HIDDEN_SIZE


def cuda_gru(gru: GRU) -> Callable[[mx.array], mx.array]:
    """The layer as a function ``[1, T, C]`` to ``[1, T, 512]``, computed in float32.

    The result equals ``torch.nn.GRU`` to rounding; non-finite inputs give infinities.
    """
    w_ih, w_hh, b_ih, b_hh = gru.stacked()
    project = mx.array(np.concatenate(list(w_ih)).T.copy())  # [C, 2 * 768]
    offset = mx.array(b_ih.reshape(-1))
    recurrent, biases = mx.array(w_hh), mx.array(b_hh)
    mx.eval(project, offset, recurrent, biases)
    kernel: Any = mx.fast.cuda_kernel(
        name="bidirectional_gru",
        input_names=["projected", "recurrent", "biases", "steps"],
        output_names=["states"],
        source=_SOURCE,
    )

    def run(x: mx.array) -> mx.array:
        T = x.shape[1]
        projected = mx.addmm(offset, x[0].astype(mx.float32), project)
        (states,) = kernel(
            inputs=[projected, recurrent, biases, mx.array([T], mx.int32)],
            grid=(2 * _BLOCKS_PER_DIRECTION * _THREADS, 1, 1),
            threadgroup=(_THREADS, 1, 1),
            output_shapes=[(T, 2 * HIDDEN_SIZE)],
            output_dtypes=[mx.float32],
            init_value=float("nan"),
        )
        return states[None].astype(x.dtype)

    return run
