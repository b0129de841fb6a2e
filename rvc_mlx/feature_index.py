"""The feature vectors of a voice, grouped in cells as its index file holds them.

Vectors stay in the file and are mapped: a search touches only the cells it visits. An
open index file may be replaced, but not rewritten in place.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np


def prepare_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what ranks ``rows`` [n, d] by distance in one matrix product.

    With c their mean, |q - r|^2 / 2 is (c - q) . (r - c) + |r - c|^2 / 2 and something
    that is the same for all r. The shift keeps small what cancels.

    Returns:
        c ``[d]``, and r - c with |r - c|^2 / 2 as a last column, ``[n, d + 1]`` float32.
    """
    centre = rows.mean(0)
    operand = np.empty((len(rows), len(centre) + 1), np.float32)
    shifted = np.subtract(rows, centre, out=operand[:, :-1])
    operand[:, -1] = np.einsum("nd,nd->n", shifted, shifted) / 2
    return centre, operand


@dataclass(frozen=True)
class Index:
    """The vectors of a voice, in cells around centroids.

    Attributes:
        path: the file, for messages.
        width: d, numbers per vector: 256 (v1 voices) or 768 (v2).
        centroids: ``[nlist, d]`` float32; empty for a flat index, which has one cell.
        nprobe: cells searched for each query.
        metric: 1, squared L2, the only one read.
        data: ``[bytes]`` uint8, the file, mapped.
        offsets: ``[cells]`` int64, where the vectors of each cell start in ``data``.
        starts: ``[cells + 1]`` int64, where each cell starts in ``ids``.
        ids: ``[n]`` int64 numbers of the vectors, cell after cell.
    """

    path: Path
    width: int
    centroids: np.ndarray
    nprobe: int
    metric: int
    data: np.ndarray
    offsets: np.ndarray
    starts: np.ndarray
    ids: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def prepared_centroids(self) -> tuple[np.ndarray, np.ndarray]:
        """``prepare_rows`` of the centroids, kept because every search needs it."""
        return prepare_rows(self.centroids)

    @property
    def list_ids(self) -> list[np.ndarray]:
        """The ids of the vectors in each cell, int64 ``[size]`` each."""
        return np.split(self.ids, self.starts[1:-1])

    @property
    def vectors(self) -> np.ndarray:
        """All vectors by id, ``[n, d]`` float32, copied from the file."""
        out = np.empty((len(self), self.width), np.float32)
        out[self.ids] = self.rows(0, len(self))
        return out

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Return vectors ``start`` to ``stop``, counted as in ids: ``[n, d]`` float32.

        Raises:
            ValueError: if one is not finite.
        """
        size = 4 * self.width
        out = np.empty((stop - start, self.width), np.float32)
        raw = out.view(np.uint8)  # bytes, because the file does not align the numbers
        cell = int(np.searchsorted(self.starts, start, "right")) - 1
        done = start
        while done < stop:
            first, end = int(self.starts[cell]), min(int(self.starts[cell + 1]), stop)
            offset = int(self.offsets[cell]) + (done - first) * size
            part = self.data[offset : offset + (end - done) * size]
            raw[done - start : end - start] = part.reshape(-1, size)
            done, cell = end, cell + 1
        if not np.isfinite(np.vdot(out, out)):  # one pass, no table of bools
            raise ValueError(
                f"{self.path}: this index holds numbers that are not finite; build it "
                "again from clean features"
            )
        return out

    def take(self, positions: np.ndarray) -> np.ndarray:
        """Return ``[n, d]`` float32 vectors at ``positions`` [n], counted as in ids."""
        cells = np.searchsorted(self.starts, positions, "right") - 1
        size = 4 * self.width
        begins = self.offsets[cells] + (positions - self.starts[cells]) * size
        out = np.empty((len(positions), self.width), np.float32)
        for row, begin in zip(out.view(np.uint8), begins.tolist(), strict=True):
            row[:] = self.data[begin : begin + size]
        return out
