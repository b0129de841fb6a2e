"""The vocoder's convolutions between its residual blocks as matrix products on CUDA.

cuDNN plans each convolution anew for each length, for tens of milliseconds a vocoder. A
product needs no plan::

    Conv1d             windows of frames [L', taps * C_in]  x  weights [taps * C_in, C_out]
    ConvTranspose1d    windows of the few frames that ``stride`` outputs see
                       [L, frames * C_in]  x  weights [frames * C_in, stride * C_out]

The last layer has one output, and its windows would be large: it has a kernel of its own.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from rvc_mlx import fused_waveform
from rvc_mlx.conv_kernel import supports
from rvc_mlx.models.nsf_hifigan import HiFiGAN
from rvc_mlx.steady import few_lengths
from rvc_mlx.windows import windows

_FEW_ROWS = 1 << 16  # for more the library takes one kernel, whatever their number


class ProductConv(nn.Module):
    """``Conv1d`` without dilation or groups."""

    def __init__(self, layer: nn.Conv1d):
        super().__init__()
        outputs, self._taps, _ = layer.weight.shape
        self._stride, self._padding = layer.stride, layer.padding
        self.factors = mx.contiguous(layer.weight.reshape(outputs, -1).T)
        if "bias" in layer:
            self.bias = layer.bias

    def __call__(self, x: mx.array) -> mx.array:
        """``[B, L, C_in]`` to ``[B, L', C_out]``."""
        frames = (x.shape[1] + 2 * self._padding - self._taps) // self._stride + 1
        seen = windows(
            *(x, self._taps),
            stride=self._stride,
            before=self._padding,
            frames=_rows(len(x), frames),
        )
        if seen.shape[-1] == 1:  # of one number each
            y = seen * self.factors[0]
            y = y + self.bias if "bias" in self else y
        elif "bias" in self:
            y = mx.addmm(self.bias, seen, self.factors)
        else:
            y = seen @ self.factors
        return y[:, :frames]


class ProductUp(nn.Module):
    """``ConvTranspose1d`` without dilation."""

    def __init__(self, layer: nn.ConvTranspose1d):
        super().__init__()
        weight = np.array(layer.weight.astype(mx.float32))
        outputs, taps, inputs = weight.shape
        stride, padding = layer.stride, layer.padding
        self._stride = stride
        self._missing = taps - 2 * padding + layer.output_padding - stride
        # Output r of a frame's sees the frame d places on through the tap r + padding - d s.
        self._before = (taps - 1 - padding) // stride
        after = (stride - 1 + padding) // stride
        self._seen = self._before + after + 1
        factors = np.zeros((self._seen, inputs, stride, outputs), np.float32)
        for i in range(self._seen):
            for r in range(stride):
                tap = r + padding - (i - self._before) * stride
                if 0 <= tap < taps:
                    factors[i, :, r] = weight[:, tap].T
        flat = factors.reshape(self._seen * inputs, stride * outputs)
        self.factors = mx.array(flat).astype(layer.weight.dtype)
        if "bias" in layer:
            self.bias = layer.bias

    def __call__(self, x: mx.array, slope: float = 1.0) -> mx.array:
        """``[B, L, C_in]``, leakily rectified, to ``[B, L', C_out]``."""
        B, L, _ = x.shape
        length = L * self._stride + self._missing
        frames = _rows(B, -(-length // self._stride))
        seen = windows(x, self._seen, before=self._before, frames=frames, slope=slope)
        y = (seen @ self.factors).reshape(B, frames * self._stride, -1)
        y = y if y.shape[1] == length else y[:, :length]
        return y + self.bias if "bias" in self else y


def _rows(batch: int, frames: int) -> int:
    """Rows of a product for so many frames: few lengths, for which few kernels load."""
    few = batch == 1 and frames <= _FEW_ROWS
    return few_lengths(frames, most=None) if few else frames


def serves(vocoder: nn.Module) -> bool:
    """Whether no convolution of a vocoder has to be left to a library on this machine.

    Its residual blocks want the most: a GPU and widths, of which the last layer has the
    narrowest.
    """
    if not isinstance(vocoder, HiFiGAN):
        return False
    _, taps, inputs = vocoder.conv_post.weight.shape
    return supports(inputs, taps, mx.float16)


def quicken_convs(vocoder: HiFiGAN) -> None:
    """Let a loaded vocoder compute this way from now on, before ``quicken_joints``."""
    if isinstance(vocoder.conv_pre, ProductConv) or not serves(vocoder):
        return
    vocoder.conv_pre = ProductConv(vocoder.conv_pre)
    vocoder._waveform = fused_waveform.waveform
    ups = vocoder.upsamples if "upsamples" in vocoder else vocoder.ups
    ups[:] = map(ProductUp, ups)
    if "noise_convs" in vocoder:
        vocoder.noise_convs[:] = map(ProductConv, vocoder.noise_convs)
