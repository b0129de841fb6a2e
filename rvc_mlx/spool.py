"""A long float array in memory, or in a temporary file once it outgrows its share of it.

So an hour of audio needs no more memory than some minutes. Reads and writes of the file
are plain file calls, not a memory map: mapped pages would count as resident memory. It
lies in the system's temporary folder (``TMPDIR``), which should be a disk: a folder in
memory would defeat the purpose.
"""

import os
import tempfile
from collections.abc import Iterator
from types import TracebackType
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from .arrays import Excerpt, copy_to

BLOCK = 1 << 18  # samples: 1 MiB of float32
MEMORY = 32 << 20  # bytes of a recording kept in memory: 9 minutes at 16 kHz


class Spool:
    """An append-only array of float32 or float64 samples.

    The file, if there is one, has no name on POSIX systems from the moment it is made,
    so it disappears however the program ends. Use a spool as a context manager, or call
    ``close``.

    Args:
        dtype: float32 or float64; what is stored and returned.
        memory: most bytes kept in memory; a longer array is in a file.
        expected: samples that will come, as far as known: saves copies.

    Raises:
        ValueError: if the dtype is another one.
        OSError: if the temporary folder cannot be written.
    """

    def __init__(
        self,
        dtype: npt.DTypeLike = np.float32,
        memory: int = MEMORY,
        expected: int = 0,
    ):
        self.dtype = np.dtype(dtype)
        if self.dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
            raise ValueError(f"a spool holds float32 or float64, not {self.dtype}")
        self._memory = memory
        self._length = 0
        self._buffer = np.empty(0, self.dtype)
        self._file: BinaryIO | None = None
        self._make_room(expected)

    @classmethod
    def around(cls, x: np.ndarray) -> "Spool":
        """A spool of what is in memory anyway, ``[n]`` float32 or float64, not copied."""
        spool = cls(x.dtype, memory=np.iinfo(np.int64).max)
        spool._buffer, spool._length = x, len(x)
        return spool

    def like(self, dtype: npt.DTypeLike = np.float32, expected: int = 0) -> "Spool":
        """A new spool that may take as much memory as this one."""
        return Spool(dtype, self._memory, expected)

    def __len__(self) -> int:
        return self._length

    def __enter__(self) -> "Spool":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Forget the array, and its file; the spool is unusable afterwards."""
        self._buffer, self._length = np.empty(0, self.dtype), 0
        if self._file:
            self._file.close()

    def _make_room(self, length: int) -> None:
        """Let ``length`` samples fit into the buffer, or move to a file."""
        if self._file or length <= len(self._buffer):
            return
        kept = self._buffer[: self._length]
        if length * self.dtype.itemsize > self._memory:
            # Unbuffered: blocks are large, and positions are given with every call.
            self._file = tempfile.TemporaryFile(  # noqa: SIM115 (closed by close)
                prefix="rvc-mlx-", buffering=0
            )
            self._write_file(0, kept)
            self._buffer = np.empty(0, self.dtype)
        else:
            self._buffer = np.empty(max(length, 2 * len(self._buffer)), self.dtype)
            self._buffer[: len(kept)] = kept

    def append(self, x: np.ndarray) -> np.ndarray:
        """Add ``x`` ``[n]`` at the end.

        Returns:
            As ``x``, not to be changed, where the host reads it soonest: a device's
            memory comes page by page.

        Raises:
            ValueError: if ``x`` is not one-dimensional.
            OSError: if the disk is full.
        """
        if x.ndim != 1:
            raise ValueError(f"a spool takes [n], not {x.shape}")
        stop = self._length + len(x)
        self._make_room(stop)
        kept = x
        if self._file:
            self._write_file(self._length, x)
        else:
            kept = self._buffer[self._length : stop]
            copy_to(kept, x)
        self._length = stop
        return kept

    def _write_file(self, start: int, x: np.ndarray) -> None:
        assert self._file
        data = np.ascontiguousarray(x, dtype=self.dtype).view(np.uint8).data
        offset = start * self.dtype.itemsize
        try:
            while len(data):  # one call may write less than it is given
                written = os.pwrite(self._file.fileno(), data, offset)
                data, offset = data[written:], offset + written
        except OSError as error:
            raise OSError(
                f"{tempfile.gettempdir()}: cannot write temporary audio "
                f"({error.strerror}); free some space or set TMPDIR to another folder"
            ) from error

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return samples ``start`` to ``stop``, ``[stop - start]``, not to be changed.

        Raises:
            ValueError: if the range is not inside 0..length.
        """
        if not 0 <= start <= stop <= self._length:
            raise ValueError(f"{start}:{stop} is outside a spool of {self._length}")
        if self._file is None:
            out = self._buffer[start:stop]
            out.flags.writeable = False
            return out
        out = np.empty(stop - start, self.dtype)
        data = out.view(np.uint8).data
        offset = start * self.dtype.itemsize
        while len(data):
            count = os.preadv(self._file.fileno(), [data], offset)
            if count == 0:
                raise OSError("the temporary audio file became shorter while in use")
            data, offset = data[count:], offset + count
        return out

    def take(self) -> np.ndarray:
        """Close the spool and return all of it, ``[length]``; it is the caller's."""
        x = self.read(0, self._length) if self._file else self._buffer[: self._length]
        self.close()
        return x

    def read_reflected(self, start: int, stop: int) -> np.ndarray:
        """Return ``[stop - start]`` samples; outside the array it is mirrored.

        As ``numpy.pad(mode="reflect")``: the edge sample is not repeated (index -1 is
        sample 1), a range longer than the array is mirrored again and again, and an
        array of one sample is constant.

        Raises:
            ValueError: if the spool is empty.
        """
        if self._length == 0:
            raise ValueError("an empty spool has nothing to mirror")
        if 0 <= start <= stop <= self._length:
            return self.read(start, stop)
        if -self._length < start <= stop < 2 * self._length:
            return self._mirrored_once(start, stop)
        period = max(2 * (self._length - 1), 1)
        index = np.arange(start, stop) % period
        index = np.minimum(index, period - index) if self._length > 1 else index * 0
        if not len(index):
            return np.empty(0, self.dtype)
        # Neighbours stay neighbours under mirroring, so this read is never longer
        # than the range asked for.
        low = int(index.min())
        return self.read(low, int(index.max()) + 1)[index - low]

    def excerpt(self, start: int, stop: int) -> Excerpt:
        """``read_reflected`` for networks: where the samples are, not yet reflected."""
        return Excerpt(self.read_reflected(start, stop))

    def _mirrored_once(self, start: int, stop: int) -> np.ndarray:
        """``read_reflected`` of a range that leaves the array by less than its length."""
        n = self._length
        parts = [self.read(min(max(start, 0), n), max(min(stop, n), 0))]
        if start < 0:
            parts.insert(0, self.read(max(1 - stop, 1), 1 - start)[::-1])
        if stop > n:
            parts.append(
                self.read(2 * n - 1 - stop, min(2 * n - 1 - start, n - 1))[::-1]
            )
        return np.concatenate(parts)

    def blocks(self, size: int = BLOCK) -> Iterator[np.ndarray]:
        """Yield the array in order, in blocks of ``size`` (the last may be shorter)."""
        for start in range(0, self._length, size):
            yield self.read(start, min(start + size, self._length))
