"""Noise as an argument: the object that every conversion takes, and how it is asked.

A noise object has two methods:

* ``normal(name, segment, start, stop, per_frame, channels)`` gives float32
  ``[(stop - start) * per_frame, channels]``, standard normal, for the frames
  ``start..stop`` of that segment;
* ``uniform(name, segment, count)`` gives float32 ``[count]`` in 0..1.

Names: ``prior``, ``source``, ``phase`` and ``adain.{stage}.{branch}.{0|2}``.
"""

from __future__ import annotations

import zlib
from typing import Protocol

import numpy as np


class Noise(Protocol):
    """What the pipeline needs from a source of noise."""

    def normal(
        self,
        name: str,
        segment: int,
        start: int,
        stop: int,
        per_frame: int,
        channels: int,
    ) -> np.ndarray:
        """Give standard normal float32 ``[(stop - start) * per_frame, channels]``."""

    def uniform(self, name: str, segment: int, count: int) -> np.ndarray:
        """Give uniform float32 ``[count]`` in 0..1."""


class SeededNoise:
    """Noise of one seed; each name and segment is a stream of its own.

    A part ``start..stop`` is cut out of the stream from frame 0, so how a segment is
    split does not matter.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def _generator(self, name: str, segment: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, segment, zlib.crc32(name.encode())])

    def normal(
        self,
        name: str,
        segment: int,
        start: int,
        stop: int,
        per_frame: int,
        channels: int,
    ) -> np.ndarray:
        """Give standard normal float32 ``[(stop - start) * per_frame, channels]``."""
        generator = self._generator(name, segment)
        whole = generator.standard_normal(
            (stop * per_frame, channels), dtype=np.float32
        )
        return whole[start * per_frame :]

    def uniform(self, name: str, segment: int, count: int) -> np.ndarray:
        """Give uniform float32 ``[count]`` in 0..1."""
        return self._generator(name, segment).random(count, dtype=np.float32)


class ZeroNoise:
    """No noise at all: for comparisons in which randomness must not take part."""

    def normal(
        self,
        name: str,
        segment: int,
        start: int,
        stop: int,
        per_frame: int,
        channels: int,
    ) -> np.ndarray:
        """Give zeros float32 ``[(stop - start) * per_frame, channels]``."""
        del name, segment
        return np.zeros(((stop - start) * per_frame, channels), np.float32)

    def uniform(self, name: str, segment: int, count: int) -> np.ndarray:
        """Give zeros float32 ``[count]``."""
        del name, segment
        return np.zeros(count, np.float32)
