"""The objects that a pickle may bring about, apart from plain data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rvc_mlx.formats.pickle_reader import PickleReader

MAX_NAME_LENGTH = 256
MAX_KEY_PARTS = 16


@dataclass(frozen=True, eq=False)
class Foreign:
    """A class or function that the file names and this package does not run."""

    __slots__ = ("name",)
    name: str


class Record:
    """An object of the allow-list that a pickle may fill in after it is made."""

    __slots__ = ()

    def set_state(self, state: object) -> None:
        """Take the state that the pickle gives to the object.

        Raises:
            ValueError: the state is not one that this kind of object has.
        """
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Builder:
    """A name of the allow-list, with the function that stands in for it."""

    name: str
    build: Callable[[tuple, PickleReader], object]


def text_key(key: object) -> str:
    """A dict key as text, without hashing or printing anything nested.

    Raises:
        ValueError: the key is neither a name, a number nor a short tuple of those.
    """
    if isinstance(key, str):
        return key
    if isinstance(key, Foreign):
        return key.name
    if _is_short(key):
        return str(key) if not isinstance(key, bytes) else repr(key)
    if (
        isinstance(key, tuple)
        and len(key) <= MAX_KEY_PARTS
        and all(map(_is_short, key))
    ):
        return repr(key)
    raise ValueError(f"the pickle uses a {type(key).__name__} as a dict key")


def _is_short(value: object) -> bool:
    if isinstance(value, (str, bytes)):
        return len(value) <= MAX_NAME_LENGTH
    return value is None or isinstance(value, (bool, int, float))
