"""HiFi-GAN vocoders of RVC: with a harmonic source (NSF), without F0, and MRF.

Source: Kong et al. 2020 (HiFi-GAN), Wang et al. 2019 (neural source filter); layouts of
RVC's ``GeneratorNSF``/``Generator`` and Applio's ``HiFiGANMRFGenerator``.

Frames run at 100 per second; a frame is ``U = prod(upsample_rates)`` samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from rvc_mlx.models.layers import LRELU_SLOPE, ResBlock, leaky_relu
from rvc_mlx.models.voice_config import SynthesizerConfig

SINE_AMPLITUDE = 0.1
VOICED_NOISE = 0.003  # deviation of the noise on a voiced sample
UNVOICED_NOISE = SINE_AMPLITUDE / 3
LAST_SLOPE = 0.01  # upstream uses the default here, once


# Upsampler, source convolution and residual blocks.
Stage = tuple[nn.Module, nn.Module | None, Sequence[nn.Module]]


class SineSource(nn.Module):
    """Excitation: sines at the harmonics of F0 plus noise, merged to one channel.

    The phase of every sample comes in as an input, accumulated in float64 by
    ``pitch.sample_phases``.
    """

    def __init__(self, harmonics: int):
        super().__init__()
        self.l_linear = nn.Linear(harmonics, 1)

    @property
    def merge_layer(self) -> nn.Linear:
        """From all harmonics to one channel."""
        layer: nn.Linear = self.l_linear
        return layer

    def __call__(
        self, voiced: mx.array, phase: mx.array, offset: mx.array, noise: mx.array
    ) -> mx.array:
        """Make the excitation.

        Args:
            voiced: 1 where there is F0, else 0, ``[B, T, U]``.
            phase: of the fundamental at every sample, ``[B, T, U]`` in cycles.
            offset: starting phase of each harmonic, ``[B, 1, harmonics]`` in cycles.
            noise: standard normal, ``[B, T * U, harmonics]``.

        Returns:
            ``[B, T * U, 1]`` in -1..1.
        """
        return mx.tanh(self.merge_layer(self.excitation(voiced, phase, offset, noise)))

    def from_frames(
        self, cycles: mx.array, start: mx.array, offset: mx.array, noise: mx.array
    ) -> mx.array:
        """As ``__call__``, with the phase given once per frame.

        Args:
            cycles: that the fundamental advances per sample, 0 where unvoiced,
                ``[B, T, 1]`` (held for a frame) or ``[B, T, U]``.
            start: phase before the first sample of each frame, ``[B, T, 1]`` in cycles.
            offset: as above.
            noise: as above.

        Returns:
            ``[B, T * U, 1]`` in -1..1.
        """
        B, T, held = cycles.shape
        U = noise.shape[1] // T
        if held == 1:
            phase = start + cycles * mx.arange(1, U + 1, dtype=mx.float32)
        else:
            phase = start + mx.cumsum(cycles, axis=-1)
        voiced = mx.broadcast_to((cycles > 0).astype(mx.float32), (B, T, U))
        return self(voiced, phase - mx.floor(phase), offset, noise)

    def excitation(
        self, voiced: mx.array, phase: mx.array, offset: mx.array, noise: mx.array
    ) -> mx.array:
        """As ``__call__``, before the merge: ``[B, T * U, harmonics]``."""
        voiced = voiced.flatten(-2)[..., None]  # [B, L, 1]
        phase = phase.flatten(-2)[..., None]
        multiples = mx.arange(1, noise.shape[-1] + 1, dtype=mx.float32)
        sines = mx.sin((2 * math.pi) * (phase * multiples + offset))
        deviation = voiced * VOICED_NOISE + (1 - voiced) * UNVOICED_NOISE
        return SINE_AMPLITUDE * voiced * sines + deviation * noise


def _noise_convs(rates: tuple[int, ...], channels: list[int]) -> list[nn.Conv1d]:
    """Strided convolutions that bring the source to each stage's rate."""
    convs = []
    for i, width in enumerate(channels):
        stride = math.prod(rates[i + 1 :])
        kernel = 2 * stride - stride % 2 if stride > 1 else 1
        convs.append(
            nn.Conv1d(1, width, kernel, stride=stride, padding=(kernel - stride) // 2)
        )
    return convs


def _upsamplers(config: SynthesizerConfig) -> list[nn.ConvTranspose1d]:
    width = config.upsample_initial_channel
    return [
        nn.ConvTranspose1d(
            width >> i,
            width >> (i + 1),
            kernel,
            stride=rate,
            padding=(kernel - rate) // 2 if rate % 2 == 0 else rate // 2 + 1,
            output_padding=rate % 2,
        )
        for i, (rate, kernel) in enumerate(
            zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True)
        )
    ]


