"""What numpy's and Python's own names in a pickle become here.

Each function stands in for one upstream function and checks its arguments itself.

Source: ``numpy/_core/src/multiarray/methods.c`` (``array_setstate``), ``descriptor.c``
(``arraydescr_setstate``).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from rvc_mlx.formats.pickle_reader import PickleReader
from rvc_mlx.formats.pickle_values import Builder, Foreign, Record, text_key

MAX_DIMENSIONS = 32
MAX_ELEMENTS = 2**48
_NUMPY_CODES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")


def is_count(value: object) -> bool:
    """Whether a value from a pickle can be a size, a stride or an offset."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_shape(value: object) -> bool:
    """Whether a value from a pickle can be the shape of an array."""
    return (
        isinstance(value, tuple)
        and len(value) <= MAX_DIMENSIONS
        and all(map(is_count, value))
        and math.prod(n or 1 for n in value) <= MAX_ELEMENTS
    )


class NumpyType(Record):
    """A numpy dtype; ``foreign`` is set for the kinds that are not plain numbers."""

    __slots__ = ("dtype", "foreign")

    def __init__(self, dtype: np.dtype | None, foreign: Foreign | None):
        self.dtype = dtype
        self.foreign = foreign

    def set_state(self, state: object) -> None:
        """Take the byte order; names, sub-arrays and the like are refused."""
        if self.dtype is None:
            return
        if not isinstance(state, tuple) or len(state) < 5:
            raise ValueError("a numpy type in the file has an unknown state")
        if state[1] not in ("<", ">", "|", "=") or any(
            x is not None for x in state[2:5]
        ):
            raise ValueError("a numpy type in the file has parts; plain ones are read")
        stored = self.dtype.newbyteorder(state[1])
        self.dtype = self.dtype if stored.isnative else stored


class PickledArray(Record):
    """A numpy array, there once its state is set; or ``foreign`` if not of numbers."""

    __slots__ = ("_reader", "array", "foreign")

    def __init__(self, reader: PickleReader):
        self._reader = reader
        self.array: np.ndarray | None = None
        self.foreign: Foreign | None = None

    def set_state(self, state: object) -> None:
        """Take (version, shape, dtype, fortran order, bytes)."""
        if not isinstance(state, tuple) or len(state) != 5:
            raise ValueError("a numpy array in the file has an unknown state")
        self.fill(state[4], state[2], state[1], "F" if state[3] else "C")

    def fill(self, data: object, dtype: object, shape: object, order: object) -> None:
        """View ``data`` as an array, without a copy."""
        if not isinstance(dtype, NumpyType):
            raise ValueError("a numpy array in the file has no type")
        if dtype.dtype is None:
            self.foreign = dtype.foreign
            return
        if isinstance(data, str):  # written by Python 2
            self._reader.charge(copied=len(data))
            data = data.encode("utf-8")
        if not isinstance(data, (bytes, memoryview)):
            raise ValueError("a numpy array in the file has no bytes")
        if (
            not isinstance(shape, tuple)
            or not is_shape(shape)
            or order not in ("C", "F")
        ):
            raise ValueError("a numpy array in the file has an impossible shape")
        if math.prod(shape) * dtype.dtype.itemsize != len(data):
            raise ValueError(
                f"a numpy array in the file has shape {shape} of {dtype.dtype} but "
                f"{len(data)} bytes"
            )
        self.array = np.frombuffer(data, dtype.dtype).reshape(shape, order=order)


def check(arguments: tuple, fewest: int, most: int, name: str) -> None:
    """Refuse a call with too few or too many arguments."""
    if not fewest <= len(arguments) <= most:
        raise ValueError(f"the pickle calls {name} with {len(arguments)} arguments")


def marker(name: str) -> Builder:
    """A class that is recognised but never called."""
    return Builder(name, lambda _, reader: reader.foreign_class(name))


def _reconstruct(arguments: tuple, reader: PickleReader) -> object:
    check(arguments, 3, 3, "numpy's _reconstruct")
    if isinstance(arguments[0], Foreign):
        return arguments[0]
    if arguments[0] is not _NDARRAY:
        raise ValueError("a numpy array in the file has an unknown class")
    return PickledArray(reader)


