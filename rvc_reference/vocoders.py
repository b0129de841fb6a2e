"""HiFi-GAN vocoders of RVC voices: plain, with harmonic source (NSF), and MRF.

Source: Kong et al. 2020 (HiFi-GAN), Wang et al. 2019 (neural source-filter).
The third kind, RefineGAN, is in ``refinegan.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rvc_reference.weight_norm import WNConv1d, WNConvTranspose1d

SLOPE = 0.1
LAST_SLOPE = 0.01  # before conv_post upstream falls back to PyTorch's default
SINE_AMP = 0.1
VOICED_NOISE = 0.003
UNVOICED_NOISE = SINE_AMP / 3
MRF_HARMONICS = 9


@dataclass(frozen=True)
class VocoderConfig:
    """Sizes of a vocoder; ``upsample`` is the number of samples in a frame."""

    channels: int
    initial: int
    rates: tuple[int, ...]
    kernels: tuple[int, ...]
    block_kernels: tuple[int, ...]
    dilations: tuple[tuple[int, ...], ...]
    gin: int
    sample_rate: int

    @property
    def upsample(self) -> int:
        """Samples per frame."""
        return prod(self.rates)


@dataclass
class VocoderNoise:
    """The random inputs of a vocoder; a None counts as zeros.

    Attributes:
        source: ``[B, T * upsample, H]`` float32, standard normal; H is 1, or 9 (MRF).
        phase: ``[B, H]`` in 0..1, initial phases in cycles; entry 0 is ignored.
        adain: RefineGAN only: "adain.{stage}.{branch}.{0|2}" to ``[B, L_stage, C]``.
    """

    source: Tensor | None = None
    phase: Tensor | None = None
    adain: dict[str, Tensor] = field(default_factory=dict)


def wrap(cycles: Tensor) -> Tensor:
    """Take whole cycles away: the same phase in -0.5..0.5."""
    return torch.remainder(cycles + 0.5, 1.0) - 0.5


def frame_phase(f0: Tensor, upsample: int, sample_rate: int) -> Tensor:
    """Give the phase of an F0 that is held within each frame.

    Args:
        f0: ``[B, T, H]`` float64 in Hz.
        upsample: samples per frame.
        sample_rate: in Hz.

    Returns:
        ``[B, T * upsample, H]`` float64 in cycles; sample j of a frame has already
        advanced by j + 1 steps.
    """
    advance = wrap(f0 * upsample / sample_rate)
    start = torch.cumsum(advance, dim=1) - advance
    steps = torch.arange(1, upsample + 1, dtype=torch.float64, device=f0.device)[
        :, None
    ]
    ramp = steps * (f0 / sample_rate)[:, :, None, :]
    return (wrap(start)[:, :, None, :] + ramp).flatten(1, 2)


def excitation(phase: Tensor, voiced: Tensor, noise: VocoderNoise) -> Tensor:
    """Give sine plus noise ``[B, L, H]`` float32.

    Args:
        phase: ``[B, L, H]`` float64 in cycles.
        voiced: ``[B, L, 1]`` float32, 1 or 0.
        noise: ``source`` and ``phase`` are used.
    """
    if noise.phase is not None:
        initial = noise.phase.double().clone()
        initial[:, 0] = 0  # the fundamental starts at phase 0
        phase = phase + initial[:, None, :]
    sine = (SINE_AMP * torch.sin(2 * torch.pi * phase)).float() * voiced
    if noise.source is None:
        return sine
    return sine + (voiced * VOICED_NOISE + (1 - voiced) * UNVOICED_NOISE) * noise.source


class HarmonicSource(nn.Module):
    """F0 at frame rate to the excitation of the vocoder."""

    def __init__(self, harmonics: int, upsample: int, sample_rate: int) -> None:
        super().__init__()
        self.harmonics = harmonics
        self.upsample = upsample
        self.sample_rate = sample_rate
        self.l_linear = nn.Linear(harmonics, 1)

    def forward(self, f0: Tensor, noise: VocoderNoise) -> Tensor:
        """Map ``[B, T]`` Hz to ``[B, 1, T * upsample]``."""
        multiples = torch.arange(
            1, self.harmonics + 1, dtype=torch.float64, device=f0.device
        )
        phase = frame_phase(
            f0.double()[..., None] * multiples, self.upsample, self.sample_rate
        )
        voiced = (f0 > 0).float().repeat_interleave(self.upsample, dim=1)[..., None]
        return torch.tanh(self.l_linear(excitation(phase, voiced, noise))).transpose(
            1, 2
        )


class ResBlock(nn.Module):
    """Pairs of dilated and plain convolutions, each pair with a shortcut."""

    def __init__(
        self,
        channels: int,
        kernel: int,
        dilations: tuple[int, ...],
        slope: float = SLOPE,
    ) -> None:
        super().__init__()
        self.slope = slope
        self.convs1 = nn.ModuleList(same_conv(channels, kernel, d) for d in dilations)
        self.convs2 = nn.ModuleList(same_conv(channels, kernel, 1) for _ in dilations)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, L]`` to ``[B, C, L]``."""
        for dilated, plain in zip(self.convs1, self.convs2, strict=True):
            y = dilated(F.leaky_relu(x, self.slope))
            x = x + plain(F.leaky_relu(y, self.slope))
        return x


