"""A voice: text encoder, flow and vocoder, built from what its checkpoint says.

Source: RVC ``SynthesizerTrnMs256NSFsid`` / ``SynthesizerTrnMs768NSFsid`` and their
variants without pitch; Applio's ``Synthesizer``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from rvc_mlx.models.nsf_hifigan import Generator, MRFGenerator, NSFGenerator
from rvc_mlx.models.refinegan import RefineGANGenerator
from rvc_mlx.models.vits import (
    PRIOR_NOISE_SCALE,
    ResidualCouplingFlow,
    TextEncoder,
)

VOCODERS = ("HiFi-GAN", "MRF HiFi-GAN", "RefineGAN")


@dataclass(frozen=True)
class SynthesizerConfig:
    """The 18 entries of RVC's ``config`` list, in its order, and what the tensors say.

    Attributes:
        spec_channels: bins of the training spectrogram.
        segment_size: training segment in frames; unused at inference.
        inter_channels: width of the latent.
        hidden_channels: width of text encoder and flow.
        filter_channels: width inside the feed-forward blocks.
        n_heads: attention heads.
        n_layers: text encoder layers.
        kernel_size: taps of the feed-forward convolutions.
        p_dropout: training dropout.
        resblock: kind of residual block; RVC knows ``"1"`` only.
        resblock_kernel_sizes: taps of each residual branch.
        resblock_dilation_sizes: dilations of each residual branch.
        upsample_rates: samples per sample of each stage; the product is one frame.
        upsample_initial_channel: channels before the first stage.
        upsample_kernel_sizes: taps of the upsamplers.
        spk_embed_dim: speakers (rows of ``emb_g``).
        gin_channels: width of a speaker embedding.
        sample_rate: of the output, Hz.
        feature_size: width of the content features, 256 (v1) or 768 (v2).
        f0: whether the voice takes pitch.
        vocoder: one of ``VOCODERS``.
    """

    spec_channels: int
    segment_size: int
    inter_channels: int
    hidden_channels: int
    filter_channels: int
    n_heads: int
    n_layers: int
    kernel_size: int
    p_dropout: float
    resblock: str
    resblock_kernel_sizes: tuple[int, ...]
    resblock_dilation_sizes: tuple[tuple[int, ...], ...]
    upsample_rates: tuple[int, ...]
    upsample_initial_channel: int
    upsample_kernel_sizes: tuple[int, ...]
    spk_embed_dim: int
    gin_channels: int
    sample_rate: int
    feature_size: int = 768
    f0: bool = True
    vocoder: str = "HiFi-GAN"

    @property
    def version(self) -> str:
        """``"v1"`` (features of layer 9, projected) or ``"v2"`` (last layer)."""
        return "v1" if self.feature_size == 256 else "v2"

    @property
    def samples_per_frame(self) -> int:
        """Output samples per 10 ms frame."""
        return math.prod(self.upsample_rates)

    def as_list(self) -> list[Any]:
        """The checkpoint's ``config`` list."""
        values = [getattr(self, field.name) for field in fields(self)[:18]]
        return [_listed(value) for value in values]

    @classmethod
    def from_tensors(
        cls, config: list[Any], tensors: Mapping[str, np.ndarray]
    ) -> SynthesizerConfig:
        """Join a checkpoint's ``config`` list with what its tensors say.

        The tensors win where both speak: speakers, feature width, pitch, vocoder.

        Args:
            config: 18 entries.
            tensors: sanitized state dict in torch layout.

        Raises:
            ValueError: the list has another length, or the network is of a kind that
                RVC does not have.
        """
        if len(config) != 18:
            raise ValueError(
                f"its config has {len(config)} entries, RVC voices have 18; it is a "
                "voice of another program"
            )
        values = [_tupled(value) for value in config]
        values[15], values[17] = tensors["emb_g.weight"].shape[0], int(values[17])
        result = cls(
            *values,
            feature_size=tensors["enc_p.emb_phone.weight"].shape[1],
            f0="enc_p.emb_pitch.weight" in tensors,
            vocoder=_vocoder_of(tensors),
        )
        if str(result.resblock) != "1":
            raise ValueError(f"resblock {result.resblock!r} is unknown; RVC has '1'")
        if result.samples_per_frame * 100 != result.sample_rate:
            raise ValueError(
                f"upsample rates {result.upsample_rates} make "
                f"{result.samples_per_frame * 100} Hz, its config says "
                f"{result.sample_rate} Hz"
            )
        return result


def _tupled(value: Any) -> Any:
    return (
        tuple(_tupled(v) for v in value) if isinstance(value, list | tuple) else value
    )


def _listed(value: Any) -> Any:
    return [_listed(v) for v in value] if isinstance(value, tuple) else value


def _vocoder_of(tensors: Mapping[str, np.ndarray]) -> str:
    if any(name.startswith("dec.mrfs.") for name in tensors):
        return "MRF HiFi-GAN"
    if any(name.startswith("dec.upsample_conv_blocks.") for name in tensors):
        return "RefineGAN"
    return "HiFi-GAN"


class Synthesizer(nn.Module):
    """Content features, pitch and speaker to audio, in three pure steps.

    ``prior`` (text encoder and inverse flow), ``dec.m_source`` (excitation) and ``dec``
    (vocoder) are separate because each back end runs them at its own precision and
    window length. All randomness is an argument.
    """

    def __init__(self, config: SynthesizerConfig):
        super().__init__()
        self.config = config
        self.enc_p = TextEncoder(
            config.feature_size,
            config.inter_channels,
            config.hidden_channels,
            config.filter_channels,
            config.n_heads,
            config.n_layers,
            config.kernel_size,
            config.f0,
        )
        self.flow = ResidualCouplingFlow(
            config.inter_channels, config.hidden_channels, config.gin_channels
        )
        self.dec = _build_vocoder(config)
        self.emb_g = nn.Embedding(config.spk_embed_dim, config.gin_channels)

    def prior(
        self,
        features: mx.array,
        noise: mx.array,
        g: mx.array,
        pitch: mx.array | None = None,
    ) -> mx.array:
        """Sample the prior and invert the flow.

        Args:
            features: ``[B, T, feature_size]`` at 100 frames per second.
            noise: standard normal ``[B, T, inter_channels]``.
            g: speaker embedding ``[B, 1, gin_channels]``.
            pitch: coarse pitch ``[B, T]`` int32 in 1..255, None without F0.

        Returns:
            Latent ``[B, T, inter_channels]``.
        """
        mean, log_std = self.enc_p(features, pitch)
        z = mean + mx.exp(log_std) * noise * PRIOR_NOISE_SCALE
        return self.flow(z, g, reverse=True)


def _build_vocoder(config: SynthesizerConfig) -> nn.Module:
    if not config.f0:
        if config.vocoder != "HiFi-GAN":
            raise ValueError(
                f"a voice without F0 cannot have a {config.vocoder} vocoder"
            )
        return Generator(config)
    kinds = {
        "HiFi-GAN": NSFGenerator,
        "MRF HiFi-GAN": MRFGenerator,
        "RefineGAN": RefineGANGenerator,
    }
    return kinds[config.vocoder](config)


def sanitize(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Drop the posterior encoder, which is for training only; names stay."""
    return {
        name: value for name, value in tensors.items() if not name.startswith("enc_q.")
    }


def is_voice(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether a state dict is an RVC synthesizer, with or without ``enc_q``."""
    return "enc_p.emb_phone.weight" in tensors and "emb_g.weight" in tensors
