"""Sequences of few lengths: a recording of a new length meets shapes that are known.

For each new number of rows a GPU's library takes another kernel, which has to be loaded,
and the graph has to be built: together that takes longer than a network. So a sequence is
made as long as one of a few lengths, some to an octave::

    own rows ....... | rows that nobody asked for

What is behind its own end is never seen from in front of it: a convolution along time reads
zeros there, attention gives it no weight, a mean leaves it out. Where the end is comes as an
array, so that the graph is one for all lengths.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx

from rvc_mlx.arrays import steady_length
from rvc_mlx.compiling import Replayed

_LEAST, _MOST = 8, 512  # rows between lengths
_told = threading.local()

Network = Callable[..., mx.array]


@dataclass(frozen=True)
class Rows:
    """How a network's inputs are made longer.

    Attributes:
        own: of inputs, the rows of their result, and whatever else a layer asks for.
        lengthened: inputs as they are for so many rows; what is behind them is any number.
    """

    own: Callable[..., tuple[int, ...]]
    lengthened: Callable[[Sequence[mx.array], int], list[mx.array]]


def few_lengths(n: int, most: int | None = _MOST) -> int:
    """``n`` rounded up to a multiple of 8: four lengths an octave, at most ``most`` apart."""
    return steady_length(n, _LEAST, most, an_octave=4)


@dataclass(frozen=True)
class OwnRows:
    """How many rows are a sequence's own.

    Attributes:
        count: int32, what ``Rows.own`` says of the inputs: first their rows.
        of: rows that are computed.
    """

    count: mx.array
    of: int


def own_rows() -> OwnRows | None:
    """What a layer is told; None where all rows are the sequence's own."""
    found: OwnRows | None = getattr(_told, "rows", None)
    return found


def told_kernel(own: OwnRows | None) -> mx.array:
    """Own rows as kernels are given them, int32; any numbers where all are."""
    return mx.zeros((2,), mx.int32) if own is None else own.count


@contextmanager
def telling(rows: OwnRows) -> Iterator[None]:
    """``own_rows`` is this meanwhile."""
    _told.rows = rows
    try:
        yield
    finally:
        _told.rows = None


def within(x: mx.array, count: mx.array) -> mx.array:
    """``x`` ``[B, T, ...]``, zeros behind as many rows as ``count`` ``[1]`` says first."""
    rows = mx.arange(x.shape[1]).reshape(-1, *[1] * (x.ndim - 2))
    return mx.where(rows < count[0], x, mx.zeros((), x.dtype))


class Steady:
    """A network of one sequence, that computes any length as one of few.

    Several sequences together are computed as they are: they have been made alike. Those
    shapes are many, and most are met once; of one sequence they are few, and kept at once.

    Args:
        network: of arrays ``[B, ...]`` to ``[B, T, C]``; asks ``own_rows``.
        rows: of its inputs; None if these have few lengths already.

    Raises:
        RuntimeError: see ``Replayed``.
    """

    def __init__(self, network: Network, rows: Rows | None):
        self._rows = rows
        self._longer = Replayed(_told_network(network, rows), at_once=True)
        self._several = Replayed(network)

    def __call__(self, *arrays: mx.array) -> mx.array:
        """As the network, to rounding; may still be computing."""
        if len(arrays[0]) > 1:
            return self._several(*arrays)
        if self._rows is None:
            return self._longer(*arrays)
        own = self._rows.own(*arrays)
        longer = self._rows.lengthened(arrays, few_lengths(own[0]))
        return self._longer(mx.array(own, mx.int32), *longer)[:, : own[0]]


def _told_network(network: Network, rows: Rows | None) -> Network:
    """The network behind an array more, which says how many rows are the inputs' own."""
    if rows is None:
        return network
    own = rows.own

    def told(count: mx.array, *arrays: mx.array) -> mx.array:
        # The array stands for any count, so the rows come from the inputs' shapes.
        with telling(OwnRows(count, own(*arrays)[0])):
            return network(*arrays)

    return told
