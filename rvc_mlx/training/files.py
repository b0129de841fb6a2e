"""Files that appear whole or not at all, and a folder that one run at a time works in."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rvc_mlx.output_format import part_path

LOCK = ".lock"

Progress = Callable[[float, float], None]  # done, in all


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write a file under a temporary name, then give it its own.

    A run that is killed leaves the file as it was, and at most a ``.part`` file beside it
    (see ``remove_parts``).

    Raises:
        OSError: the disk is full, or the folder is missing or may not be written; nothing
            is left of the file.
    """
    part = part_path(path)
    try:
        with part.open("xb") as file:
            file.write(data)
        part.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(
                f"{path}: writing failed ({error.strerror}); check the disk's free space "
                "and the folder's permissions, then run again to go on"
            ) from error
        raise


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, see ``write_bytes``."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON, see ``write_bytes``."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Content of a JSON file.

    Raises:
        ValueError: it is not JSON.
        OSError: it cannot be read.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path}: not readable ({error}); move it away and run again"
        ) from error


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a ``.npy`` file, see ``write_bytes``."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_bytes(path, buffer.getbuffer())


def write_wave(path: Path, audio: np.ndarray, sample_rate: int) -> None:
    """Write ``audio`` ``[n]`` as a mono float32 wav file, see ``write_bytes``.

    Float32 always: other trainers read 16-bit samples as they are, 32768 times too loud.
    SciPy writes equal bytes for equal samples; libsndfile adds the time of day.
    """
    from scipy.io import wavfile

    buffer = io.BytesIO()
    wavfile.write(buffer, sample_rate, np.ascontiguousarray(audio, np.float32))
    write_bytes(path, buffer.getbuffer())


def make_folders(folder: Path, names: tuple[str, ...] = ()) -> None:
    """Make a folder and folders in it.

    Raises:
        OSError: it cannot be made; says why.
    """
    try:
        for path in (folder, *(folder / name for name in names)):
            path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"{folder}: the folder cannot be made ({error.strerror}); give another one"
        ) from error


def remove_parts(folder: Path) -> None:
    """Remove what killed runs left half-written in a folder and those in it."""
    for part in folder.rglob(".rvc-mlx-*.part"):
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder; the lock ends with the process, however it ends.

    Raises:
        OSError: another run works there, or the folder may not be written.
    """
    import fcntl

    path = folder / LOCK
    try:
        file = path.open("ab")
    except OSError as error:
        raise OSError(
            f"{folder}: the folder cannot be written ({error.strerror}); change its "
            "permissions or give another folder"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(
                f"{folder}: another run is working in this folder; wait for it to end"
            ) from error
        yield
