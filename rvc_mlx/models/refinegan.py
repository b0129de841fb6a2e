"""RefineGAN vocoder, as Applio trains it.

Source: Xu et al. 2021 (RefineGAN); layout of Applio's ``RefineGANGenerator``. The source
signal is brought down to frame rate step by step, joined with the latent, and brought
up again with the intermediate signals as skips; small noise is added at every block.
"""

from __future__ import annotations

import itertools
import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from rvc_mlx.models.layers import ResBlock, leaky_relu
from rvc_mlx.models.nsf_hifigan import SineSource
from rvc_mlx.models.voice_config import SynthesizerConfig

SLOPE = 0.2
CHANNELS = 512  # of the latent joined with the source, halved at each stage
DILATIONS = (1, 3, 5)
KERNEL_SIZES = (3, 7, 11)

# Kaiser-windowed sinc of torchaudio's "sinc_interp_kaiser" at its best quality.
_LOWPASS_WIDTH = 64
_ROLLOFF = 0.9475937167399596
_BETA = 14.769656459379492


def decimation_kernel(rate: int) -> tuple[np.ndarray, int]:
    """Low-pass taps for keeping every ``rate``-th sample.

    Returns:
        Taps ``[2 * width + rate]`` float32, and ``width``, the samples before the kept one.

    Source: torchaudio ``_get_sinc_resample_kernel``.
    """
    width = math.ceil(_LOWPASS_WIDTH * rate / _ROLLOFF)
    t = np.arange(-width, width + rate, dtype=np.float64) / rate * _ROLLOFF
    t = t.clip(-_LOWPASS_WIDTH, _LOWPASS_WIDTH)
    window = np.i0(_BETA * np.sqrt(1 - (t / _LOWPASS_WIDTH) ** 2)) / np.i0(_BETA)
    taps = np.sinc(t) * window * (_ROLLOFF / rate)
    return taps.astype(np.float32), width


class Decimate(nn.Module):
    """Keep every ``rate``-th sample of each channel, after a low-pass."""

    def __init__(self, rate: int):
        super().__init__()
        taps, self._width = decimation_kernel(rate)
        self._taps = mx.array(taps)
        self._rate = rate

    @property
    def context(self) -> int:
        """Input samples on each side that an output sample depends on."""
        return self._width + self._rate

    def __call__(self, x: mx.array) -> mx.array:
        """``[B, L, C]`` to ``[B, L / rate, C]``."""
        C = x.shape[-1]
        x = mx.pad(x, [(0, 0), (self._width, self._width + self._rate), (0, 0)])
        kernel = mx.broadcast_to(self._taps[None, :, None], (C, self._taps.size, 1))
        y = mx.conv1d(x, kernel, stride=self._rate, groups=C)
        return y[:, :-1].astype(x.dtype)  # the taps are float32


def upsample_linear(x: mx.array, rate: int) -> mx.array:
    """Interpolate linearly between sample centres (``align_corners=False``).

    Args:
        x: ``[B, L, C]``.
        rate: new samples per sample.

    Returns:
        ``[B, L * rate, C]``.
    """
    offset = (np.arange(rate) + 0.5) / rate - 0.5
    before, after = (
        mx.array(np.maximum(sign * offset, 0).astype(np.float32)[:, None], x.dtype)
        for sign in (-1, 1)
    )
    previous = mx.concatenate([x[:, :1], x[:, :-1]], axis=1)[:, :, None]
    following = mx.concatenate([x[:, 1:], x[:, -1:]], axis=1)[:, :, None]
    centre = x[:, :, None]
    y = previous * before + centre * (1 - before - after) + following * after
    return y.flatten(1, 2)


class AdaIN(nn.Module):
    """Add noise, scaled per channel, then a leaky rectifier."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = mx.full((channels,), 1e-4)

    def __call__(self, x: mx.array, noise: mx.array) -> mx.array:
        """``[B, L, C]`` and standard normal noise of its shape to ``[B, L, C]``."""
        return leaky_relu(x + noise * self.weight, SLOPE)


class ParallelResBlock(nn.Module):
    """A convolution, then three noisy residual branches, averaged."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.input_conv = nn.Conv1d(c_in, c_out, 7, padding=3)
        self.blocks = [
            [AdaIN(c_out), ResBlock(c_out, k, DILATIONS, SLOPE), AdaIN(c_out)]
            for k in KERNEL_SIZES
        ]

    def __call__(self, x: mx.array, noise: mx.array) -> mx.array:
        """``[B, L, C_in]`` and noise ``[B, L, 6 * C_out]`` to ``[B, L, C_out]``."""
        x = self.input_conv(x)
        noises = mx.split(noise, 2 * len(self.blocks), axis=-1)
        branches = [
            after(block(before(x, noises[2 * i])), noises[2 * i + 1])
            for i, (before, block, after) in enumerate(self.blocks)
        ]
        return (branches[0] + branches[1] + branches[2]) / len(branches)


