"""How a training step is compiled, if it is.

One step is a graph of more than ten thousand operations, and to build it in Python takes
longer than a GPU needs for them:

- ``"traced"``: it is built once for each shape of batch and replayed as it is. Nothing is
  compiled, so that training starts at once.
- ``"fused"``: likewise, and operations that follow one another become one kernel where
  they can. On CUDA hundreds of kernels are compiled for that, minutes on a new machine.
- ``"no"``: it is built anew at each step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

WAYS = ("traced", "fused", "no")

Function = Callable[..., Any]

# ``void mlx::core::set_compile_mode(CompileMode)``, in C++ only, and its values.
_SYMBOL = "_ZN3mlx4core16set_compile_modeENS0_11CompileModeE"
_NO_FUSE, _ENABLED = 2, 3


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


@contextmanager
def _unfused() -> Iterator[None]:
    """What ``mx.compile`` traces meanwhile keeps its operations."""
    _switch()(_NO_FUSE)
    try:
        yield
    finally:
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