def _stage_channels(config: SynthesizerConfig) -> list[int]:
    return [
        config.upsample_initial_channel >> (i + 1)
        for i in range(len(config.upsample_rates))
    ]


def hifigan_context(config: SynthesizerConfig) -> int:
    """Frames on each side that one output frame of a HiFi-GAN depends on."""
    widest = max(
        sum((k - 1) // 2 * (d + 1) for d in dilations)
        for k, dilations in zip(
            config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True
        )
    )
    samples_per_frame, frames = 1, 3.0  # conv_pre
    for rate, kernel in zip(
        config.upsample_rates, config.upsample_kernel_sizes, strict=True
    ):
        frames += (kernel / rate) / samples_per_frame
        samples_per_frame *= rate
        frames += widest / samples_per_frame
    return math.ceil(frames + 3 / samples_per_frame + 1)


def upsampled(
    x: mx.array, upsample: Any, source_conv: Any, source: mx.array | None
) -> mx.array:
    """What a stage's residual blocks are given: ``x`` at the next rate, and the source."""
    x = upsample(leaky_relu(x))
    return x if source_conv is None else x + source_conv(source)


def average_blocks(x: mx.array, blocks: Sequence[Any]) -> mx.array:
    """Mean of what the residual blocks of a stage, or functions, make of ``[B, L, C]``."""
    total = blocks[0](x)
    for block in blocks[1:]:
        total = total + block(x)
    return total / len(blocks)


def waveform(x: mx.array, conv_post: Any) -> mx.array:
    """Audio ``[B, L]`` in -1..1 from what the last stage gives, ``[B, L, C]``."""
    return mx.tanh(conv_post(leaky_relu(x, LAST_SLOPE)))[..., 0]


class HiFiGAN(nn.Module):
    """The path that all HiFi-GAN vocoders share.

    A subclass names its layers as its checkpoint does and hands them over through
    ``stages``.
    """

    def __init__(self, config: SynthesizerConfig):
        super().__init__()
        self._context = hifigan_context(config)
        self._upsampled, self._average = upsampled, average_blocks
        self._waveform = waveform

    @property
    def context(self) -> int:
        """Frames on each side that one output frame depends on."""
        return self._context

    def stages(self) -> list[Stage]:
        """Upsampler, source convolution and residual blocks of each stage."""
        raise NotImplementedError

    def _decode(self, z: mx.array, g: mx.array, source: mx.array | None) -> mx.array:
        x = self.conv_pre(z) + self.cond(g)
        for upsample, source_conv, blocks in self.stages():
            x = self._upsampled(x, upsample, source_conv, source)
            x = self._average(x, blocks)
        return self._waveform(x, self.conv_post)


class Generator(HiFiGAN):
    """HiFi-GAN; without F0 the vocoder itself (key ``dec`` of voices without pitch)."""

    def __init__(self, config: SynthesizerConfig):
        super().__init__(config)
        width = config.upsample_initial_channel
        channels = _stage_channels(config)
        self.conv_pre = nn.Conv1d(config.inter_channels, width, 7, padding=3)
        self.cond = nn.Conv1d(config.gin_channels, width, 1)
        self.ups = _upsamplers(config)
        self.resblocks = [
            ResBlock(c, k, d)
            for c in channels
            for k, d in zip(
                config.resblock_kernel_sizes,
                config.resblock_dilation_sizes,
                strict=True,
            )
        ]
        self.conv_post = nn.Conv1d(channels[-1], 1, 7, padding=3, bias=False)

    def stages(self) -> list[Stage]:
        """Upsampler, no source, residual blocks of each stage."""
        n = len(self.resblocks) // len(self.ups)
        return [
            (up, None, self.resblocks[i * n : (i + 1) * n])
            for i, up in enumerate(self.ups)
        ]

    def __call__(
        self, z: mx.array, g: mx.array, source: mx.array | None = None
    ) -> mx.array:
        """Decode.

        Args:
            z: latent ``[B, T, inter_channels]``.
            g: speaker ``[B, 1, gin_channels]``.
            source: excitation ``[B, T * U, 1]``; None without F0.

        Returns:
            Audio ``[B, T * U]`` in -1..1.
        """
        return self._decode(z, g, source)


class NSFGenerator(Generator):
    """HiFi-GAN driven by a harmonic source: the vocoder of nearly every RVC voice."""

    HARMONICS = 1

    def __init__(self, config: SynthesizerConfig):
        super().__init__(config)
        self.m_source = SineSource(self.HARMONICS)
        self.noise_convs = _noise_convs(config.upsample_rates, _stage_channels(config))

    def stages(self) -> list[Stage]:
        """Upsampler, source convolution, residual blocks of each stage."""
        return [
            (up, conv, blocks)
            for (up, _, blocks), conv in zip(
                super().stages(), self.noise_convs, strict=True
            )
        ]


class MRFLayer(nn.Module):
    """Dilated convolution, plain convolution, add."""

    def __init__(self, channels: int, kernel_size: int, dilation: int):
        super().__init__()
        pad = (kernel_size - 1) // 2
        self.conv1 = nn.Conv1d(
            channels, channels, kernel_size, padding=pad * dilation, dilation=dilation
        )
        self.conv2 = nn.Conv1d(channels, channels, kernel_size, padding=pad)

    def __call__(self, x: mx.array) -> mx.array:
        """``[B, L, C]`` to ``[B, L, C]``."""
        return x + self.conv2(leaky_relu(self.conv1(leaky_relu(x, LRELU_SLOPE))))


class MRFBlock(nn.Module):
    """One kernel size of a multi-receptive-field fusion."""

    def __init__(self, channels: int, kernel_size: int, dilations: tuple[int, ...]):
        super().__init__()
        self.layers = [MRFLayer(channels, kernel_size, d) for d in dilations]

    def __call__(self, x: mx.array) -> mx.array:
        """``[B, L, C]`` to ``[B, L, C]``."""
        for layer in self.layers:
            x = layer(x)
        return x


class MRFGenerator(HiFiGAN):
    """Applio's "MRF HiFi-GAN": nine harmonics, other names, a biased last layer."""

    HARMONICS = 9

    def __init__(self, config: SynthesizerConfig):
        super().__init__(config)
        width = config.upsample_initial_channel
        channels = _stage_channels(config)
        self.m_source = SineSource(self.HARMONICS)
        self.conv_pre = nn.Conv1d(config.inter_channels, width, 7, padding=3)
        self.cond = nn.Conv1d(config.gin_channels, width, 1)
        self.upsamples = _upsamplers(config)
        self.noise_convs = _noise_convs(config.upsample_rates, channels)
        self.mrfs = [
            [
                MRFBlock(c, k, d)
                for k, d in zip(
                    config.resblock_kernel_sizes,
                    config.resblock_dilation_sizes,
                    strict=True,
                )
            ]
            for c in channels
        ]
        self.conv_post = nn.Conv1d(channels[-1], 1, 7, padding=3)

    def stages(self) -> list[Stage]:
        """Upsampler, source convolution, residual blocks of each stage."""
        return list(zip(self.upsamples, self.noise_convs, self.mrfs, strict=True))

    def __call__(self, z: mx.array, g: mx.array, source: mx.array) -> mx.array:
        """As ``NSFGenerator``."""
        return self._decode(z, g, source)
