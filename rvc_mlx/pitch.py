"""Pitch: salience to F0, the user's changes to it, and what the networks take.

F0 is in Hz at 100 frames per second, 0 where unvoiced.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from rvc_mlx.arrays import (
    Array,
    array_module,
    begin,
    neighbours,
    one_ahead,
    reflected,
    to_host,
    together,
)
from rvc_mlx.elementwise import on_cuda
from rvc_mlx.machine import in_parallel
from rvc_mlx.salience_kernel import strongest_bins
from rvc_mlx.spectral import HOP_LENGTH, N_FFT, LogMel, log_mel

FRAME_RATE = 100  # frames per second
FRAME_LENGTH = HOP_LENGTH  # samples of 16 kHz audio per frame

CENTS_PER_BIN = 20
FIRST_BIN_CENTS = 1997.3794084376191  # of bin 0, above 10 Hz
_NEAR = 4  # bins on each side of the strongest that count
VOICING_THRESHOLD = 0.03  # salience at or below which a frame is unvoiced

F0_MIN, F0_MAX = 50.0, 1100.0  # Hz, range of the coarse pitch
COARSE_BINS = 255

CHUNK_FRAMES = 9600  # frames that go through the network at once (a multiple of 32)
CHUNK_CONTEXT = 512  # of these, frames on each inner side that are thrown away

AUTOTUNE_NOTES = np.round(440 * 2 ** ((np.arange(31, 85) - 69) / 12), 2)  # G1..C6, Hz

Reader = Callable[[int, int], Array]


def decode_salience(
    salience: Array, threshold: float = VOICING_THRESHOLD
) -> np.ndarray:
    """F0 of each frame: mean of the nine bins around the strongest, weighted.

    Args:
        salience: ``[T, bins]`` in 0..1.
        threshold: frames whose strongest bin is not above it are unvoiced.

    Returns:
        ``[T]`` float64 in Hz, 0 where unvoiced.

    Source: RMVPE ``to_local_average_cents``.
    """
    return begin_decoding(salience, threshold)()


def widened(f0: np.ndarray, onset: int, offset: int) -> np.ndarray:
    """F0 whose voiced runs begin sooner and end later, with the pitch they begin and end with.

    Gaps of up to ``onset + offset`` frames vanish; a frame that both reach is the later run's.

    Args:
        f0: ``[T]`` in Hz, 0 where unvoiced.
        onset: frames of 10 ms by which a run begins sooner, 0 or more.
        offset: frames by which it ends later, likewise.
    """
    for _ in range(onset):
        f0 = np.where(f0 > 0, f0, np.append(f0[1:], 0.0))
    for _ in range(offset):
        f0 = np.where(f0 > 0, f0, np.append(0.0, f0[:-1]))
    return f0


def begin_decoding(
    salience: Array, threshold: float = VOICING_THRESHOLD
) -> Callable[[], np.ndarray]:
    """Begin ``decode_salience`` where the salience is; what waits for it, and its result.

    A device does it before what it is given next.
    """
    if isinstance(salience, mx.array) and salience.size and on_cuda():
        strongest, strengths = strongest_bins(salience, _NEAR)
    else:
        xp = array_module(salience)
        strongest = xp.argmax(salience, axis=1)
        near = xp.arange(2 * _NEAR + 1, dtype=strongest.dtype) + strongest[:, None]
        padded = xp.pad(salience, ((0, 0), (_NEAR, _NEAR)))
        strengths = xp.take_along_axis(padded, near, axis=1)
    begin(strongest, strengths)
    return lambda: _mean_hertz(to_host(strongest), to_host(strengths), threshold)


def _mean_hertz(
    strongest: np.ndarray, strengths: np.ndarray, threshold: float
) -> np.ndarray:
    """Hz of bins ``[T]`` by their own and their neighbours' strengths ``[T, 9]``.

    0 where the bin's own, the fifth, is weak. Those of bins that are not there are 0.
    """
    weights = strengths.astype(np.float64)
    near = np.arange(-_NEAR, _NEAR + 1.0)
    total = np.maximum(weights @ np.ones_like(near), 1e-12)
    bins = strongest.astype(np.float64) + weights @ near / total
    mean = CENTS_PER_BIN * bins + FIRST_BIN_CENTS
    return np.where(strengths[:, _NEAR] > threshold, 10 * 2 ** (mean / 1200), 0.0)


@dataclass(frozen=True)
class PitchSettings:
    """How F0 is estimated.

    Attributes:
        n_mels: mel bands of the network.
        threshold: see ``decode_salience``.
        onset: frames by which voiced runs begin sooner, see ``widened``.
        offset: frames by which they end later.
        frames_multiple: the network takes a multiple of this many frames.
        mel_padding: how the last chunk is filled up: ``"reflect"`` (Applio) or
            ``"constant"`` (zeros, the WebUI).
        chunk_frames: frames per chunk, a multiple of ``frames_multiple``.
        batch_frames: most frames of equal chunks that go through the network together.
        log_mel: of samples and bands; another one than the host's runs on one thread.

    Raises:
        ValueError: ``chunk_frames`` leaves nothing between the contexts, or is no
            multiple of ``frames_multiple``.
    """

    n_mels: int = 128
    threshold: float = VOICING_THRESHOLD
    onset: int = 0
    offset: int = 0
    frames_multiple: int = 32
    mel_padding: str = "reflect"
    chunk_frames: int = CHUNK_FRAMES
    batch_frames: int = 0
    log_mel: LogMel = log_mel

    def __post_init__(self) -> None:
        multiple, chunk = self.frames_multiple, self.chunk_frames
        least = 2 * (CHUNK_CONTEXT + multiple)
        if chunk < least or chunk % multiple:
            raise ValueError(
                f"chunk_frames is {chunk}; expected {least} or more, and a multiple of "
                f"{multiple}"
            )

    def filled_up(self, frames: int) -> int:
        """Frames that the network is given for so many."""
        return frames + -frames % self.frames_multiple


@dataclass(frozen=True)
class Signal:
    """Recordings of one length whose F0 is wanted.

    Attributes:
        read: their samples ``start..stop``, ``[count, stop - start]`` float32 at
            16 kHz; on the host where the log-mel is made there, and then called by
            several threads.
        length: samples of each in all, more than 512.
        count: recordings, whose chunks go through the network together, no matter what
            ``batch_frames`` is.
    """

    read: Reader
    length: int
    count: int = 1


@dataclass(frozen=True)
class _Chunk:
    """Frames ``start..stop`` of a signal; of the result ``kept..until`` count."""

    number: int  # of the signal
    start: int
    stop: int
    kept: int
    until: int


def estimate_f0(
    salience: Callable[[Array], Array],
    read: Reader,
    length: int,
    n_mels: int = 128,
    threshold: float = VOICING_THRESHOLD,
    frames_multiple: int = 32,
    mel_padding: str = "reflect",
    chunk_frames: int = CHUNK_FRAMES,
) -> np.ndarray:
    """F0 of one recording by settings of its own; see ``estimate_one``."""
    settings = PitchSettings(
        n_mels,
        threshold,
        frames_multiple=frames_multiple,
        mel_padding=mel_padding,
        chunk_frames=chunk_frames,
    )
    return estimate_one(salience, read, length, settings)


def estimate_one(
    salience: Callable[[Array], Array],
    read: Reader,
    length: int,
    settings: PitchSettings,
) -> np.ndarray:
    """F0 ``[length // 160 + 1]`` float64 in Hz of one recording; see ``estimate_all``.

    ``read`` gives ``[stop - start]`` samples.
    """
    signal = Signal(lambda start, stop: read(start, stop)[None], length)
    return estimate_all(salience, [signal], settings)[0]


def estimate_all(
    salience: Callable[[Array], Array],
    signals: Sequence[Signal],
    settings: PitchSettings,
) -> list[np.ndarray]:
    """F0 ``[length // 160 + 1]`` float64 in Hz of each recording; see ``begin_all``."""
    return begin_all(salience, signals, settings)()


def begin_all(
    salience: Callable[[Array], Array],
    signals: Sequence[Signal],
    settings: PitchSettings,
) -> Callable[[], list[np.ndarray]]:
    """Begin to find the F0 of signals of any length, in chunks with context.

    Up to ``chunk_frames`` the network sees a signal whole. Beyond, neighbouring chunks
    overlap and only their inner parts are kept::

        |--------kept--------|ctx|
                         |ctx|--------kept--------|ctx|

    Args:
        salience: log-mel ``[B, T, n_mels]`` to salience ``[B, T, bins]``; may still be
            computing.
        signals: one or more.
        settings: how.

    Returns:
        What waits for the F0 of all their recordings in order, ``[length // 160 + 1]``
        float64 in Hz each.
    """
    curves = [np.zeros((s.count, s.length // HOP_LENGTH + 1)) for s in signals]
    chunks = [
        chunk
        for number, curve in enumerate(curves)
        for chunk in _plan_chunks(number, curve.shape[1], settings)
    ]

    def mel(chunk: _Chunk) -> Array:
        frames = _mel_frames(signals[chunk.number], chunk.start, chunk.stop, settings)
        return _fill_up(frames, settings)

    def begun() -> Iterator[tuple[list[_Chunk], Callable[[], np.ndarray]]]:
        on_host = settings.log_mel is log_mel
        made = in_parallel(mel, chunks) if on_host else map(mel, chunks)

        def length(pair: tuple[_Chunk, Array]) -> int:
            return pair[1].shape[1]

        def frames(pair: tuple[_Chunk, Array]) -> int:
            return len(pair[1]) * length(pair)

        pairs = zip(chunks, made, strict=True)
        for group in neighbours(pairs, length, frames, settings.batch_frames):
            found = salience(together([mel for _, mel in group]))
            rows = found.reshape(-1, found.shape[-1])
            yield (
                [chunk for chunk, _ in group],
                begin_decoding(rows, settings.threshold),
            )

    groups = one_ahead(begun())
    first = next(groups, None)

    def finish() -> list[np.ndarray]:
        for group, found in itertools.chain([first] if first else [], groups):
            counts = [signals[chunk.number].count for chunk in group]
            rows = found().reshape(sum(counts), -1)
            parts = np.split(rows, np.cumsum(counts)[:-1])
            for chunk, f0 in zip(group, parts, strict=True):
                inner = f0[:, chunk.kept - chunk.start : chunk.until - chunk.start]
                curves[chunk.number][:, chunk.kept : chunk.until] = inner
        onset, offset = settings.onset, settings.offset
        return [widened(f0, onset, offset) for curve in curves for f0 in curve]

    return finish


def _plan_chunks(number: int, total: int, settings: PitchSettings) -> Iterator[_Chunk]:
    """The chunks of a signal of ``total`` frames."""
    kept = 0
    while kept < total:
        start = max(0, kept - CHUNK_CONTEXT)
        start -= start % settings.frames_multiple
        stop = min(start + settings.chunk_frames, total)
        until = stop if stop == total else stop - CHUNK_CONTEXT
        yield _Chunk(number, start, stop, kept, until)
        kept = until


def _mel_frames(
    signal: Signal, start: int, stop: int, settings: PitchSettings
) -> Array:
    """Log-mel frames ``start..stop`` of a signal, reflected at its two ends.

    Returns:
        ``[count, stop - start, n_mels]`` float32.
    """
    first = start * HOP_LENGTH - N_FFT // 2
    last = (stop - 1) * HOP_LENGTH + N_FFT // 2
    samples = signal.read(max(first, 0), min(last, signal.length))
    samples = reflected(samples, max(-first, 0), max(last - signal.length, 0))
    return settings.log_mel(samples, settings.n_mels)


def _fill_up(mel: Array, settings: PitchSettings) -> Array:
    T = mel.shape[1]
    missing = settings.filled_up(T) - T
    if not missing:
        return mel
    pads = ((0, 0), (0, missing), (0, 0))
    padded: Array = array_module(mel).pad(mel, pads, mode=settings.mel_padding)
    return padded


def shift_f0(f0: np.ndarray, semitones: float) -> np.ndarray:
    """Transpose F0 ``[T]`` in Hz by semitones."""
    return f0 * 2 ** (semitones / 12)


def quantize_f0(f0: np.ndarray) -> np.ndarray:
    """Coarse pitch: 255 equal steps on the mel scale between 50 and 1100 Hz.

    Args:
        f0: ``[T]`` in Hz, 0 where unvoiced.

    Returns:
        ``[T]`` int32 in 1..255; unvoiced is 1.

    Source: RVC ``Pipeline.get_f0``.
    """
    mel = 1127 * np.log1p(f0 / 700)
    low, high = 1127 * np.log1p(np.array([F0_MIN, F0_MAX]) / 700)
    steps = (mel - low) * (COARSE_BINS - 1) / (high - low) + 1
    return np.rint(np.clip(steps, 1, COARSE_BINS)).astype(np.int32)


def autotune_f0(f0: np.ndarray, strength: float) -> np.ndarray:
    """Pull voiced frames towards the nearest semitone from G1 to C6.

    Unlike Applio's, unvoiced frames stay unvoiced and the key shift still applies.

    Args:
        f0: ``[T]`` in Hz.
        strength: 0 (off) to 1 (on the note).
    """
    nearest = AUTOTUNE_NOTES[np.abs(f0[:, None] - AUTOTUNE_NOTES).argmin(axis=1)]
    return np.where(f0 > 0, f0 + (nearest - f0) * strength, 0.0)


def propose_shift(f0: np.ndarray, target: float) -> int:
    """Semitones, at most an octave, that bring the median F0 to ``target`` Hz.

    Source: Applio's ``proposed_pitch`` (155 Hz for male, 255 Hz for female voices).
    """
    voiced = np.flatnonzero(f0 > 0)
    if len(voiced) < 2:
        return 0
    filled = np.interp(np.arange(len(f0)), voiced, f0[voiced])
    return int(np.clip(np.round(12 * np.log2(target / np.median(filled))), -12, 12))


def read_f0_file(path: str | Path) -> np.ndarray:
    """A pitch curve as the classic WebUI reads it: lines ``seconds,hertz``.

    Returns:
        ``[points, 2]`` float64, sorted by time.

    Raises:
        ValueError: a line is not two numbers of 0 or more, or there is none.
    """
    points = []
    for number, line in enumerate(Path(path).read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            seconds, hertz = (float(field) for field in line.split(","))
        except ValueError:
            seconds = hertz = math.nan
        if not (0 <= seconds < math.inf and 0 <= hertz < math.inf):
            raise ValueError(
                f"{path}, line {number}: {line.strip()!r} is not 'seconds,hertz', both "
                "0 or more"
            )
        points.append((seconds, hertz))
    if not points:
        raise ValueError(f"{path}: no lines 'seconds,hertz' in it")
    return np.array(sorted(points))


def overlay_f0(f0: np.ndarray, points: np.ndarray, first_frame: int) -> np.ndarray:
    """Write a curve of ``read_f0_file`` over F0 ``[T]`` from ``first_frame`` on."""
    seconds, hertz = points.T
    count = int(np.round((seconds[-1] - seconds[0]) * FRAME_RATE + 1))
    grid = seconds[0] + np.arange(count) / FRAME_RATE
    start = first_frame + int(np.round(seconds[0] * FRAME_RATE))
    curve = np.interp(grid, seconds, hertz)[: max(len(f0) - start, 0)]
    result = f0.copy()
    result[start : start + len(curve)] = curve
    return result


def sample_cycles(
    f0: np.ndarray, samples_per_frame: int, linear: bool = False
) -> np.ndarray:
    """Cycles that the oscillator advances at each output sample.

    Args:
        f0: ``[T]`` in Hz.
        samples_per_frame: ``U``; the sample rate is ``100 * U``.
        linear: interpolate between frames (RefineGAN) instead of holding each.

    Returns:
        ``[T, U]`` float64.
    """
    T, U = len(f0), samples_per_frame
    if linear:
        position = (np.arange(T * U) + 0.5) / U - 0.5
        curve = np.interp(position, np.arange(T), f0).reshape(T, U)
        return curve / (FRAME_RATE * U)
    return np.broadcast_to((f0 / (FRAME_RATE * U))[:, None], (T, U))


def sample_phases(cycles: np.ndarray) -> np.ndarray:
    """Phase of the oscillator at each output sample.

    Accumulated in float64 over the whole segment: a float32 sum is off by 1e-4 after ten
    seconds, and by ten times as much at the ninth harmonic.

    Args:
        cycles: ``[T, U]`` of ``sample_cycles``.

    Returns:
        ``[T, U]`` float32, in cycles within -0.5..0.5.
    """
    phase = np.cumsum(cycles)
    phase -= np.rint(phase)
    return phase.astype(np.float32).reshape(cycles.shape)


def frame_phases(cycles: np.ndarray) -> np.ndarray:
    """Phase of the oscillator before the first sample of each frame.

    As ``sample_phases``, where the device adds up the samples of a frame by itself.

    Args:
        cycles: ``[T, U]`` of ``sample_cycles``.

    Returns:
        ``[T, 1]`` float32, in cycles within -0.5..0.5.
    """
    held = cycles.strides[1] == 0  # one value for all samples of a frame
    advance = cycles[:, 0] * cycles.shape[1] if held else cycles.sum(axis=1)
    phase = np.cumsum(advance) - advance
    return (phase - np.rint(phase)).astype(np.float32)[:, None]
