"""The three ways to read sound from a file, behind one shape.

libsndfile (wav, flac, mp3, ogg, aiff ...) is always there. PyAV, or else an ``ffmpeg``
program, reads the rest (m4a, mp4, webm, wma ...). A decoder has ``sample_rate``,
``channels``, ``frames`` (samples per channel, None where only a full pass can tell) and
``blocks(size)``, which decodes from the beginning each time it is called. Content
decides which one is used, not the file's suffix.
"""

import contextlib
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import soundfile

from .ffmpeg_decoders import ffmpeg_decoder

_LIBSNDFILE_SUFFIXES = (
    *(".wav", ".flac", ".mp3", ".ogg", ".opus", ".oga", ".aif", ".aiff", ".aifc"),
    *(".au", ".snd", ".caf", ".w64", ".rf64"),
)
_INSTALL = (
    "install PyAV (pip install 'rvc-mlx[av]') or the ffmpeg program, or convert the "
    "file to wav"
)
# What libsndfile's log says of a chunk whose claim goes beyond the end of the file.
_CUT_CHUNK = re.compile(
    r"^\s*(?:data|SSND|Data Size)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE
)
_UNKNOWN_SIZE = 0x7FFF0000  # claims from here on are what recorders write to a pipe


class Decoder(Protocol):
    """What ``AudioReader`` needs of a file."""

    sample_rate: int
    channels: int
    frames: int | None

    def blocks(self, size: int) -> Iterator[np.ndarray]:
        """Yield float32 ``[n, channels]`` blocks, n up to about ``size``."""
        ...


def open_decoder(path: Path) -> Decoder:
    """Return the decoder for a file that exists and is not empty.

    Raises:
        ValueError: if nothing installed can read it; the message says what to do.
    """
    try:
        return SoundFileDecoder(path)
    except soundfile.LibsndfileError as error:
        found = ffmpeg_decoder(path)
        if found is not None:
            return found
        if path.suffix.lower() in _LIBSNDFILE_SUFFIXES:
            raise ValueError(
                f"{path}: not a readable audio file "
                f"({error.error_string.strip().rstrip('.')}); check that it is "
                f"{path.suffix} audio and complete"
            ) from error
        raise ValueError(f"{path}: this format needs a decoder; {_INSTALL}") from error


class ForwardSoundFile(soundfile.SoundFile):
    """A sound file that is read or written from front to back.

    python-soundfile seeks after every block of a file that it may seek in, which breaks
    an mp3 at each block border.
    """

    def seekable(self) -> bool:
        """Return False, so that no call seeks."""
        return False


class SoundFileDecoder:
    """Reads what libsndfile knows.

    ``frames`` is what the file claims, also where it is cut off before.
    """

    def __init__(self, path: Path):
        self.path = path
        with path.open("rb") as raw, self._open(raw.fileno()) as file:
            self.sample_rate = int(file.samplerate)
            self.channels = int(file.channels)
            claimed = _claimed_frames(file)
            is_mp3 = file.format == "MP3"
        # Of an mp3 without a length header libsndfile guesses the length from the first
        # bit rate, and stops there even if the sound goes on. From a pipe it does not.
        self._start = _start_without_length(path) if is_mp3 else None
        self.frames: int | None = claimed if self._start is None else None

    @staticmethod
    def _open(descriptor: int) -> Any:
        return ForwardSoundFile(descriptor, closefd=False)

    def blocks(self, size: int) -> Iterator[np.ndarray]:
        """Yield float32 ``[n, channels]`` blocks."""
        size = max(1, min(size, (1 << 22) // self.channels))
        with contextlib.ExitStack() as stack:
            raw = stack.enter_context(self.path.open("rb"))
            descriptor = raw.fileno()
            if self._start is not None:
                raw.seek(self._start)
                descriptor = stack.enter_context(_piped(raw))
            try:
                file = stack.enter_context(self._open(descriptor))
                while len(x := file.read(size, dtype="float32", always_2d=True)):
                    yield x
            except soundfile.LibsndfileError as error:
                raise ValueError(
                    f"{self.path}: the audio is damaged or cut off "
                    f"({error.error_string.strip().rstrip('.')}); export it again"
                ) from error


@contextlib.contextmanager
def _piped(raw: Any) -> Iterator[int]:
    """Give a descriptor from which the rest of an open file comes, without seeking."""
    reader, writer = os.pipe()

    def pump() -> None:
        with contextlib.suppress(BrokenPipeError), os.fdopen(writer, "wb") as out:
            shutil.copyfileobj(raw, out)

    thread = threading.Thread(target=pump, daemon=True)
    thread.start()
    try:
        yield reader
    finally:
        os.close(reader)
        thread.join()


def _claimed_frames(file: Any) -> int:
    """Return the frames that the header promises, more than there are if it is cut."""
    frames = int(file.frames)
    match = _CUT_CHUNK.search(file.extra_info)
    if match is None:
        return frames
    claimed, found = int(match[1]), int(match[2])
    if claimed <= found or claimed >= _UNKNOWN_SIZE:
        return frames
    return frames * claimed // max(found, 1)


def _start_without_length(path: Path) -> int | None:
    """Return where the sound of an mp3 starts, None if a header there has its length."""
    with path.open("rb") as file:
        start = file.read(10).ljust(10)
        tag = 0
        if start[:3] == b"ID3":  # the size of the tag comes in groups of seven bits
            for byte in start[6:]:
                tag = tag << 7 | byte
            tag += 10
        file.seek(tag)
        start = file.read(4096)
    found = any(name in start for name in (b"Xing", b"Info", b"VBRI"))
    return None if found else tag
