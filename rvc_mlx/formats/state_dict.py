"""Which part of an unpickled file is the weights, and what beside it is plain data."""

from __future__ import annotations

import numpy as np

from rvc_mlx.formats.numpy_pickle import PickledArray
from rvc_mlx.formats.pickle_values import Foreign
from rvc_mlx.formats.torch_file import PickleFile
from rvc_mlx.formats.torch_pickle import TensorRecord

CONTAINERS = ("weight", "model", "state_dict")
MAX_DEPTH = 32
MAX_METADATA_VALUES = 100_000
# A widened bfloat16 doubles; tied weights count once more.
MAX_EXPANSION = 4
EXPANSION_SLACK = 2**20


def choose_state(
    file: PickleFile,
) -> tuple[dict[str, np.ndarray], dict, str, tuple[str, ...]]:
    """Choose the state dict of a pickled object and make plain data of the rest.

    Returns:
        Tensors, metadata, container and foreign names, as in `Checkpoint`.

    Raises:
        ValueError: the object holds no tensors, or tensors that need a class that is
            not run, or metadata beyond the limits.
    """
    if not isinstance(file.value, dict):
        raise ValueError(_not_a_dict(file.value))
    container, state = _find_state(file.value)
    metadata: dict = {}
    budget = [MAX_METADATA_VALUES]
    for key, value in file.value.items():
        if key not in (container, "optimizer") and not _is_tensor(value):
            try:
                metadata[key] = _plain(value, MAX_DEPTH, budget)
            except _NotPlainError:
                continue
    records = {k: v for k, v in state.items() if container != "bare" or _is_tensor(v)}
    for key, value in records.items():
        _require_tensor(key, value)
    if container == "bare":
        for key, value in state.items():
            if isinstance(value, Foreign) and value.name.startswith(
                ("torch.", "numpy.")
            ):
                raise ValueError(_needs_class(value.name, key))
    total, limit = sum(map(_nbytes, records.values())), file.raw.size * MAX_EXPANSION
    if total > limit + EXPANSION_SLACK:
        raise ValueError(
            f"its tensors unpack to {total} bytes, far more than the file's "
            f"{file.raw.size}; call .contiguous() or .clone() on them before saving"
        )
    tensors = {key: _array(file, value) for key, value in records.items()}
    return tensors, metadata, container, file.foreign


def _not_a_dict(value: object) -> str:
    if isinstance(value, Foreign):
        return _needs_class(value.name, "the whole file")
    return (
        f"the file holds a {type(value).__name__}, not a dict of tensors; save the "
        "module's state_dict()"
    )


def _needs_class(name: str, where: str) -> str:
    return (
        f"{where[:80]}: this file needs the class {name}, which rvc_mlx does not run; "
        "save plain tensors (a state_dict()) instead"
    )


def _find_state(top: dict) -> tuple[str, dict]:
    """The state dict of a file, with the name of the key it is under."""
    for container in CONTAINERS:
        inner = top.get(container)
        if isinstance(inner, dict) and any(map(_is_tensor, inner.values())):
            return container, inner
    if any(map(_is_tensor, top.values())):
        return "bare", top
    for container in CONTAINERS:
        inner = top.get(container)
        values = list(inner.values()) if isinstance(inner, dict) else [inner]
        for value in values:
            if (name := _foreign_name(value)) is not None:
                raise ValueError(_needs_class(name, container))
    found = ", ".join(repr(key[:40]) for key in list(top)[:8]) or "nothing"
    raise ValueError(
        f"no tensors found: the file holds {found}; expected names with tensors, or "
        "those under 'weight', 'model' or 'state_dict'"
    )


def _is_tensor(value: object) -> bool:
    if isinstance(value, PickledArray):
        return value.array is not None and value.array.dtype.kind in "biuf"
    return isinstance(value, TensorRecord)


def _foreign_name(value: object) -> str | None:
    if isinstance(value, PickledArray):
        value = value.foreign
    return value.name if isinstance(value, Foreign) else None


def _require_tensor(key: str, value: object) -> None:
    if _is_tensor(value):
        return
    if (name := _foreign_name(value)) is not None:
        raise ValueError(_needs_class(name, key))
    raise ValueError(
        f"{key[:80]!r} among the weights is a {type(value).__name__}; expected a tensor"
    )


def _nbytes(value: object) -> int:
    if isinstance(value, PickledArray):
        return 0 if value.array is None else value.array.nbytes
    return value.nbytes if isinstance(value, TensorRecord) else 0


def _array(file: PickleFile, value: object) -> np.ndarray:
    if isinstance(value, TensorRecord):
        return file.tensor(value)
    assert isinstance(value, PickledArray)
    assert value.array is not None
    array = value.array.astype(value.array.dtype.newbyteorder("="), copy=False)
    if not array.flags.aligned:
        array = array.copy()
    array.flags.writeable = False
    return array


class _NotPlainError(Exception):
    """A value holds tensors or classes, so it is no metadata."""


def _plain(value: object, depth: int, budget: list[int]) -> object:
    """The value as JSON types: tuples become lists.

    Args:
        value: what the pickle gave.
        depth: how many more levels are entered.
        budget: one number, how many more values are visited.
    """
    budget[0] -= 1
    if depth < 0 or budget[0] < 0:
        raise ValueError(
            f"its metadata is nested deeper than {MAX_DEPTH} levels or holds more than "
            f"{MAX_METADATA_VALUES} values"
        )
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth - 1, budget) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item, depth - 1, budget) for key, item in value.items()}
    raise _NotPlainError
