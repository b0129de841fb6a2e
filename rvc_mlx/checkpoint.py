"""Reading and writing weights: ``.pth``, ``.pt``, ``.bin``, ``.safetensors``, ``.npz``.

Nothing in a file is ever run. The layout of a ``.pth`` file is drawn in
`rvc_mlx.formats.torch_file`; what its pickle may build is the exact list in
`rvc_mlx.formats.torch_pickle`. Tensors are views of the mapped file, so reading a voice
costs little memory until its weights are used.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rvc_mlx.formats.array_file import (
    METADATA,
    read_npz,
    read_safetensors,
    write_npz,
    write_safetensors,
)
from rvc_mlx.formats.state_dict import MAX_DEPTH, choose_state
from rvc_mlx.formats.stored_zip import read_entries
from rvc_mlx.formats.torch_file import read_pickle_file, read_torch_zip

_EXPECTED = "a voice or model file: .pth, .pt, .bin, .safetensors or .npz"
_SUFFIXES = {
    ".safetensors": "safetensors",
    ".npz": "npz",
    **dict.fromkeys((".pth", ".pt", ".bin", ".ckpt", ".pkl"), "pickle"),
}
_KINDS = {
    "safetensors": ("safetensors data", ".safetensors"),
    "npz": ("numpy arrays", ".npz"),
    "pickle": ("a PyTorch or pickle file", ".pth"),
}
# Offset, first bytes, what such a file is and what to do with it.
_OTHER_FILES = (
    (0, b"RIFF", "audio (RIFF); pass it as the input recording"),
    (0, b"FORM", "audio (AIFF); pass it as the input recording"),
    (0, b"fLaC", "audio (FLAC); pass it as the input recording"),
    (0, b"OggS", "audio (Ogg); pass it as the input recording"),
    (0, b"ID3", "audio (MP3); pass it as the input recording"),
    (0, b"Ix", "a retrieval index; pass it as the index, and the .pth as the voice"),
    (0, b"Iw", "a retrieval index; pass it as the index, and the .pth as the voice"),
    (0, b"\x08", "probably an ONNX model; use the .pth file it was made from"),
    (0, b"\x93NUMPY", "a single array (.npy); save named arrays with numpy.savez"),
    (0, b"\x1f\x8b", "a gzip archive; unpack it first"),
    (0, b"7z\xbc\xaf", "a 7z archive; unpack it first"),
    (0, b"Rar!", "a RAR archive; unpack it first"),
    (257, b"ustar", "a tar archive or a torch.save file from before 2017; unpack it, or "
     "load and save it again with a current PyTorch"),
    (0, b"version https://git-lfs", "a pointer to a large file; run 'git lfs pull'"),
    (0, b"<", "a web page or XML; the download went wrong, get the file itself"),
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """The content of a weights file.

    Attributes:
        path: where it was read from.
        tensors: name, as stored, to a read-only array. Types as stored, except
            bfloat16, which is float32 with the same values.
        metadata: everything beside the tensors that is plain data: None, bool, int,
            float, str, and lists and str-keyed dicts of those.
        container: the key that the tensors were under: "weight", "model",
            "state_dict", or "bare" for none.
        foreign: classes that the file names and that were left aside, not run.
    """

    path: Path
    tensors: dict[str, np.ndarray]
    metadata: dict = field(default_factory=dict)
    container: str = "bare"
    foreign: tuple[str, ...] = ()


def read_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Read weights and their metadata, running nothing that the file contains.

    The content decides how a file is read; a suffix that says otherwise is an error.

    Args:
        path: a file written by ``torch.save`` (either layout), a pickle of a dict of
            numpy arrays, a safetensors file or an uncompressed npz file.

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: it is a folder.
        ValueError: it is another kind of file, is damaged, exceeds a limit, or its
            tensors need a class that is not run here.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: this is a folder; expected {_EXPECTED}")
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file; expected {_EXPECTED}")
    try:
        if not path.is_file() or path.stat().st_size == 0:
            raise ValueError("the file is empty or no regular file; get it again")
        return _read(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read(path: Path) -> Checkpoint:
    raw = np.memmap(path, np.uint8, "r")
    head = bytes(raw[:512])
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        entries = read_entries(raw.data)
        if entries and all(name.endswith(".npy") for name in entries):
            _check_suffix(path, "npz")
            return Checkpoint(path, *read_npz(raw, entries))
        _check_suffix(path, "pickle")
        return Checkpoint(path, *choose_state(read_torch_zip(raw, entries)))
    is_safetensors = head[8:9] == b"{" and (
        head[:1] != b"\x80" or head[4:8] == bytes(4)
    )
    if head[:1] == b"\x80" and not is_safetensors:
        _check_suffix(path, "pickle")
        return Checkpoint(path, *choose_state(read_pickle_file(raw)))
    if is_safetensors:
        _check_suffix(path, "safetensors")
        return Checkpoint(path, *read_safetensors(raw))
    for offset, start, what in _OTHER_FILES:
        if head[offset:].startswith(start):
            raise ValueError(f"this is {what}. Expected {_EXPECTED}")
    raise ValueError(
        f"this is no weights file (it starts {head[:8]!r}). Expected {_EXPECTED}"
    )


def _check_suffix(path: Path, kind: str) -> None:
    if _SUFFIXES.get(path.suffix.lower(), kind) != kind:
        what, suffix = _KINDS[kind]
        raise ValueError(
            f"the name ends in {path.suffix} but the file holds {what}; rename it to "
            f"{path.stem}{suffix} if that is what you meant to use"
        )


def save_checkpoint(
    path: str | os.PathLike, tensors: Mapping[str, np.ndarray], metadata: dict
) -> None:
    """Write weights so that `read_checkpoint` gives back the same, or write nothing.

    Args:
        path: ends in ``.safetensors`` or ``.npz``; an existing file is replaced at once
            when the new one is complete on the disk.
        tensors: name to an array of numbers or booleans.
        metadata: JSON data: None, bool, int, float, str, lists, dicts with str keys.

    Raises:
        ValueError: another suffix, or a value that would not come back the same.
    """
    path = Path(path)
    writer = {".safetensors": write_safetensors, ".npz": write_npz}.get(path.suffix)
    if writer is None:
        raise ValueError(
            f"{path}: weights are saved as .safetensors or .npz, not "
            f"{path.suffix or 'without a suffix'}; choose one of those names"
        )
    _require_json(path, metadata, MAX_DEPTH + 1)
    arrays = {name: _savable(path, name, array) for name, array in tensors.items()}
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.touch(exist_ok=False)
        mode = partial.stat().st_mode
        writer(partial, arrays, metadata)
        partial.chmod(mode)  # safetensors makes files that only their owner reads
        with partial.open("rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _savable(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    if name == METADATA:
        raise ValueError(f"{path}: a tensor cannot be named {METADATA!r}; rename it")
    array = np.asarray(array)
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise ValueError(
            f"{path}: tensor {name!r} has type {array.dtype}; numbers of up to 64 bits "
            "and booleans are saved"
        )
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _require_json(path: Path, value: object, depth: int) -> None:
    """Refuse metadata that JSON would change or could not hold."""
    what = type(value).__name__
    if type(value) is list and depth >= 0:
        for item in value:
            _require_json(path, item, depth - 1)
    elif type(value) is dict and depth >= 0 and all(type(k) is str for k in value):
        for item in value.values():
            _require_json(path, item, depth - 1)
    elif type(value) not in (type(None), bool, int, float, str):
        raise ValueError(
            f"{path}: the metadata holds a {what} that JSON would not give back; use "
            f"numbers, text, lists and dicts with text keys, up to {MAX_DEPTH} levels"
        )


def name_and_hash(path: str | os.PathLike) -> str:
    """How a file is named where it is told what something was made from."""
    return f"{Path(path).name} (sha256 {hash_file(path)})"


def hash_file(path: str | os.PathLike) -> str:
    """The sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(2**20):
            digest.update(block)
    return digest.hexdigest()
