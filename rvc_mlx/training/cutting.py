"""One recording to clips: what happens to the sound."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rvc_mlx.audio import (
    HIGH_PASS_HZ,
    HIGH_PASS_ORDER,
    SAMPLE_RATE,
    resample,
    resample_blocks,
)
from rvc_mlx.audio_io import AudioReader
from rvc_mlx.spool import Spool
from rvc_mlx.training import slicer
from rvc_mlx.training.data_report import Clip, Problem
from rvc_mlx.training.files import write_wave
from rvc_mlx.training.recordings import Recording

CUTS = ("silence", "fixed", "whole")
NORMALIZATIONS = ("clip", "file", "none")

MIN_SECONDS = 0.1  # what is shorter says nothing and is left out
PADDED_SECONDS = 0.5  # what is shorter gets silence: 48 frames, more than any segment
WHOLE_SECONDS = 30.0  # longest clip; the encoder hears one at once
MAX_PEAK = 2.5  # above, the recording is broken
LOUDNESS, ALPHA = 0.9, 0.75  # peak aimed at, and how much of the way there
CLIP_LEVEL = 0.95  # equal samples in a row from here on were cut off
CLIPPED_SHARE = 1e-4  # of the samples, worth telling


@dataclass(frozen=True)
class PreprocessOptions:
    """How recordings become clips.

    Attributes:
        cut: ``"silence"``: at silences, then into clips; ``"fixed"``: into clips
            whatever is in them; ``"whole"``: no cuts up to 30 seconds.
        clip_seconds: length of a clip.
        overlap_seconds: what neighbouring clips share.
        high_pass: take away what lies below 48 Hz.
        normalization: bring each ``"clip"`` or ``"file"`` near a peak of 0.9, or
            ``"none"``.
    """

    cut: str = "silence"
    clip_seconds: float = 3.0
    overlap_seconds: float = 0.3
    high_pass: bool = True
    normalization: str = "clip"

    def __post_init__(self) -> None:
        for name, known in (("cut", CUTS), ("normalization", NORMALIZATIONS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; expected one of "
                    f"{', '.join(known)}"
                )
        if not PADDED_SECONDS <= self.clip_seconds <= WHOLE_SECONDS:
            raise ValueError(
                f"clip_seconds is {self.clip_seconds}; expected {PADDED_SECONDS} to "
                f"{WHOLE_SECONDS:.0f}"
            )
        if not 0 <= self.overlap_seconds <= self.clip_seconds / 2:
            raise ValueError(
                f"overlap_seconds is {self.overlap_seconds}; expected 0 to half of "
                "clip_seconds"
            )


class _UnreadableError(Exception):
    """The recording is at fault, not the folder or the disk."""


class _Watch:
    """Reads a recording and counts what was cut off at full scale."""

    def __init__(self, path: str):
        try:
            self._reader = AudioReader(path)
        except (ValueError, OSError) as error:
            raise _UnreadableError(str(error)) from error
        self.sample_rate = self._reader.sample_rate
        self._last = np.zeros(2, np.float32)
        self._samples = self._clipped = 0

    def blocks(self) -> Iterator[np.ndarray]:
        """The recording's blocks at its own rate."""
        try:
            for block in self._reader.blocks():
                self._count(block)
                yield block
        except (ValueError, OSError) as error:
            raise _UnreadableError(str(error)) from error

    def _count(self, block: np.ndarray) -> None:
        x = np.concatenate([self._last, block])
        flat = (x[2:] == x[1:-1]) & (x[1:-1] == x[:-2])
        self._clipped += int(np.count_nonzero(flat & (np.abs(x[2:]) >= CLIP_LEVEL)))
        self._samples += len(block)
        self._last = x[-2:]

    @property
    def clipped(self) -> float:
        """Share of samples that continue a flat top."""
        return self._clipped / max(self._samples, 1)


def prepare_recording(
    recording: Recording,
    folders: tuple[Path, Path],
    sample_rate: int,
    options: PreprocessOptions,
) -> tuple[list[Clip], list[Problem]]:
    """Write the clips of a recording.

    Args:
        recording: what to read.
        folders: where clips at the voice's rate and at 16 kHz go.
        sample_rate: of the voice, Hz.
        options: how.

    Returns:
        The clips, and what was left out, padded or looks wrong.

    Raises:
        OSError: a clip or temporary audio cannot be written.
    """
    clips: list[Clip] = []
    source = recording.source
    with Spool() as audio:
        loudness = slicer.FrameLoudness(sample_rate)
        try:
            problems = _read(source, audio, loudness, sample_rate, options.high_pass)
        except _UnreadableError as error:
            return [], [Problem(source, "unreadable", str(error))]
        frames = loudness.frames()
        found = _unusable(source, len(audio) / sample_rate, frames.max(), None)
        if found:
            return [], [*problems, found]
        for start, stop in _ranges(frames, len(audio), sample_rate, options):
            x = audio.read(start, stop)
            wrong = _judge(source, x, start, sample_rate)
            problems += [wrong] if wrong else []
            if wrong is None or wrong.used:
                name = f"{recording.name}_{len(clips)}"
                x = _normalize(x, audio, options.normalization)
                clips.append(_write(name, x, folders, sample_rate))
    return clips, problems


