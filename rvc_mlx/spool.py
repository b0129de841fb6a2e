"""A long float array kept in a temporary file, so that an hour of audio needs no memory.

Reads and writes are plain file calls, not a memory map: mapped pages would count as
resident memory. The file lies in the system's temporary folder (``TMPDIR``), which
should be a disk: a folder in memory would defeat the purpose.
"""

import os
import tempfile
from collections.abc import Iterator
from types import TracebackType

import numpy as np
import numpy.typing as npt

BLOCK = 1 << 18  # samples: 1 MiB of float32


class Spool:
    """An append-only array of float32 or float64 samples in a temporary file.

    The file has no name on POSIX systems from the moment it is made, so it disappears
    however the program ends. Use it as a context manager, or call ``close``.

    Args:
        dtype: float32 or float64; what is stored and returned.

    Raises:
        ValueError: if the dtype is another one.
        OSError: if the temporary folder cannot be written.
    """

    def __init__(self, dtype: npt.DTypeLike = np.float32):
        self.dtype = np.dtype(dtype)
        if self.dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
            raise ValueError(f"a spool holds float32 or float64, not {self.dtype}")
        self._length = 0
        # Unbuffered: blocks are large, and positions are given with every call.
        self._file = tempfile.TemporaryFile(  # noqa: SIM115 (closed by close)
            prefix="rvc-mlx-", buffering=0
        )

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
        """Delete the file; the spool is unusable afterwards."""
        self._file.close()

    def append(self, x: np.ndarray) -> None:
        """Add ``x`` ``[n]`` at the end.

        Raises:
            ValueError: if ``x`` is not one-dimensional.
            OSError: if the disk is full.
        """
        self.write(self._length, x)

    def write(self, start: int, x: np.ndarray) -> None:
        """Put ``x`` ``[n]`` at ``start``; a gap before it reads as zeros.

        Raises:
            ValueError: if ``x`` is not one-dimensional or ``start`` is negative.
            OSError: if the disk is full.
        """
        if x.ndim != 1 or start < 0:
            raise ValueError(f"a spool takes [n] at 0 or later, not {x.shape}, {start}")
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
        self._length = max(self._length, start + len(x))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return samples ``start`` to ``stop``, ``[stop - start]``.

        Raises:
            ValueError: if the range is not inside 0..length.
        """
        if not 0 <= start <= stop <= self._length:
            raise ValueError(f"{start}:{stop} is outside a spool of {self._length}")
        out = np.empty(stop - start, self.dtype)
        data = out.view(np.uint8).data
        offset = start * self.dtype.itemsize
        while len(data):
            count = os.preadv(self._file.fileno(), [data], offset)
            if count == 0:
                raise OSError("the temporary audio file became shorter while in use")
            data, offset = data[count:], offset + count
        return out

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
        period = max(2 * (self._length - 1), 1)
        index = np.arange(start, stop) % period
        index = np.minimum(index, period - index) if self._length > 1 else index * 0
        if not len(index):
            return np.empty(0, self.dtype)
        # Neighbours stay neighbours under mirroring, so this read is never longer
        # than the range asked for.
        low = int(index.min())
        return self.read(low, int(index.max()) + 1)[index - low]

    def blocks(self, size: int = BLOCK) -> Iterator[np.ndarray]:
        """Yield the array in order, in blocks of ``size`` (the last may be shorter)."""
        for start in range(0, self._length, size):
            yield self.read(start, min(start + size, self._length))

    def blocks_reversed(self, size: int = BLOCK) -> Iterator[np.ndarray]:
        """Yield the array backwards: joined, the blocks are the array reversed."""
        for stop in range(self._length, 0, -size):
            yield self.read(max(stop - size, 0), stop)[::-1]
