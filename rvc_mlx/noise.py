"""Seeded random numbers that do not depend on how the work is cut into pieces."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from rvc_mlx.arrays import Array


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
        seeds = [self._seeds(name, segment, block) for block in range(first, end)]
        blocks = self._blocks(seeds, size * per_frame, channels)
        skip = (start - first * size) * per_frame
        return blocks[skip : skip + (stop - start) * per_frame]

    def _blocks(
        self, seeds: Sequence[np.random.SeedSequence], rows: int, channels: int
    ) -> Array:
        """Standard normal values ``[len(seeds) * rows, channels]`` float32."""
        generators = [np.random.Generator(np.random.SFC64(seed)) for seed in seeds]
        shape = (rows, channels)
        return np.concatenate(
            [generator.standard_normal(shape, np.float32) for generator in generators]
        )

    def uniform(self, name: str, segment: int, count: int) -> np.ndarray:
        """Values ``[count]`` float32 in 0..1."""
        generator = np.random.Generator(np.random.SFC64(self._seeds(name, segment, 0)))
        return generator.random(count, np.float32)


class DeviceNoise(Noise):
    """The same promise with numbers drawn on MLX's default device, as ``mx.array``.

    They are other numbers than those of ``Noise`` with the same seed.
    """

    _block_frames = 256

    def _blocks(
        self, seeds: Sequence[np.random.SeedSequence], rows: int, channels: int
    ) -> Array:
        # The device takes longer to be told a block than to draw it: all at once.
        keys = mx.array(np.stack([seed.generate_state(2) for seed in seeds]))
        drawn = mx.vmap(lambda key: mx.random.normal((rows, channels), key=key))(keys)
        return drawn.reshape(-1, channels)
