"""How loud a recording is: peaks, the loudness envelope, and silence that stays silent.

Everything works on streams of blocks; the array forms are built on them.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .audio import SAMPLE_RATE
from .spool import Spool

INPUT_PEAK = 0.95  # louder input is scaled down to this
OUTPUT_PEAK = 0.99  # louder output is scaled down to this
SILENCE_FRAME_RATE = 100  # frames per second in which silence is measured


def peak(blocks: Iterable[np.ndarray]) -> float:
    """Return the largest absolute sample of a stream of blocks; 0 if there is none."""
    largest = 0.0
    for x in blocks:
        if len(x):
            largest = max(largest, float(np.max(x)), -float(np.min(x)))
    return largest


def normalize_gain(peak: float) -> float:
    """Return the factor that brings input louder than 0.95 down to it; never above 1."""
    return min(1.0, INPUT_PEAK / peak) if peak > 0 else 1.0


def limit_gain(peak: float) -> float:
    """Return the factor that brings output louder than 0.99 down to it; never above 1."""
    return min(1.0, OUTPUT_PEAK / peak) if peak > 0 else 1.0


class Envelope:
    """Accumulates the loudness of a stream: one point per ``hop`` samples.

    A point is the root mean square of the 2 hop samples around a multiple of ``hop``,
    zeros outside the signal::

        signal     |--- e0 ---|--- e1 ---|--- e2 ---|-e3-|
        points     0          1          2          3
                  e0        e0+e1      e1+e2      e2+e3      divided by 2 hop, root

    Args:
        hop: samples between points; half a second in RVC.

    Source:
        ``librosa.feature.rms(frame_length=2 * hop, hop_length=hop, center=True)``.
    """

    def __init__(self, hop: int):
        if hop < 1:
            raise ValueError(f"the hop of an envelope is 1 sample or more, not {hop}")
        self.hop = hop
        self._energies = [0.0]  # of each stretch of hop samples; the last is filling
        self._filled = 0  # samples in the last stretch, below hop

    def add(self, block: np.ndarray) -> None:
        """Take the next samples ``[n]``."""
        squares = np.square(block, dtype=np.float64)
        starts = np.arange(self.hop - self._filled, len(squares), self.hop)
        if len(squares):
            sums = np.add.reduceat(squares, np.concatenate(([0], starts)))
            self._energies[-1] += float(sums[0])
            self._energies.extend(sums[1:].tolist())
            self._filled += len(squares) - self.hop * len(starts)
        if self._filled == self.hop:
            self._energies.append(0.0)
            self._filled = 0

    def points(self) -> np.ndarray:
        """Return ``[1 + n // hop]`` float64 loudness so far, n the samples taken."""
        energies = np.array(self._energies)
        energies[1:] += np.array(self._energies[:-1])
        return np.sqrt(energies / (2 * self.hop))


def rms_points(blocks: Iterable[np.ndarray], hop: int) -> np.ndarray:
    """Return the loudness ``[1 + n // hop]`` float64 of a stream (see ``Envelope``)."""
    envelope = Envelope(hop)
    for block in blocks:
        envelope.add(block)
    return envelope.points()


@dataclass(frozen=True)
class LoudnessMatch:
    """Moves the loudness of an output towards that of its source.

    Each sample is multiplied by (source / output) ** (1 - rate), both envelopes
    stretched linearly over the whole output.

    Attributes:
        source_points: ``[K1]`` loudness of the source (``rms_points``).
        output_points: ``[K2]`` loudness of the output.
        total: samples of the whole output.
        rate: 1 leaves the output as it is, 0 gives it the envelope of the source.

    Source:
        RVC, ``change_rms``; its ``F.interpolate(mode="linear")``.
    """

    source_points: np.ndarray
    output_points: np.ndarray
    total: int
    rate: float

    def apply(self, y: np.ndarray, start: int) -> np.ndarray:
        """Samples ``y`` ``[n]`` float32 of the output, from ``start`` on, as they will be."""
        if self.rate == 1 or not len(y):
            return y
        stop = start + len(y)
        source = _stretched(self.source_points, start, stop, self.total)
        output = _stretched(self.output_points, start, stop, self.total)
        np.maximum(output, 1e-6, out=output)
        ratio = np.divide(source, output, out=source).astype(np.float32)
        return y * ratio ** np.float32(1 - self.rate)


def _stretched(points: np.ndarray, start: int, stop: int, total: int) -> np.ndarray:
    """Return samples start..stop of ``points`` [K] interpolated to ``total`` samples."""
    position = np.arange(start, stop, dtype=np.float64)
    position += 0.5
    position *= len(points) / total
    position -= 0.5
    return np.interp(position, np.arange(len(points)), points)  # holds at both ends


def match_loudness(
    y: np.ndarray, sample_rate: int, source16k: np.ndarray, rate: float
) -> np.ndarray:
    """Return ``y`` with its loudness moved towards that of the source.

    Args:
        y: ``[n]`` float32 output.
        sample_rate: its rate, Hz.
        source16k: ``[m]`` float source at 16 kHz, high-passed.
        rate: 1 leaves ``y`` as it is, 0 gives it the envelope of the source.

    Returns:
        ``[n]`` float32.
    """
    source = rms_points([source16k], SAMPLE_RATE // 2)
    output = rms_points([y], sample_rate // 2)
    return LoudnessMatch(source, output, len(y), rate).apply(y, 0)


class SilenceGate:
    """Where the source is digital silence, the gain is 0, so silence stays silence.

    The source is measured in frames of 10 ms; frames whose peak is below the threshold
    for long enough are silent. The fades lie inside the silence, so that no sample
    under a sounding frame is touched. Silence at either end of the recording, or
    everywhere, has no fade there.

    Args:
        source: the 16 kHz recording before any gain or filter.
        threshold_db: a frame is silent below this peak, dB of full scale.
        min_seconds: shorter silence is left alone.
        fade_seconds: length of each fade.
    """

    def __init__(
        self,
        source: Spool,
        threshold_db: float = -80.0,
        min_seconds: float = 0.2,
        fade_seconds: float = 0.01,
    ):
        self.fade_seconds = fade_seconds
        silent = _silent_frames(source, 10 ** (threshold_db / 20))
        edges = np.flatnonzero(np.diff(silent, prepend=False, append=False))
        starts, stops = edges[::2], edges[1::2]  # frames, stop exclusive
        kept = (stops - starts) / SILENCE_FRAME_RATE >= min_seconds
        kept |= stops - starts == len(silent)
        self._starts = starts[kept].astype(np.float64)
        self._stops = stops[kept].astype(np.float64)
        self._stops[self._stops == len(silent)] = np.inf  # silent for ever after

    def gain(self, start: int, stop: int, sample_rate: int) -> np.ndarray:
        """Return the gain of output samples ``start`` to ``stop``.

        Args:
            start: first sample, counted from the beginning of the recording.
            stop: one past the last sample.
            sample_rate: the rate that these are counted in, Hz.

        Returns:
            ``[stop - start]`` float32 in 0..1.
        """
        gain = np.ones(stop - start, np.float32)
        fade = max(self.fade_seconds * sample_rate, 1e-9)
        for begin, end in self._runs(start, stop, sample_rate):
            low = max(start, int(np.ceil(begin)))
            high = int(min(stop, np.ceil(end)))
            # Samples from the nearer sounding frame; the ends of a recording have none.
            index = np.arange(low, high)
            distance = np.minimum(index - begin if begin else np.inf, end - index)
            gain[low - start : high - start] = np.maximum(1 - distance / fade, 0)
        return gain

    def apply(self, y: np.ndarray, start: int, sample_rate: int) -> np.ndarray:
        """Samples ``y`` ``[n]`` of the output from ``start`` on, times their gain."""
        stop = start + len(y)
        silent = len(self._runs(start, stop, sample_rate)) > 0
        return y * self.gain(start, stop, sample_rate) if silent else y

    def _runs(self, start: int, stop: int, sample_rate: int) -> np.ndarray:
        """Silences that overlap ``start`` to ``stop``: ``[runs, 2]``, in samples."""
        begins = self._starts * sample_rate / SILENCE_FRAME_RATE  # samples, fractional
        ends = self._stops * sample_rate / SILENCE_FRAME_RATE
        found = (begins < stop) & (ends > start)
        return np.stack([begins[found], ends[found]], axis=1)


def _silent_frames(source: Spool, threshold: float) -> np.ndarray:
    """Return one bool per 10 ms frame: all samples of it are below ``threshold``."""
    frame = SAMPLE_RATE // SILENCE_FRAME_RATE
    found = [
        np.maximum.reduceat(np.abs(x), np.arange(0, len(x), frame)) < threshold
        for x in source.blocks(frame * 1600)
    ]
    return np.concatenate(found) if found else np.zeros(0, bool)
