"""How a network or a training step is compiled, if it is.

To build a graph in Python takes longer than a GPU needs for its operations, of which a
network has hundreds and a training step more than ten thousand:

- ``"traced"``: it is built once for each shape and replayed as it is. Nothing is
  compiled, so that it starts at once.
- ``"fused"``: likewise, and operations that follow one another become one kernel where
  they can. On CUDA hundreds of kernels are compiled for that, minutes on a new machine.
- ``"no"``: it is built anew at each call.
"""

from __future__ import annotations

import ctypes
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Lock, RLock
from typing import Any, cast

import mlx.core as mx

WAYS = ("traced", "fused", "no")

Function = Callable[..., Any]

# ``void mlx::core::set_compile_mode(CompileMode)``, in C++ only, and its values.
_SYMBOL = "_ZN3mlx4core16set_compile_modeENS0_11CompileModeE"
_NO_FUSE, _ENABLED = 2, 3
_MODE = RLock()  # it is one for all threads
_WITHIN: list[bool] = []  # an entry for each trace that is under way, one in another


def compiled(function: Function, way: str) -> Function:
    """``function`` of trees of arrays, compiled in one of the ways.

    Args:
        function: pure.
        way: of ``WAYS``.

    Raises:
        ValueError: the way is unknown.
        RuntimeError: this MLX cannot trace without fusing.
    """
    if way not in WAYS:
        raise ValueError(f"compile {way!r}; expected one of {', '.join(WAYS)}")
    if way == "no":
        return function
    replayed = cast(Function, mx.compile(function))
    if way == "fused":
        return replayed
    _switch()  # fails now rather than at the first step

    def traced(*arguments: Any) -> Any:
        with _unfused():
            return replayed(*arguments)

    return traced


class Replayed:
    """A function of arrays whose graphs are kept by shape, as ``"traced"`` keeps them.

    To keep one takes several times as long as to build it. So a shape's first call builds
    it as ever, and the second, if there is one, keeps it. What the function holds is
    computed by then, and no part of the graph.

    The newest graphs are kept; a server that meets ever new lengths does not grow. A graph
    belongs to the stream that it was built on, and so to its thread.

    Args:
        function: pure, of arrays to an array.
        kept: graphs; and shapes that were met once.
        at_once: keep a shape's graph from its first call on, but for the very first call
            on each stream: a thread may end after that.

    Raises:
        RuntimeError: this MLX cannot trace without fusing.
    """

    def __init__(
        self,
        function: Callable[..., mx.array],
        kept: int = 128,
        at_once: bool = False,
    ):
        _switch()
        self._function, self._kept = function, kept
        self._at_once = at_once
        self._streams: set[str] = set()
        self._graphs: OrderedDict[Any, Function | None] = OrderedDict()
        self._lock = Lock()

    def __call__(self, *arrays: mx.array) -> mx.array:
        """As the function; may still be computing."""
        stream = str(mx.default_stream(mx.default_device()))
        key = (stream, *((array.shape, array.dtype) for array in arrays))
        with self._lock:
            again = self._at_once and stream in self._streams
            known = again or key in self._graphs
            graph = self._graphs.get(key)
        if not known:
            result = self._function(*arrays)
        elif graph is None:
            # A function of its own: MLX forgets all graphs of one together.
            graph = mx.compile(lambda *given: self._function(*given))
            with _unfused():
                result = graph(*arrays)
        else:
            result = graph(*arrays)
        with self._lock:
            self._streams.add(stream)
            self._graphs[key] = graph
            self._graphs.move_to_end(key)
            while len(self._graphs) > self._kept:
                self._graphs.popitem(last=False)
        return cast(mx.array, result)


@contextmanager
def _unfused() -> Iterator[None]:
    """What ``mx.compile`` traces meanwhile keeps its operations."""
    if "MLX_DISABLE_COMPILE" in os.environ:  # a switch back would undo it
        yield
        return
    with _MODE:
        _switch()(_NO_FUSE)
        _WITHIN.append(True)
        try:
            yield
        finally:
            _WITHIN.pop()
            if not _WITHIN:
                _switch()(_ENABLED)


@cache
def _switch() -> Callable[[int], None]:
    folder = Path(mx.__file__).parent / "lib"
    files = [folder / name for name in ("libmlx.so", "libmlx.dylib")]
    try:
        library = ctypes.CDLL(str(next(file for file in files if file.exists())))
        switch = library[_SYMBOL]
    except (StopIteration, OSError, AttributeError) as error:
        raise RuntimeError(
            "this MLX has no switch for tracing without fusing; "
            "pass --compile fused or --compile no"
        ) from error
    switch.argtypes, switch.restype = [ctypes.c_int], None
    return cast(Callable[[int], None], switch)
