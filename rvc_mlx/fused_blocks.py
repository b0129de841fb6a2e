"""The residual blocks of a HiFi-GAN vocoder through the hand-written CUDA convolution.

A step of a block is ``x + conv2(leaky_relu(conv1(leaky_relu(x))))``: one launch, or two
where no kernel takes it at once, instead of two convolutions and five element-wise passes.
The mean over the blocks of a stage rides on the last launch of each block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from rvc_mlx import conv_kernel, step_kernel
from rvc_mlx.conv_kernel import Output, fused_conv, pack_weight, supports
from rvc_mlx.models.layers import LRELU_SLOPE, ResBlock
from rvc_mlx.models.nsf_hifigan import HiFiGAN, MRFBlock, average_blocks

Step = Callable[..., mx.array]


class _TwoLaunches:
    """A step that is too wide for one.

    What is between the convolutions is rectified by the first. The second multiplies it in
    float16 where arrays are float32: so it is kept.
    """

    def __init__(self, first: nn.Conv1d, second: nn.Conv1d):
        dtype = first.weight.dtype
        inner = mx.float16 if dtype == mx.float32 else dtype
        rectified = Output(inner, LRELU_SLOPE)
        self._layers = first, second
        self._first = pack_weight(first.weight, dtype, products=inner, output=rectified)
        self._second = pack_weight(second.weight, inner, output=Output(dtype))

    def __call__(
        self, x: mx.array, accumulate: mx.array | None = None, scale: float = 1.0
    ) -> mx.array:
        first, second = self._layers
        between = fused_conv(
            x, self._first, first.bias, dilation=first.dilation, slope=LRELU_SLOPE
        )
        return fused_conv(
            between,
            self._second,
            second.bias,
            dilation=second.dilation,
            slope=1.0,
            residual=x,
            accumulate=accumulate,
            scale=scale,
        )


def _step(first: nn.Conv1d, second: nn.Conv1d) -> Step:
    """A step of ``[B, L, C]``, what is added to it, and a factor."""
    channels, taps, _ = first.weight.shape
    dtype, dilation = first.weight.dtype, first.dilation
    weights, biases = (first.weight, second.weight), (first.bias, second.bias)
    given = weights, biases, dtype, dilation, LRELU_SLOPE
    if second.dilation == 1:
        if step_kernel.supports(channels, taps, dilation, dtype):
            return partial(step_kernel.fused_step, step=step_kernel.pack_step(*given))
        if channels <= conv_kernel.WIDEST_STEP and taps <= conv_kernel.LONGEST_STEP:
            return partial(conv_kernel.fused_step, step=conv_kernel.pack_step(*given))
    return _TwoLaunches(first, second)


def _pairs(block: nn.Module) -> list[tuple[nn.Conv1d, nn.Conv1d]]:
    if isinstance(block, ResBlock):
        return list(zip(block.convs1, block.convs2, strict=True))
    assert isinstance(block, MRFBlock)
    return [(layer.conv1, layer.conv2) for layer in block.layers]


class FusedBlocks:
    """``average_blocks`` for the blocks of one vocoder, in its weights' type."""

    def __init__(self, vocoder: HiFiGAN):
        self._steps: dict[int, list[Step]] = {}
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
            *others, last = self._steps[id(block)]
            y = x
            for step in others:
                y = step(y)
            scale = 1 / len(blocks) if block is blocks[-1] else 1.0
            total = last(y, accumulate=total, scale=scale)
        assert total is not None
        return total


def _fits(layer: nn.Conv1d) -> bool:
    out, taps, _ = layer.weight.shape
    return supports(out, taps, layer.weight.dtype)
