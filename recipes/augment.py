"""Augmentation in MLX: the same clip in another throat, room and noise, labels exact.

Every random choice is an argument (``Draws``), so a batch is reproducible. Time is only changed by the resampling: output
sample n is source sample ``start + rate * n``, which is how labels follow.
"""

from __future__ import annotations

from functools import cache

import mlx.core as mx
import numpy as np

from recipes.draws import CHORD, CURVES, NOTE, RATE_STEPS
from recipes.optimisation import fused
from rvc_mlx.audio import SAMPLE_RATE
from rvc_mlx.cuda_kernel import CudaKernel, Grid
from rvc_mlx.spectral import HOP_LENGTH, LOG_FLOOR, N_FFT, hann_window, mel_filters
from rvc_mlx.training.fused import on_cuda

MAX_RATE = 1.45  # fastest resampling

_TAPS = 16  # of the interpolation, on each side
_FFT, _HOP = 512, 128  # of the spectral shaping
_LIFTER = 28  # cepstral coefficients that make the envelope
_REVERB = 8192  # samples of impulse response
_LARGEST_GAIN = 2.8  # natural logarithm, of the formant shift


def source_length(L: int) -> int:
    """Samples of source that ``augment`` needs for ``L`` samples at any rate."""
    return int(np.ceil(L * MAX_RATE)) + 2 * _TAPS + 2


FIRST_SAMPLE = _TAPS  # position in the source of output sample 0


def augment(
    source: mx.array, draws: dict[str, mx.array], L: int, key: mx.array
) -> mx.array:
    """One view of a batch.

    Args:
        source: ``[B, source_length(L)]`` float32 in -1..1; output sample n is read at
            ``FIRST_SAMPLE + rate * n``.
        draws: ``Draws.arrays()`` as MLX arrays.
        L: samples of output.
        key: of the noise and the rooms' echoes.

    Returns:
        ``[B, L]`` float32, not limited to -1..1.
    """
    keys = mx.random.split(key, 3)
    voice = resample(source, draws["rate"], L)
    voice = shape_spectrum(voice, draws)
    voice = voice * _unmuted(draws, L)
    level = mx.sqrt(mx.square(resample_level(source)) + 1e-9)[:, None]
    voice = voice + _column(draws["babble"]) * mx.roll(voice, 1, axis=0)
    voice = reverberate(voice, draws, keys[0])
    noise = coloured_noise(draws["colour"], L, keys[1]) * _column(draws["noise"])
    noise = noise + _hum(draws, L, keys[2]) * _column(draws["hum"])
    noise = noise + _chords(draws, L) * _column(draws["music"])
    return (voice + noise * level) * _column(draws["gain"])


def _column(x: mx.array) -> mx.array:
    return x[:, None]


def resample_level(source: mx.array) -> mx.array:
    """Root mean square of each clip, ``[B]``."""
    return mx.sqrt(mx.square(source).mean(axis=1))


_BLOCK = 256  # threads
_RESAMPLE = CudaKernel(
    "resample",
    ("source", "rate"),
    ("out",),
    r"""
const int n = blockIdx.x * blockDim.x + threadIdx.x, clip = blockIdx.y;
if (n >= L) return;
const int steps = __float2int_rn(rate[clip] * RATE_STEPS) * n;
const float part = steps % RATE_STEPS / (float)RATE_STEPS;
const float cutoff = fminf(1.f, 1.f / rate[clip]);
const float* heard = source + (size_t)clip * width + FIRST + steps / RATE_STEPS;
float sum = 0.f;
for (int tap = 1 - TAPS; tap <= TAPS; tap++) {
    const float distance = part - tap, turn = cutoff * distance;
    const float sinc =
        fabsf(turn) < 1e-5f ? 1.f : sinpif(turn) / (3.14159265f * turn);
    const float window = 0.5f + 0.5f * cospif(distance / TAPS);
    if (fabsf(distance) < TAPS) sum += cutoff * sinc * window * heard[tap];
}
out[(size_t)clip * L + n] = sum;
""",
    (("L", "int"), ("width", "int")),
)


