"""Seeded random numbers that do not depend on how the work is cut into pieces."""

from __future__ import annotations

import zlib

import mlx.core as mx
import numpy as np

from rvc_mlx.arrays import Array

_BLOCK_FRAMES = 64  # frames drawn by one generator
_DEVICE_BLOCK_FRAMES = 256  # the same on a device, where a call costs more than numbers


class Noise:
    """All randomness of one conversion, from one seed.

    The value at a frame depends on the seed, the name of the draw, the segment and the
    frame alone, so windows of any length see the same noise.

    Args:
        seed: 0 or more.
    """

    def __init__(self, seed: int = 0):
        self.seed = seed

    def _seeds(self, name: str, segment: int, block: int) -> np.random.SeedSequence:
        key = (self.seed, zlib.crc32(name.encode()), segment, block)
        return np.random.SeedSequence(key)

    def _generator(self, name: str, segment: int, block: int) -> np.random.Generator:
        return np.random.Generator(np.random.SFC64(self._seeds(name, segment, block)))

    def normal(
        self,
        name: str,
        segment: int,
        start: int,
        stop: int,
        per_frame: int,
        channels: int,
    ) -> Array:
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


class DeviceNoise(Noise):
    """The same promise with numbers drawn on MLX's default device, as ``mx.array``.

    They are other numbers than those of ``Noise`` with the same seed.
    """

    def normal(
        self,
        name: str,
        segment: int,
        start: int,
        stop: int,
        per_frame: int,
        channels: int,
    ) -> mx.array:
        """As ``Noise.normal``, on the device."""
        size = _DEVICE_BLOCK_FRAMES
        first = start // size
        blocks = [
            mx.random.normal(
                (size * per_frame, channels),
                key=mx.array(self._seeds(name, segment, block).generate_state(2)),
            )
            for block in range(first, -(-stop // size))
        ]
        if not blocks:
            return mx.zeros((0, channels))
        skip = (start - first * size) * per_frame
        return mx.concatenate(blocks)[skip : skip + (stop - start) * per_frame]
