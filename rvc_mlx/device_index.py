"""Retrieval on the device: the same search as ``retrieval``, without leaving it.

A table of distances from matrix products ranks all vectors of the index, those outside
the probed cells excluded. The best few are then measured again as sum((q - r)^2), which
does not cancel. GPUs may shorten the factors of a product to 11 bits (TF32); split into
two numbers of that length each, they lose nothing that matters.
"""

from __future__ import annotations

from functools import cached_property

import mlx.core as mx
import numpy as np

from rvc_mlx.feature_index import Index, prepare_rows
from rvc_mlx.retrieval import (
    MIN_DISTANCE,
    MISSING_DISTANCE,
    NEIGHBOURS,
    check_blend,
    check_queries,
)

_TABLE_BYTES = 256 << 20  # memory for one table of distances, or of candidates
_MOST_QUERIES = 1 << 15  # of one table: CUDA's sort counts its rows up to 65,535
_SPARE = 8  # candidates beyond k that are measured again
_GROUP = 64  # columns whose minimum stands for them
_HIGH_BITS = 0xFFFFE000  # of a float32: sign, exponent, 10 bits of the fraction


class DeviceIndex:
    """An index whose vectors lie where MLX computes; loaded at its first search.

    Args:
        index: from ``read_index``.
    """

    def __init__(self, index: Index):
        self.index = index

    @staticmethod
    def memory(index: Index) -> int:
        """Bytes that the vectors of an index take on a device."""
        return 3 * 4 * len(index) * index.width

    @cached_property
    def _vectors(self) -> _Rows:
        return _Rows(self.index.rows(0, len(self.index)))

    @cached_property
    def _centroids(self) -> _Rows:
        return _Rows(self.index.centroids)

    @cached_property
    def _cells(self) -> mx.array:
        """Cell of each vector ``[n]``, as the table has them."""
        sizes = np.diff(self.index.starts)
        cells = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
        return mx.array(np.pad(cells, (0, self._vectors.spare), constant_values=-1))

    def nearest(
        self, queries: mx.array, k: int = NEIGHBOURS, exact: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """As ``retrieval.nearest``; queries that are not finite are not found out."""
        check_queries(self.index, queries.shape, k)
        distances = np.full((len(queries), k), MISSING_DISTANCE, np.float32)
        ids = np.full(distances.shape, -1)
        for part in self._parts(len(queries), k):
            near, place = map(np.array, self._search(queries[part], k, exact))
            found = np.isfinite(near)
            count = near.shape[1]
            distances[part, :count][found] = near[found]
            ids[part, :count][found] = self.index.ids[place[found]]
        return distances, ids

    def blend(
        self,
        features: mx.array,
        rate: float,
        k: int = NEIGHBOURS,
        exact: bool = False,
    ) -> mx.array:
        """As ``retrieval.blend_features``: ``[T, d]`` float32, nothing computed yet."""
        check_blend(self.index, rate)
        check_queries(self.index, features.shape, k)
        parts = [
            self._blended(features[part], rate, k, exact)
            for part in self._parts(len(features), k)
        ]
        return mx.concatenate(parts) if rate and parts else features

    def _blended(
        self, features: mx.array, rate: float, k: int, exact: bool
    ) -> mx.array:
        distances, places = self._search(features, k, exact)
        found = mx.isfinite(distances)
        near = mx.maximum(mx.where(found, distances, 1), MIN_DISTANCE)
        # Relative to the first, the nearest, whose square alone could be out of range.
        weights = mx.where(found, mx.square(near[:, :1] / near), 0)
        weights = weights / mx.maximum(weights.sum(1, keepdims=True), 1)
        mean = (weights[..., None] * self._vectors.rows[places]).sum(1)
        blended = rate * mean + (1 - rate) * features
        return mx.where(found[:, :1], blended, features)

    def _parts(self, count: int, k: int) -> list[slice]:
        """Queries whose table of distances, and candidates, the GPU takes together."""
        index = self.index
        row = max(len(index), len(index.centroids), (k + _SPARE) * index.width)
        step = min(max(1, _TABLE_BYTES // (4 * row)), _MOST_QUERIES)
        return [slice(i, min(i + step, count)) for i in range(0, count, step)]

    def _search(
        self, queries: mx.array, k: int, exact: bool
    ) -> tuple[mx.array, mx.array]:
        """Distances and places of up to k neighbours, ascending; infinite if missing."""
        if exact or not len(self.index.centroids):
            return self._vectors.nearest(queries, k)
        _, probed = self._centroids.nearest(queries, self.index.nprobe)
        allowed = self._cells == probed[:, :1]
        for i in range(1, probed.shape[1]):
            allowed = allowed | (self._cells == probed[:, i : i + 1])
        return self._vectors.nearest(queries, k, allowed)


class _Rows:
    """Vectors ``[n, d]`` among which neighbours are looked for.

    Attributes:
        rows: ``[n + spare, d]``; the spare ones fill up the last group.
    """

    def __init__(self, rows: np.ndarray):
        self.spare = -len(rows) % _GROUP if len(rows) else _GROUP
        if len(rows):
            centre, operand = prepare_rows(rows)
        else:
            centre = np.zeros(rows.shape[1], np.float32)
            operand = np.zeros((0, rows.shape[1] + 1), np.float32)
        fill = (0, self.spare)
        self.rows = mx.array(np.pad(rows, (fill, (0, 0))))
        self._norms = mx.array(np.pad(operand[:, -1], fill, constant_values=np.inf))
        self._centre = mx.array(centre)
        shifted = mx.array(np.pad(operand[:, :-1], (fill, (0, 0))))
        self._high, self._low = _split(shifted)
        mx.eval(self.rows, self._norms, self._centre, self._high, self._low)

    def nearest(
        self, queries: mx.array, k: int, allowed: mx.array | None = None
    ) -> tuple[mx.array, mx.array]:
        """Squared distances and row numbers ``[T, min(k, n)]``, ascending.

        Args:
            queries: ``[T, d]`` float32.
            k: neighbours.
            allowed: ``[T, n + spare]``; rows that may be found, all if None. Where
                there are not enough the distance is infinite.
        """
        high, low = _split(self._centre - queries)
        table = mx.addmm(self._norms, high, self._high.T)
        table = mx.addmm(table, high, self._low.T)
        table = mx.addmm(table, low, self._high.T)
        if allowed is not None:
            table = mx.where(allowed, table, mx.inf)
        n = len(self.rows) - self.spare
        candidates = _smallest(table, min(k + _SPARE, len(self.rows)))
        difference = self.rows[candidates] - queries[:, None]
        distances = mx.square(difference).sum(-1)
        ranked = mx.take_along_axis(table, candidates, axis=1)
        distances = mx.where(mx.isinf(ranked), mx.inf, distances)
        order = mx.argsort(distances, axis=1)[:, : min(k, n)]
        return tuple(  # type: ignore[return-value]
            mx.take_along_axis(x, order, axis=1) for x in (distances, candidates)
        )


def _split(x: mx.array) -> tuple[mx.array, mx.array]:
    """Two numbers of few bits each whose sum is ``x``."""
    high = (x.view(mx.uint32) & _HIGH_BITS).view(mx.float32)
    return high, x - high


def _smallest(table: mx.array, count: int) -> mx.array:
    """Columns of the ``count`` smallest values of each row, in any order.

    They lie in the ``count`` groups of columns with the smallest minima.
    """
    height, width = table.shape
    groups = width // _GROUP
    if groups < 2 * count:
        return mx.argpartition(table, count - 1, axis=1)[:, :count]
    minima = table.reshape(height, groups, _GROUP).min(axis=2)
    best = mx.argpartition(minima, count - 1, axis=1)[:, :count]
    columns = (best[:, :, None] * _GROUP + mx.arange(_GROUP)).reshape(height, -1)
    values = mx.take_along_axis(table, columns, axis=1)
    order = mx.argpartition(values, count - 1, axis=1)[:, :count]
    return mx.take_along_axis(columns, order, axis=1)
