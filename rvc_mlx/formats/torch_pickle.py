"""The allow-list of names in pickles, and what torch's own names become.

Tensors are not built while the pickle is read. A `TensorRecord` keeps which storage a
tensor looks at and how, so that only the tensors a caller wants are ever touched. Each
function below stands in for one upstream function and checks its arguments itself.

Source: ``torch/_utils.py`` (``_rebuild_*``), ``torch/serialization.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from rvc_mlx.formats.numpy_pickle import (
    check,
    is_count,
    is_shape,
    items,
    marker,
    numpy_names,
)
from rvc_mlx.formats.pickle_reader import PickleReader
from rvc_mlx.formats.pickle_values import Builder, Foreign, text_key

# torch's name of a type -> numpy's; bfloat16 has none and is widened when read.
TORCH_TYPES = {
    **{name: name for name in ("float16", "float32", "float64", "bool")},
    **{
        f"{sign}int{bits}": f"{sign}int{bits}"
        for sign in ("", "u")
        for bits in (8, 16, 32, 64)
    },
    "bfloat16": "uint16",
}
_STORAGES = {
    "Half": "float16",
    "Float": "float32",
    "Double": "float64",
    "BFloat16": "bfloat16",
    "Char": "int8",
    "Byte": "uint8",
    "Short": "int16",
    "Int": "int32",
    "Long": "int64",
    "Bool": "bool",
    "Untyped": "uint8",
}


@dataclass(frozen=True, eq=False)
class StorageType:
    """The element type of a storage, by torch's name."""

    dtype: str


@dataclass(frozen=True, eq=False)
class Storage:
    """One storage of the file: ``count`` elements from element ``start`` of ``key``."""

    key: str
    dtype: str
    count: int
    start: int = 0


@dataclass(frozen=True, eq=False)
class TensorRecord:
    """A tensor not read yet; ``offset`` and ``stride`` count elements of ``dtype``."""

    storage: Storage
    dtype: str
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor fills when it is laid out densely."""
        return math.prod(self.size) * item_size(self.dtype)


def item_size(dtype: str) -> int:
    """Bytes of one element of a torch type."""
    return np.dtype(TORCH_TYPES[dtype]).itemsize


def _tensor(arguments: tuple, _reader: PickleReader) -> object:
    """``_rebuild_tensor`` and ``_v2``: (storage, offset, size, stride, ...)."""
    check(arguments, 4, 7, "a tensor builder")
    storage, offset, size, stride = arguments[:4]
    if isinstance(storage, Foreign):
        return storage
    if not isinstance(storage, Storage):
        raise ValueError("a tensor in the file has no storage")
    if len(arguments) == 7 and arguments[6]:
        raise ValueError("a tensor in the file is conjugated or negated; save it plain")
    return _record(storage, storage.dtype, offset, size, stride)


def _typed_tensor(arguments: tuple, reader: PickleReader) -> object:
    """``_rebuild_tensor_v3``: as v2, with the type of the elements."""
    check(arguments, 7, 8, "a tensor builder")
    storage, offset, size, stride, _, _, dtype = arguments[:7]
    for part in (storage, dtype):
        if isinstance(part, Foreign):
            return part
    if not isinstance(storage, Storage) or not isinstance(dtype, str):
        raise ValueError("a tensor in the file has no storage or no type")
    name = dtype.removeprefix("torch.")
    if name not in TORCH_TYPES:
        return reader.foreign_class(f"torch.{name[:40]}")
    return _record(storage, name, offset, size, stride)


def _record(
    storage: Storage, dtype: str, offset: object, size: object, stride: object
) -> TensorRecord:
    """A tensor whose every element lies inside its storage."""
    if (
        not isinstance(size, tuple)
        or not isinstance(stride, tuple)
        or not isinstance(offset, int)
        or not (is_shape(size) and all(map(is_count, stride)) and is_count(offset))
        or len(size) != len(stride)
    ):
        raise ValueError(
            "a tensor in the file has an impossible size, stride or offset"
        )
    elements = storage.count * item_size(storage.dtype) // item_size(dtype)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 in size:
        last = offset - 1
    if last >= elements:
        raise ValueError(
            f"a tensor of shape {size} reads element {last} of storage "
            f"{storage.key!r}, which has {elements}"
        )
    return TensorRecord(storage, dtype, offset, size, stride)


def _parameter(arguments: tuple, _reader: PickleReader) -> object:
    """``_rebuild_parameter``: the tensor that the parameter wraps."""
    check(arguments, 3, 4, "a parameter builder")
    if not isinstance(arguments[0], (TensorRecord, Foreign)):
        raise ValueError("a parameter in the file wraps no tensor")
    return arguments[0]


def _from_type(arguments: tuple, reader: PickleReader) -> object:
    """``_rebuild_from_type_v2``: (builder, class, arguments, state)."""
    check(arguments, 4, 4, "torch._tensor._rebuild_from_type_v2")
    builder, kind, inner = arguments[:3]
    for part in (builder, kind):
        if isinstance(part, Foreign):
            return part
    if builder not in _TENSOR_BUILDERS or kind not in _TENSOR_CLASSES:
        raise ValueError("a tensor in the file is built in an unknown way")
    if not isinstance(inner, tuple):
        raise ValueError("a tensor in the file is built from no arguments")
    return builder.build(inner, reader)


def _size(arguments: tuple, reader: PickleReader) -> object:
    check(arguments, 1, 1, "torch.Size")
    return tuple(items(arguments[0], reader))


def _device(arguments: tuple, _reader: PickleReader) -> object:
    check(arguments, 1, 2, "torch.device")
    return ":".join(map(text_key, arguments))


_TENSOR_CLASSES = (marker("torch.Tensor"), marker("torch.nn.parameter.Parameter"))
_TENSOR_BUILDERS = (
    Builder("torch._utils._rebuild_tensor", _tensor),
    Builder("torch._utils._rebuild_tensor_v2", _tensor),
    Builder("torch._utils._rebuild_tensor_v3", _typed_tensor),
)


def _allowed_names() -> dict[tuple[str, str], object]:
    builders = {
        ("torch._utils", "_rebuild_parameter"): _parameter,
        ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
        ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
        ("torch", "Size"): _size,
        ("torch", "device"): _device,
    }
    names = numpy_names()
    for (module, name), function in builders.items():
        names[module, name] = Builder(f"{module}.{name}", function)
    for builder in _TENSOR_BUILDERS:
        names["torch._utils", builder.name.removeprefix("torch._utils.")] = builder
    names["torch", "Tensor"], names["torch.nn.parameter", "Parameter"] = _TENSOR_CLASSES
    for dtype in TORCH_TYPES:
        names["torch", dtype] = f"torch.{dtype}"
    for prefix, dtype in _STORAGES.items():
        for module in ("torch", "torch.cuda", "torch.storage"):
            names[module, f"{prefix}Storage"] = StorageType(dtype)
    return names


ALLOWED_NAMES = _allowed_names()
