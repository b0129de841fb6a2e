"""The RVC synthesizer: text encoder, prior, inverse flow, vocoder.

Key names equal those of public voices (``enc_p``, ``flow``, ``dec``, ``emb_g`` and,
in training checkpoints, ``enc_q``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rvc_reference.modules import Flow, PosteriorEncoder, TextEncoder
from rvc_reference.noise import Noise
from rvc_reference.refinegan import RefineGAN
from rvc_reference.vocoders import (
    HiFiGAN,
    MRFHiFiGAN,
    NSFHiFiGAN,
    VocoderConfig,
    VocoderNoise,
)
from rvc_reference.weight_norm import fuse_weight_norm

PRIOR_SCALE = 0.66666
FEATURES = {"v1": 256, "v2": 768}
VOCODERS = {"HiFi-GAN": NSFHiFiGAN, "MRF HiFi-GAN": MRFHiFiGAN, "RefineGAN": RefineGAN}
CONFIG_NAMES = (
    "spec_channels",
    "segment_size",
    "inter_channels",
    "hidden_channels",
    "filter_channels",
    "n_heads",
    "n_layers",
    "kernel_size",
    "p_dropout",
    "resblock",
    "resblock_kernel_sizes",
    "resblock_dilation_sizes",
    "upsample_rates",
    "upsample_initial_channel",
    "upsample_kernel_sizes",
    "spk_embed_dim",
    "gin_channels",
    "sr",
)


def detect(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read version, f0, vocoder, with_enc_q and speaker count off the tensors."""
    widths = {width: version for version, width in FEATURES.items()}
    vocoder = "HiFi-GAN"
    if any(key.startswith("dec.mrfs.") for key in weights):
        vocoder = "MRF HiFi-GAN"
    if any(key.startswith("dec.upsample_conv_blocks.") for key in weights):
        vocoder = "RefineGAN"
    return {
        "version": widths[weights["enc_p.emb_phone.weight"].shape[1]],
        "f0": "enc_p.emb_pitch.weight" in weights,
        "vocoder": vocoder,
        "with_enc_q": "enc_q.pre.weight" in weights,
        "speakers": weights["emb_g.weight"].shape[0],
    }


def vocoder_config(c: Mapping[str, Any]) -> VocoderConfig:
    """Give the vocoder's sizes of a config with the names of ``CONFIG_NAMES``."""
    return VocoderConfig(
        c["inter_channels"],
        c["upsample_initial_channel"],
        tuple(c["upsample_rates"]),
        tuple(c["upsample_kernel_sizes"]),
        tuple(c["resblock_kernel_sizes"]),
        tuple(map(tuple, c["resblock_dilation_sizes"])),
        c["gin_channels"],
        c["sr"],
    )


