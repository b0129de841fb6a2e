"""Seeded random numbers that do not depend on how the work is cut into pieces."""

from __future__ import annotations

import zlib

import mlx.core as mx
import numpy as np

from rvc_mlx.arrays import Array, array_module


class Noise:
    """All randomness of one conversion, from one seed.

    The value at a frame depends on the seed, the name of the draw, the segment and the
    frame alone, so windows of any length see the same noise.

    Args:
        seed: 0 or more.
    """

    _block_frames = 64  # frames drawn by one generator

    def __init__(self, seed: int = 0):
        self.seed = seed

    def _seeds(self, name: str, segment: int, block: int) -> np.random.SeedSequence:
        key = (self.seed, zlib.crc32(name.encode()), segment, block)
        return np.random.SeedSequence(key)

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
        size = self._block_frames
        first = start // size
        end = max(first + 1, -(-stop // size))  # no frames are a cut of one block, too
        blocks = [
            self._block(self._seeds(name, segment, block), size * per_frame, channels)
            for block in range(first, end)
        ]
        skip = (start - first * size) * per_frame
        joined: Array = array_module(blocks[0]).concatenate(blocks)
        return joined[skip : skip + (stop - start) * per_frame]

    def _block(self, seeds: np.random.SeedSequence, rows: int, channels: int) -> Array:
        """Standard normal values ``[rows, channels]`` float32."""
        generator = np.random.Generator(np.random.SFC64(seeds))
        return generator.standard_normal((rows, channels), np.float32)

    def uniform(self, name: str, segment: int, count: int) -> np.ndarray:
        """Values ``[count]`` float32 in 0..1."""
        generator = np.random.Generator(np.random.SFC64(self._seeds(name, segment, 0)))
        return generator.random(count, np.float32)


class DeviceNoise(Noise):
    """The same promise with numbers drawn on MLX's default device, as ``mx.array``.

    They are other numbers than those of ``Noise`` with the same seed.
    """

    _block_frames = 256  # a call costs more than numbers

    def _block(self, seeds: np.random.SeedSequence, rows: int, channels: int) -> Array:
        key = mx.array(seeds.generate_state(2))
        return mx.random.normal((rows, channels), key=key)
