"""Sound files: reading any of them in blocks, and writing one safely."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import soundfile

from .audio import SAMPLE_RATE, resample_blocks
from .decoders import ForwardSoundFile, open_decoder
from .output_format import check_length, check_output, output_format, part_path
from .spool import BLOCK, Spool

RATES = range(1000, 768001)  # Hz: what is accepted as input
_PIECE = 1 << 16  # samples per write: libsndfile's vorbis overflows its stack on more
_CUT_TOLERANCE = 0.1  # seconds by which headers of complete files are off


class AudioReader:
    """Reads a sound file in mono blocks, as often as wanted.

    Args:
        path: wav, flac, mp3, ogg, aiff and others; also m4a, mp4, webm, wma ... where
            PyAV or an ``ffmpeg`` program is installed.

    Attributes:
        sample_rate: Hz, as in the file.
        channels: as in the file; blocks are their mean.

    Raises:
        OSError: if there is no such file, or it is not one that can be opened.
        ValueError: if it is not audio, empty, cut off, or of an impossible rate.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        _check_input(self.path)
        self._decoder = open_decoder(self.path)
        self.sample_rate = self._decoder.sample_rate
        self.channels = self._decoder.channels
        if self.sample_rate not in RATES:
            raise ValueError(
                f"{self.path}: a sample rate of {self.sample_rate} Hz; expected "
                f"{RATES[0]} to {RATES[-1]}; convert the file first"
            )
        self._counted: int | None = None
        if self._decoder.frames == 0:
            raise ValueError(f"{self.path}: the file holds no audio (0 samples)")

    def __enter__(self) -> "AudioReader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Nothing stays open between passes."""

    @property
    def frames(self) -> int:
        """Samples per channel: counted by a full pass, or as the header says before.

        Where the header does not say, the first use makes that pass.
        """
        if self._counted is None and self._decoder.frames is None:
            for _ in self.blocks():
                pass
        counted = self._decoder.frames if self._counted is None else self._counted
        assert counted is not None
        return counted

    def blocks(self, size: int = BLOCK) -> Iterator[np.ndarray]:
        """Yield the sound from its beginning, mono, in blocks of ``size`` samples.

        Yields:
            ``[size]`` float32, the last shorter.

        Raises:
            ValueError: if the sound is damaged, cut off, empty or not finite.
        """
        return _regroup(self._mono(size), size)

    def _mono(self, size: int) -> Iterator[np.ndarray]:
        count = 0
        for block in self._decoder.blocks(size):
            x = _mean_of_channels(block)
            finite = np.isfinite(x)
            if not finite.all():
                second = (count + int(np.argmin(finite))) / self.sample_rate
                raise ValueError(
                    f"{self.path}: a sample at {second:.3f} s is not a finite number; "
                    "expected ordinary audio; export the file again"
                )
            count += len(x)
            yield x
        if count == 0:
            raise ValueError(f"{self.path}: the file holds no audio (0 samples)")
        claimed = self._decoder.frames or 0
        if count < claimed - _CUT_TOLERANCE * self.sample_rate:
            raise ValueError(
                f"{self.path}: cut off after {count / self.sample_rate:.1f} s of "
                f"{claimed / self.sample_rate:.1f} s; copy or export it again"
            )
        self._counted = count


def _check_input(path: Path) -> None:
    """Raise if ``path`` is not a file with something in it."""
    if path.is_dir():
        raise IsADirectoryError(f"{path}: a folder was given; give one sound file")
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file; check the path")
    if not path.is_file():
        raise OSError(f"{path}: not an ordinary file; give a sound file on disk")
    if not os.access(path, os.R_OK):
        raise PermissionError(f"{path}: may not be read; change its permissions")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty (0 bytes); export it again")


def _mean_of_channels(block: np.ndarray) -> np.ndarray:
    """Return float32 [n] from [n, channels]; column by column is several times faster."""
    x = block[:, 0].astype(np.float32)
    if block.shape[1] > 1:
        with np.errstate(invalid="ignore", over="ignore"):  # reported by the caller
            for channel in range(1, block.shape[1]):
                x += block[:, channel]
        x *= np.float32(1 / block.shape[1])
    return x


