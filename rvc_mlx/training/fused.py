"""Element-wise functions of training, with slopes of few operations.

Automatic differentiation makes eight of a leaky rectifier and back; here there are five,
and on CUDA one each way: MLX compiles nothing while it differentiates, and a traced step
(see ``compiling``) is not fused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import cast

import mlx.core as mx

from rvc_mlx import elementwise, fused_prior
from rvc_mlx.cuda_kernel import CudaKernel, Grid
from rvc_mlx.elementwise import (
    EACH_PACK,
    PACK,
    PACKS,
    on_cuda,
    pack_grid,
    packed,
    whole_packs,
)
from rvc_mlx.models.layers import LRELU_SLOPE, gated

Function = Callable[..., mx.array]

_BLOCK = 256  # threads, one value each
_WARP = 32

_PLACE = "const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;\n"
_FORWARD = CudaKernel(
    "leaky_relu",
    ("x",),
    ("y",),
    _PLACE + "const float v = float(x[i]);\ny[i] = T(v > 0 ? v : v * slope);\n",
    (("slope", "float"),),
)
_BACK = CudaKernel(
    "leaky_relu_back",
    ("x", "cotangent"),
    ("y",),
    _PLACE + "const float back = float(cotangent[i]);\n"
    "y[i] = T(float(x[i]) > 0 ? back : back * slope);\n",
    (("slope", "float"),),
)

_GELU_BACK = CudaKernel(
    "gelu_back",
    ("x", "cotangent"),
    ("y",),
    PACKS
    + r"""
const Pack back = ((const Pack*)cotangent)[i];
#pragma unroll
for (int k = 0; k < PACK; k++) {
    const float v = float(in.v[k]);
    const float below = 0.5f + 0.5f * erff(v * 0.70710678f);
    const float density = 0.39894228f * expf(-0.5f * v * v);
    out.v[k] = T(float(back.v[k]) * (below + v * density));
}
((Pack*)y)[i] = out;
""",
    (("packs", "int"),),
)

# A thread takes as many channels of both halves.
_HALVES = (
    EACH_PACK
    + r"""const int row = i / width, first = row * 2 * width + i % width, second = first + width;
const Pack a = ((const Pack*)x)[first], b = ((const Pack*)x)[second];
"""
)
_GATE_BACK = CudaKernel(
    "gate_back",
    ("x", "cotangent"),
    ("y",),
    _HALVES
    + r"""
const Pack back = ((const Pack*)cotangent)[i];
Pack da, db;
#pragma unroll
for (int k = 0; k < PACK; k++) {
    const float t = tanhf(float(a.v[k])), s = 1.f / (1.f + expf(-float(b.v[k])));
    const float g = float(back.v[k]);
    da.v[k] = T(g * s * (1.f - t * t));
    db.v[k] = T(g * t * s * (1.f - s));
}
((Pack*)y)[first] = da;
((Pack*)y)[second] = db;
""",
    (("packs", "int"), ("width", "int")),
)


def leaky_relu(x: mx.array, slope: float = LRELU_SLOPE) -> mx.array:
    """As ``models.layers.leaky_relu``, with a slope of its own."""
    return _rectifier(slope)(x)


def rectified_slope(x: mx.array, cotangent: mx.array, slope: float) -> mx.array:
    """Slope of the rectifier's input ``x``, of the same shape as its output's."""
    if _whole_warps(x):
        return _launch(_BACK, slope, x, cotangent)
    return mx.where(x > 0, cotangent, slope * cotangent)


@cache
def _rectifier(slope: float) -> Function:
    @mx.custom_function
    def rectified(x: mx.array) -> mx.array:
        if _whole_warps(x):
            return _launch(_FORWARD, slope, x)
        return mx.maximum(x, slope * x)

    @rectified.vjp
    def back(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
        del output
        return rectified_slope(x, cotangent, slope)

    return cast(Function, rectified)


def gelu(x: mx.array) -> mx.array:
    """``nn.gelu`` with a slope of its own."""
    return cast(mx.array, _gelu(x))


@mx.custom_function
def _gelu(x: mx.array) -> mx.array:
    return elementwise.gelu(x)


@_gelu.vjp
def _gelu_vjp(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    del output
    if whole_packs(x):
        return packed(_GELU_BACK, x, cotangent)
    exact = x.astype(mx.float32)
    below = 0.5 + 0.5 * mx.erf(exact / math.sqrt(2))
    density = mx.exp(-0.5 * exact * exact) / math.sqrt(2 * math.pi)
    return cotangent * (below + exact * density).astype(x.dtype)


def gate(x: mx.array) -> mx.array:
    """``models.layers.gated`` with a slope of its own."""
    return cast(mx.array, _gate(x))


@mx.custom_function
def _gate(x: mx.array) -> mx.array:
    return fused_prior.gated(x) if _whole_halves(x) else gated(x)


@_gate.vjp
def _gate_vjp(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    del output
    if _whole_halves(x):
        packs = x.size // (2 * PACK)
        (slope,) = _GATE_BACK(
            [x, cotangent],
            [(x.shape, x.dtype)],
            pack_grid(packs),
            scalars=[packs, x.shape[-1] // (2 * PACK)],
            constants={"T": x.dtype, "PACK": PACK},
        )
        return slope
    a, b = mx.split(x, 2, axis=-1)
    t, s = mx.tanh(a), mx.sigmoid(b)
    slopes = [cotangent * s * (1 - t * t), cotangent * t * s * (1 - s)]
    return mx.concatenate(slopes, axis=-1)


def _whole_warps(x: mx.array) -> bool:
    """Whether a kernel takes ``x``: on CUDA, and no thread is without a value."""
    return on_cuda() and x.size > 0 and x.size % _WARP == 0


def _whole_halves(x: mx.array) -> bool:
    return whole_packs(x) and x.shape[-1] % (2 * PACK) == 0


def _launch(kernel: CudaKernel, slope: float, x: mx.array, *more: mx.array) -> mx.array:
    threads = math.gcd(x.size, _BLOCK)
    (y,) = kernel(
        [x, *more],
        [(x.shape, x.dtype)],
        Grid(x.size // threads, threads),
        scalars=[slope],
        constants={"T": x.dtype},
    )
    return y
