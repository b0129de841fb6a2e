"""The two file layouts of ``torch.save``, and plain pickles, without PyTorch.

The zip layout, written since PyTorch 1.6 (every entry stored, not compressed)::

    voice.pth
    ├── voice/data.pkl            a pickle: dicts, numbers, and for each tensor
    │                             (storage "0", offset, size, stride)
    ├── voice/byteorder           "little" or "big"; absent in older files
    ├── voice/data/0              the bytes of storage "0"
    ├── voice/data/1              ...
    └── voice/version

The layout before it is one stream: the pickles of a magic number, the protocol version,
the machine, the object and the list of storage keys, then for each key a 64-bit count
and that many elements, always little endian.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from rvc_mlx.formats.numpy_pickle import is_count
from rvc_mlx.formats.pickle_reader import PickleReader
from rvc_mlx.formats.pickle_values import Foreign
from rvc_mlx.formats.stored_zip import Span
from rvc_mlx.formats.torch_pickle import (
    ALLOWED_NAMES,
    TORCH_TYPES,
    Storage,
    StorageType,
    TensorRecord,
    item_size,
)

MAX_PICKLE_BYTES = 32 * 2**20
MAX_COPIES = 2  # times the file: bfloat16 doubles when widened
_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


@dataclass
class PickleFile:
    """What a pickle-based file holds; tensors are read by `tensor` when wanted."""

    raw: np.ndarray  # the whole file, uint8
    value: object = None
    foreign: tuple[str, ...] = ()
    big_endian: bool = False
    spans: dict[str, Span] = field(default_factory=dict)
    _arrays: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    _copied: int = 0

    def tensor(self, record: TensorRecord) -> np.ndarray:
        """The tensor as a read-only array, a view of the file where its type allows."""
        whole = self._storage(record.storage.key, record.dtype)
        first = record.storage.start * item_size(record.storage.dtype)
        step = whole.itemsize
        array = np.ndarray(
            record.size,
            whole.dtype,
            buffer=whole,
            offset=(first // item_size(record.dtype) + record.offset) * step,
            strides=[n * step for n in record.stride],
        )
        array.flags.writeable = False
        return array

    def _storage(self, key: str, dtype: str) -> np.ndarray:
        """One whole storage, ``[n]``; made once, so that tensors share it."""
        if (key, dtype) not in self._arrays:
            span = self.spans[key]
            part = self.raw[span.start : span.start + span.size]
            part = part[: span.size - span.size % item_size(dtype)]
            array = native(part, dtype, self.big_endian)
            if not np.may_share_memory(array, part):
                self._copied += array.nbytes
            if self._copied > MAX_COPIES * self.raw.size:
                raise ValueError("its tensors read the same bytes as many types")
            self._arrays[key, dtype] = array
        return self._arrays[key, dtype]


def native(part: np.ndarray, dtype: str, big_endian: bool = False) -> np.ndarray:
    """Bytes as numbers of this machine: ``[n]`` of a numpy type, float32 for bfloat16.

    Args:
        part: ``[bytes]`` uint8.
        dtype: torch's name of the type.
        big_endian: the order of the bytes in the file.
    """
    kind = np.dtype(TORCH_TYPES[dtype])
    if dtype == "bool":  # any non-zero byte is true
        return part != 0
    if part.ctypes.data % kind.itemsize:
        part = part.copy()
    stored = kind.newbyteorder(">" if big_endian else "<")
    array = np.frombuffer(part, kind if stored.isnative else stored)
    if dtype == "bfloat16":  # the upper half of a float32
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(kind, copy=False)


def read_torch_zip(raw: np.ndarray, entries: dict[str, Span]) -> PickleFile:
    """Read the zip layout.

    Raises:
        ValueError: the zip is no ``torch.save`` file, or is damaged.
    """
    folder = _archive_folder(entries)
    if any(n.startswith((f"{folder}code/", f"{folder}constants.pkl")) for n in entries):
        raise ValueError(
            "this is a TorchScript program, which is not run here; use the voice's "
            "own .pth file, or save the module's state_dict()"
        )
    result = PickleFile(raw)
    if order := entries.get(f"{folder}byteorder"):
        text = bytes(raw[order.start : order.start + min(order.size, 16)])
        if text not in (b"little", b"big"):
            raise ValueError(f"the zip names an unknown byte order: {text!r}")
        result.big_endian = text == b"big"
    prefix = f"{folder}data/"
    result.spans = {
        n.removeprefix(prefix): span
        for n, span in entries.items()
        if n.startswith(prefix)
    }
    pickle = entries[f"{folder}data.pkl"]
    if pickle.size > MAX_PICKLE_BYTES:
        raise ValueError(
            f"data.pkl has {pickle.size} bytes; at most {MAX_PICKLE_BYTES} are read"
        )

    def load_persistent(identifier: object) -> object:
        storage = _parse_storage(identifier, 5)
        if isinstance(storage, Storage):
            _check_storage(storage, result.spans.get(storage.key))
        return storage

    window = raw.data[pickle.start : pickle.start + pickle.size]
    reader = PickleReader(window, ALLOWED_NAMES, load_persistent)
    result.value, result.foreign = reader.load(), reader.foreign
    return result


def _archive_folder(entries: dict[str, Span]) -> str:
    """The folder inside the zip that holds everything, with its slash."""
    pickles = [n for n in entries if n == "data.pkl" or n.endswith("/data.pkl")]
    if len(pickles) != 1 or pickles[0].count("/") > 1:
        found = ", ".join(repr(n[:60]) for n in list(entries)[:4]) or "nothing"
        raise ValueError(
            f"this zip holds {found}, not one data.pkl as torch.save writes it; if a "
            "voice was packed into a zip, unpack it first"
        )
    return pickles[0].removesuffix("data.pkl")


def _parse_storage(identifier: object, length: int) -> Storage | Foreign:
    """A persistent id: ("storage", type, key, place, count), checked piece by piece."""
    if (
        not isinstance(identifier, tuple)
        or len(identifier) != length
        or identifier[0] != "storage"
    ):
        raise ValueError("the pickle refers to data in a way torch.save does not")
    kind, key, _, count = identifier[1:5]
    if isinstance(kind, Foreign):
        return kind
    if not isinstance(kind, StorageType) or not isinstance(key, str):
        raise ValueError("a storage in the file has no type or no key")
    if not isinstance(count, int) or not is_count(count):
        raise ValueError(f"storage {key[:40]!r} has an impossible size")
    return Storage(key, kind.dtype, count)


def _check_storage(storage: Storage, span: Span | None) -> None:
    wanted = storage.count * item_size(storage.dtype)
    if span is None:
        raise ValueError(f"the file has no storage {storage.key[:40]!r}")
    if span.size != wanted:
        raise ValueError(
            f"storage {storage.key!r} should have {wanted} bytes but has {span.size}"
        )


def read_pickle_file(raw: np.ndarray) -> PickleFile:
    """Read the older ``torch.save`` layout, or a plain pickle with numpy arrays.

    Raises:
        ValueError: the file is neither, or is damaged.
    """
    data = raw.data
    result = PickleFile(raw)
    first = PickleReader(data, ALLOWED_NAMES)
    result.value = first.load()
    result.foreign = first.foreign
    if isinstance(result.value, int) and result.value == _MAGIC:
        _read_legacy(result, data, first.position)
    return result


def _read_legacy(result: PickleFile, data: memoryview, position: int) -> None:
    """Read what follows the magic number into ``result``."""
    storages: dict[str, Storage] = {}

    def load_persistent(identifier: object) -> object:
        return _legacy_storage(identifier, storages)

    window = data[: position + MAX_PICKLE_BYTES]
    reader = PickleReader(window, ALLOWED_NAMES, load_persistent)
    version = reader.load(position)
    if version != _LEGACY_PROTOCOL:
        raise ValueError("the file has an unknown version of torch's older layout")
    reader.load(reader.position)  # the machine that wrote it; its byte order is unused
    result.value = reader.load(reader.position)
    keys = reader.load(reader.position)
    if (
        not isinstance(keys, list)
        or not all(isinstance(key, str) for key in keys)
        or set(keys) != set(storages)
    ):
        raise ValueError(
            "the storages listed in the file are not those its tensors use"
        )
    if len(keys) != len(storages):
        raise ValueError("the file lists a storage twice")
    result.foreign = reader.foreign
    place = reader.position
    for key in keys:
        span = _legacy_span(data, place, storages[key])
        result.spans[key] = span
        place = span.start + span.size


def _legacy_storage(identifier: object, storages: dict[str, Storage]) -> object:
    """A storage of the older layout, or the part of one that a tensor saw."""
    storage = _parse_storage(identifier, 6)
    if isinstance(storage, Foreign):
        raise ValueError(
            f"this file needs the class {storage.name}, which rvc_mlx does not run; "
            "save its tensors as float16, bfloat16, float32 or integers"
        )
    known = storages.setdefault(storage.key, storage)
    if (known.dtype, known.count) != (storage.dtype, storage.count):
        raise ValueError(f"storage {storage.key!r} is described in two ways")
    view = identifier[5] if isinstance(identifier, tuple) else None
    if view is None:
        return known
    if (
        not isinstance(view, tuple)
        or len(view) != 3
        or not all(map(is_count, view[1:]))
    ):
        raise ValueError(f"a view of storage {storage.key!r} is damaged")
    start, count = view[1:]
    if start + count > storage.count:
        raise ValueError(f"a view reaches beyond storage {storage.key!r}")
    return Storage(storage.key, storage.dtype, count, start)


def _legacy_span(data: memoryview, place: int, storage: Storage) -> Span:
    """Where the elements of a storage lie, behind their count."""
    count = int.from_bytes(data[place : place + 8], "little")
    size = storage.count * item_size(storage.dtype)
    if place + 8 + size > len(data):
        raise ValueError("the file is cut short in its tensors; download it again")
    if count != storage.count:
        raise ValueError(
            f"storage {storage.key!r} should have {storage.count} elements but has "
            f"{count}"
        )
    return Span(place + 8, size)