class MergedSource(SineSource):
    """The excitation with its merge as the checkpoint names it (no bias)."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.merge = [nn.Linear(1, 1, bias=False)]

    @property
    def merge_layer(self) -> nn.Linear:
        """As ``SineSource``."""
        layer: nn.Linear = self.merge[0]
        return layer


class RefineGANGenerator(nn.Module):
    """Latent, speaker and harmonic source to audio."""

    HARMONICS = 1

    def __init__(self, config: SynthesizerConfig):
        super().__init__()
        rates = config.upsample_rates
        bottom = CHANNELS // 2
        self._rates = rates
        self._samples_per_frame = math.prod(rates)
        self.m_source = MergedSource()
        first = bottom >> len(rates)
        self.pre_conv = nn.Conv1d(1, first, 7, padding=3)
        self._decimators = [Decimate(rate) for rate in reversed(rates)]
        self.downsample_blocks = [
            nn.Conv1d(first << i, first << (i + 1), 7, padding=3)
            for i in range(len(rates))
        ]
        self.mel_conv = nn.Conv1d(config.inter_channels, bottom, 7, padding=3)
        self.cond = nn.Conv1d(config.gin_channels, bottom, 1)
        widths = [CHANNELS >> i for i in range(len(rates) + 1)]
        self.upsample_conv_blocks = [
            ParallelResBlock(c_in + c_in // 4, c_out)
            for c_in, c_out in itertools.pairwise(widths)
        ]
        self.conv_post = nn.Conv1d(widths[-1], 1, 7, padding=3, bias=False)

    @property
    def context(self) -> int:
        """Frames of latent on each side that one output frame depends on."""
        widest = max(KERNEL_SIZES) // 2 * (sum(DILATIONS) + len(DILATIONS)) + 3
        frames, per_frame = 3.0, 1
        for rate in self._rates:
            frames += 1 / per_frame
            per_frame *= rate
            frames += widest / per_frame
        return math.ceil(frames + 3 / per_frame + 1)

    @property
    def source_context(self) -> int:
        """Further frames of source on each side that the way down needs."""
        frames, per_frame = 3 / self._samples_per_frame, self._samples_per_frame
        for decimate, rate in zip(self._decimators, reversed(self._rates), strict=True):
            frames += decimate.context / per_frame
            per_frame //= rate
            frames += 3 / per_frame
        return math.ceil(frames + 1)

    def noise_shapes(self) -> list[tuple[int, int]]:
        """Samples per frame and channels of each of the 6 noises of every stage."""
        shapes, per_frame = [], 1
        for i, rate in enumerate(self._rates):
            per_frame *= rate
            shapes.append((per_frame, CHANNELS >> (i + 1)))
        return shapes

    def __call__(
        self, z: mx.array, g: mx.array, source: mx.array, *noises: mx.array
    ) -> mx.array:
        """Decode.

        Args:
            z: latent ``[B, T, inter_channels]``.
            g: speaker ``[B, 1, gin_channels]``.
            source: excitation ``[B, (T + 2 e) * U, 1]``; the ``e`` extra frames on each
                side are context for the way down and may be 0.
            noises: per stage ``[B, T * per_frame, 6 * C]``: before and after the block
                of branch 0, then 1, then 2.

        Returns:
            Audio ``[B, T * U]`` in -1..1.
        """
        T = z.shape[1]
        extra = (source.shape[1] // self._samples_per_frame - T) // 2
        x = self.pre_conv(source)
        skips, per_frame = [], self._samples_per_frame
        for decimate, conv, rate in zip(
            self._decimators,
            self.downsample_blocks,
            reversed(self._rates),
            strict=True,
        ):
            x = leaky_relu(x, SLOPE)
            skips.append(_crop(x, extra * per_frame))
            x = conv(decimate(x))
            per_frame //= rate
        x = mx.concatenate([self.mel_conv(z) + self.cond(g), _crop(x, extra)], axis=-1)
        for rate, block, noise in zip(
            self._rates, self.upsample_conv_blocks, noises, strict=True
        ):
            x = upsample_linear(leaky_relu(x, SLOPE), rate)
            x = block(mx.concatenate([x, skips.pop()], axis=-1), noise)
        return mx.tanh(self.conv_post(leaky_relu(x, SLOPE)))[..., 0]


def _crop(x: mx.array, margin: int) -> mx.array:
    return x[:, margin:-margin] if margin else x
