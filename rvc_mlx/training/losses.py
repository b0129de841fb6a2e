"""Spectrograms and losses of training, all in float32.

Source: RVC ``mel_processing.py`` (spectrum and mel) and ``losses.py``; Mao et al. 2017
(least squares GAN), Kim et al. 2021 (KL of VITS), Kumar et al. 2023 (multi-scale mel).
"""

from __future__ import annotations

import math
from functools import cache

import mlx.core as mx
import numpy as np

from rvc_mlx.spectral import hann_window, triangles
from rvc_mlx.training.presets import TrainingConfig

FEATURE_WEIGHT = 2.0  # of the feature matching loss
# Of the multi-scale mel loss: Applio has a third of the sum of seven decimal logarithms.
_SCALES_WEIGHT = 7 / 3 / math.log(10)

# Feature maps of every discriminator, the output last.
Maps = list[list[mx.array]]


@cache
def slaney_filters(
    sample_rate: int, n_fft: int, n_mels: int, fmin: float, fmax: float | None
) -> np.ndarray:
    """Triangular mel filters on Slaney's scale, each of unit area.

    The scale is linear to 1 kHz (15 mel) and logarithmic above. ``spectral.mel_filters``
    are those of RMVPE, on the HTK scale.

    Returns:
        ``[n_fft // 2 + 1, n_mels]`` float32, to be applied to magnitudes.

    Source: librosa ``filters.mel`` with its defaults.
    """
    step = math.log(6.4) / 27

    def to_mel(hz: float) -> float:
        return hz * 3 / 200 if hz < 1000 else 15 + math.log(hz / 1000) / step

    mels = np.linspace(to_mel(fmin), to_mel(fmax or sample_rate / 2), n_mels + 2)
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp((mels - 15) * step))
    return triangles(edges, sample_rate, n_fft)


def _window(config: TrainingConfig) -> np.ndarray:
    """Hann window of ``win`` samples in the middle of ``n_fft``."""
    before = (config.n_fft - config.win) // 2
    after = config.n_fft - config.win - before
    return np.pad(hann_window(config.win), (before, after)).astype(np.float32)


def spectrogram(wave: mx.array, config: TrainingConfig) -> mx.array:
    """Magnitude spectra as the original takes them: reflected ends, not centred.

    Frame t holds the samples around ``t * hop .. (t + 1) * hop``::

        |<- (n_fft - hop) / 2 ->|<- hop ->|<- (n_fft - hop) / 2 ->|

    Args:
        wave: ``[B, L]`` float32, L more than ``(n_fft - hop) / 2``.
        config: sizes and epsilon.

    Returns:
        ``[B, L // hop, n_fft // 2 + 1]`` float32, at least ``sqrt(epsilon)``.
    """
    margin = (config.n_fft - config.hop) // 2
    return _magnitudes(
        wave, _window(config), config.hop, margin, config.spectrum_epsilon
    )


