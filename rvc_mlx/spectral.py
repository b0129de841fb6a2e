"""Spectrograms: short-time Fourier transform and the log-mel input of RMVPE."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import scipy.fft

from rvc_mlx.audio import SAMPLE_RATE
from rvc_mlx.machine import processors

N_FFT = 1024  # samples, also the window length
HOP_LENGTH = 160  # samples: 100 frames per second
F_MIN, F_MAX = 30.0, 8000.0  # Hz, range of the mel bands
LOG_FLOOR = 1e-5  # smallest mel magnitude before the logarithm

_FRAMES_PER_BLOCK = 256  # frames transformed at once: 2 MiB of windows
_MOST_THREADS = 8


@cache
def hann_window(n: int) -> np.ndarray:
    """Periodic Hann window ``[n]`` float64."""
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n) / n)


def triangles(edges: np.ndarray, sample_rate: int, n_fft: int) -> np.ndarray:
    """Triangular filters of unit area, each from one edge to the next but one.

    Args:
        edges: ``[bands + 2]`` float64 in Hz, rising.
        sample_rate: Hz.
        n_fft: samples of the transform.

    Returns:
        ``[n_fft // 2 + 1, bands]`` float32, to be applied to magnitudes.
    """
    ramps = edges[:, None] - np.linspace(0, sample_rate / 2, n_fft // 2 + 1)
    width = np.diff(edges)[:, None]
    rising, falling = -ramps[:-2] / width[:-1], ramps[2:] / width[1:]
    area = 2 / (edges[2:] - edges[:-2])[:, None]
    weights = np.maximum(0, np.minimum(rising, falling)) * area
    return np.ascontiguousarray(weights.T.astype(np.float32))


@cache
def mel_filters(n_mels: int) -> np.ndarray:
    """Triangular mel filters, HTK frequency scale, each of unit area ("slaney" norm).

    Returns:
        ``[n_fft // 2 + 1, n_mels]`` float64 of float32 values, to be applied to magnitudes.

    Source: librosa ``filters.mel`` with ``htk=True`` and its default norm.
    """
    low, high = 2595 * np.log10(1 + np.array([F_MIN, F_MAX]) / 700)
    edges = 700 * (10 ** (np.linspace(low, high, n_mels + 2) / 2595) - 1)
    return triangles(edges, SAMPLE_RATE, N_FFT).astype(np.float64)


@cache
def _band_entries(n_mels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Filters that are not 0, band by band: bins, weights, first entry of each band.

    A bin is in two bands at most, so this is 60 times less work than the whole matrix.
    """
    bands, bins = np.nonzero(mel_filters(n_mels).T)
    first = np.searchsorted(bands, np.arange(n_mels))
    if len(np.unique(bands)) != n_mels:
        raise ValueError(f"{n_mels} mel bands are too many: some would hold no bin")
    return bins, mel_filters(n_mels)[bins, bands], first


def magnitudes(samples: np.ndarray) -> np.ndarray:
    """Magnitude spectra of all whole windows.

    Args:
        samples: ``[(T - 1) * HOP_LENGTH + N_FFT]`` float32.

    Returns:
        ``[T, N_FFT // 2 + 1]`` float64: in bands without signal a float32 transform
        leaves rounding noise, which the logarithm of the mel turns into 6e-3.
    """
    windows = np.lib.stride_tricks.sliding_window_view(samples, N_FFT)[::HOP_LENGTH]
    spectra = scipy.fft.rfft(windows * hann_window(N_FFT), axis=-1)
    return np.sqrt(np.square(spectra.real) + np.square(spectra.imag))


def log_mel(samples: np.ndarray, n_mels: int) -> np.ndarray:
    """Log-mel spectrogram without padding of its own.

    Args:
        samples: ``[(T - 1) * HOP_LENGTH + N_FFT]`` float32 at 16 kHz; the caller pads
            (frame t is centred on sample ``t * HOP_LENGTH + N_FFT // 2``).
        n_mels: bands.

    Returns:
        ``[T, n_mels]`` float32, natural logarithm of mel magnitudes >= 1e-5.
    """
    frames = (len(samples) - N_FFT) // HOP_LENGTH + 1
    mel = np.empty((frames, n_mels), np.float32)
    bins, weights, starts_of_bands = _band_entries(n_mels)

    def transform(start: int) -> None:
        stop = min(start + _FRAMES_PER_BLOCK, frames)
        block = samples[start * HOP_LENGTH : (stop - 1) * HOP_LENGTH + N_FFT]
        parts = magnitudes(block)[:, bins] * weights
        bands = np.add.reduceat(parts, starts_of_bands, axis=1)
        mel[start:stop] = np.log(np.maximum(bands, LOG_FLOOR))

    starts = range(0, frames, _FRAMES_PER_BLOCK)
    if len(starts) == 1:
        transform(0)
    else:
        threads = min(_MOST_THREADS, processors(), len(starts))
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(transform, starts))
    return mel
