"""Discriminators: one on the waveform, several on the waveform folded by a period.

Source: Kong et al. 2020 (HiFi-GAN), Kumar et al. 2019 (MelGAN); RVC's
``MultiPeriodDiscriminator`` and ``MultiPeriodDiscriminatorV2``. Attribute names equal the
keys of public ``f0D*.pth`` files.

Upstream convolves the folded waveform with ``(5, 1)`` kernels: every column by itself.
Here the columns are items of the batch, which makes them plain 1-D convolutions::

    [B, L] -> [B, L / p, p] -> [B * p, L / p, 1]
"""

from __future__ import annotations

from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn

from rvc_mlx.training.convolutions import Convolutions, reformulate
from rvc_mlx.training.fused import leaky_relu
from rvc_mlx.training.presets import TrainingConfig

# Input channels of one group of the waveform discriminator, whatever its width.
GROUP_WIDTH = 4


def _conv(
    inputs: int, outputs: int, taps: int, stride: int = 1, groups: int = 1
) -> nn.Conv1d:
    return nn.Conv1d(inputs, outputs, taps, stride, taps // 2, groups=groups)


def _feature_maps(
    convs: list[nn.Conv1d], conv_post: nn.Conv1d, x: mx.array
) -> list[mx.array]:
    maps = []
    for conv in convs:
        x = leaky_relu(conv(x))
        maps.append(x)
    return [*maps, conv_post(x)]


class DiscriminatorS(nn.Module):
    """Judges the waveform itself by strided, grouped convolutions."""

    def __init__(self, width: int):
        super().__init__()
        widths = [max(width // 2, 1), *(n * width for n in (2, 8, 32, 32, 32))]
        self.convs = [_conv(1, widths[0], 15)]
        for inputs, outputs in pairwise(widths[:5]):
            groups = max(inputs // GROUP_WIDTH, 1)
            self.convs.append(_conv(inputs, outputs, 41, 4, groups))
        self.convs.append(_conv(widths[4], widths[5], 5))
        self.conv_post = _conv(widths[5], 1, 3)

    def __call__(self, x: mx.array) -> list[mx.array]:
        """Waveform ``[B, L]`` to feature maps ``[B, L', C]``, the output last."""
        return _feature_maps(self.convs, self.conv_post, x[..., None])


class DiscriminatorP(nn.Module):
    """Judges samples that are ``period`` apart."""

    def __init__(self, period: int, width: int):
        super().__init__()
        widths = [1, *(n * width for n in (1, 4, 16, 32, 32))]
        strides = (3, 3, 3, 3, 1)
        self.convs = [
            _conv(inputs, outputs, 5, stride)
            for (inputs, outputs), stride in zip(pairwise(widths), strides, strict=True)
        ]
        self.conv_post = _conv(widths[5], 1, 3)
        self._period = period

    def __call__(self, x: mx.array) -> list[mx.array]:
        """Waveform ``[B, L]`` to feature maps ``[B * period, L', C]``, the output last."""
        B, L = x.shape
        if rest := -L % self._period:
            x = mx.pad(x, [(0, 0), (0, rest)], mode="reflect")
        columns = x.reshape(B, -1, self._period).swapaxes(1, 2)
        columns = columns.reshape(B * self._period, -1, 1)
        return _feature_maps(self.convs, self.conv_post, columns)


class Discriminator(nn.Module):
    """All discriminators of a configuration.

    Args:
        config: which periods, and how wide.
        how: the way convolutions are computed; None for the back end's.
    """

    def __init__(self, config: TrainingConfig, how: Convolutions | None = None):
        super().__init__()
        width = config.discriminator_width
        self.discriminators: list[nn.Module] = [DiscriminatorS(width)]
        self.discriminators += [DiscriminatorP(p, width) for p in config.periods]
        if how is not None:
            reformulate(self, how.plain, how.grouped)

    def __call__(self, x: mx.array) -> list[list[mx.array]]:
        """Judge waveforms.

        Args:
            x: ``[B, L]`` in -1..1.

        Returns:
            For each discriminator its feature maps, the output last. Axis 0 of each is
            a multiple of B with the items in order.
        """
        return [judge(x) for judge in self.discriminators]
