"""Clicks: single samples that the sound around them does not explain.

A cut, a jump at a join or a lost sample is a step or an impulse: after linear prediction
it is one spike. Vocal folds make spikes, too, but a train of them; a stop's burst lasts
milliseconds. So a click is a spike of the prediction error that

- is well above the spikes of the 60 ms on both sides,
- holds most of the error's energy of the 10 ms around it, and
- is not negligible beside the sound.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import maximum_filter1d, percentile_filter

ORDER = 16  # of the linear prediction
ABOVE = 5.0  # times the level of the neighbours
ALONE = 0.5  # share of the energy of +-5 ms within +-0.5 ms
FAINTEST = 2e-3  # of full scale
_WHITE = 1e-6  # noise added before solving, relative
_BLOCK = 0.032  # seconds in which the prediction is constant
_BIN = 0.002  # seconds of which the maximum is taken
_SIDE = 0.06  # seconds on both sides that count as neighbours
_APART = 0.005  # seconds; nearer clicks are one
_FRAMES_AT_ONCE = 64


def _predictors(x: np.ndarray, size: int) -> np.ndarray:
    """Inverse filters ``[F, ORDER + 1]`` of the blocks at every half ``size``."""
    hop = size // 2
    padded = np.pad(x, (hop // 2, size))
    windows = np.lib.stride_tricks.sliding_window_view(padded, size)[::hop]
    spectra = np.fft.rfft(windows * np.hanning(size), 2 * size, axis=1)
    lags = np.fft.irfft(np.abs(spectra) ** 2, axis=1)[:, : ORDER + 1]
    lags[:, 0] = lags[:, 0] * (1 + _WHITE) + 1e-12
    toeplitz = lags[:, np.abs(np.subtract.outer(np.arange(ORDER), np.arange(ORDER)))]
    solved = np.linalg.solve(toeplitz, lags[:, 1:, None])[..., 0]
    return np.concatenate([np.ones((len(solved), 1)), -solved], axis=1)


def prediction_error(x: np.ndarray, rate: int) -> np.ndarray:
    """What linear prediction leaves of ``[n]``: ``[n]`` float64."""
    x = np.asarray(x, np.float64)
    size = 2 * round(_BLOCK * rate / 2)
    hop = size // 2
    filters = _predictors(x, size)[: -(-len(x) // hop), ::-1]
    padded = np.pad(x, (ORDER, hop * len(filters) - len(x)))
    history = np.lib.stride_tricks.sliding_window_view(padded, ORDER + 1)
    history = history.reshape(len(filters), hop, ORDER + 1)
    error = np.empty((len(filters), hop))
    for start in range(0, len(filters), _FRAMES_AT_ONCE):
        part = slice(start, start + _FRAMES_AT_ONCE)
        error[part] = (history[part] @ filters[part, :, None])[..., 0]
    error = error.reshape(-1)[: len(x)]
    error[:ORDER] = 0  # nothing to predict from
    return error


def _neighbours(error: np.ndarray, size: int) -> np.ndarray:
    """Level of the spikes around every bin of ``size`` samples, that bin left out."""
    bins = np.pad(error, (0, -len(error) % size)).reshape(-1, size).max(axis=1)
    side = round(_SIDE / _BIN)
    around = np.ones(2 * side + 1, bool)
    around[side - 1 : side + 2] = False
    return percentile_filter(bins, 90, footprint=around, mode="reflect")


def find_clicks(x: np.ndarray, rate: int) -> np.ndarray:
    """Where a recording clicks.

    Args:
        x: ``[n]`` float in -1..1.
        rate: its sample rate, Hz.

    Returns:
        ``[k]`` float64 seconds, ascending.
    """
    if len(x) <= rate * _BLOCK:
        return np.empty(0)
    error = np.abs(prediction_error(x, rate))
    size = round(_BIN * rate)
    level = np.repeat(_neighbours(error, size), size)[: len(error)]
    spike = (error > ABOVE * level) & (error > FAINTEST)
    spike &= error == maximum_filter1d(error, 2 * round(_APART * rate) + 1)
    energy = np.concatenate(([0.0], np.cumsum(error**2)))

    def around(places: np.ndarray, seconds: float) -> np.ndarray:
        reach = round(seconds * rate)
        low, high = places - reach, places + reach + 1
        return energy[np.minimum(high, len(error))] - energy[np.maximum(low, 0)]

    places = np.flatnonzero(spike)
    alone = around(places, 0.0005) > ALONE * around(places, 0.005)
    return places[alone] / rate
