"""Decoders for what libsndfile cannot read: m4a, mp4, webm, wma and others.

PyAV where it is installed, else an ``ffmpeg`` program on the path. Both have the shape
that ``decoders`` describes. Neither follows a playlist to other files or addresses.
"""

import contextlib
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np

_END_TOLERANCE = 0.5  # seconds that a container may claim beyond its last packet


def ffmpeg_decoder(path: Path) -> "PyAVDecoder | FFmpegDecoder | None":
    """Return PyAV's or ffmpeg's decoder, or None where neither is installed."""
    try:
        import av  # noqa: F401
    except ImportError:
        program = shutil.which("ffmpeg")
        return FFmpegDecoder(path, program) if program else None
    return PyAVDecoder(path)


class PyAVDecoder:
    """Reads everything FFmpeg's libraries know, through PyAV."""

    def __init__(self, path: Path):
        self.path = path
        self.frames: int | None = None
        self.sample_rate, self.channels = self._first_frame()

    def _container(self) -> Any:
        """Open the file: never a playlist that points to other files or addresses."""
        import av

        return av.open(
            f"file:{self.path.absolute()}", options={"protocol_whitelist": "file"}
        )

    def _first_frame(self) -> tuple[int, int]:
        """Return rate and channels as decoded: headers of HE-AAC may say half."""
        import av

        try:
            with self._container() as container:
                if not container.streams.audio:
                    raise ValueError(f"{self.path}: this file has no sound in it")
                for frame in container.decode(audio=0):
                    return frame.sample_rate, len(frame.layout.channels)
        except av.FFmpegError as error:
            raise ValueError(
                f"{self.path}: not a readable audio file ({error.strerror}); check "
                "that it is complete and plays elsewhere"
            ) from error
        raise ValueError(f"{self.path}: the file holds no audio (0 samples)")

    def blocks(self, size: int) -> Iterator[np.ndarray]:
        """Yield float32 ``[n, channels]`` blocks, one per packet of the file."""
        del size  # packets are small
        import av

        end, duration = 0.0, 0.0
        try:
            with self._container() as container:
                stream = container.streams.audio[0]
                duration = _promised_seconds(container, stream)
                resampler: Any = None
                for frame in container.decode(stream):
                    if resampler is None:  # to float; rate and layout stay the first's
                        resampler = av.AudioResampler(
                            "fltp", frame.layout, self.sample_rate
                        )
                    if frame.pts is not None:
                        end = float(frame.pts * frame.time_base)
                        end += frame.samples / self.sample_rate
                    for part in resampler.resample(frame):
                        yield part.to_ndarray().T
        except av.FFmpegError as error:
            raise ValueError(
                f"{self.path}: the audio is damaged or cut off after {end:.1f} s "
                f"({error.strerror}); export it again"
            ) from error
        if end < duration - _END_TOLERANCE:
            raise ValueError(
                f"{self.path}: cut off after {end:.1f} s of {duration:.1f} s; "
                "copy or export it again"
            )


def _promised_seconds(container: Any, stream: Any) -> float:
    """Return where the sound ends by the header, 0 where it gives a guess or nothing."""
    name = container.format.name
    if "mp4" in name and stream.duration and stream.time_base:
        start = stream.start_time or 0
        return float((start + stream.duration) * stream.time_base)
    if "matroska" in name and container.duration and len(container.streams) == 1:
        return container.duration / 1e6  # microseconds
    return 0.0


class FFmpegDecoder:
    """Reads everything an ``ffmpeg`` program knows, through a pipe.

    The pipe carries the au format: its header of six big-endian words tells rate and
    channels, so no second program has to be asked.
    """

    def __init__(self, path: Path, program: str):
        self.path = path
        self.frames: int | None = None
        self._command = [program, "-v", "error", "-nostdin"]
        self._command += ["-protocol_whitelist", "file,pipe"]
        self._command += ["-i", f"file:{path.absolute()}", "-map", "0:a:0"]
        self._command += ["-c:a", "pcm_f32be", "-f", "au", "pipe:1"]
        self.sample_rate, self.channels = 0, 0
        with contextlib.closing(self.blocks(1024)) as blocks:
            next(blocks, None)
        if not self.channels:
            raise ValueError(f"{path}: the file holds no audio (0 samples)")

    def blocks(self, size: int) -> Generator[np.ndarray, None, None]:
        """Yield float32 ``[n, channels]`` blocks; the program ends with the loop."""
        with tempfile.TemporaryFile() as log:
            process = subprocess.Popen(
                self._command, stdout=subprocess.PIPE, stderr=log
            )
            assert process.stdout is not None
            try:
                yield from self._read(process.stdout, size)
                status = process.wait()
            finally:
                process.kill()
                process.stdout.close()
                process.wait()
            log.seek(0)
            lines = log.read().decode(errors="replace").strip().splitlines()
        if status or lines:
            reason = lines[-1] if lines else f"ffmpeg ended with status {status}"
            raise ValueError(
                f"{self.path}: the audio is damaged, cut off or not audio ({reason}); "
                "check that it plays elsewhere or export it again"
            )

    def _read(self, pipe: Any, size: int) -> Iterator[np.ndarray]:
        """Yield the blocks of an au stream and note its rate and channels."""
        header = pipe.read(24)
        if len(header) < 24:
            return
        offset, _, _, self.sample_rate, self.channels = struct.unpack(
            ">5I", header[4:24]
        )
        pipe.read(offset - 24)
        width = 4 * self.channels
        while data := pipe.read(size * width):
            whole = len(data) // width * width
            yield np.frombuffer(data[:whole], ">f4").reshape(-1, self.channels)
