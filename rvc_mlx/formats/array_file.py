"""Reading and writing ``.safetensors`` and ``.npz``, with metadata as JSON.

A safetensors file is ``[8 bytes: n][n bytes of JSON][data]``; the JSON gives each tensor
its type, shape and place in the data, and ``__metadata__`` a dict of strings. An
``.npz`` is a zip of ``.npy`` entries; metadata goes into an entry ``__metadata__`` that
holds JSON as bytes.
"""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from rvc_mlx.formats.numpy_pickle import is_count, is_shape
from rvc_mlx.formats.stored_zip import Span
from rvc_mlx.formats.torch_file import native
from rvc_mlx.formats.torch_pickle import item_size

MAX_JSON_BYTES = 4 * 2**20
MAX_JSON_GROUPS = 100_000
METADATA = "__metadata__"
_SAFETENSORS_TYPES = {
    "BOOL": "bool",
    "BF16": "bfloat16",
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
}
_NPY_HEADER = re.compile(
    rb"\{'descr': *'([<>|=]?)([biuf])(\d{1,2})', *'fortran_order': *(True|False), *"
    rb"'shape': *\(([\d, ]{0,400})\),? *\}\s*"
)
_NPY_KINDS = {b"b": "bool", b"i": "int", b"u": "uint", b"f": "float"}


def parse_json(text: bytes, what: str) -> object:
    """JSON within the limits of this module.

    Raises:
        ValueError: it is too long, too nested, repeats a key or is not JSON.
    """
    if (
        len(text) > MAX_JSON_BYTES
        or text.count(b"[") + text.count(b"{") > MAX_JSON_GROUPS
    ):
        raise ValueError(f"{what} is too large: {len(text)} bytes of JSON")
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError(f"{what} is nested too deeply") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{what} is not JSON: {error}") from error


def _unique(pairs: list[tuple[str, object]]) -> dict:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a JSON object in the file holds a key twice")
    return result


def read_safetensors(raw: np.ndarray) -> tuple[dict[str, np.ndarray], dict]:
    """Tensors and metadata of a safetensors file.

    Args:
        raw: ``[bytes]`` uint8, the whole file.

    Returns:
        Read-only arrays, views of ``raw`` where their type allows, and the metadata.

    Raises:
        ValueError: the header is damaged or the tensors do not fill the data exactly.
    """
    length = int.from_bytes(bytes(raw[:8]), "little")
    if length > MAX_JSON_BYTES or 8 + length > len(raw):
        raise ValueError(
            f"its header claims {length} bytes; at most {MAX_JSON_BYTES} are read and "
            f"the file has {len(raw)}: it is cut short or no safetensors file"
        )
    header = parse_json(bytes(raw[8 : 8 + length]), "its header")
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    metadata = header.pop(METADATA, None)
    if metadata is None:  # or null, as MLX writes it where there is none
        metadata = {}
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise ValueError("its metadata is not a dict of strings")
    data = raw[8 + length :]
    spans = {name: _safetensors_entry(name, entry) for name, entry in header.items()}
    place = 0
    for _, _, span in sorted(spans.values(), key=lambda s: (s[2].start, s[2].size)):
        if span.start != place:
            raise ValueError("its tensors overlap or leave holes in the data")
        place += span.size
    if place != len(data):
        raise ValueError(f"its tensors fill {place} bytes but {len(data)} are there")
    tensors = {
        name: _shaped(data[span.start : span.start + span.size], dtype, shape)
        for name, (dtype, shape, span) in spans.items()
    }
    return tensors, {key: _decode(value) for key, value in metadata.items()}


def _safetensors_entry(name: str, entry: object) -> tuple[str, tuple[int, ...], Span]:
    """Type, shape and place of one tensor."""
    if not isinstance(entry, dict):
        raise ValueError(f"its tensor {name!r} has no description")
    kind, shape = entry.get("dtype"), entry.get("shape")
    place = entry.get("data_offsets")
    if not isinstance(kind, str) or kind not in _SAFETENSORS_TYPES:
        raise ValueError(
            f"its tensor {name!r} has type {str(kind)[:20]!r}; "
            f"{', '.join(_SAFETENSORS_TYPES)} are read"
        )
    if not isinstance(shape, list) or not isinstance(place, list):
        raise ValueError(f"its tensor {name!r} has no shape or no place")
    size, offsets = tuple(shape), tuple(place)
    if not is_shape(size) or len(offsets) != 2 or not all(map(is_count, offsets)):
        raise ValueError(f"its tensor {name!r} has an impossible shape or place")
    dtype = _SAFETENSORS_TYPES[kind]
    start, end = offsets
    if end - start != math.prod(size) * item_size(dtype):
        raise ValueError(
            f"its tensor {name!r} has shape {list(size)} of {kind} but {end - start} bytes"
        )
    return dtype, size, Span(start, end - start)


