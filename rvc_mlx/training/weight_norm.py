"""Weight norm of a whole network as one CUDA kernel each way.

Hundreds of weights of a few kilobytes cost a GPU more in launches than in arithmetic.
Parameters lie in one vector (see ``parametrization.Packing``); a block of threads
takes one row of it: the values that share one ``g``, or a piece of what has none.

    forward   w = g v / |v|
    back      dv = g / |v| (dw - v (v . dw) / |v|^2),   dg = v . dw / |v|
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import mlx.core as mx
import numpy as np

from rvc_mlx.cuda_kernel import CudaKernel, Grid

# Columns: first value, how many, distance between them, place of g or -1.
Rows = np.ndarray  # [R, 4] int32

PIECE = 4096  # values of a row that has no norm
_THREADS = 128

_SUM = r"""
__device__ __forceinline__ float2 sum_of_block(float2 v) {
    __shared__ float2 parts[4];
    for (int k = 16; k; k >>= 1) {
        v.x += __shfl_xor_sync(~0u, v.x, k);
        v.y += __shfl_xor_sync(~0u, v.y, k);
    }
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = v;
    __syncthreads();
    return make_float2(parts[0].x + parts[1].x + parts[2].x + parts[3].x,
                       parts[0].y + parts[1].y + parts[2].y + parts[3].y);
}
"""

_ROW = r"""
const int* row = rows + 4 * blockIdx.x;
const int first = row[0], count = row[1], step = row[2], place = row[3];
"""

_FORWARD = (
    _ROW
    + r"""
float factor = 1;
if (place >= 0) {
    float2 sum = make_float2(0, 0);
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        const float v = vector[first + i * step];
        sum.x += v * v;
    }
    factor = vector[place] / sqrtf(sum_of_block(sum).x);
    if (threadIdx.x == 0) plain[place] = 0;
}
for (int i = threadIdx.x; i < count; i += blockDim.x)
    plain[first + i * step] = factor * vector[first + i * step];
"""
)

_BACK = (
    _ROW
    + r"""
float factor = 1, along = 0;
if (place >= 0) {
    float2 sum = make_float2(0, 0);
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        const float v = vector[first + i * step];
        sum.x += v * v;
        sum.y += v * cotangent[first + i * step];
    }
    sum = sum_of_block(sum);
    const float norm = sqrtf(sum.x);
    factor = vector[place] / norm;
    along = sum.y / sum.x;
    if (threadIdx.x == 0) slope[place] = sum.y / norm;
}
for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const int k = first + i * step;
    const float back = cotangent[k];
    slope[k] = place < 0 ? back : factor * (back - along * vector[k]);
}
"""
)

_FORWARD_KERNEL = CudaKernel(
    "weight_norm", ("vector", "rows"), ("plain",), _FORWARD, header=_SUM
)
_BACK_KERNEL = CudaKernel(
    "weight_norm_back",
    ("vector", "cotangent", "rows"),
    ("slope",),
    _BACK,
    header=_SUM,
)


def piece_rows(start: int, size: int) -> list[tuple[int, int, int, int]]:
    """Rows of ``size`` values from ``start`` that have no norm."""
    return [
        (first, min(PIECE, start + size - first), 1, -1)
        for first in range(start, start + size, PIECE)
    ]


def folding(rows: Sequence[tuple[int, int, int, int]]) -> Callable[..., mx.array]:
    """A function of the vector of all parameters to that of plain weights.

    Args:
        rows: first value, how many, distance between them, and place of their ``g`` in
            the vector, -1 for none; together they cover the vector but for the ``g``.

    Returns:
        ``[n]`` float32 to ``[n]``: weights where ``v`` was, 0 where ``g`` was, the rest
        as it is. Needs a CUDA GPU when it is called.
    """
    table = mx.array(np.asarray(rows, np.int32))

    def run(kernel: CudaKernel, *arrays: mx.array) -> mx.array:
        (result,) = kernel(
            [*arrays, table],
            [(arrays[0].shape, mx.float32)],
            Grid(len(rows), _THREADS),
        )
        return result

    @mx.custom_function
    def folded(vector: mx.array) -> mx.array:
        return run(_FORWARD_KERNEL, vector)

    @folded.vjp
    def slopes(vector: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
        del output
        return run(_BACK_KERNEL, vector, cotangent)

    return cast(Callable[..., mx.array], folded)
