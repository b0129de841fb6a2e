"""Spectrograms: short-time Fourier transform and the log-mel input of RMVPE."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import scipy.fft

from rvc_mlx.arrays import Array
from rvc_mlx.audio import SAMPLE_RATE
from rvc_mlx.machine import in_parallel

LogMel = Callable[[Any, int], Array]  # as ``log_mel``, of samples where it computes

N_FFT = 1024  # samples, also the window length
HOP_LENGTH = 160  # samples: 100 frames per second
F_MIN, F_MAX = 30.0, 8000.0  # Hz, range of the mel bands
LOG_FLOOR = 1e-5  # smallest mel magnitude before the logarithm

# Frames transformed at once, and bands summed at once: all of it stays in the cache, and
# the products are too small for the BLAS to start threads of its own.
_FRAMES_PER_BLOCK, _BANDS_PER_PRODUCT = 128, 16


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
def _band_products(n_mels: int) -> list[tuple[slice, slice, np.ndarray]]:
    """Filters of neighbouring bands: which bands, which bins they span, weights.

    Outside their span they are 0, so this is a sixth of the work of the whole matrix.
    """
    filters = mel_filters(n_mels)
    if not filters.any(axis=0).all():
        raise ValueError(f"{n_mels} mel bands are too many: some would hold no bin")
    products = []
    for first in range(0, n_mels, _BANDS_PER_PRODUCT):
        bands = slice(first, min(first + _BANDS_PER_PRODUCT, n_mels))
        used = np.flatnonzero(filters[:, bands].any(axis=1))
        bins = slice(int(used[0]), int(used[-1]) + 1)
        products.append((bands, bins, np.ascontiguousarray(filters[bins, bands])))
    return products


def magnitudes(samples: np.ndarray) -> np.ndarray:
    """Magnitude spectra of all whole windows.

    Args:
        samples: ``[..., (T - 1) * HOP_LENGTH + N_FFT]`` float32.

    Returns:
        ``[..., T, N_FFT // 2 + 1]`` float64: in bands without signal a float32
        transform leaves rounding noise, which the logarithm of the mel turns into 6e-3.
    """
    every = np.lib.stride_tricks.sliding_window_view(samples, N_FFT, axis=-1)
    windows = every[..., ::HOP_LENGTH, :]
    spectra = scipy.fft.rfft(windows * hann_window(N_FFT), axis=-1)
    return np.abs(spectra)


def log_mel(samples: np.ndarray, n_mels: int) -> np.ndarray:
    """Log-mel spectrogram without padding of its own.

    Args:
        samples: ``[..., (T - 1) * HOP_LENGTH + N_FFT]`` float32 at 16 kHz; the caller
            pads (frame t is centred on sample ``t * HOP_LENGTH + N_FFT // 2``).
        n_mels: bands.

    Returns:
        ``[..., T, n_mels]`` float32, natural logarithm of mel magnitudes >= 1e-5.
    """
    *batch, length = samples.shape
    frames = (length - N_FFT) // HOP_LENGTH + 1
    mel = np.empty((*batch, frames, n_mels), np.float32)
    products = _band_products(n_mels)

    def transform(start: int) -> None:
        stop = min(start + _FRAMES_PER_BLOCK, frames)
        block = samples[..., start * HOP_LENGTH : (stop - 1) * HOP_LENGTH + N_FFT]
        spectra = magnitudes(block)
        sums = np.empty((*batch, stop - start, n_mels))
        for bands, bins, weights in products:
            np.matmul(spectra[..., bins], weights, out=sums[..., bands])
        np.maximum(sums, LOG_FLOOR, out=sums)
        mel[..., start:stop, :] = np.log(sums, out=sums)

    for _ in in_parallel(transform, range(0, frames, _FRAMES_PER_BLOCK)):
        pass
    return mel
