"""The random choices of the augmentation, as plain arrays: what `augment` does is up to them."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

CURVES = 8  # cosines over frequency in the random equaliser
CHORD = 3  # voices of the accompaniment
NOTE = 4800  # samples of one note: .3 s
RATE_STEPS = 4096  # resampling rates are multiples of 1 / 4096


@dataclass(frozen=True)
class Draws:
    """Random choices for one view of a batch, each ``[B]`` or ``[B, n]`` float32.

    Attributes:
        rate: resampling: F0, formants and tempo times this.
        formant: further scale of formants alone.
        tilt: ``[B, 8]`` equaliser, in units of the natural logarithm.
        low, high: Hz, corners of the band that is kept.
        reverb: level of the reverberation, 0 for none.
        decay: seconds until it has fallen by 60 dB.
        noise: level of coloured noise below the voice, as a factor.
        colour: exponent of its power over frequency (0 white, 2 brown).
        hum: level of mains hum, as a factor.
        mains: Hz.
        babble: level of another clip of the batch, as a factor.
        music: level of the accompaniment, as a factor.
        notes: ``[B, 3 * notes]`` Hz of the accompaniment, per .3 s.
        gain: final factor.
        mute_from, mute_to: samples between which the voice is silent.
    """

    rate: np.ndarray
    formant: np.ndarray
    tilt: np.ndarray
    low: np.ndarray
    high: np.ndarray
    reverb: np.ndarray
    decay: np.ndarray
    noise: np.ndarray
    colour: np.ndarray
    hum: np.ndarray
    mains: np.ndarray
    babble: np.ndarray
    music: np.ndarray
    notes: np.ndarray
    gain: np.ndarray
    mute_from: np.ndarray
    mute_to: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        """All of them by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True)
class Strength:
    """How much is drawn; the defaults are for content, ``PITCH`` is for F0.

    Attributes:
        rates: range of resampling.
        formants: range of the formant shift.
        loudest_noise: dB of noise against the voice, at most.
        music: share of clips with accompaniment.
        babble: share of clips with another voice behind.
        muted: share of clips with a silent stretch; a third of them wholly silent.
    """

    rates: tuple[float, float] = (0.72, 1.4)
    formants: tuple[float, float] = (0.78, 1.28)
    loudest_noise: float = -2.0
    music: float = 0.1
    babble: float = 0.2
    muted: float = 0.0


CONTENT = Strength()
PITCH = Strength((0.75, 1.35), (0.85, 1.18), 4.0, 0.3, 0.0, 0.3)


def draw(rng: np.random.Generator, B: int, L: int, strength: Strength) -> Draws:
    """Choices for ``B`` clips of ``L`` samples."""

    def uniform(low: float, high: float, *shape: int) -> np.ndarray:
        return rng.uniform(low, high, (B, *shape)).astype(np.float32)

    def sometimes(share: float, values: np.ndarray) -> np.ndarray:
        return np.where(rng.random(B) < share, values, 0).astype(np.float32)

    def decibels(low: float, high: float) -> np.ndarray:
        return 10 ** (uniform(low, high) / 20)

    def between(limits: tuple[float, float]) -> np.ndarray:
        return np.exp(uniform(*np.log(limits)))

    slopes = 1 / np.arange(1, CURVES + 1, dtype=np.float32) ** 0.7
    muted = rng.random(B) < strength.muted
    whole = rng.random(B) < 1 / 3
    first = np.where(whole, -1e4, uniform(0, 0.8) * L)
    last = np.where(whole, 2.0 * L, first + uniform(0.1, 0.6) * L)
    columns = CHORD * (L // NOTE + 1)
    semitones = rng.integers(-24, 25, (B, columns))
    return Draws(
        rate=np.round(between(strength.rates) * RATE_STEPS) / RATE_STEPS,
        formant=between(strength.formants),
        tilt=rng.normal(0, 0.5, (B, CURVES)).astype(np.float32) * slopes,
        low=sometimes(0.6, np.exp(uniform(np.log(20), np.log(300)))),
        high=8100 - sometimes(0.4, uniform(500, 5000)),
        reverb=sometimes(0.5, decibels(-22, 2)),
        decay=uniform(0.1, 0.9),
        noise=sometimes(0.85, decibels(-55, strength.loudest_noise)),
        colour=uniform(-0.3, 2.2),
        hum=sometimes(0.2, decibels(-45, -12)),
        mains=rng.choice([50.0, 60.0], B).astype(np.float32) * uniform(0.998, 1.002),
        babble=sometimes(strength.babble, decibels(-32, -10)),
        music=sometimes(strength.music, decibels(-25, 0)),
        notes=(220 * 2 ** (semitones / 12)).astype(np.float32),
        gain=decibels(-26, 8),
        mute_from=np.where(muted, first, 4.0 * L).astype(np.float32),
        mute_to=np.where(muted, last, 5.0 * L).astype(np.float32),
    )


def plain(B: int, L: int) -> Draws:
    """Choices that change nothing."""
    none, one = np.zeros(B, np.float32), np.ones(B, np.float32)
    return Draws(
        rate=one,
        formant=one,
        tilt=np.zeros((B, CURVES), np.float32),
        low=none,
        high=8100 * one,
        reverb=none,
        decay=0.3 * one,
        noise=none,
        colour=none,
        hum=none,
        mains=50 * one,
        babble=none,
        music=none,
        notes=np.full((B, CHORD * (L // NOTE + 1)), 220, np.float32),
        gain=one,
        mute_from=4.0 * L * one,
        mute_to=5.0 * L * one,
    )
