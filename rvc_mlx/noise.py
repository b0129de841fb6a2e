"""Seeded random numbers that do not depend on how the work is cut into pieces."""

from __future__ import annotations

import zlib

import numpy as np

_BLOCK_FRAMES = 64  # frames drawn by one generator


class Noise:
    """All randomness of one conversion, from one seed.

    The value at a frame depends on the seed, the name of the draw, the segment and the
    frame alone, so windows of any length see the same noise.

    Args:
        seed: 0 or more.
    """

    def __init__(self, seed: int = 0):
        self.seed = seed

    def _generator(self, name: str, segment: int, block: int) -> np.random.Generator:
        key = (self.seed, zlib.crc32(name.encode()), segment, block)
        return np.random.Generator(np.random.SFC64(np.random.SeedSequence(key)))

    def normal(
        self,
        name: str,
        segment: int,
        start: int,
        stop: int,
        per_frame: int,
        channels: int,
    ) -> np.ndarray:
        """Standard normal values of frames ``start..stop`` of a segment.

        Returns:
            ``[(stop - start) * per_frame, channels]`` float32.
        """
        first = start // _BLOCK_FRAMES
        blocks = [
            self._generator(name, segment, block).standard_normal(
                (_BLOCK_FRAMES * per_frame, channels), np.float32
            )
            for block in range(first, -(-stop // _BLOCK_FRAMES))
        ]
        if not blocks:
            return np.zeros((0, channels), np.float32)
        skip = (start - first * _BLOCK_FRAMES) * per_frame
        return np.concatenate(blocks)[skip : skip + (stop - start) * per_frame]

    def uniform(self, name: str, segment: int, count: int) -> np.ndarray:
        """Values ``[count]`` float32 in 0..1."""
        return self._generator(name, segment, 0).random(count, np.float32)
