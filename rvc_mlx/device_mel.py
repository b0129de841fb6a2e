"""The log-mel input of RMVPE on a GPU, where the network runs.

In float32, and the filters' product in TF32 where the GPU has it: bands without signal
differ from ``spectral.log_mel``, which is exact, by some thousandths.
"""

from __future__ import annotations

import math
from functools import cache

import mlx.core as mx
import numpy as np

from rvc_mlx.arrays import Array, steady_length, zeros_behind
from rvc_mlx.spectral import HOP_LENGTH, LOG_FLOOR, N_FFT, hann_window, mel_filters

_LARGEST_STEP = 256  # frames between numbers of them


def device_log_mel(samples: Array, n_mels: int) -> mx.array:
    """As ``spectral.log_mel``, on MLX's device.

    Args:
        samples: ``[..., (T - 1) * HOP_LENGTH + N_FFT]`` float32 at 16 kHz.
        n_mels: bands.

    Returns:
        ``[..., T, n_mels]`` float32; may still be computing.
    """
    *batch, length = samples.shape
    T = (length - N_FFT) // HOP_LENGTH + 1
    B = math.prod(batch)
    strides = (length, HOP_LENGTH, 1)
    windows = mx.as_strided(mx.array(samples), (B, T, N_FFT), strides)
    window, filters = _constants(n_mels)
    rows = (windows * window).reshape(1, B * T, N_FFT)
    # The transform is planned anew for each number of frames.
    steady = steady_length(B * T, 1, _LARGEST_STEP)
    spectra = mx.fft.rfft(zeros_behind(rows, steady))
    magnitudes = mx.sqrt(mx.square(spectra.real) + mx.square(spectra.imag))
    mel = mx.log(mx.maximum(magnitudes @ filters, LOG_FLOOR))
    return mel[:, : B * T].reshape(*batch, T, n_mels)


@cache
def _constants(n_mels: int) -> tuple[mx.array, mx.array]:
    """Window ``[N_FFT]`` and filters ``[N_FFT // 2 + 1, n_mels]``, sent once."""
    window = mx.array(hann_window(N_FFT).astype(np.float32))
    return window, mx.array(mel_filters(n_mels).astype(np.float32))
