"""One spelling for arrays on the host (numpy) and on a device (MLX).

Both libraries name the same functions alike; what a stage gives to the next may be
either, and only what needs the host asks for numpy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np

Array = np.ndarray | mx.array


def array_module(x: Array) -> Any:
    """``mlx.core`` or ``numpy``, whichever ``x`` belongs to."""
    return mx if isinstance(x, mx.array) else np


def to_host(x: Array) -> np.ndarray:
    """``x`` as numpy; waits until it is computed."""
    return np.asarray(x)


def one_ahead(items: Iterable[Array]) -> Iterator[Array]:
    """The same arrays, each given once the next one is begun.

    So a device computes one while the host reads the one before.
    """
    begun: Array | None = None
    for item in items:
        if begun is not None:
            yield begun
        begun = item
    if begun is not None:
        yield begun
