"""One spelling for arrays on the host (numpy) and on a device (MLX).

Both libraries name the same functions alike; what a stage gives to the next may be
either, and only what needs the host asks for numpy.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple, TypeVar

import mlx.core as mx
import numpy as np

Array = np.ndarray | mx.array
Item = TypeVar("Item")

_LEAST_COPY = 1 << 18  # bytes; for fewer the copier's start costs more
_ANY_DIRECTION = 4  # cudaMemcpyDefault


def array_module(x: Array) -> Any:
    """``mlx.core`` or ``numpy``, whichever ``x`` belongs to."""
    return mx if isinstance(x, mx.array) else np


def reflected(x: Array, before: int, after: int) -> Array:
    """``x`` ``[..., n]``, mirrored at its ends, which are not repeated.

    Args:
        x: more samples than ``before`` and than ``after``.
        before: samples in front of it; none here and behind it: it is ``x`` itself.
        after: samples behind it.
    """
    if not (before or after):
        return x
    end = x.shape[-1] - 1
    head, tail = x[..., 1 : before + 1], x[..., end - after : end]
    parts = [head[..., ::-1], x, tail[..., ::-1]]
    joined: Array = array_module(x).concatenate(parts, axis=-1)
    return joined


class Excerpt(NamedTuple):
    """Samples ``[n]``, and how many ``reflected`` is to put before and after them."""

    samples: Array
    before: int = 0
    after: int = 0


def reflected_together(excerpts: Sequence[Excerpt]) -> Array:
    """Excerpts that are equally long once reflected, ``[B, before + n + after]``.

    Neighbours that are alike are stacked first, and reflected at once.
    """
    runs = itertools.groupby(excerpts, lambda e: (len(e.samples), e.before, e.after))
    return together(
        [
            reflected(together([e.samples[None] for e in run]), before, after)
            for (_, before, after), run in runs
        ]
    )


def to_host(x: Array) -> np.ndarray:
    """``x`` as numpy; waits until it is computed."""
    return np.asarray(x)


def copy_to(target: np.ndarray, x: np.ndarray) -> None:
    """``target[:] = x``, by the device's copier where ``x`` lies in memory of it.

    The host would fetch such memory page by page, in two and a half times the time.

    Args:
        target: as ``x``, contiguous.
        x: on the host, or as ``to_host`` gives it.
    """
    owner: object = x
    while isinstance(owner, np.ndarray) and owner.base is not None:
        owner = owner.base
    if isinstance(owner, memoryview):
        owner = owner.obj
    alike = (x.dtype, x.shape) == (target.dtype, target.shape)
    plain = alike and x.flags.c_contiguous and target.flags.c_contiguous
    if isinstance(owner, mx.array) and plain and x.nbytes >= _LEAST_COPY:
        copier = _cuda_copier()
        if copier and copier(target, x):
            return
    target[:] = x


@cache
def _cuda_copier() -> Callable[[np.ndarray, np.ndarray], bool] | None:
    """Copies from CUDA's managed memory on a stream of its own; None without CUDA."""
    if not mx.cuda.is_available():
        return None
    stream = ctypes.c_void_p()
    for version in (13, 12):
        with suppress(OSError, AttributeError):
            cuda = ctypes.CDLL(f"libcudart.so.{version}")
            # It waits for the default stream, on which MLX brings the array here, but not
            # as that does for networks that are under way.
            if cuda.cudaStreamCreate(ctypes.byref(stream)) == 0:
                break
    else:
        return None

    def copy(target: np.ndarray, x: np.ndarray) -> bool:
        places = (ctypes.c_void_p(a.ctypes.data) for a in (target, x))
        size = ctypes.c_size_t(x.nbytes)
        failed = cuda.cudaMemcpyAsync(*places, size, _ANY_DIRECTION, stream)
        return not (failed or cuda.cudaStreamSynchronize(stream))

    return copy


def begin(*arrays: Array) -> None:
    """Queue what a device has to compute for these; the host's are there."""
    mx.async_eval(*(array for array in arrays if isinstance(array, mx.array)))


def steady_length(
    n: int, least: int, most: int | None = None, an_octave: int = 8
) -> int:
    """``n`` rounded up a little, so that lengths near one another share one length.

    A library that plans each new shape anew, as cuDNN does for hundreds of milliseconds a
    network, then meets so many lengths an octave, and more where steps cannot grow.

    Args:
        n: 1 or more.
        least: the result is a multiple of it; a power of two.
        most: largest step between lengths; likewise; None: they grow for ever.
        an_octave: lengths where steps grow; a power of two.
    """
    step = max((1 << n.bit_length()) // (2 * an_octave), least)
    step = step if most is None else min(step, most)
    return -(-n // step) * step


def zeros_behind(x: mx.array, length: int) -> mx.array:
    """``x`` ``[B, n, ...]`` and zeros up to ``length``; as it is where it is as long."""
    missing = length - x.shape[1]
    if missing <= 0:
        return x  # padding by nothing would still be a copy
    return mx.pad(x, [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)])


def one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The same items, each given once the next one is begun.

    So a device computes one while the host reads the one before.
    """
    waiting: list[Item] = []
    for item in items:
        waiting.append(item)
        if len(waiting) == 2:
            yield waiting.pop(0)
    yield from waiting


def neighbours(
    items: Iterable[Item],
    key: Callable[[Item], object],
    weight: Callable[[Item], float],
    most: float,
) -> Iterator[list[Item]]:
    """Runs of neighbours that can be computed together.

    Args:
        items: taken one by one, none before it is needed.
        key: equal for items that can be together, such as their length.
        weight: what an item costs.
        most: what the items of a run may cost together; one alone may cost more.
    """
    run: list[Item] = []
    total = 0.0
    for item in items:
        if run and (key(item) != key(run[0]) or total + weight(item) > most):
            yield run
            run, total = [], 0.0
        run.append(item)
        total += weight(item)
        if total >= most:
            yield run
            run, total = [], 0.0
    if run:
        yield run


def together(arrays: Sequence[Array]) -> Array:
    """Arrays ``[b, ...]`` as ``[B, ...]``; the same ``[1, ...]`` again costs nothing.

    On the device if one of them is there.
    """
    first = arrays[0]
    if len(arrays) == 1:
        return first
    xp = mx if any(isinstance(array, mx.array) for array in arrays) else np
    joined: Array
    if len(first) == 1 and all(array is first for array in arrays):
        joined = xp.broadcast_to(first, (len(arrays), *first.shape[1:]))
    else:
        joined = xp.concatenate([xp.asarray(array) for array in arrays])
    return joined
