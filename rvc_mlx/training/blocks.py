"""The vocoder's residual blocks in training, through the hand-written CUDA convolution.

Forward it is ``fused_blocks``' kernel. The slope of its input is the same convolution
with the kernel turned round, then the rectifier's slope; that of the weight is one
batched product, see ``convolutions.weight_slope``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from rvc_mlx.conv_kernel import fused_conv, pack_weight, supports
from rvc_mlx.models.layers import ResBlock
from rvc_mlx.models.nsf_hifigan import HiFiGAN, average_blocks
from rvc_mlx.training.convolutions import weight_slope
from rvc_mlx.training.fused import leaky_relu, rectified_slope

Product = Callable[..., mx.array]


def quicken_blocks(vocoder: nn.Module) -> None:
    """Let a vocoder in training compute its residual blocks this way where it can.

    The kernel's products are TF32, so it is not used where MLX is told to do without.
    """
    if not isinstance(vocoder, HiFiGAN) or os.environ.get("MLX_ENABLE_TF32") == "0":
        return
    vocoder._average = _average


def _average(x: mx.array, blocks: Sequence[nn.Module]) -> mx.array:
    """As ``average_blocks``."""
    if not all(_fits(block, x) for block in blocks):
        return average_blocks(x, blocks)
    return average_blocks(x, [partial(_through, block) for block in blocks])


def _fits(block: nn.Module, x: mx.array) -> bool:
    if not isinstance(block, ResBlock):
        return False
    taps = block.convs1[0].weight.shape[1]
    return supports(x.shape[-1], taps, x.dtype)


def _through(block: nn.Module, x: mx.array) -> mx.array:
    assert isinstance(block, ResBlock)
    for first, second in zip(block.convs1, block.convs2, strict=True):
        y = _convolution(x, first, block._slope)
        x = _convolution(y, second, block._slope, residual=x)
    return x


def _convolution(
    x: mx.array, layer: Any, slope: float, residual: mx.array | None = None
) -> mx.array:
    """``layer(leaky_relu(x)) + residual``."""
    product = _product(layer.dilation, slope, residual is not None)
    added = () if residual is None else (residual,)
    return product(x, layer.weight, layer.bias, *added)


@cache
def _product(dilation: int, slope: float, residual: bool) -> Product:
    def forward(x: mx.array, weight: mx.array, bias: mx.array, *added: mx.array):
        return fused_conv(
            x,
            pack_weight(weight, x.dtype),
            bias,
            dilation=dilation,
            slope=slope,
            residual=added[0] if added else None,
        )

    product = mx.custom_function(forward)

    @product.vjp
    def slopes(
        primals: tuple[mx.array, ...], cotangent: mx.array, output: mx.array
    ) -> tuple[mx.array, ...]:
        del output
        x, weight, bias = primals[:3]
        taps = weight.shape[1]
        backwards = pack_weight(weight[:, ::-1].transpose(2, 1, 0), x.dtype)
        inner = fused_conv(
            cotangent, backwards, mx.zeros_like(bias), dilation=dilation, slope=1.0
        )
        activated = leaky_relu(x, slope)
        padding = dilation * (taps - 1) // 2
        made = (
            rectified_slope(x, inner, slope),
            weight_slope(activated, cotangent, taps, 1, padding, dilation),
            cotangent.sum(axis=(0, 1)),
        )
        return (*made, cotangent) if residual else made

    return cast(Product, product)
