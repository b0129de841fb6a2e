"""RefineGAN, Applio's third vocoder: a U-shaped net around the harmonic source.

Source: Xu et al. 2021 (RefineGAN) as built in Applio; the resampler is the Kaiser
windowed sinc of torchaudio's ``resample``.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from math import ceil, gcd, prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rvc_reference.vocoders import ResBlock, VocoderConfig, VocoderNoise, excitation
from rvc_reference.weight_norm import WNConv1d

SLOPE = 0.2
FIRST_CHANNELS = 16
LOWPASS_WIDTH = 64
ROLLOFF = 0.9475937167399596
BETA = 14.769656459379492


@lru_cache(maxsize=64)
def kaiser_kernel(old: int, new: int) -> tuple[Tensor, int]:
    """Give the taps ``[new, 1, 2 * width + old]`` float32 and ``width``.

    ``old`` and ``new`` are rates without a common divisor.
    """
    cutoff = min(old, new) * ROLLOFF
    width = ceil(LOWPASS_WIDTH * old / cutoff)
    taps = torch.arange(-width, width + old, dtype=torch.float64) / old
    phases = torch.arange(new, dtype=torch.float64)[:, None] / new
    t = ((taps - phases) * cutoff).clamp(-LOWPASS_WIDTH, LOWPASS_WIDTH)
    window = torch.i0(BETA * torch.sqrt(1 - (t / LOWPASS_WIDTH) ** 2))
    window = window / torch.i0(torch.tensor(BETA, dtype=torch.float64))
    kernel = torch.sinc(t) * window * (cutoff / old)
    return kernel.float()[:, None], width


def resample(x: Tensor, old: int, new: int) -> Tensor:
    """Resample ``[B, C, L]`` in time to ``[B, C, ceil(new * L / old)]``."""
    divisor = gcd(old, new)
    old, new = old // divisor, new // divisor
    if old == new:
        return x
    B, C, L = x.shape
    kernel, width = kaiser_kernel(old, new)
    padded = F.pad(x.reshape(B * C, 1, L), (width, width + old))
    y = F.conv1d(padded, kernel.to(x.device), stride=old)  # [B * C, new, blocks]
    return y.transpose(1, 2).reshape(B, C, -1)[..., : ceil(new * L / old)]


class MergedSource(nn.Module):
    """F0 to the excitation; F0 glides linearly between frames."""

    def __init__(self, upsample: int, sample_rate: int) -> None:
        super().__init__()
        self.upsample = upsample
        self.sample_rate = sample_rate
        self.merge = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Tanh())

    def forward(self, f0: Tensor, noise: VocoderNoise) -> Tensor:
        """Map ``[B, T]`` Hz to ``[B, 1, T * upsample]``."""
        length = f0.shape[1] * self.upsample
        glide = F.interpolate(f0.double()[:, None], size=length, mode="linear")
        glide = glide.transpose(1, 2)  # [B, L, 1]
        phase = torch.cumsum(glide / self.sample_rate, dim=1)
        voiced = (glide > 0).float()
        return self.merge(excitation(phase, voiced, noise)).transpose(1, 2)


class AdaIN(nn.Module):
    """Per-channel noise, then a leaky ReLU (what the name says it is, it is not)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), 1e-4))

    def forward(self, x: Tensor, noise: Tensor | None) -> Tensor:
        """Map ``[B, C, L]`` with noise ``[B, L, C]`` to ``[B, C, L]``."""
        if noise is not None:
            x = x + noise.transpose(1, 2) * self.weight[:, None]
        return F.leaky_relu(x, SLOPE)


class ParallelResBlock(nn.Module):
    """An input convolution and parallel branches of which the mean is taken."""

    def __init__(self, cin: int, cout: int, config: VocoderConfig) -> None:
        super().__init__()
        self.input_conv = nn.Conv1d(cin, cout, 7, padding=3)
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                [AdaIN(cout), ResBlock(cout, kernel, dilations, SLOPE), AdaIN(cout)]
            )
            for kernel, dilations in zip(
                config.block_kernels, config.dilations, strict=True
            )
        )

    def forward(self, x: Tensor, stage: int, adain: dict[str, Tensor]) -> Tensor:
        """Map ``[B, cin, L]`` to ``[B, cout, L]``."""
        x = self.input_conv(x)
        total = 0
        for branch, (before, block, after) in enumerate(self.blocks):
            name = f"adain.{stage}.{branch}"
            y = block(before(x, adain.get(f"{name}.0")))
            total = total + after(y, adain.get(f"{name}.2"))
        return total / len(self.blocks)


class RefineGAN(nn.Module):
    """Down path over the source, up path from the latent with skips."""

    harmonics = 1

    def __init__(self, config: VocoderConfig) -> None:
        super().__init__()
        self.rates = config.rates
        half = config.initial // 2
        self.m_source = MergedSource(config.upsample, config.sample_rate)
        self.pre_conv = WNConv1d(1, FIRST_CHANNELS, 7, padding=3)
        down = [FIRST_CHANNELS << stage for stage in range(len(config.rates) + 1)]
        self.downsample_blocks = nn.ModuleList(
            WNConv1d(a, b, 7, padding=3) for a, b in itertools.pairwise(down)
        )
        self.mel_conv = WNConv1d(config.channels, half, 7, padding=3)
        self.cond = nn.Conv1d(config.gin, half, 1)
        wide = [(half + down[-1]) >> stage for stage in range(len(config.rates) + 1)]
        self.upsample_conv_blocks = nn.ModuleList(
            ParallelResBlock(wide[stage] + down[-2 - stage], wide[stage + 1], config)
            for stage in range(len(config.rates))
        )
        self.conv_post = WNConv1d(wide[-1], 1, 7, padding=3, bias=False)

    def adain_shapes(self) -> dict[str, tuple[int, int]]:
        """Give name to (samples per frame, channels) of every AdaIN noise."""
        shapes = {}
        for stage, block in enumerate(self.upsample_conv_blocks):
            per_frame = prod(self.rates[: stage + 1])
            for branch in range(len(block.blocks)):
                for place in (0, 2):
                    name = f"adain.{stage}.{branch}.{place}"
                    shapes[name] = (per_frame, block.input_conv.out_channels)
        return shapes

    def _down(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for rate, block in zip(
            reversed(self.rates), self.downsample_blocks, strict=True
        ):
            x = F.leaky_relu(x, SLOPE)
            skips.append(x)
            x = block(resample(x, rate, 1))
        return x, skips

    def forward(self, z: Tensor, f0: Tensor, g: Tensor, noise: VocoderNoise) -> Tensor:
        """Map z ``[B, C, T]``, f0 ``[B, T]`` Hz, g ``[B, gin, 1]`` to ``[B, T * upsample]``."""
        x, skips = self._down(self.pre_conv(self.m_source(f0, noise)))
        x = torch.cat([self.mel_conv(z) + self.cond(g), x], dim=1)
        for stage, (rate, block) in enumerate(
            zip(self.rates, self.upsample_conv_blocks, strict=True)
        ):
            x = F.leaky_relu(x, SLOPE)
            x = F.interpolate(x, size=x.shape[-1] * rate, mode="linear")
            x = block(torch.cat([x, skips.pop()], dim=1), stage, noise.adain)
        return torch.tanh(self.conv_post(F.leaky_relu(x, SLOPE)))[:, 0]