class Synthesizer(nn.Module):
    """A voice.

    Args:
        config: the list of 18 of a checkpoint.
        version: "v1" (256 features) or "v2" (768).
        f0: whether the voice takes pitch.
        vocoder: "HiFi-GAN", "MRF HiFi-GAN" or "RefineGAN".
        with_enc_q: whether there is the posterior encoder of training checkpoints.
        speakers: rows of ``emb_g``; None takes the config's entry.
    """

    def __init__(
        self,
        config: Sequence,
        version: str = "v2",
        f0: bool = True,
        vocoder: str = "HiFi-GAN",
        with_enc_q: bool = False,
        speakers: int | None = None,
    ) -> None:
        super().__init__()
        if len(config) != len(CONFIG_NAMES):
            raise ValueError(
                f"config has {len(config)} entries; expected {len(CONFIG_NAMES)}"
            )
        if vocoder not in VOCODERS or (vocoder != "HiFi-GAN" and not f0):
            raise ValueError(
                f"vocoder {vocoder!r} with f0={f0}; expected one of {list(VOCODERS)}"
            )
        c = dict(zip(CONFIG_NAMES, config, strict=True))
        self.version = version
        self.f0 = f0
        self.inter, self.sample_rate = c["inter_channels"], c["sr"]
        self.vocoder_config = vocoder_config(c)
        self.enc_p = TextEncoder(
            FEATURES[version],
            self.inter,
            hidden=c["hidden_channels"],
            inner=c["filter_channels"],
            heads=c["n_heads"],
            layers=c["n_layers"],
            kernel=c["kernel_size"],
            f0=f0,
        )
        self.dec = (VOCODERS[vocoder] if f0 else HiFiGAN)(self.vocoder_config)
        if with_enc_q:
            self.enc_q = PosteriorEncoder(
                c["spec_channels"], self.inter, c["hidden_channels"], c["gin_channels"]
            )
        self.flow = Flow(self.inter, c["hidden_channels"], c["gin_channels"])
        self.emb_g = nn.Embedding(speakers or c["spk_embed_dim"], c["gin_channels"])

    @property
    def upsample(self) -> int:
        """Samples per frame (100 frames per second)."""
        return self.vocoder_config.upsample

    def fuse(self) -> None:
        """Compute every weight-normed weight once, for inference."""
        fuse_weight_norm(self)

    def speaker(self, sid: int | Tensor) -> Tensor:
        """Give the speaker's condition ``[B, gin]`` of an id or of ids ``[B]``."""
        ids = torch.as_tensor(sid, device=self.emb_g.weight.device).reshape(-1)
        return self.emb_g(ids)

    def encode_text(self, phone: Tensor, pitch: Tensor | None) -> tuple[Tensor, Tensor]:
        """Give the prior's m and logs, each ``[B, T, inter]``.

        Args:
            phone: ``[B, T, 256|768]`` float32 at 100 Hz.
            pitch: ``[B, T]`` int64 in 1..255, or None for a voice without F0.
        """
        m, logs = self.enc_p(phone, pitch)
        return m.transpose(1, 2), logs.transpose(1, 2)

    def prior(self, m: Tensor, logs: Tensor, g: Tensor, noise: Tensor | None) -> Tensor:
        """Draw from the prior and run the inverse flow.

        Args:
            m: ``[B, T, inter]``.
            logs: ``[B, T, inter]``.
            g: ``[B, gin]``.
            noise: standard normal ``[B, T, inter]``; None counts as zeros.

        Returns:
            The latent z ``[B, T, inter]``.
        """
        z = m if noise is None else m + torch.exp(logs) * noise * PRIOR_SCALE
        return self.flow.inverse(z.transpose(1, 2), g[..., None]).transpose(1, 2)

    def decode(
        self,
        z: Tensor,
        f0: Tensor | None,
        g: Tensor,
        source_noise: Tensor | None = None,
        source_phase: Tensor | None = None,
        adain: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Run the vocoder.

        Args:
            z: ``[B, T, inter]``.
            f0: ``[B, T]`` float32 in Hz, 0 where unvoiced; None without F0.
            g: ``[B, gin]``.
            source_noise: ``[B, T * upsample, H]``; None counts as zeros.
            source_phase: ``[B, H]`` in cycles; None counts as zeros.
            adain: name to ``[B, L_stage, C]``; missing names count as zeros.

        Returns:
            Waveform ``[B, T * upsample]`` in -1..1.
        """
        noise = VocoderNoise(source_noise, source_phase, adain or {})
        return self.dec(z.transpose(1, 2), f0, g[..., None], noise)

    def infer(
        self,
        phone: Tensor,
        pitch: Tensor | None,
        f0: Tensor | None,
        sid: int | Tensor,
        prior_noise: Tensor | None = None,
        noise: VocoderNoise | None = None,
    ) -> Tensor:
        """Give the waveform ``[B, T * upsample]``; arguments as in the stages."""
        noise = noise or VocoderNoise()
        g = self.speaker(sid)
        z = self.prior(*self.encode_text(phone, pitch), g, prior_noise)
        return self.decode(z, f0, g, noise.source, noise.phase, noise.adain)

    def draw(
        self, noise: Noise, segment: int, frames: int
    ) -> tuple[Tensor, VocoderNoise]:
        """Ask a noise object for everything that ``infer`` needs for one segment.

        Returns:
            Prior noise ``[1, frames, inter]`` and the vocoder's noise.
        """

        def normal(name: str, per_frame: int, channels: int) -> Tensor:
            values = noise.normal(name, segment, 0, frames, per_frame, channels)
            return torch.from_numpy(np.ascontiguousarray(values))[None]

        prior = normal("prior", 1, self.inter)
        if not self.f0:
            return prior, VocoderNoise()
        harmonics = self.dec.harmonics
        phase = torch.from_numpy(noise.uniform("phase", segment, harmonics))[None]
        shapes = self.dec.adain_shapes() if isinstance(self.dec, RefineGAN) else {}
        adain = {name: normal(name, *shape) for name, shape in shapes.items()}
        return prior, VocoderNoise(
            normal("source", self.upsample, harmonics), phase, adain
        )