def _regroup(blocks: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Yield the same samples in blocks of exactly ``size``, the last shorter."""
    waiting: list[np.ndarray] = []
    count = 0
    for block in blocks:
        if not waiting and len(block) == size:
            yield block
            continue
        waiting.append(block)
        count += len(block)
        if count >= size:
            joined = np.concatenate(waiting)
            whole = count // size * size
            yield from (joined[i : i + size] for i in range(0, whole, size))
            waiting, count = [joined[whole:]], count - whole
            if not count:
                waiting = []
    if count:
        yield np.concatenate(waiting)


def load_spool(
    reader: AudioReader, sample_rate: int = SAMPLE_RATE
) -> tuple[Spool, int]:
    """Decode, mix and resample a whole file into a spool.

    Args:
        reader: the file.
        sample_rate: the rate wanted, Hz.

    Returns:
        A float32 spool of at least one sample, to be closed by the caller, and the
        number of samples the file had at its own rate.
    """
    spool = Spool(np.float32)
    try:
        for block in resample_blocks(reader.blocks(), reader.sample_rate, sample_rate):
            spool.append(block)
        if not len(spool):  # a sample or two that round to none at a lower rate
            spool.append(next(reader.blocks())[:1])
    except BaseException:
        spool.close()
        raise
    return spool, reader.frames


def load_audio(path: str | os.PathLike[str]) -> np.ndarray:
    """Return a sound file as ``[n]`` float32, mono, at 16 kHz, at its own loudness."""
    with AudioReader(path) as reader:
        spool, _ = load_spool(reader)
    with spool:
        return spool.read(0, len(spool))


class AudioWriter:
    """Writes a mono file that appears complete or not at all.

    Samples go to a temporary file in the same folder, which takes the place of the
    destination when the ``with`` block ends without an exception; after any exception,
    a keyboard interrupt too, it is removed and an existing file stays as it was.

    Args:
        path: where to; the suffix says the format (see ``check_output``).
        sample_rate: Hz.
        subtype: None for the format's default.

    Raises:
        ValueError: see ``check_output``.
        OSError: see ``check_output``.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        sample_rate: int,
        subtype: str | None = None,
    ):
        self.path = Path(path)
        self.sample_rate = sample_rate
        self.frames = 0  # samples written
        check_output(self.path, sample_rate, subtype)
        self._format, self._subtype = output_format(self.path, subtype)
        self._target = Path(os.path.realpath(self.path))
        self._part = part_path(self._target)
        self._file: Any = None

    def __enter__(self) -> "AudioWriter":
        try:
            self._file = ForwardSoundFile(
                str(self._part),
                "w",
                self.sample_rate,
                1,
                self._subtype,
                format=self._format,
            )
        except soundfile.LibsndfileError as error:
            self._part.unlink(missing_ok=True)
            raise self._failed(error) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._close()
            if kind is None:
                os.replace(self._part, self._target)
        finally:
            self._part.unlink(missing_ok=True)

    def write(self, block: np.ndarray) -> None:
        """Add samples; beyond -1..1 the integer formats clip.

        Args:
            block: ``[n]`` float32.

        Raises:
            ValueError: if the samples are not one-dimensional or not finite, or the
                file would grow beyond what its format can hold.
            OSError: if the disk is full.
        """
        if block.ndim != 1 or not np.isfinite(block).all():
            raise ValueError(
                f"{self.path}: got samples of shape {block.shape} that are not one row "
                "of finite numbers; nothing was written"
            )
        self.frames += len(block)
        check_length(self.path, self._format, self._subtype, self.frames)
        samples = np.ascontiguousarray(block, np.float32)
        try:
            for start in range(0, len(samples), _PIECE):
                self._file.write(samples[start : start + _PIECE])
        except soundfile.LibsndfileError as error:
            raise self._failed(error) from error

    def _close(self) -> None:
        try:
            self._file.close()
        except soundfile.LibsndfileError as error:
            raise self._failed(error) from error

    def _failed(self, error: soundfile.LibsndfileError) -> OSError:
        return OSError(
            f"{self.path}: writing failed ({error.error_string.strip().rstrip('.')}); "
            "check that the disk is not full"
        )


def save_audio(
    path: str | os.PathLike[str],
    audio: np.ndarray,
    sample_rate: int,
    subtype: str | None = None,
) -> None:
    """Write ``audio`` ``[n]`` float32 to a file (see ``AudioWriter``)."""
    with AudioWriter(path, sample_rate, subtype) as writer:
        writer.write(audio)
