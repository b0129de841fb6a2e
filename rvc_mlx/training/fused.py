"""Element-wise functions of training, with slopes of few operations.

Automatic differentiation makes eight of a leaky rectifier and back; here there are five,
and on CUDA one each way: MLX compiles nothing while it differentiates, and a traced step
(see ``compiling``) is not fused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import mlx.core as mx

from rvc_mlx.models.layers import LRELU_SLOPE

Function = Callable[..., mx.array]

_BLOCK = 256  # threads, one value each
_WARP = 32


def leaky_relu(x: mx.array, slope: float = LRELU_SLOPE) -> mx.array:
    """As ``models.layers.leaky_relu``, with a slope of its own."""
    return _rectifier(slope)(x)


def rectified_slope(x: mx.array, cotangent: mx.array, slope: float) -> mx.array:
    """Slope of the rectifier's input ``x``, of the same shape as its output's."""
    if _whole_warps(x):
        return _launch(_kernels(slope)[1], x, cotangent)
    return mx.where(x > 0, cotangent, slope * cotangent)


@cache
def _rectifier(slope: float) -> Function:
    @mx.custom_function
    def rectified(x: mx.array) -> mx.array:
        if _whole_warps(x):
            return _launch(_kernels(slope)[0], x)
        return mx.maximum(x, slope * x)

    @rectified.vjp
    def back(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
        del output
        return rectified_slope(x, cotangent, slope)

    return cast(Function, rectified)


def on_cuda() -> bool:
    """Whether MLX computes on an NVIDIA GPU now, so that CUDA kernels run."""
    return bool(mx.cuda.is_available() and mx.default_device() == mx.Device(mx.gpu))


def _whole_warps(x: mx.array) -> bool:
    """Whether a kernel takes ``x``: on CUDA, and no thread is without a value."""
    return on_cuda() and x.size > 0 and x.size % _WARP == 0


@cache
def _kernels(slope: float) -> tuple[Any, Any]:
    """Forward and back, of arrays whose values lie in order."""

    def kernel(name: str, inputs: list[str], source: str) -> Any:
        return mx.fast.cuda_kernel(
            name=f"{name}_{str(slope).replace('.', '_')}",
            input_names=inputs,
            output_names=["y"],
            source="const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;\n"
            "const float v = float(x[i]);\n" + source,
        )

    return (
        kernel("leaky_relu", ["x"], f"y[i] = T(v > 0 ? v : v * {slope}f);"),
        kernel(
            "leaky_relu_back",
            ["x", "cotangent"],
            "const float back = float(cotangent[i]);\n"
            f"y[i] = T(v > 0 ? back : back * {slope}f);",
        ),
    )


def _launch(kernel: Any, x: mx.array, *others: mx.array) -> mx.array:
    (y,) = kernel(
        inputs=[x, *others],
        template=[("T", x.dtype)],
        grid=(x.size, 1, 1),
        threadgroup=(math.gcd(x.size, _BLOCK), 1, 1),
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
    )
    return cast(mx.array, y)
