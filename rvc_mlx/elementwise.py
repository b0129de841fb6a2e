"""Element-wise functions on CUDA in one pass: where MLX does not fuse, it takes several."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from rvc_mlx.cuda_kernel import CudaKernel, Grid

PACK = 8  # values of a thread
PACK_TYPE = r"""
struct alignas(PACK * sizeof(T)) Pack { T v[PACK]; };
"""
# What each thread begins with; it has pack ``i``.
EACH_PACK = (
    PACK_TYPE
    + r"""const int i = blockIdx.x * blockDim.x + threadIdx.x;
if (i >= packs) return;
"""
)
PACKS = (
    EACH_PACK
    + r"""const Pack in = ((const Pack*)x)[i];
Pack out;
"""
)
GELU_OF_V = "T(v * (0.5f + 0.5f * erff(v * 0.70710678f)))"
GELU = CudaKernel(
    "gelu",
    ("x",),
    ("y",),
    PACKS
    + r"""
#pragma unroll
for (int k = 0; k < PACK; k++) {
    const float v = float(in.v[k]);
    out.v[k] = """
    + GELU_OF_V
    + r""";
}
((Pack*)y)[i] = out;
""",
    (("packs", "int"),),
)
_BLOCK = 256  # threads


def pack_grid(packs: int) -> Grid:
    """A thread for each pack, as ``EACH_PACK`` wants it."""
    return Grid(-(-packs // _BLOCK), _BLOCK)


def on_cuda() -> bool:
    """Whether MLX computes on an NVIDIA GPU now, so that CUDA kernels run."""
    return bool(mx.cuda.is_available() and mx.default_device() == mx.Device(mx.gpu))


def whole_packs(x: mx.array) -> bool:
    """Whether ``packed`` takes ``x``."""
    return on_cuda() and 0 < x.size < 1 << 31 and x.size % PACK == 0


def packed(kernel: CudaKernel, x: mx.array, *more: mx.array) -> mx.array:
    """A kernel whose threads take 16 bytes or more each: half precision wants that.

    Args:
        kernel: begins with ``PACKS``; ``packs`` is its only scalar.
        x: see ``whole_packs``.
        more: of the shape and type of ``x``, as the result is.
    """
    packs = x.size // PACK
    (y,) = kernel(
        [x, *more],
        [(x.shape, x.dtype)],
        pack_grid(packs),
        scalars=[packs],
        constants={"T": x.dtype, "PACK": PACK},
    )
    return y


def gelu(x: mx.array) -> mx.array:
    """``nn.gelu``, in float32 with one rounding at the end on CUDA."""
    return packed(GELU, x) if whole_packs(x) else nn.gelu(x)