def _read(
    source: str,
    audio: Spool,
    loudness: slicer.FrameLoudness,
    sample_rate: int,
    filtered: bool,
) -> list[Problem]:
    """Decode, resample and filter a recording in one pass over it."""
    watch = _Watch(source)
    blocks = resample_blocks(watch.blocks(), watch.sample_rate, sample_rate)
    for block in _high_passed(blocks, sample_rate) if filtered else blocks:
        audio.append(block)
        loudness.add(block)
    if watch.clipped <= CLIPPED_SHARE:
        return []
    share = f"{100 * watch.clipped:.2f} % of the samples are cut off at full scale"
    return [Problem(source, "clipped", f"{share}; record at a lower level", used=True)]


def _high_passed(
    blocks: Iterable[np.ndarray], sample_rate: int
) -> Iterator[np.ndarray]:
    """The blocks without what lies below 48 Hz, float32.

    Forwards only, from rest, as the RVC trainers do; the arithmetic is float64.
    """
    from scipy import signal

    b, a = signal.butter(HIGH_PASS_ORDER, HIGH_PASS_HZ, "high", fs=sample_rate)
    state = np.zeros(HIGH_PASS_ORDER)
    for block in blocks:
        y, state = signal.lfilter(b, a, block.astype(np.float64), zi=state)
        yield y.astype(np.float32)


def _ranges(
    loudness: np.ndarray, samples: int, sample_rate: int, options: PreprocessOptions
) -> list[tuple[int, int]]:
    """First sample of each clip and one past its last."""
    stretches = [(0, samples)]
    if options.cut == "silence":
        stretches = slicer.find_slices(loudness, samples, sample_rate)
    lengths = (options.clip_seconds, options.overlap_seconds)
    if options.cut == "whole":
        lengths = (WHOLE_SECONDS, 0.0)
    return [
        clip
        for start, stop in stretches
        for clip in slicer.cut_clips(start, stop, sample_rate, *lengths)
    ]


def _judge(source: str, x: np.ndarray, start: int, sample_rate: int) -> Problem | None:
    """What is wrong with a clip."""
    second, seconds = round(start / sample_rate, 3), len(x) / sample_rate
    peak = float(np.abs(x).max())
    if not peak <= MAX_PEAK:
        detail = f"a peak of {peak:.3g}; expected up to {MAX_PEAK}, 1 is full scale"
        return Problem(source, "too loud", detail, second)
    level = slicer.frame_loudness(x, sample_rate).max()
    found = _unusable(source, seconds, level, second)
    if found is None and seconds < PADDED_SECONDS:
        detail = f"{seconds:.3f} s; filled up with silence to {PADDED_SECONDS} s"
        return Problem(source, "padded", detail, second, used=True)
    return found


def _unusable(
    source: str, seconds: float, level: float, second: float | None
) -> Problem | None:
    """Whether a recording or a clip is too short or silent.

    Silent clips are left out because normalisation would make their noise loud.
    """
    if seconds < MIN_SECONDS:
        detail = f"{seconds:.3f} s; expected {MIN_SECONDS} s or more"
        return Problem(source, "too short", detail, second)
    if level < slicer.THRESHOLD:
        found = f"{20 * np.log10(level):.0f} dB" if level > 0 else "digital silence"
        detail = f"{seconds:.1f} s of silence (loudest: {found}; expected -42 dB)"
        return Problem(source, "silent", detail, second)
    return None


def _normalize(x: np.ndarray, audio: Spool, how: str) -> np.ndarray:
    """Bring ``x`` ``[n]`` three quarters of the way to a peak of 0.9."""
    if how == "none":
        return x
    blocks = audio.blocks() if how == "file" else [x]
    peak = max(float(np.abs(block).max()) for block in blocks)
    return x * np.float32(LOUDNESS * ALPHA / peak + (1 - ALPHA))


def _write(
    name: str, x: np.ndarray, folders: tuple[Path, Path], sample_rate: int
) -> Clip:
    """Write a clip at both rates, filled up with silence where it is very short."""
    missing = round(PADDED_SECONDS * sample_rate) - len(x)
    x = np.pad(x, (0, max(missing, 0)))
    paths = [folder / f"{name}.wav" for folder in folders]
    write_wave(paths[0], x, sample_rate)
    write_wave(paths[1], resample(x, sample_rate, SAMPLE_RATE), SAMPLE_RATE)
    return Clip(name, len(x), (paths[0].stat().st_size, paths[1].stat().st_size))