def _frombuffer(arguments: tuple, reader: PickleReader) -> object:
    check(arguments, 4, 4, "numpy's _frombuffer")
    box = PickledArray(reader)
    data, dtype, shape, order = arguments
    box.fill(data, dtype, shape, order)
    return box


def _numpy_type(arguments: tuple, reader: PickleReader) -> object:
    check(arguments, 1, 3, "numpy.dtype")
    code = arguments[0]
    if isinstance(code, Foreign):
        return code
    if not isinstance(code, str):
        raise ValueError("a numpy type in the file has no name")
    if code in _NUMPY_CODES:
        return NumpyType(np.dtype(code), None)
    if code[:1] in ("U", "S") and code[1:].isdecimal() and len(code) <= 5:
        return NumpyType(np.dtype(code), None)
    return NumpyType(None, reader.foreign_class(f"numpy.dtype[{code[:40]}]"))


def _scalar(arguments: tuple, reader: PickleReader) -> object:
    """A numpy scalar, as the Python number or text that it equals."""
    check(arguments, 2, 2, "numpy's scalar")
    box = PickledArray(reader)
    box.fill(arguments[1], arguments[0], (), "C")
    return box.foreign if box.array is None else box.array.item()


def _encode(arguments: tuple, reader: PickleReader) -> object:
    """``_codecs.encode``, which older protocols use to write bytes as text."""
    if len(arguments) != 2 or arguments[1] not in ("latin1", "latin-1"):
        raise ValueError("the pickle encodes text with a codec other than latin1")
    if not isinstance(arguments[0], str):
        raise ValueError("the pickle encodes something that is not text")
    reader.charge(copied=len(arguments[0]))
    try:
        return arguments[0].encode("latin-1")
    except UnicodeEncodeError as error:
        raise ValueError("the pickle holds bytes written as wrong text") from error


def _bytes(arguments: tuple, reader: PickleReader) -> object:
    if not arguments:
        return b""
    if len(arguments) == 2:
        return _encode(arguments, reader)
    check(arguments, 1, 1, "bytes")
    if not isinstance(arguments[0], (bytes, memoryview)):
        raise ValueError("the pickle makes bytes from something else")
    return arguments[0]


def _list(arguments: tuple, reader: PickleReader) -> object:
    check(arguments, 0, 1, "a set or list")
    return items(arguments[0], reader) if arguments else []


def items(source: object, reader: PickleReader) -> list:
    """A list or tuple as a list of its own, paid for."""
    if not isinstance(source, (list, tuple)):
        raise ValueError(f"the pickle makes a list from a {type(source).__name__}")
    reader.charge(items=len(source))
    return list(source)


def _dict(arguments: tuple, reader: PickleReader) -> object:
    """``OrderedDict(pairs)``, ``Counter(dict)``, ``defaultdict(factory)``."""
    check(arguments, 0, 1, "a dict")
    if not arguments or isinstance(arguments[0], (Builder, Foreign)):
        return {}
    if isinstance(arguments[0], dict):
        return arguments[0]
    result = {}
    for pair in items(arguments[0], reader):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError("the pickle makes a dict from something without pairs")
        result[text_key(pair[0])] = pair[1]
    return result


_NDARRAY = marker("numpy.ndarray")


def numpy_names() -> dict[tuple[str, str], object]:
    """The part of the allow-list that is numpy's and Python's."""
    functions: dict[tuple[str, str], Callable[[tuple, PickleReader], object]] = {
        ("numpy", "dtype"): _numpy_type,
        ("_codecs", "encode"): _encode,
        ("collections", "OrderedDict"): _dict,
        ("collections", "Counter"): _dict,
        ("collections", "defaultdict"): _dict,
    }
    for core in ("numpy.core", "numpy._core"):
        functions[f"{core}.multiarray", "_reconstruct"] = _reconstruct
        functions[f"{core}.multiarray", "scalar"] = _scalar
        functions[f"{core}.numeric", "_frombuffer"] = _frombuffer
    for builtins in ("builtins", "__builtin__"):
        functions[builtins, "set"] = _list
        functions[builtins, "frozenset"] = _list
        functions[builtins, "bytes"] = _bytes
        functions[builtins, "bytearray"] = _bytes
    names: dict[tuple[str, str], object] = {("numpy", "ndarray"): _NDARRAY}
    for (module, name), function in functions.items():
        names[module, name] = Builder(f"{module}.{name}", function)
    return names