def _shaped(
    part: np.ndarray,
    dtype: str,
    shape: tuple[int, ...],
    big: bool = False,
    order: str = "C",
) -> np.ndarray:
    array = native(part, dtype, big)
    array = array.reshape(shape, order="F" if order == "F" else "C")
    array.flags.writeable = False
    return array


def _decode(text: str) -> object:
    """A metadata string as the JSON value it encodes, or as it is."""
    try:
        return parse_json(text.encode("utf-8"), "its metadata")
    except ValueError:
        return text


def read_npz(
    raw: np.ndarray, entries: Mapping[str, Span]
) -> tuple[dict[str, np.ndarray], dict]:
    """Arrays and metadata of an ``.npz`` whose entries are stored, not compressed.

    Raises:
        ValueError: an entry holds objects or is damaged.
    """
    tensors: dict[str, np.ndarray] = {}
    for name, span in entries.items():
        part = raw[span.start : span.start + span.size]
        tensors[name.removesuffix(".npy")] = _read_npy(part, name)
    stored = tensors.pop(METADATA, None)
    if stored is None:
        return tensors, {}
    metadata = parse_json(stored.tobytes(), "its metadata")
    if not isinstance(metadata, dict):
        raise ValueError("its metadata is not a JSON object")
    return tensors, metadata


def _read_npy(part: np.ndarray, name: str) -> np.ndarray:
    """One ``.npy`` entry; ``part`` is ``[bytes]`` uint8."""
    start = bytes(part[:12])
    if start[:6] != b"\x93NUMPY" or start[6:7] not in (b"\x01", b"\x02"):
        raise ValueError(f"its entry {name!r} is no array as numpy.savez writes it")
    width = 2 if start[6] == 1 else 4
    length = int.from_bytes(start[8 : 8 + width], "little")
    begin = 8 + width + length
    header = bytes(part[8 + width : min(begin, 4096)])
    match = _NPY_HEADER.fullmatch(header)
    if match is None:
        raise ValueError(
            f"its entry {name!r} holds something other than plain numbers (such as "
            "Python objects), which is not read; save number arrays only"
        )
    order, kind, width_text, fortran, dims = match.groups()
    bits = b"" if kind == b"b" else b"%d" % (8 * int(width_text))
    dtype = _NPY_KINDS[kind] + bits.decode()
    shape = tuple(int(n) for n in dims.replace(b",", b" ").split())
    if dtype not in _SAFETENSORS_TYPES.values() or not is_shape(shape):
        raise ValueError(f"its entry {name!r} has an unknown type or impossible shape")
    size = math.prod(shape) * item_size(dtype)
    if begin + size != len(part):
        raise ValueError(
            f"its entry {name!r} has shape {shape} of {dtype} but {len(part) - begin} "
            "bytes"
        )
    layout = "F" if fortran == b"True" else "C"
    return _shaped(part[begin:], dtype, shape, order == b">", layout)


def write_safetensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: dict
) -> None:
    """Write arrays and JSON values to a new safetensors file.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    texts = {key: json.dumps(value) for key, value in metadata.items()}
    arrays = {name: np.asarray(a, order="C") for name, a in tensors.items()}
    try:
        save_file(arrays, path, metadata=texts or None)
    except SafetensorError as error:  # a full disk is none of Python's errors there
        raise OSError(f"{path.parent}: writing weights failed ({error})") from error


def write_npz(path: Path, tensors: Mapping[str, np.ndarray], metadata: dict) -> None:
    """Write arrays and JSON values to a new npz file."""
    text = json.dumps(metadata).encode("ascii")
    arrays = {**tensors, METADATA: np.frombuffer(text, np.uint8)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, np.asarray(array), allow_pickle=False)