def _magnitudes(
    wave: mx.array, window: np.ndarray, hop: int, margin: int, epsilon: float
) -> mx.array:
    """Spectra of a wave that is reflected by ``margin`` samples at both ends."""
    n_fft = len(window)
    padded = mx.pad(wave, [(0, 0), (margin, margin)], mode="reflect")
    frames = (padded.shape[1] - n_fft) // hop + 1
    # Blocks of one hop, of which each frame takes consecutive ones: contiguous copies.
    blocks = -(-n_fft // hop)
    wanted = (frames + blocks - 1) * hop
    padded = mx.pad(padded, [(0, 0), (0, max(0, wanted - padded.shape[1]))])
    rows = padded[:, :wanted].reshape(wave.shape[0], -1, hop)
    parts = [rows[:, k : k + frames] for k in range(blocks)]
    framed = mx.concatenate(parts, axis=-1)[..., :n_fft]
    spectrum = mx.fft.rfft(framed * mx.array(window), axis=-1)
    power = mx.square(spectrum.real) + mx.square(spectrum.imag)
    return mx.sqrt(power + epsilon)


def log_mel(spectra: mx.array, config: TrainingConfig) -> mx.array:
    """Natural logarithm of mel magnitudes.

    Args:
        spectra: magnitudes ``[B, T, n_fft // 2 + 1]`` float32.
        config: bands and floor.

    Returns:
        ``[B, T, n_mels]`` float32.
    """
    return _log_bands(spectra, config.n_fft, config.n_mels, config)


def _log_bands(
    spectra: mx.array, n_fft: int, bands: int, config: TrainingConfig
) -> mx.array:
    rate = config.model.sample_rate
    filters = slaney_filters(rate, n_fft, bands, config.mel_fmin, config.mel_fmax)
    return mx.log(mx.maximum(spectra @ mx.array(filters), config.log_floor))


def mel_loss(real: mx.array, fake: mx.array) -> mx.array:
    """Mean absolute difference of two log-mels."""
    return mx.mean(mx.abs(real - fake))


def multiscale_mel_loss(
    real: mx.array, fake: mx.array, config: TrainingConfig
) -> mx.array:
    """Distance of two waves in the log-mels of ``config.mel_scales``.

    For Applio's seven windows, from 32 to 2048 samples, it is Applio's loss: a third of
    the sum of the mean absolute differences of decimal logarithms. For others it is as
    large: their mean is weighted in place of that of seven.

    Args:
        real: ``[B, L]`` float32, L more than half the longest window.
        fake: ``[B, L]`` float32.
        config: sample rate, frequency range, floor and epsilon.

    Source: Applio ``MultiScaleMelSpectrogramLoss``, after the Descript Audio Codec.
    """
    distances = [
        mel_loss(*(_scale(wave, bands, size, config) for wave in (real, fake)))
        for bands, size in config.mel_scales
    ]
    return mx.mean(mx.stack(distances)) * _SCALES_WEIGHT


def _scale(wave: mx.array, bands: int, size: int, config: TrainingConfig) -> mx.array:
    """Natural log-mel of windows a quarter of their size apart, the first around 0."""
    window = hann_window(size).astype(np.float32)
    spectra = _magnitudes(wave, window, size // 4, size // 2, config.spectrum_epsilon)
    return _log_bands(spectra, size, bands, config)


def discriminator_loss(real: Maps, fake: Maps) -> mx.array:
    """Least squares: real to 1, fake to 0; summed over discriminators."""
    terms = [
        mx.mean(mx.square(1 - _f32(r[-1]))) + mx.mean(mx.square(_f32(f[-1])))
        for r, f in zip(real, fake, strict=True)
    ]
    return mx.sum(mx.stack(terms))


def adversarial_loss(fake: Maps) -> mx.array:
    """Least squares: fake to 1; summed over discriminators."""
    return mx.sum(mx.stack([mx.mean(mx.square(1 - _f32(f[-1]))) for f in fake]))


def feature_loss(real: Maps, fake: Maps) -> mx.array:
    """Twice the mean absolute difference of each feature map, summed over all.

    The real side is a target: no gradient flows into it.
    """
    terms = [
        mx.mean(mx.abs(_f32(mx.stop_gradient(r)) - _f32(f)))
        for real_maps, fake_maps in zip(real, fake, strict=True)
        for r, f in zip(real_maps, fake_maps, strict=True)
    ]
    return FEATURE_WEIGHT * mx.sum(mx.stack(terms))


def kl_loss(
    z_p: mx.array,
    logs_q: mx.array,
    m_p: mx.array,
    logs_p: mx.array,
    mask: mx.array,
) -> mx.array:
    """KL divergence of posterior and prior, by the drawn sample.

    Args:
        z_p: the posterior's sample through the flow, ``[B, T, C]``.
        logs_q: log deviation of the posterior, ``[B, T, C]``.
        m_p: mean of the prior, ``[B, T, C]``.
        logs_p: log deviation of the prior, ``[B, T, C]``.
        mask: 1 on real frames, ``[B, T, 1]`` float32.

    Returns:
        Sum over channels, mean over real frames.
    """
    z_p, logs_q, m_p, logs_p = map(_f32, (z_p, logs_q, m_p, logs_p))
    kl = logs_p - logs_q - 0.5 + 0.5 * mx.square(z_p - m_p) * mx.exp(-2 * logs_p)
    return mx.sum(kl * mask) / mx.sum(mask)


def _f32(x: mx.array) -> mx.array:
    return x.astype(mx.float32)
