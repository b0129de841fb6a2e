"""A voice: text encoder, flow and vocoder, built from what its checkpoint says.

Source: RVC ``SynthesizerTrnMs256NSFsid`` / ``SynthesizerTrnMs768NSFsid`` and their
variants without pitch; Applio's ``Synthesizer``.
"""

from __future__ import annotations

from collections.abc import Mapping

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
from rvc_mlx.models.voice_config import SynthesizerConfig


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
        self.flow: nn.Module = ResidualCouplingFlow(
            config.inter_channels, config.hidden_channels, config.gin_channels
        )
        self.dec = build_vocoder(config)
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


def build_vocoder(config: SynthesizerConfig) -> nn.Module:
    """The vocoder that a configuration names.

    Raises:
        ValueError: a voice without F0 names one that needs it.
    """
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
