"""A recording's sound at other moments and on another pitch, by WORLD.

Source: Morise et al. 2016.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recipes.harmonics import FRAME_SECONDS, world, world_frames


@dataclass(frozen=True)
class Sound:
    """WORLD's analysis of a recording, every 5 ms.

    Attributes:
        rate: Hz.
        f0: ``[T]`` Hz, 0 where unvoiced.
        envelope: ``[T, K]`` logarithm of the power.
        aperiodicity: ``[T, K]`` in 0..1.
    """

    rate: int
    f0: np.ndarray
    envelope: np.ndarray
    aperiodicity: np.ndarray


def sound_of(samples: np.ndarray, rate: int) -> Sound:
    """What ``[n]`` samples sound like."""
    f0, envelope, aperiodicity = world_frames(samples, rate)
    return Sound(rate, f0, np.log(envelope), aperiodicity)


def moved(
    sound: Sound, moments: np.ndarray, f0: np.ndarray, semitones: float = 0.0
) -> np.ndarray:
    """A recording's sound at other moments and on another pitch.

    Args:
        sound: of the recording.
        moments: ``[T]`` seconds of the recording, every 5 ms of the result.
        f0: ``[T]`` Hz, 0 where unvoiced; moved as a whole to the recording's median.
        semitones: above that median.

    Returns:
        ``[m]`` float64 at the recording's rate.
    """
    last = len(sound.f0) - 1
    places = np.clip(moments / FRAME_SECONDS, 0, last)
    before = places.astype(int)
    after, part = np.minimum(before + 1, last), (places - before)[:, None]

    def between(frames: np.ndarray) -> np.ndarray:
        mixed: np.ndarray = frames[before] * (1 - part) + frames[after] * part
        return mixed

    own = sound.f0[sound.f0 > 0]
    if len(own) and (f0 > 0).any():
        f0 = f0 * np.median(own) / np.median(f0[f0 > 0]) * 2 ** (semitones / 12)
    made: np.ndarray = world().synthesize(
        f0,
        np.exp(between(sound.envelope)),
        between(sound.aperiodicity),
        sound.rate,
        1000 * FRAME_SECONDS,
    )
    return made
