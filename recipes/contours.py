"""F0 contours of speech and song, each 5 ms, 50 to 1100 Hz."""

from __future__ import annotations

import numpy as np
import scipy.signal

from recipes.harmonics import FRAME_SECONDS, Analysis

LOWEST, HIGHEST = 50.0, 1100.0  # Hz
_KINDS = ("own", "stretched", "walk", "vibrato", "notes")


def random_contour(
    analysis: Analysis, rng: np.random.Generator, kind: str = ""
) -> np.ndarray:
    """A contour for the frames of an analysis.

    Args:
        analysis: at least one voiced frame.
        rng: source of randomness.
        kind: ``"own"`` (the recording's, transposed), ``"stretched"`` (its intonation
            widened or flattened round another pitch), ``"walk"``, ``"vibrato"`` (on a
            glide) or ``"notes"``; by default one at random.

    Returns:
        ``[T]`` float64 in Hz, everywhere, smooth across unvoiced frames.
    """
    kind = kind or _KINDS[rng.integers(len(_KINDS))]
    T = len(analysis.f0)
    time = np.arange(T) * FRAME_SECONDS
    base = np.exp(rng.uniform(np.log(60), np.log(520)))
    if kind in ("own", "stretched"):
        own = _smooth_own(analysis)
        mean = own[analysis.voiced].mean()
        if kind == "own":
            semitones = (own - mean) + 12 * (
                mean / 12 + rng.uniform(np.log2(0.6), np.log2(2.5))
            )
            return _limited(semitones)
        return _limited(12 * np.log2(base) + (own - mean) * rng.uniform(0.2, 1.8))
    if kind == "walk":
        b, a = scipy.signal.butter(2, rng.uniform(1, 5) * 2 * FRAME_SECONDS)
        walk = scipy.signal.filtfilt(b, a, rng.standard_normal(T))
        walk *= rng.uniform(1, 6) / (walk.std() + 1e-9)
        return _limited(12 * np.log2(base) + np.clip(walk, -12, 14))
    if kind == "vibrato":
        depth, rate = rng.uniform(0.1, 1.5), rng.uniform(4, 7.5)
        swing = depth * np.sin(2 * np.pi * (rate * time + rng.random()))
        return _limited(12 * np.log2(base) + swing + 12 * rng.uniform(-0.5, 0.5) * time)
    return _limited(12 * np.log2(base * rng.uniform(1, 1.6)) + _notes(T, time, rng))


def _limited(semitones: np.ndarray) -> np.ndarray:
    """Semitones above 1 Hz to Hz within the limits."""
    return np.clip(2 ** (semitones / 12), LOWEST, HIGHEST)


def _smooth_own(analysis: Analysis) -> np.ndarray:
    """The recording's F0 in semitones above 1 Hz, interpolated and smooth."""
    index = np.arange(len(analysis.f0))
    known = index[analysis.voiced]
    semitones = np.interp(index, known, 12 * np.log2(analysis.f0[known]))
    b, a = scipy.signal.butter(2, 8 * FRAME_SECONDS)
    return scipy.signal.filtfilt(b, a, semitones, padlen=min(9, len(index) - 1))


def _notes(T: int, time: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A melody round 0 semitones: held notes, slides between them, vibrato in some."""
    lengths = rng.uniform(0.12, 0.7, size=int(T * FRAME_SECONDS / 0.12) + 2)
    starts = np.cumsum(lengths)
    pitches = np.clip(np.cumsum(rng.integers(-5, 6, size=len(lengths) + 1)), -12, 12)
    melody = pitches[np.searchsorted(starts, time)].astype(np.float64)
    taps = int(rng.integers(3, 25))
    padded = np.pad(melody, (taps, taps), mode="edge")
    melody = np.convolve(padded, np.ones(taps) / taps, mode="same")[taps:-taps]
    vibrato = np.sin(2 * np.pi * rng.uniform(4.5, 6.5) * time)
    return melody + vibrato * rng.choice([0.0, 0.3, 0.7])
