"""Where a long recording is cut, and how much each piece hears of its neighbours."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from rvc_mlx import pitch
from rvc_mlx.audio import SAMPLE_RATE
from rvc_mlx.machine import in_parallel
from rvc_mlx.options import ConversionOptions
from rvc_mlx.spool import Spool

FRAME = pitch.FRAME_LENGTH  # samples of 16 kHz audio per frame


@dataclass(frozen=True)
class Segment:
    """A stretch of the recording that is converted at once.

    Indices count samples of the recording at 16 kHz, padded on its left by the context::

        padded    |.context.|---- start .. stop ----|.context.|
                  ^ start                    stop + 2 * context ^
    Attributes:
        number: counts segments; part of the noise's key.
        start: first sample, a multiple of a frame.
        samples: audio that the encoder hears, from ``start`` of the padded recording.
        first: first frame of the segment that is kept.
        last: one past the last frame that is kept.
    """

    number: int
    start: int
    samples: int
    first: int
    last: int

    @property
    def frames(self) -> int:
        """Frames that the encoder's features fill."""
        features = (self.samples - 400) // 320 + 1
        return min(self.samples // FRAME, 2 * features)


def pad_frames(options: ConversionOptions) -> int:
    """Frames of context on each side of a segment."""
    return round(options.x_pad * pitch.FRAME_RATE)


def find_cuts(audio: Spool, options: ConversionOptions) -> list[int]:
    """Quiet places at which a long recording is cut.

    Near every ``x_center`` seconds, the place where the sum over 10 ms of signal is
    nearest to 0, rounded down to a frame.

    Source: RVC ``Pipeline.pipeline`` (the signed sum, as in Applio and the classic WebUI).
    """
    length = len(audio)
    if length + FRAME <= options.x_max * SAMPLE_RATE:
        return []
    query = round(options.x_query * SAMPLE_RATE)
    center = round(options.x_center * SAMPLE_RATE)
    return list(
        in_parallel(
            lambda middle: _quietest(audio, middle - query, middle + query),
            range(center, length, center),
        )
    )


def _quietest(audio: Spool, start: int, stop: int) -> int:
    """The frame of the quietest place from ``start`` to ``stop``, in samples."""
    stop, half = min(stop, len(audio)), FRAME // 2
    window = audio.read_reflected(start - half, stop + half)
    sums = np.zeros(len(window) + 1)
    np.cumsum(window, dtype=np.float64, out=sums[1:])
    loudness = sums[FRAME:] - sums[:-FRAME]
    cut = start + int(np.abs(loudness, out=loudness)[: stop - start].argmin())
    return cut - cut % FRAME


def plan_segments(audio: Spool, options: ConversionOptions) -> list[Segment]:
    """Cut a recording into segments with context.

    By default every frame of the recording has its frame of output; with
    ``reference_lengths`` segments are as long as the original's, whose features end
    up to two frames early.
    """
    length = len(audio)
    pad = pad_frames(options)
    edges = [0, *find_cuts(audio, options), length]
    segments = []
    for number, (start, stop) in enumerate(itertools.pairwise(edges)):
        final = number == len(edges) - 2
        samples = stop - start + 2 * pad * FRAME
        if options.reference_lengths:
            samples += 0 if final else FRAME
            last = Segment(number, start, samples, 0, 0).frames - pad
        else:
            # One more frame at the very end, for the rounding of output rates.
            kept = (stop - start) // FRAME + (1 if final else 0)
            last = pad + kept
            # The encoder drops what does not fill its window of 400 samples.
            samples = (2 * pad + kept) * FRAME
            samples += FRAME if samples % (2 * FRAME) == 0 else 2 * FRAME
        segments.append(Segment(number, start, samples, pad, last))
    return segments
