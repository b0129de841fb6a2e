"""The full state of a run on disk: written whole or not at all, continued bit by bit.

One ``.safetensors`` file holds every tensor that a step changes (parameters, Adam
moments, step counters, loss scale) and, as metadata, where the run stands. Nothing else
is random or hidden: batches depend on (seed, epoch), draws on (seed, step). A file is
written beside its place, flushed to the disk and renamed over the old one, so a killed
process or a full disk leaves the old one as it was.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import struct
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from rvc_mlx.checkpoint import read_checkpoint

_TYPES = {
    **{f"float{bits}": f"F{bits}" for bits in (16, 32, 64)},
    **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
    "bool": "BOOL",
}
_FORMAT = 1
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        epoch: the one that the next step belongs to, counted from 0.
        position: steps of it that are done.
        step: steps done in all.
        best: lowest validation score so far; None before the first validation.
        best_epoch: epochs that were done when it was reached.
        stale: epochs validated since then without a lower one.
        stopped: the early stop has ended the run.
    """

    epoch: int = 0
    position: int = 0
    step: int = 0
    best: float | None = None
    best_epoch: int = 0
    stale: int = 0
    stopped: bool = False


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A new file's name, which becomes ``path`` at the end, on the disk, at once.

    Yields:
        A path in the same folder with the same suffix, to be written. If the block
        fails it is removed, and what was at ``path`` stays.
    """
    path = Path(path)
    partial = path.with_name(
        f".{path.stem}.{uuid.uuid4().hex[:8]}.partial{path.suffix}"
    )
    try:
        yield partial
        with partial.open("rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(partial, path)
    except OSError as error:
        reason = error.strerror or str(error)
        advice = "; make room, then continue with --resume"
        raise OSError(
            f"{path}: this file could not be written ({reason}); what was there before "
            f"is unchanged{advice if error.errno in _FULL else ''}"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    """Make a rename last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sweep(folder: Path) -> None:
    """Remove what killed writers left behind in a folder."""
    for partial in folder.glob(".*.partial*"):
        partial.unlink(missing_ok=True)


def write_state(
    path: str | os.PathLike,
    tensors: Mapping[str, mx.array | np.ndarray],
    progress: Progress,
    identity: Mapping[str, Any],
) -> None:
    """Save a run.

    Args:
        path: a ``.safetensors`` file.
        tensors: the whole state of the training step.
        progress: where the run stands.
        identity: JSON data that must be the same when the run is continued.

    Raises:
        OSError: it cannot be written; the file that was there is unchanged.
        ValueError: a tensor is of a type that is not saved.
    """
    record = {"format": _FORMAT, **asdict(progress)}
    metadata = {"progress": json.dumps(record), "identity": json.dumps(dict(identity))}
    with replacing(path) as partial:
        write_tensors(partial, tensors, metadata)


def write_tensors(
    path: Path, tensors: Mapping[str, mx.array | np.ndarray], metadata: dict[str, str]
) -> None:
    """Write a safetensors file, tensor by tensor.

    The safetensors library copies all of them into memory first, and what it raises on a
    full disk is no ``OSError``.

    Args:
        path: a new file.
        tensors: name to array.
        metadata: text by name.

    Raises:
        OSError: it cannot be written.
        ValueError: a tensor is of a type that is not saved.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    place = 0
    for name, value in tensors.items():
        kind = str(value.dtype).removeprefix("mlx.core.").replace("bool_", "bool")
        if kind not in _TYPES:
            raise ValueError(f"{name}: a state holds no {kind}; expected float32")
        header[name] = {
            "dtype": _TYPES[kind],
            "shape": list(value.shape),
            "data_offsets": [place, place + value.nbytes],
        }
        place += value.nbytes
    text = json.dumps(header).encode("ascii")
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for value in tensors.values():
            file.write(np.ascontiguousarray(np.asarray(value)).data)


def read_state(
    path: str | os.PathLike,
    identity: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
) -> tuple[dict[str, np.ndarray], Progress]:
    """Load a run to continue it.

    Args:
        path: what ``write_state`` wrote.
        identity: of the run that is to continue.
        defaults: in the form of ``identity``; what a state is taken to have been made
            with that does not tell, being older than the option.

    Returns:
        Tensors (views of the file) and where the run stands.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file, or a run with other settings; names them all.
    """
    checkpoint = read_checkpoint(path)
    record = checkpoint.metadata.get("progress")
    stored = checkpoint.metadata.get("identity")
    if (
        not isinstance(record, dict)
        or not isinstance(stored, dict)
        or record.pop("format", None) != _FORMAT
        or set(record) != {field.name for field in fields(Progress)}
    ):
        raise ValueError(f"{path}: this is no saved run of rvc-mlx train")
    saved, given, absent = (
        dict(_leaves(json.loads(json.dumps(dict(settings)))))
        for settings in (stored, identity, defaults or {})
    )
    saved = {name: absent[name] for name in given if name in absent} | saved
    other = [
        f"{name}: saved {json.dumps(saved.get(name))}, "
        f"given {json.dumps(given.get(name))}"
        for name in sorted(saved.keys() | given.keys())
        if saved.get(name) != given.get(name)
    ]
    if other:
        raise ValueError(
            f"{path}: this run was started with other settings ({'; '.join(other)}); "
            "continue it with the same, or start anew with --force"
        )
    return checkpoint.tensors, Progress(**record)


def _leaves(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """What a tree of settings holds, by dotted name; lists are whole."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{above}{name}.")
        else:
            yield above + name, value
