"""The log-mel input of RMVPE on a GPU, where the network runs.

In float32, and the filters' product in TF32 where the GPU has it: bands without signal
differ from ``spectral.log_mel``, which is exact, by some thousandths.
"""

from __future__ import annotations

from functools import cache

import mlx.core as mx
import numpy as np

from rvc_mlx.arrays import Array, steady_length, zeros_behind
from rvc_mlx.spectral import HOP_LENGTH, LOG_FLOOR, N_FFT, hann_window, mel_filters

_LARGEST_STEP = 256  # frames between numbers of them


def device_log_mel(samples: Array, n_mels: int) -> mx.array:
    """As ``spectral.log_mel``, on MLX's device.

    Args:
        samples: ``[(T - 1) * HOP_LENGTH + N_FFT]`` float32 at 16 kHz.
        n_mels: bands.

    Returns:
        ``[T, n_mels]`` float32; may still be computing.
    """
    frames = (len(samples) - N_FFT) // HOP_LENGTH + 1
    # The transform is planned anew for each number of frames.
    steady = steady_length(frames, 1, _LARGEST_STEP)
    length = (steady - 1) * HOP_LENGTH + N_FFT
    longer = zeros_behind(mx.array(samples)[None], length)[0]
    windows = mx.as_strided(longer, (steady, N_FFT), (HOP_LENGTH, 1))
    window, filters = _constants(n_mels)
    spectra = mx.fft.rfft(windows * window)
    magnitudes = mx.sqrt(mx.square(spectra.real) + mx.square(spectra.imag))
    return mx.log(mx.maximum(magnitudes @ filters, LOG_FLOOR))[:frames]


@cache
def _constants(n_mels: int) -> tuple[mx.array, mx.array]:
    """Window ``[N_FFT]`` and filters ``[N_FFT // 2 + 1, n_mels]``, sent once."""
    window = mx.array(hann_window(N_FFT).astype(np.float32))
    return window, mx.array(mel_filters(n_mels).astype(np.float32))
