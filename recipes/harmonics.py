"""Speech with an exactly known F0: a sum of harmonics on a chosen contour, plus noise.

Roughness makes it creak: pulses come early or late, and every second one is weaker and late.
F0 stays that of the pulses, as one hears it while neighbours are not too unlike.

The spectral envelope and the aperiodicity of a recording (WORLD's analysis) are kept,
its pitch is replaced. Harmonic h has the phase ``h * 2 pi * integral(f0)``, so F0 is the
contour by construction; pulses that WORLD itself writes jitter by 10 to 20 cents.

Source: Morise et al. 2016 (WORLD), for the analysis and the gain of a pulse train; Titze
1995, "Workshop on Acoustic Voice Analysis", for jitter and subharmonics of a voice.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import scipy.signal

from recipes.corpus import F0_HOP
from rvc_mlx.audio import SAMPLE_RATE

FRAME_SECONDS = F0_HOP / SAMPLE_RATE

_ANALYSIS_F0 = 60.0, 600.0  # Hz, of the engines' voices
_PERIODIC_BAND = 100.0, 1500.0  # Hz, where aperiodicity decides about voicing
_LARGEST_APERIODICITY = 0.5
_RANGE_DB = 50.0  # frames that much below the loudest are unvoiced
_NOISE_FFT = 320  # samples: 20 ms
_JITTER_HOP = 160  # samples from one random deviation of F0 to the next
# A rough stretch and what lies between, seconds; and its ends.
_ROUGH_SECONDS, _ROUGH_ENDS = (0.1, 0.6), 0.03
_MOST_WEAKER, _MOST_LATE, _MOST_JITTER = 0.5, 0.5, 0.03


@dataclass(frozen=True)
class Analysis:
    """What is kept of a recording, every 5 ms.

    Attributes:
        f0: ``[T]`` Hz, 0 where unvoiced.
        voiced: ``[T]`` where harmonics will be heard.
        envelope: ``[T, K]`` power.
        aperiodicity: ``[T, K]`` in 0..1.
    """

    f0: np.ndarray
    voiced: np.ndarray
    envelope: np.ndarray
    aperiodicity: np.ndarray


@dataclass(frozen=True)
class Roughness:
    """How unlike neighbouring pulses are, each ``[T]``.

    Attributes:
        weaker: amplitude of the half frequency's modulation, 0..1.
        late: by how much of its phase, radians, the half frequency moves the fundamental.
        jitter: standard deviation of F0, as a share of it.
    """

    weaker: np.ndarray
    late: np.ndarray
    jitter: np.ndarray


def random_roughness(frames: int, rng: np.random.Generator) -> Roughness:
    """Stretches of a creaking voice, and smooth ones between them."""
    on, places = np.zeros(frames), 0
    rough = rng.random() < 0.5
    while places < frames:
        length = int(rng.uniform(*_ROUGH_SECONDS) / FRAME_SECONDS)
        on[places : places + length] = rough
        places, rough = places + length, not rough
    ends = np.hanning(2 * round(_ROUGH_ENDS / FRAME_SECONDS) + 3)
    on = np.convolve(on, ends / ends.sum(), mode="same")[:frames]
    most = np.array([_MOST_WEAKER, _MOST_LATE, _MOST_JITTER])
    weaker, late, jitter = (rng.uniform(0, most))[:, None] * on
    return Roughness(weaker, late, jitter)


@cache
def world() -> Any:
    """The package pyworld, which warns about its own use of ``pkg_resources``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pyworld

    return pyworld


