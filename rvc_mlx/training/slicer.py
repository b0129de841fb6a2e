"""Where a recording is cut at its silences, and how long pieces become clips.

Loudness is measured in frames of four hops of 15 ms. A silence is a run of frames below
-42 dB; one of 0.4 s that comes 1.5 s or more after the last cut is a place to cut, and at
most half a second of it stays on either side::

    speech |~~~~|                 |~~~~| speech
           s    left cut          right cut
                 ^ quietest of the first 0.5 s, and of the last

Source: the slicer of the RVC trainers (openvpi's audio-slicer), with their constants.
"""

from __future__ import annotations

import numpy as np

THRESHOLD = 10 ** (-42 / 20)  # root mean square below which a frame is silent
HOP_SECONDS = 0.015
WINDOW_HOPS = 4  # the original's min(0.4 s, 4 hops) is 4 hops at every rate
MIN_LENGTH = 1.5  # seconds from a cut to the end of the silence that is cut next
MIN_INTERVAL = 0.4  # seconds of silence that are a place to cut
MAX_KEPT = 0.5  # seconds of silence kept on either side of a cut


def hop_length(sample_rate: int) -> int:
    """Samples from one frame to the next."""
    return round(HOP_SECONDS * sample_rate)


class FrameLoudness:
    """Root mean square of frames, of a signal that comes in blocks.

    Args:
        sample_rate: Hz.

    Attributes:
        samples: how many came.
    """

    def __init__(self, sample_rate: int):
        self._hop = hop_length(sample_rate)
        self._rest = np.empty(0, np.float32)
        self._sums: list[np.ndarray] = []
        self.samples = 0

    def add(self, x: np.ndarray) -> None:
        """Add a block ``[n]``."""
        self.samples += len(x)
        x = np.concatenate([self._rest, x])
        whole = len(x) // self._hop * self._hop
        self._sums.append(_squares(x[:whole], self._hop))
        self._rest = x[whole:]

    def frames(self) -> np.ndarray:
        """Loudness ``[samples // hop + 1]`` float64.

        Frame t is centred on sample ``t * hop``; beyond both ends there are zeros.
        """
        missing = -len(self._rest) % self._hop
        last = _squares(np.pad(self._rest, (0, missing)), self._hop)
        count = self.samples // self._hop + 1
        sums = np.concatenate([*self._sums, last])
        sums = np.pad(sums, (2, count + 2 - len(sums)))
        total = sum(sums[k : k + count] for k in range(WINDOW_HOPS))
        return np.sqrt(total / (WINDOW_HOPS * self._hop))


def _squares(x: np.ndarray, hop: int) -> np.ndarray:
    rows = x.reshape(-1, hop).astype(np.float64)
    return np.einsum("th,th->t", rows, rows)


def frame_loudness(x: np.ndarray, sample_rate: int) -> np.ndarray:
    """Loudness of the frames of ``x`` ``[n]``, see ``FrameLoudness.frames``."""
    frames = FrameLoudness(sample_rate)
    frames.add(x)
    return frames.frames()


def find_slices(
    loudness: np.ndarray, samples: int, sample_rate: int
) -> list[tuple[int, int]]:
    """Stretches of a recording between its silences.

    Args:
        loudness: ``[samples // hop + 1]``, see ``FrameLoudness``.
        samples: of the recording.
        sample_rate: Hz.

    Returns:
        First sample and one past the last, in order, none empty. A recording without
        long silences is one stretch.
    """
    hop = hop_length(sample_rate)
    edges = [0]
    for left, right in _removed(loudness, sample_rate):
        edges += [left, right]
    edges.append(len(loudness))
    bounds = [min(edge * hop, samples) for edge in edges]
    pairs = zip(bounds[::2], bounds[1::2], strict=True)
    return [(start, stop) for start, stop in pairs if stop > start]


def _removed(loudness: np.ndarray, sample_rate: int) -> list[tuple[int, int]]:
    """Frames that each cut takes away: the first, and one past the last."""
    kept = _in_hops(MAX_KEPT, sample_rate)
    interval = _in_hops(MIN_INTERVAL, sample_rate)
    length = _in_hops(MIN_LENGTH, sample_rate)
    total, clip_start, cuts = len(loudness), 0, []
    for start, stop in _silences(loudness):
        if stop == total:
            if stop - start >= interval:
                cuts.append((_quietest(loudness, start, start + kept), total))
            continue
        leading = start == 0 and stop > kept
        if not leading and (stop - start < interval or stop - clip_start < length):
            continue
        if stop - start <= kept:
            left = right = _quietest(loudness, start, stop)
        else:
            # Up to twice ``kept`` the original also looks at the overlap of the two
            # windows; its quietest frame never changes either cut.
            left = _quietest(loudness, start, start + kept)
            right = _quietest(loudness, stop - kept, stop)
        cuts.append((0 if start == 0 else left, right))
        clip_start = right
    return cuts


def _silences(loudness: np.ndarray) -> list[tuple[int, int]]:
    """Runs of silent frames: the first, and one past the last."""
    quiet = np.concatenate([[False], loudness < THRESHOLD, [False]])
    edges = np.flatnonzero(quiet[1:] != quiet[:-1]).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def _quietest(loudness: np.ndarray, first: int, last: int) -> int:
    """The first of the quietest frames in ``first..last``, both included."""
    return first + int(loudness[first : last + 1].argmin())


def _in_hops(seconds: float, sample_rate: int) -> int:
    return round(seconds * sample_rate / hop_length(sample_rate))


def cut_clips(
    start: int, stop: int, sample_rate: int, seconds: float, overlap: float
) -> list[tuple[int, int]]:
    """Cut a stretch into clips of equal length that overlap.

    The last clip holds the rest: from ``2 * overlap`` to ``seconds + overlap``, less
    only where the whole stretch is shorter. Nothing is left over.

    Args:
        start: first sample of the stretch.
        stop: one past its last.
        sample_rate: Hz.
        seconds: of a clip.
        overlap: seconds that neighbours share.

    Returns:
        First sample of each clip and one past its last, in order.

    Source: ``PreProcess.pipeline`` of the RVC trainers.
    """
    clips: list[tuple[int, int]] = []
    while True:
        first = start + int(sample_rate * (seconds - overlap) * len(clips))
        if stop - first <= (seconds + overlap) * sample_rate:
            return [*clips, (first, stop)]
        clips.append((first, first + int(seconds * sample_rate)))