def resample(source: mx.array, rate: mx.array, L: int) -> mx.array:
    """Read each clip ``rate`` times as fast, by a windowed sinc.

    Args:
        source: ``[B, S]``, ``S >= source_length(L)`` for the highest rate.
        rate: ``[B]`` multiples of ``1 / RATE_STEPS``.
        L: samples of output, at most 360,000 (whole numbers of 32 bits).
    """
    if on_cuda():
        B = len(source)
        (out,) = _RESAMPLE(
            [source, rate],
            [((B, L), mx.float32)],
            Grid(-(-L // _BLOCK), _BLOCK, B),
            scalars=[L, source.shape[1]],
            constants={"TAPS": _TAPS, "FIRST": FIRST_SAMPLE, "RATE_STEPS": RATE_STEPS},
        )
        return out
    # Whole numbers: float32 positions would be off by up to 1/256 after 4 s.
    steps = mx.round(rate * RATE_STEPS).astype(mx.int32)[:, None] * mx.arange(L)
    index = FIRST_SAMPLE + steps // RATE_STEPS  # [B, L]
    part = (steps % RATE_STEPS).astype(mx.float32) / RATE_STEPS
    cutoff = mx.minimum(1.0, 1 / rate)[:, None]  # below the lower Nyquist frequency
    out = mx.zeros(part.shape)
    for tap in range(1 - _TAPS, _TAPS + 1):
        heard = mx.take_along_axis(source, index + tap, axis=1)
        out = _add_tap(out, heard, part - tap, cutoff)
    return out


@fused
def _add_tap(
    out: mx.array, heard: mx.array, distance: mx.array, cutoff: mx.array
) -> mx.array:
    angle = np.pi * cutoff * distance
    sinc = mx.where(mx.abs(angle) < 1e-4, 1.0, mx.sin(angle) / (angle + 1e-12))
    window = 0.5 + 0.5 * mx.cos(np.pi / _TAPS * distance)
    weight = mx.where(mx.abs(distance) < _TAPS, cutoff * sinc * window, 0.0)
    return out + weight * heard


@cache
def _lifter() -> np.ndarray:
    """``[257, 257]``: log magnitudes to their cepstrally smoothed envelope."""
    bins = _FFT // 2 + 1
    full = np.fft.irfft(np.eye(bins), n=_FFT, axis=1)  # cepstra of unit spectra
    quefrency = np.minimum(np.arange(_FFT), _FFT - np.arange(_FFT))
    taper = np.where(
        quefrency < _LIFTER, 0.5 + 0.5 * np.cos(np.pi * quefrency / _LIFTER), 0
    )
    return np.fft.rfft(full * taper, axis=1).real.astype(np.float32)


@cache
def _equaliser_basis() -> np.ndarray:
    """``[8, 257]``: cosines over a warped frequency axis."""
    hertz = np.linspace(0, SAMPLE_RATE / 2, _FFT // 2 + 1)
    place = np.log1p(hertz / 700) / np.log1p(SAMPLE_RATE / 2 / 700)
    orders = np.arange(1, CURVES + 1)[:, None]
    return np.cos(np.pi * orders * place).astype(np.float32)


def shape_spectrum(x: mx.array, draws: dict[str, mx.array]) -> mx.array:
    """Shift formants, equalise and limit the band of ``[B, L]``; time stays."""
    B, L = x.shape
    frames = -(-L // _HOP) + 3
    padded = mx.pad(x, ((0, 0), (_FFT - _HOP, (frames + 3) * _HOP - L - _FFT + _HOP)))
    window = mx.array(np.sqrt(hann_window(_FFT)).astype(np.float32))
    blocks = padded.reshape(B, -1, _HOP)
    windows = mx.concatenate([blocks[:, i : i + frames] for i in range(4)], axis=-1)
    spectra = mx.fft.rfft(windows * window, axis=-1)  # [B, frames, 257]
    spectra = spectra * mx.exp(_log_gain(spectra, draws))
    windows = mx.fft.irfft(spectra, n=_FFT, axis=-1) * window / 2
    parts = windows.reshape(B, frames, 4, _HOP)
    total = sum(mx.pad(parts[:, :, i], ((0, 0), (i, 3 - i), (0, 0))) for i in range(4))
    return total.reshape(B, -1)[:, _FFT - _HOP : _FFT - _HOP + L]


def _log_gain(spectra: mx.array, draws: dict[str, mx.array]) -> mx.array:
    bins = spectra.shape[-1]
    envelope = mx.log(mx.abs(spectra) + 1e-5) @ mx.array(_lifter())
    place = mx.arange(bins) / draws["formant"][:, None]  # [B, bins]
    place = mx.minimum(place, bins - 1.001)
    index = mx.broadcast_to(mx.floor(place).astype(mx.int32)[:, None], envelope.shape)
    part = (place - mx.floor(place))[:, None]
    shifted = mx.take_along_axis(envelope, index, axis=2) * (1 - part)
    shifted = shifted + mx.take_along_axis(envelope, index + 1, axis=2) * part
    formants = mx.clip(shifted - envelope, -_LARGEST_GAIN, _LARGEST_GAIN)
    hertz = mx.arange(bins) * (SAMPLE_RATE / _FFT)
    below = mx.maximum(_column(draws["low"]) - hertz, 0) / 25
    above = mx.maximum(hertz - _column(draws["high"]), 0) / 150
    static = draws["tilt"] @ mx.array(_equaliser_basis()) - below - above
    return formants + mx.maximum(static, -12.0)[:, None]


def _unmuted(draws: dict[str, mx.array], L: int) -> mx.array:
    """1 where the voice is heard, 0 where it is muted, ramps of 5 ms between."""
    n = mx.arange(L)[None]
    before = (_column(draws["mute_from"]) - n) / 80
    after = (n - _column(draws["mute_to"])) / 80
    return mx.clip(mx.maximum(before, after), 0, 1)


def reverberate(x: mx.array, draws: dict[str, mx.array], key: mx.array) -> mx.array:
    """Add decaying echoes after 2 ms; the direct sound stays in place."""
    B, L = x.shape
    seconds = mx.arange(_REVERB) / SAMPLE_RATE
    fall = mx.exp(-6.9 * seconds / _column(draws["decay"]))
    echo = mx.random.normal((B, _REVERB), key=key) * fall * (seconds > 0.002)
    echo = echo / mx.sqrt(mx.square(echo).sum(axis=1, keepdims=True) + 1e-9)
    size = 1 << (L + _REVERB - 1).bit_length()
    wet = mx.fft.irfft(mx.fft.rfft(x, n=size) * mx.fft.rfft(echo, n=size), n=size)
    return x + _column(draws["reverb"]) * wet[:, :L]


def coloured_noise(colour: mx.array, L: int, key: mx.array) -> mx.array:
    """Noise ``[B, L]`` of level 1 whose power falls with ``frequency ** -colour``."""
    size = 1 << (L - 1).bit_length()
    white = mx.random.normal((colour.shape[0], size), key=key)
    bins = mx.maximum(mx.arange(size // 2 + 1), size * 40 / SAMPLE_RATE)
    slope = mx.exp(-0.5 * colour[:, None] * mx.log(bins)[None])
    noise = mx.fft.irfft(mx.fft.rfft(white) * slope, n=size)[:, :L]
    return noise / (mx.sqrt(mx.square(noise).mean(axis=1, keepdims=True)) + 1e-9)


def _hum(draws: dict[str, mx.array], L: int, key: mx.array) -> mx.array:
    turns = _column(draws["mains"]) * (mx.arange(L) / SAMPLE_RATE)
    levels = mx.random.uniform(shape=(draws["mains"].shape[0], 5), key=key)
    hum = mx.zeros(turns.shape)
    for h in range(5):
        hum = hum + levels[:, h : h + 1] * mx.sin(2 * np.pi * (h + 1) * turns)
    return hum


def _chords(draws: dict[str, mx.array], L: int) -> mx.array:
    """Three voices of plucked notes with six harmonics each, of level about 1."""
    notes = mx.unflatten(draws["notes"], 1, (CHORD, -1))  # [B, 3, notes]
    held = mx.repeat(notes, NOTE, axis=2)[:, :, :L]
    angle = mx.cumsum(held * (2 * np.pi / SAMPLE_RATE), axis=2)
    angle = angle - 2 * np.pi * mx.floor(angle / (2 * np.pi))
    pluck = mx.exp(-3.0 * (mx.arange(L) % NOTE) / NOTE)
    tone = sum(mx.sin((h + 1) * angle) / (h + 1) for h in range(6))
    return tone.sum(axis=1) * pluck


def log_mel(audio: mx.array, n_mels: int) -> mx.array:
    """``rvc_mlx.spectral.log_mel`` on the device.

    Args:
        audio: ``[B, (T - 1) * 160 + 1024]`` float32; frame t is centred on sample
            ``160 * t + 512``.
        n_mels: bands.

    Returns:
        ``[B, T, n_mels]`` float32.
    """
    B, L = audio.shape
    T = (L - N_FFT) // HOP_LENGTH + 1
    windows = mx.as_strided(
        mx.contiguous(audio), (B, T, N_FFT), (L, HOP_LENGTH, 1)
    ) * mx.array(hann_window(N_FFT).astype(np.float32))
    magnitudes = mx.abs(mx.fft.rfft(windows, axis=-1))
    filters = mx.array(mel_filters(n_mels).astype(np.float32))
    return mx.log(mx.maximum(magnitudes @ filters, LOG_FLOOR))
