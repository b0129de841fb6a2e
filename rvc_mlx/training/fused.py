"""Element-wise functions of training, with slopes of few operations.

Automatic differentiation makes eight of a leaky rectifier and back; here there are five.
MLX compiles nothing while it differentiates, so on a GPU they become one kernel each way
where the slope is computed outside of that, or where the whole step is compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import cast

import mlx.core as mx

from rvc_mlx.models.layers import LRELU_SLOPE

Function = Callable[..., mx.array]


def fused(function: Function) -> Function:
    """``function`` as one kernel on a GPU; on the CPU MLX would call a C compiler."""

    @cache
    def compiled() -> Function:
        on_gpu = mx.default_device().type == mx.DeviceType.gpu
        return (
            cast(Function, mx.compile(function, shapeless=True)) if on_gpu else function
        )

    return lambda *arguments: compiled()(*arguments)


def leaky_relu(x: mx.array, slope: float = LRELU_SLOPE) -> mx.array:
    """As ``models.layers.leaky_relu``, with a slope of its own."""
    return _rectifier(slope)(x)


def rectified_slope(x: mx.array, cotangent: mx.array, slope: float) -> mx.array:
    """Slope of the rectifier's input ``x``, of the same shape as its output's."""
    return _slope_of(slope)(x, cotangent)


@cache
def _slope_of(slope: float) -> Function:
    return fused(lambda x, cotangent: mx.where(x > 0, cotangent, slope * cotangent))


@cache
def _rectifier(slope: float) -> Function:
    rectify = fused(lambda x: mx.maximum(x, slope * x))

    @mx.custom_function
    def rectified(x: mx.array) -> mx.array:
        return rectify(x)

    @rectified.vjp
    def back(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
        del output
        return rectified_slope(x, cotangent, slope)

    return cast(Function, rectified)
