"""Writing what ``torch.save`` writes, without PyTorch: numbers, text, arrays, no code.

The file is the zip layout that `rvc_mlx.formats.torch_file` draws. Its pickle uses the
few opcodes below, and names three things only: ``collections.OrderedDict``, torch's
storage types and ``torch._utils._rebuild_tensor_v2``; that is what
``torch.load(weights_only=True)`` accepts. Equal values give equal bytes.

Source: ``torch/serialization.py`` (``_save``), Python's ``pickletools``.
"""

from __future__ import annotations

import struct
import sys
import zipfile
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

_STORAGES = {
    "float16": "Half",
    "float32": "Float",
    "float64": "Double",
    "int8": "Char",
    "uint8": "Byte",
    "int16": "Short",
    "int32": "Int",
    "int64": "Long",
    "bool": "Bool",
}
_ALIGNMENT = 64  # of every tensor's bytes in the file, as torch has them
_DATE = (1980, 1, 1, 0, 0, 0)


def write_torch(path: str | Path, value: Any) -> None:
    """Write a value as a ``.pth`` file.

    Args:
        path: the file; an existing one is overwritten in place, so give a new name
            where that matters.
        value: None, bool, int, float, str, numpy arrays of a type that torch has, and
            lists, tuples and dicts of those; keys of dicts are str or int.

    Raises:
        ValueError: something else is in it.
        OSError: the file cannot be written.
    """
    path = Path(path)
    pickler = _Pickler()
    pickler.save(value)
    folder = path.name.removeprefix(".").split(".")[0] or "archive"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, f"{folder}/data.pkl", pickler.finish())
        _add(archive, f"{folder}/byteorder", sys.byteorder.encode())
        for number, array in enumerate(pickler.arrays):
            _add(archive, f"{folder}/data/{number}", array.tobytes())
        _add(archive, f"{folder}/version", b"3\n")


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    """Add an entry whose bytes start at a multiple of ``_ALIGNMENT``."""
    entry = zipfile.ZipInfo(name, _DATE)
    assert archive.fp is not None
    header = 30 + len(name.encode()) + 4  # and the extra field's own head
    padding = -(archive.fp.tell() + header) % _ALIGNMENT
    entry.extra = b"FB" + struct.pack("<H", padding) + bytes(padding)
    archive.writestr(entry, data)


class _Pickler:
    """Protocol 2 of pickle, for plain data and arrays.

    Attributes:
        arrays: the tensors met, each flat and contiguous, in order of their storages.
    """

    def __init__(self) -> None:
        self.arrays: list[np.ndarray] = []
        self._out = BytesIO()
        self._out.write(b"\x80\x02")
        self._writers: dict[type, Callable[[Any], None]] = {
            type(None): lambda _: self._put(b"N"),
            bool: lambda value: self._put(b"\x88" if value else b"\x89"),
            int: self._int,
            float: lambda value: self._put(b"G" + struct.pack(">d", value)),
            str: self._text,
            list: self._list,
            tuple: self._tuple,
            dict: self._dict,
            np.ndarray: self._tensor,
        }

    def finish(self) -> bytes:
        """The pickle, ended."""
        self._put(b".")
        return self._out.getvalue()

    def save(self, value: Any) -> None:
        """Append one value."""
        writer = self._writers.get(type(value))
        if writer is None:
            raise ValueError(
                f"a {type(value).__name__} cannot be written to a .pth file; use plain "
                "numbers, text, lists, dicts and numpy arrays"
            )
        writer(value)

    def _put(self, data: bytes) -> None:
        self._out.write(data)

    def _int(self, value: int) -> None:
        if 0 <= value < 256:
            self._put(b"K" + bytes([value]))
        elif -(2**31) <= value < 2**31:
            self._put(b"J" + struct.pack("<i", value))
        else:
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            self._put(b"\x8a" + bytes([len(data)]) + data)

    def _text(self, value: str) -> None:
        data = value.encode("utf-8", "surrogatepass")
        self._put(b"X" + struct.pack("<I", len(data)) + data)

    def _list(self, value: list) -> None:
        self._put(b"](")
        for item in value:
            self.save(item)
        self._put(b"e")

    def _tuple(self, value: tuple) -> None:
        self._put(b"(")
        for item in value:
            self.save(item)
        self._put(b"t")

    def _dict(self, value: Mapping) -> None:
        self._put(b"}(")
        for key, item in value.items():
            if type(key) not in (str, int):
                raise ValueError(f"the key {key!r} is neither text nor an integer")
            self.save(key)
            self.save(item)
        self._put(b"u")

    def _global(self, module: str, name: str) -> None:
        self._put(f"c{module}\n{name}\n".encode("ascii"))

    def _tensor(self, array: np.ndarray) -> None:
        """``_rebuild_tensor_v2(storage, 0, size, stride, False, OrderedDict())``."""
        kind = _STORAGES.get(array.dtype.name)
        if kind is None:
            raise ValueError(
                f"an array of type {array.dtype} has no place in a .pth file; "
                f"expected {', '.join(_STORAGES)}"
            )
        flat = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("=")))
        flat = flat.reshape(-1)
        strides = [1]
        for length in reversed(array.shape[1:]):
            strides.append(strides[-1] * max(length, 1))
        self._global("torch._utils", "_rebuild_tensor_v2")
        self._put(b"((")
        self._text("storage")
        self._global("torch", f"{kind}Storage")
        self._text(str(len(self.arrays)))
        self._text("cpu")
        self._int(flat.size)
        self._put(b"tQ")
        self._int(0)
        self._tuple(tuple(map(int, array.shape)))
        self._tuple(tuple(reversed(strides)) if array.shape else ())
        self._put(b"\x89")
        self._global("collections", "OrderedDict")
        self._put(b")RtR")
        self.arrays.append(flat)