def same_conv(channels: int, kernel: int, dilation: int) -> WNConv1d:
    """Give a weight-normed convolution that keeps the length."""
    padding = (kernel - 1) * dilation // 2
    return WNConv1d(channels, channels, kernel, padding=padding, dilation=dilation)


def up_conv(cin: int, rate: int, kernel: int) -> WNConvTranspose1d:
    """Give the transposed convolution of one stage: half the channels, rate times longer."""
    odd = rate % 2
    padding = rate // 2 + 1 if odd else (kernel - rate) // 2
    return WNConvTranspose1d(
        cin, cin // 2, kernel, stride=rate, padding=padding, output_padding=odd
    )


def source_convs(config: VocoderConfig) -> nn.ModuleList:
    """Give the convolutions that bring the source to each stage's rate."""
    convs = []
    for stage in range(len(config.rates)):
        step = prod(config.rates[stage + 1 :])
        kernel = 2 * step - step % 2
        width = config.initial >> (stage + 1)
        convs.append(nn.Conv1d(1, width, kernel, step, (kernel - step) // 2))
    return nn.ModuleList(convs)


class HiFiGAN(nn.Module):
    """The vocoder of voices without F0."""

    def __init__(self, config: VocoderConfig) -> None:
        super().__init__()
        self.kinds = len(config.block_kernels)
        widths = [config.initial >> stage for stage in range(len(config.rates) + 1)]
        self.conv_pre = nn.Conv1d(config.channels, config.initial, 7, padding=3)
        self.cond = nn.Conv1d(config.gin, config.initial, 1)
        self.ups = nn.ModuleList(
            up_conv(*sizes)
            for sizes in zip(widths, config.rates, config.kernels, strict=False)
        )
        self.resblocks = nn.ModuleList(
            ResBlock(width, kernel, dilations)
            for width in widths[1:]
            for kernel, dilations in zip(
                config.block_kernels, config.dilations, strict=True
            )
        )
        self.conv_post = nn.Conv1d(widths[-1], 1, 7, padding=3, bias=False)

    def _add_source(self, x: Tensor, stage: int, source: Tensor | None) -> Tensor:
        del stage, source
        return x

    def _decode(self, z: Tensor, g: Tensor, source: Tensor | None) -> Tensor:
        x = self.conv_pre(z) + self.cond(g)
        for stage, up in enumerate(self.ups):
            x = self._add_source(up(F.leaky_relu(x, SLOPE)), stage, source)
            blocks = self.resblocks[stage * self.kinds : (stage + 1) * self.kinds]
            x = sum(block(x) for block in blocks) / self.kinds
        return torch.tanh(self.conv_post(F.leaky_relu(x, LAST_SLOPE)))[:, 0]

    def forward(self, z: Tensor, f0: None, g: Tensor, noise: VocoderNoise) -> Tensor:
        """Map z ``[B, C, T]``, g ``[B, gin, 1]`` to ``[B, T * upsample]``."""
        del f0, noise
        return self._decode(z, g, None)


class NSFHiFiGAN(HiFiGAN):
    """The usual vocoder: HiFi-GAN with a harmonic source added at every stage."""

    harmonics = 1

    def __init__(self, config: VocoderConfig) -> None:
        super().__init__(config)
        self.m_source = HarmonicSource(1, config.upsample, config.sample_rate)
        self.noise_convs = source_convs(config)

    def _add_source(self, x: Tensor, stage: int, source: Tensor | None) -> Tensor:
        return x + self.noise_convs[stage](source)

    def forward(self, z: Tensor, f0: Tensor, g: Tensor, noise: VocoderNoise) -> Tensor:
        """Map z ``[B, C, T]``, f0 ``[B, T]`` Hz, g ``[B, gin, 1]`` to ``[B, T * upsample]``."""
        return self._decode(z, g, self.m_source(f0, noise))


class MRFLayer(nn.Module):
    """One pair of a residual block under the names conv1 and conv2."""

    def __init__(self, channels: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = same_conv(channels, kernel, dilation)
        self.conv2 = same_conv(channels, kernel, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, L]`` to ``[B, C, L]``."""
        y = self.conv1(F.leaky_relu(x, SLOPE))
        return x + self.conv2(F.leaky_relu(y, SLOPE))


class MRFBlock(nn.Module):
    """The pairs of one kernel size, under the name layers."""

    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MRFLayer(channels, kernel, d) for d in dilations)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, L]`` to ``[B, C, L]``."""
        for layer in self.layers:
            x = layer(x)
        return x


class MRFHiFiGAN(nn.Module):
    """Applio's "MRF HiFi-GAN": eight overtones, other names, a bias at the end."""

    harmonics = MRF_HARMONICS

    def __init__(self, config: VocoderConfig) -> None:
        super().__init__()
        widths = [config.initial >> stage for stage in range(len(config.rates) + 1)]
        self.m_source = HarmonicSource(
            MRF_HARMONICS, config.upsample, config.sample_rate
        )
        self.conv_pre = WNConv1d(config.channels, config.initial, 7, padding=3)
        self.cond = nn.Conv1d(config.gin, config.initial, 1)
        self.upsamples = nn.ModuleList(
            up_conv(*sizes)
            for sizes in zip(widths, config.rates, config.kernels, strict=False)
        )
        self.noise_convs = source_convs(config)
        kinds = list(zip(config.block_kernels, config.dilations, strict=True))
        self.mrfs = nn.ModuleList(
            nn.ModuleList(MRFBlock(width, *kind) for kind in kinds)
            for width in widths[1:]
        )
        self.conv_post = WNConv1d(widths[-1], 1, 7, padding=3)

    def forward(self, z: Tensor, f0: Tensor, g: Tensor, noise: VocoderNoise) -> Tensor:
        """Map z ``[B, C, T]``, f0 ``[B, T]`` Hz, g ``[B, gin, 1]`` to ``[B, T * upsample]``."""
        source = self.m_source(f0, noise)
        x = self.conv_pre(z) + self.cond(g)
        for up, add, blocks in zip(
            self.upsamples, self.noise_convs, self.mrfs, strict=True
        ):
            x = up(F.leaky_relu(x, SLOPE)) + add(source)
            x = sum(block(x) for block in blocks) / len(blocks)
        return torch.tanh(self.conv_post(F.leaky_relu(x, LAST_SLOPE)))[:, 0]
