"""The residual blocks of a HiFi-GAN vocoder through the hand-written CUDA convolution.

A step of a block is ``x + conv2(leaky_relu(conv1(leaky_relu(x))))``: two launches instead
of two convolutions and five element-wise passes. The mean over the blocks of a stage
rides on the last launch of each block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from rvc_mlx.conv_kernel import Output, PackedWeight, fused_conv, pack_weight, supports
from rvc_mlx.models.layers import LRELU_SLOPE, ResBlock
from rvc_mlx.models.nsf_hifigan import HiFiGAN, MRFBlock, average_blocks


@dataclass(frozen=True)
class _Convolution:
    weight: PackedWeight
    bias: mx.array
    dilation: int
    slope: float

    def __call__(
        self,
        x: mx.array,
        residual: mx.array | None = None,
        accumulate: mx.array | None = None,
        scale: float = 1.0,
    ) -> mx.array:
        return fused_conv(
            x,
            self.weight,
            self.bias,
            dilation=self.dilation,
            slope=self.slope,
            residual=residual,
            accumulate=accumulate,
            scale=scale,
        )


def _step(first: nn.Conv1d, second: nn.Conv1d) -> tuple[_Convolution, _Convolution]:
    """A step's convolutions; what is between them is rectified by the first.

    The second multiplies it in float16 where arrays are float32: so it is kept.
    """
    dtype = first.weight.dtype
    inner = mx.float16 if dtype == mx.float32 else dtype
    rectified = Output(inner, LRELU_SLOPE)
    packed = pack_weight(first.weight, dtype, products=inner, output=rectified)
    again = pack_weight(second.weight, inner, output=Output(dtype))
    return (
        _Convolution(packed, first.bias, first.dilation, LRELU_SLOPE),
        _Convolution(again, second.bias, second.dilation, 1.0),
    )


def _pairs(block: nn.Module) -> list[tuple[nn.Conv1d, nn.Conv1d]]:
    if isinstance(block, ResBlock):
        return list(zip(block.convs1, block.convs2, strict=True))
    assert isinstance(block, MRFBlock)
    return [(layer.conv1, layer.conv2) for layer in block.layers]


class FusedBlocks:
    """``average_blocks`` for the blocks of one vocoder, in its weights' type."""

    def __init__(self, vocoder: HiFiGAN):
        self._steps: dict[int, list[tuple[_Convolution, _Convolution]]] = {}
        for _, _, blocks in vocoder.stages():
            for block in blocks:
                pairs = _pairs(block)
                if all(_fits(layer) for pair in pairs for layer in pair):
                    self._steps[id(block)] = [_step(a, b) for a, b in pairs]

    def __call__(self, x: mx.array, blocks: Sequence[nn.Module]) -> mx.array:
        """``[B, L, C]`` to the mean of what the blocks make of it."""
        if any(id(block) not in self._steps for block in blocks):
            return average_blocks(x, blocks)  # of a width that the kernel has not
        total: mx.array | None = None
        for block in blocks:
            *inner, (dilated, plain) = self._steps[id(block)]
            y = x
            for first, second in inner:
                y = second(first(y), residual=y)
            scale = 1 / len(blocks) if block is blocks[-1] else 1.0
            total = plain(dilated(y), residual=y, accumulate=total, scale=scale)
        assert total is not None
        return total


def _fits(layer: nn.Conv1d) -> bool:
    out, taps, _ = layer.weight.shape
    return supports(out, taps, layer.weight.dtype)
