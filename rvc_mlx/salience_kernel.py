"""The strongest bin of each frame of a salience on CUDA, and its neighbours, in one launch."""

from __future__ import annotations

import mlx.core as mx

from rvc_mlx.cuda_kernel import CudaKernel, Grid

_FRAMES = 8  # of a block, a warp each
_KERNEL = CudaKernel(
    "strongest_bins",
    ("salience",),
    ("strongest", "strengths"),
    r"""
const int lane = threadIdx.x % 32, frame = blockIdx.x * FRAMES + threadIdx.x / 32;
if (frame >= frames) return;
const float* row = salience + (size_t)frame * bins;
float most = -3.4e38f;
int at = lane;
for (int n = lane; n < bins; n += 32)
    if (row[n] > most) {
        most = row[n];
        at = n;
    }
#pragma unroll
for (int k = 16; k > 0; k /= 2) {
    const float other = __shfl_xor_sync(~0u, most, k);
    const int there = __shfl_xor_sync(~0u, at, k);
    if (other > most || (other == most && there < at)) {
        most = other;
        at = there;
    }
}
if (lane == 0) strongest[frame] = at;
const int n = at - NEAR + lane;
if (lane <= 2 * NEAR)
    strengths[(size_t)frame * (2 * NEAR + 1) + lane] = n >= 0 && n < bins ? row[n] : 0.f;
""",
    (("frames", "int"), ("bins", "int")),
)


def strongest_bins(salience: mx.array, near: int) -> tuple[mx.array, mx.array]:
    """Bins, and the strengths around them.

    Args:
        salience: ``[T, bins]`` float32, T and bins 1 or more, without NaN.
        near: neighbours on each side, up to 15.

    Returns:
        ``[T]`` int32, of equal bins the first, and ``[T, 2 * near + 1]`` float32, 0 for
        neighbours that are not there.
    """
    T, bins = salience.shape
    strongest, strengths = _KERNEL(
        [salience],
        [((T,), mx.int32), ((T, 2 * near + 1), mx.float32)],
        Grid(-(-T // _FRAMES), 32 * _FRAMES),
        scalars=[T, bins],
        constants={"FRAMES": _FRAMES, "NEAR": near},
    )
    return strongest, strengths
