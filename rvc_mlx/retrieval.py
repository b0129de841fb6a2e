"""Retrieval: features pulled towards the nearest ones of the voice's own recordings."""

from collections.abc import Callable
from functools import partial

import numpy as np

from .arrays import Array, to_host
from .faiss_file import read_index
from .feature_index import Index, prepare_rows

__all__ = ["Index", "blend_features", "nearest", "read_index"]

NEIGHBOURS = 8
MISSING_DISTANCE = float(np.finfo(np.float32).max)  # what faiss gives for id -1
MIN_DISTANCE = 1e-8  # squared; an exact hit would have infinite weight
_BLOCK_BYTES = 32 << 20  # memory for one table of distances
_QUERY_BLOCK = 1024
_SPARE = 8  # candidates beyond k that are measured again without cancellation
_FEW_PAIRS = 512  # of a query and a vector
_GROUP = 64  # columns whose minimum stands for them


def nearest(
    index: Index, queries: np.ndarray, k: int = NEIGHBOURS, exact: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Find the nearest vectors of an index.

    Args:
        index: from ``read_index``.
        queries: ``[T, d]`` float32 features.
        k: neighbours wanted.
        exact: search all vectors instead of the nprobe nearest cells. The cells are
            what faiss and so the original RVC searches; they miss true neighbours.

    Returns:
        Squared L2 distances ``[T, k]`` float32, ascending, and ids ``[T, k]`` int64.
        Where a search meets fewer than k vectors the rest has id -1 and the largest
        float32 as its distance.

    Raises:
        ValueError: if the widths differ or the queries are not finite.
    """
    distances, positions = _nearest_positions(index, queries, k, exact)
    ids = np.full(positions.shape, -1)
    found = positions >= 0
    ids[found] = index.ids[positions[found]]
    return distances, ids


# Features ``[T, d]``, rate and whether to search exactly, to mixed features.
Blend = Callable[[Array, float, bool], Array]


def blending(index: Index) -> Blend:
    """``blend_features`` for an index, of features from anywhere, on the host."""
    return partial(_blend_on_host, index)


def _blend_on_host(index: Index, features: Array, rate: float, exact: bool) -> Array:
    return blend_features(to_host(features), index, rate, exact=exact)


def blend_features(
    features: np.ndarray,
    index: Index,
    rate: float,
    k: int = NEIGHBOURS,
    exact: bool = False,
) -> np.ndarray:
    """Mix features with the mean of their nearest neighbours in the index.

    Neighbours are weighted by 1 / distance**4 (the square of faiss's squared one).
    Rows that meet no vector at all stay as they are.

    Args:
        features: ``[T, d]`` float32 at 50 Hz.
        index: from ``read_index``.
        rate: 0 leaves the features, 1 replaces them.
        k: neighbours.
        exact: see ``nearest``.

    Returns:
        ``[T, d]`` float32.

    Raises:
        ValueError: if the index is empty or of another width, or the rate is outside
            0..1.

    Source:
        RVC, ``infer/modules/vc/pipeline.py``, ``Pipeline.vc``.
    """
    check_blend(index, rate)
    if rate == 0:
        return features
    distances, positions = _nearest_positions(index, features, k, exact)
    found = positions >= 0
    weights = np.zeros(positions.shape)
    weights[found] = np.maximum(distances[found], MIN_DISTANCE).astype(np.float64) ** -2
    weights /= np.maximum(weights.sum(1, keepdims=True), np.finfo(np.float64).tiny)
    needed, place = np.unique(np.maximum(positions, 0), return_inverse=True)
    vectors = index.take(needed)[place.reshape(positions.shape)]  # [T, k, d]
    mean = np.einsum("tk,tkd->td", weights.astype(np.float32), vectors)
    blended = np.float32(rate) * mean + np.float32(1 - rate) * features
    return np.where(found.any(1, keepdims=True), blended, features)


def check_blend(index: Index, rate: float) -> None:
    """Raise ValueError for a rate outside 0..1, or for an index without vectors."""
    if not 0 <= rate <= 1:
        raise ValueError(f"the index rate is 0 to 1, not {rate}")
    if rate and len(index) == 0:
        raise ValueError(
            f"{index.path}: this index holds no vectors; give the file whose name "
            "starts with added_ instead of trained_"
        )


def check_queries(index: Index, shape: tuple[int, ...], k: int) -> None:
    """Raise ValueError for features of another width, or for no neighbours."""
    if len(shape) != 2 or shape[1] != index.width:
        raise ValueError(
            f"{index.path}: this index is {index.width} wide, the features are "
            f"{shape}; v1 voices have 256, v2 voices 768: take the index that was made "
            "with this voice"
        )
    if k < 1:
        raise ValueError(f"the number of neighbours is 1 or more, not {k}")


def _nearest_positions(
    index: Index, queries: np.ndarray, k: int, exact: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return distances [T, k] and places in ``index.ids`` [T, k], -1 where missing."""
    check_queries(index, queries.shape, k)
    queries = np.ascontiguousarray(queries, np.float32)
    if not np.isfinite(queries).all():
        raise ValueError("the features to look up are not finite numbers")
    distances = np.full((len(queries), k), MISSING_DISTANCE, np.float32)
    positions = np.full((len(queries), k), -1)
    for start in range(0, len(queries), _QUERY_BLOCK):
        part = slice(start, start + _QUERY_BLOCK)
        distances[part], positions[part] = _search(index, queries[part], k, exact)
    return distances, positions


def _search(
    index: Index, queries: np.ndarray, k: int, exact: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return distances [T, k] and places [T, k] for one block of queries."""
    if exact or not len(index.centroids):
        cells = np.zeros((len(queries), 1), np.int64)
        starts = np.array([0, len(index)])
    else:
        _, cells = _nearest_rows(  # [T, nprobe]
            queries, index.centroids, index.nprobe, index.prepared_centroids
        )
        starts = index.starts
    probes = cells.shape[1]
    distances = np.full((len(queries), probes, k), MISSING_DISTANCE, np.float32)
    positions = np.full(distances.shape, -1)
    order = np.argsort(cells, axis=None, kind="stable")  # visits, grouped by cell
    visited, first = np.unique(cells.ravel()[order], return_index=True)
    for cell, visits in zip(visited, np.split(order, first[1:]), strict=True):
        start, stop = starts[cell : cell + 2].tolist()
        if start == stop:
            continue
        query, probe = visits // probes, visits % probes
        near, place = _search_range(index, start, stop, queries[query], k)
        distances[query, probe, : near.shape[1]] = near
        positions[query, probe, : near.shape[1]] = place
    shape = len(queries), probes * k
    return _keep(distances.reshape(shape), positions.reshape(shape), k)


def _search_range(
    index: Index, start: int, stop: int, queries: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the nearest of a range of vectors: distances, places in ``index.ids``."""
    step = max(_GROUP, _BLOCK_BYTES // (4 * max(len(queries), index.width)))
    found = []
    for first in range(start, stop, step):
        rows = index.rows(first, min(first + step, stop))
        near, row = _nearest_rows(queries, rows, k)
        found.append((near, row + first))
    if len(found) == 1:
        return found[0]
    distances = np.concatenate([near for near, _ in found], 1)
    return _keep(distances, np.concatenate([place for _, place in found], 1), k)


def _keep(
    distances: np.ndarray, places: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the k smallest distances of each row, ascending, with their places."""
    order = np.argsort(distances, 1, kind="stable")[:, :k]
    row = np.arange(len(order))[:, None]
    return distances[row, order], places[row, order]


def _nearest_rows(
    queries: np.ndarray,
    rows: np.ndarray,
    k: int,
    prepared: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the min(k, n) nearest of ``rows`` [n, d]: distances and row numbers.

    Distances are measured as sum((q - r)^2), which does not cancel: for all pairs where
    they are few, else for candidates from one matrix product (``prepared``).
    """
    if len(queries) * len(rows) <= _FEW_PAIRS:
        difference = rows - queries[:, None]
        distances = np.einsum("tcd,tcd->tc", difference, difference)
        order = np.argsort(distances, 1, kind="stable")[:, :k]
        return distances[np.arange(len(order))[:, None], order], order
    centre, operand = prepare_rows(rows) if prepared is None else prepared
    left = np.ones((len(queries), len(centre) + 1), np.float32)
    np.subtract(centre, queries, out=left[:, :-1])
    candidates = _smallest(left @ operand.T, min(k + _SPARE, len(rows)))
    difference = rows[candidates]
    difference -= queries[:, None]
    return _keep(np.einsum("tcd,tcd->tc", difference, difference), candidates, k)


def _smallest(table: np.ndarray, count: int) -> np.ndarray:
    """Return the columns of the ``count`` smallest values of each row, in any order.

    In a wide table the ``count``-th smallest minimum of groups of columns is an upper
    bound of the ``count``-th smallest value: few columns pass it, and they are sorted.
    """
    height, width = table.shape
    groups = width // _GROUP
    if groups < 2 * count:
        return np.argpartition(table, count - 1, 1)[:, :count]
    whole = table[:, : groups * _GROUP].reshape(height, groups, _GROUP)
    bound = np.partition(whole.min(2), count - 1, 1)[:, count - 1]
    row, column = np.divmod(np.flatnonzero(table <= bound[:, None]), width)
    order = np.lexsort((table[row, column], row))
    first = np.searchsorted(row, np.arange(height))
    return column[order[first[:, None] + np.arange(count)]]
