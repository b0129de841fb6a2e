"""Configuration of a voice: what its checkpoint says, by list and by tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

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
        values: dict[str, Any] = {
            item.name: _tupled(value)
            for item, value in zip(fields(cls)[:18], config, strict=True)
        }
        values["spk_embed_dim"] = tensors["emb_g.weight"].shape[0]
        values["sample_rate"] = int(values["sample_rate"])
        values["feature_size"] = tensors["enc_p.emb_phone.weight"].shape[1]
        values["f0"] = "enc_p.emb_pitch.weight" in tensors
        values["vocoder"] = _vocoder_of(tensors)
        result = cls(**values)
        if str(result.resblock) != "1":
            raise ValueError(f"resblock {result.resblock!r} is unknown; RVC has '1'")
        if result.samples_per_frame * 100 != result.sample_rate:
            raise ValueError(
                f"upsample rates {result.upsample_rates} make "
                f"{result.samples_per_frame * 100} Hz, its config says "
                f"{result.sample_rate} Hz"
            )
        return result


# Upsample rates of the public configurations, by upsampler taps and spectrogram bins.
_PUBLIC_RATES: dict[tuple[tuple[int, ...], int], tuple[int, ...]] = {
    ((16, 16, 4, 4, 4), 513): (10, 4, 2, 2, 2),
    ((16, 16, 4, 4, 4), 1025): (10, 6, 2, 2, 2),
    ((16, 16, 4, 4), 1025): (10, 10, 2, 2),
    ((20, 16, 4, 4), 513): (10, 8, 2, 2),
    ((24, 20, 4, 4), 1025): (12, 10, 2, 2),
    ((20, 12, 4, 4), 513): (10, 6, 2, 2),
}


def public_config(tensors: Mapping[str, np.ndarray]) -> list[Any]:
    """The ``config`` list of a training checkpoint, which does not store one.

    Args:
        tensors: state dict in torch layout, with ``enc_q``.

    Raises:
        ValueError: it matches none of RVC's configurations.
    """

    def shape(name: str) -> tuple[int, ...]:
        both = (
            f"{name}_v",
            f"{name.rsplit('.', 1)[0]}.parametrizations.weight.original1",
        )
        return next(tensors[n].shape for n in (name, *both) if n in tensors)

    ups = [n for n in tensors if n.startswith("dec.ups.") and n.endswith(".bias")]
    kernels = tuple(shape(f"dec.ups.{i}.weight")[2] for i in range(len(ups)))
    bins = tensors["enc_q.pre.weight"].shape[1] if "enc_q.pre.weight" in tensors else 0
    rates = _PUBLIC_RATES.get((kernels, bins))
    if rates is None:
        raise ValueError(
            f"a training checkpoint with upsampler taps {kernels} and {bins} "
            "spectrogram bins; this is none of RVC's configurations"
        )
    hidden, _, _ = tensors["enc_p.proj.weight"].shape
    inner, _, taps = tensors["enc_p.encoder.ffn_layers.0.conv_1.weight"].shape
    layers = sum(
        name.endswith("conv_1.weight") for name in tensors if "ffn_lay" in name
    )
    width = tensors["enc_p.encoder.attn_layers.0.emb_rel_k"].shape[2]
    first = [bins, 32, hidden // 2, tensors["enc_p.emb_phone.weight"].shape[0], inner]
    heads = first[3] // width
    second = [heads, layers, taps, 0, "1", [3, 7, 11], [[1, 3, 5]] * 3, list(rates)]
    speakers, gin = tensors["emb_g.weight"].shape
    initial = tensors["dec.conv_pre.bias"].shape[0]
    rate = 100 * math.prod(rates)
    return [*first, *second, initial, list(kernels), speakers, gin, rate]


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