def world_frames(
    samples: np.ndarray, rate: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """F0 ``[T]``, envelope and aperiodicity ``[T, K]`` of ``[n]``, every 5 ms."""
    pyworld = world()
    x = samples.astype(np.float64)
    low, high = _ANALYSIS_F0
    f0, times = pyworld.dio(x, rate, low, high, frame_period=1000 * FRAME_SECONDS)
    f0 = pyworld.stonemask(x, f0, times, rate)
    envelope = pyworld.cheaptrick(x, f0, times, rate)
    return f0, envelope, pyworld.d4c(x, f0, times, rate)


def analyse(samples: np.ndarray) -> Analysis:
    """WORLD's analysis of ``[n]`` samples at 16 kHz, ``n`` a multiple of ``F0_HOP``."""
    f0, envelope, aperiodicity = world_frames(samples, SAMPLE_RATE)
    per_hz = (envelope.shape[1] - 1) / (SAMPLE_RATE / 2)
    first, last = (int(edge * per_hz) for edge in _PERIODIC_BAND)
    level = 10 * np.log10(envelope.sum(1) + 1e-16)
    periodic = aperiodicity[:, first:last].mean(1) < _LARGEST_APERIODICITY
    voiced = periodic & (f0 > 0) & (level > level.max() - _RANGE_DB)
    return Analysis(f0, voiced, envelope, aperiodicity)


def warp_formants(analysis: Analysis, ratio: float) -> Analysis:
    """The same frames with every formant ``ratio`` times as high."""
    bins = np.arange(analysis.envelope.shape[1])
    index = np.minimum(bins / ratio, bins[-1]).astype(int)
    return Analysis(
        analysis.f0,
        analysis.voiced,
        analysis.envelope[:, index],
        analysis.aperiodicity[:, index],
    )


def resynthesise(
    analysis: Analysis,
    contour: np.ndarray,
    rng: np.random.Generator,
    rough: Roughness | None = None,
) -> np.ndarray:
    """Speech of an analysis with F0 on ``contour``.

    Args:
        analysis: ``T`` frames; its ``voiced`` opens and closes the harmonics.
        contour: ``[T]`` Hz everywhere, also where unvoiced.
        rng: noise, and the harmonics' phases (all alike in half of the calls).
        rough: of ``T`` frames; None for a voice whose pulses are alike.

    Returns:
        ``[(T - 1) * F0_HOP]`` float64.
    """
    voiced = analysis.voiced.astype(np.float64)
    f0 = _upsample(np.log(contour))
    np.exp(f0, out=f0)
    shaken = f0 if rough is None else f0 * (1 + _jitter(rough, len(f0), rng))
    angle = 2 * np.pi * np.cumsum(shaken) / SAMPLE_RATE
    pulses = 1.0
    if rough is not None:
        pulses = 1 + _upsample(rough.weaker) * np.cos(angle / 2)
        angle += _upsample(rough.late) * np.sin(angle / 2)
    phasor = np.exp(1j * angle).astype(np.complex64)
    last = analysis.envelope.shape[1] - 1
    amplitude = np.sqrt(
        analysis.envelope * np.clip(1 - analysis.aperiodicity**2, 0, 1)
    ).astype(np.float32)
    gain = voiced * 2 * np.sqrt(contour / SAMPLE_RATE)
    scatter = rng.random() < 0.5
    frames = np.arange(len(contour))
    out = np.zeros(len(f0), np.float32)
    turning = np.ones_like(phasor)
    harmonics = int(SAMPLE_RATE / 2 / contour[analysis.voiced].min(initial=1e4))
    for h in range(1, harmonics + 1):
        turning *= phasor
        position = h * contour / (SAMPLE_RATE / 2) * last
        below = position < last - 1
        index = np.where(below, position, 0).astype(int)
        part = (position - index).clip(0, 1)
        level = amplitude[frames, index] * (1 - part)
        level += amplitude[frames, index + 1] * part
        envelope = _upsample((level * gain * below).astype(np.float32))
        phase = np.complex64(np.exp(1j * rng.uniform(-np.pi, np.pi) * scatter))
        out += envelope * (turning * phase).real
    return out * pulses + _noise(analysis, len(out), rng)


def _jitter(rough: Roughness, length: int, rng: np.random.Generator) -> np.ndarray:
    """``[length]`` deviations of F0, as shares of it."""
    places = np.arange(0, length + _JITTER_HOP, _JITTER_HOP)
    steps = np.interp(np.arange(length), places, rng.standard_normal(len(places)))
    return _upsample(rough.jitter) * steps


def _upsample(values: np.ndarray) -> np.ndarray:
    """``[T]`` every ``F0_HOP`` samples to ``[(T - 1) * F0_HOP]``, linear."""
    ramp = np.arange(F0_HOP, dtype=values.dtype) / F0_HOP
    return (values[:-1, None] + np.diff(values)[:, None] * ramp).reshape(-1)


def _noise(analysis: Analysis, length: int, rng: np.random.Generator) -> np.ndarray:
    white = rng.standard_normal(length)
    settings = {"nperseg": _NOISE_FFT, "noverlap": _NOISE_FFT - F0_HOP}
    _, _, spectra = scipy.signal.stft(white, **settings)
    bins = np.linspace(0, analysis.envelope.shape[1] - 1, _NOISE_FFT // 2 + 1)
    index = bins.round().astype(int)
    share = np.where(analysis.voiced[:, None], analysis.aperiodicity[:, index] ** 2, 1)
    gains = np.sqrt(analysis.envelope[:, index] * share).T
    frames = min(gains.shape[1], spectra.shape[1])
    _, noise = scipy.signal.istft(spectra[:, :frames] * gains[:, :frames], **settings)
    return np.pad(noise[:length], (0, max(length - len(noise), 0)))
