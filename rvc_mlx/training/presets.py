"""What a training run is made of: the voice's sizes, its spectrograms, its discriminator.

Source: the JSON configurations of RVC (``configs/v1``, ``configs/v2``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rvc_mlx.models.voice_config import VOCODERS, SynthesizerConfig

PERIODS = {"v1": (2, 3, 5, 7, 11, 17), "v2": (2, 3, 5, 7, 11, 17, 23, 37)}
# Bands and window, in samples, of each spectrogram of Applio's multi-scale mel loss.
MEL_SCALES = (
    (5, 32), (10, 64), (20, 128), (40, 256), (80, 512), (160, 1024), (320, 2048),
)  # fmt: skip
FEATURE_SIZES = {"v1": 256, "v2": 768}


@dataclass(frozen=True)
class TrainingConfig:
    """One training run's sizes and weights; ``dataclasses.asdict`` gives plain data.

    Attributes:
        model: the voice, with ``enc_q``'s ``spec_channels = n_fft // 2 + 1``.
        n_fft: samples of a spectrum.
        hop: samples per frame (10 ms).
        win: samples of the Hann window, at most ``n_fft``.
        n_mels: bands of the mel loss.
        mel_fmin: lowest mel band, Hz.
        mel_fmax: highest mel band, Hz; None for half the sample rate.
        segment_frames: frames that the vocoder decodes of each item.
        discriminator: ``"v1"`` (6 periods) or ``"v2"`` (8).
        discriminator_width: channels of a period discriminator's first layer; 32 in RVC.
        log_floor: smallest mel magnitude before the logarithm.
        spectrum_epsilon: added to the power before the square root.
        mel_weight: weight of the mel loss.
        kl_weight: weight of the KL loss.
        prior_share: share of each batch that is spoken from the prior, see
            ``forward.generate``, 0 to 1; 0 in RVC.
        mel_scales: bands and window in samples of several spectrograms that are
            compared in place of the one, see ``losses.multiscale_mel_loss``; the windows
            are multiples of 4. None in RVC.
        content_weight: weight of the content loss, see ``listener``; 0 in RVC.
    """

    model: SynthesizerConfig
    n_fft: int
    hop: int
    win: int
    n_mels: int
    mel_fmin: float
    mel_fmax: float | None
    segment_frames: int
    discriminator: str = "v2"
    discriminator_width: int = 32
    log_floor: float = 1e-5
    spectrum_epsilon: float = 1e-6
    mel_weight: float = 45.0
    kl_weight: float = 1.0
    prior_share: float = 0.0
    mel_scales: tuple[tuple[int, int], ...] = ()
    content_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.model.vocoder == "RefineGAN":
            raise ValueError(
                "a RefineGAN voice cannot be trained: it needs another discriminator "
                'and mel loss; train vocoder "HiFi-GAN" or "MRF HiFi-GAN"'
            )
        if not 0 <= self.prior_share <= 1:
            raise ValueError(f"prior_share is {self.prior_share}; expected 0 to 1")
        if not 0 <= self.content_weight < math.inf:
            raise ValueError(
                f"content_weight is {self.content_weight}; expected 0 or more"
            )
        _check_scales(self.mel_scales, self.segment_samples)
        if self.discriminator not in PERIODS:
            raise ValueError(
                f"discriminator {self.discriminator!r} is unknown; expected 'v1' or 'v2'"
            )
        if self.model.spec_channels != self.n_fft // 2 + 1:
            raise ValueError(
                f"the voice takes {self.model.spec_channels} spectrogram bins, n_fft "
                f"{self.n_fft} makes {self.n_fft // 2 + 1}; they must agree"
            )
        if self.hop != self.model.samples_per_frame:
            raise ValueError(
                f"hop {self.hop} is not the product {self.model.samples_per_frame} of "
                "the upsample rates; they must agree"
            )

    @property
    def segment_samples(self) -> int:
        """Samples that the vocoder makes of each item."""
        return self.segment_frames * self.hop

    @property
    def periods(self) -> tuple[int, ...]:
        """Periods of the period discriminators, in samples."""
        return PERIODS[self.discriminator]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingConfig:
        """The inverse of ``dataclasses.asdict``, also after a way through JSON."""
        model = {name: _tupled(value) for name, value in values["model"].items()}
        scales = _tupled(values.get("mel_scales", ()))
        voice = SynthesizerConfig(**model)
        return cls(**{**values, "model": voice, "mel_scales": scales})


def _check_scales(scales: Sequence[Any], segment: int) -> None:
    """Raise ValueError for scales of the mel loss that no segment can be compared in."""
    for scale in scales:
        fits = isinstance(scale, Sequence) and len(scale) == 2
        fits = fits and all(isinstance(n, int) and n > 0 for n in scale)
        if not fits or scale[1] % 4:
            raise ValueError(
                f"mel_scales has {scale!r}; expected pairs of bands and window, the "
                "window a multiple of 4 samples"
            )
        if scale[1] // 2 >= segment:
            raise ValueError(
                f"a segment has {segment} samples; a mel loss with windows of {scale[1]} "
                f"needs more than {scale[1] // 2}: raise segment_frames"
            )


@dataclass(frozen=True)
class _Geometry:
    """The numbers in which the public configurations differ."""

    sample_rate: int
    n_fft: int
    n_mels: int
    segment_frames: int
    rates: tuple[int, ...]
    kernels: tuple[int, ...]


_GEOMETRIES = {
    ("32k", "v1"): _Geometry(
        32000, 1024, 80, 40, (10, 4, 2, 2, 2), (16, 16, 4, 4, 4)
    ),
    ("40k", "v1"): _Geometry(40000, 2048, 125, 32, (10, 10, 2, 2), (16, 16, 4, 4)),
    ("48k", "v1"): _Geometry(
        48000, 2048, 128, 24, (10, 6, 2, 2, 2), (16, 16, 4, 4, 4)
    ),
    ("32k", "v2"): _Geometry(32000, 1024, 80, 40, (10, 8, 2, 2), (20, 16, 4, 4)),
    ("40k", "v2"): _Geometry(40000, 2048, 125, 32, (10, 10, 2, 2), (16, 16, 4, 4)),
    ("48k", "v2"): _Geometry(48000, 2048, 128, 36, (12, 10, 2, 2), (24, 20, 4, 4)),
}  # fmt: skip

# Latent, hidden, feed-forward, layers, vocoder, speaker embedding, discriminator.
_FULL = (192, 192, 768, 6, 512, 256, 32)
_SMALL = (64, 64, 256, 6, 256, 128, 16)


def preset(
    name: str,
    version: str,
    f0: bool,
    speakers: int,
    feature_size: int | None = None,
    vocoder: str = "HiFi-GAN",
) -> TrainingConfig:
    """A public configuration, or ``"small"``: a 32 kHz voice of narrow channels.

    Args:
        name: ``"32k"``, ``"40k"``, ``"48k"`` or ``"small"``.
        version: ``"v1"`` or ``"v2"``: feature width, periods and, at 32k and 48k, rates.
        f0: whether the voice takes pitch.
        speakers: rows of ``emb_g``; the public pretrained files have 109.
        feature_size: width of the content features; None for the version's.
        vocoder: ``"HiFi-GAN"`` or ``"MRF HiFi-GAN"`` (with pitch only).

    Raises:
        ValueError: an argument is none of these.
    """
    geometry = _GEOMETRIES.get(("32k" if name == "small" else name, version))
    if geometry is None:
        raise ValueError(
            f"preset {name!r} of version {version!r} is unknown; expected 32k, 40k, 48k "
            "or small, and v1 or v2"
        )
    if speakers < 1:
        raise ValueError(f"{speakers} speakers given; expected at least 1")
    if vocoder not in VOCODERS or (vocoder != "HiFi-GAN" and not f0):
        raise ValueError(
            f"vocoder {vocoder!r} with f0={f0} is impossible; without F0 there is "
            "'HiFi-GAN' only, with F0 also 'MRF HiFi-GAN'"
        )
    inter, hidden, inner, layers, initial, gin, width = (
        _SMALL if name == "small" else _FULL
    )
    model = SynthesizerConfig(
        spec_channels=geometry.n_fft // 2 + 1,
        segment_size=geometry.segment_frames,
        inter_channels=inter,
        hidden_channels=hidden,
        filter_channels=inner,
        n_heads=2,
        n_layers=layers,
        kernel_size=3,
        p_dropout=0,
        resblock="1",
        resblock_kernel_sizes=(3, 7, 11),
        resblock_dilation_sizes=((1, 3, 5),) * 3,
        upsample_rates=geometry.rates,
        upsample_initial_channel=initial,
        upsample_kernel_sizes=geometry.kernels,
        spk_embed_dim=speakers,
        gin_channels=gin,
        sample_rate=geometry.sample_rate,
        feature_size=feature_size or FEATURE_SIZES[version],
        f0=f0,
        vocoder=vocoder,
    )
    return TrainingConfig(
        model=model,
        n_fft=geometry.n_fft,
        hop=model.samples_per_frame,
        win=geometry.n_fft,
        n_mels=geometry.n_mels,
        mel_fmin=0.0,
        mel_fmax=None,
        segment_frames=geometry.segment_frames,
        discriminator=version,
        discriminator_width=width,
    )


def _tupled(value: Any) -> Any:
    return tuple(map(_tupled, value)) if isinstance(value, list | tuple) else value
