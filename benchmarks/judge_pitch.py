"""Pitch: swift-f0, which knows nothing of RMVPE, on the source and on the output."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from judging import Case, Judge, NoReadingError, Recording, Row, foreign_code

FRAME = 256 / 16000  # seconds
VOICED = 0.5  # confidence that swift-f0 is calibrated to
TOLERANCE = 50.0  # cents
QUIET_DB = (
    50.0  # below the loudest frame nothing is voiced: the tracker hears hum there
)
_SPARE = 2  # frames by which two recordings of one length may differ


class Curve(NamedTuple):
    """Pitch of a recording, a frame every 16 ms.

    Attributes:
        f0: ``[T]`` float64 Hz, a guess where there is no voice.
        voiced: ``[T]`` bool.
    """

    f0: np.ndarray
    voiced: np.ndarray

    @property
    def median(self) -> float:
        """Median pitch in Hz.

        Raises:
            NoReadingError: no frame is voiced.
        """
        if not self.voiced.any():
            raise NoReadingError("no voiced frame, so no pitch")
        return float(np.median(self.f0[self.voiced]))


@cache
def _tracker() -> Any:
    with foreign_code():
        from swift_f0 import SwiftF0

        return SwiftF0(threads=1, spin=False)


def track(samples: np.ndarray) -> Curve:
    """Pitch of ``[n]`` float32 at 16 kHz."""
    found = _tracker().detect(samples, 16000)
    loud = _loud(samples, len(found.pitch_hz))
    return Curve(found.pitch_hz, (found.confidence >= VOICED) & loud)


def _loud(samples: np.ndarray, frames: int) -> np.ndarray:
    """Which of the tracker's frames are not inaudible beside the loudest: ``[T]`` bool."""
    power = np.concatenate(([0.0], np.cumsum(samples.astype(np.float64) ** 2)))
    middles = (np.arange(frames) + 0.5) * FRAME * 16000
    starts, stops = (
        np.clip(middles + side, 0, len(samples)).astype(int) for side in (-256, 256)
    )
    energy = power[stops] - power[starts]
    return energy > energy.max(initial=0.0) * 10 ** (-QUIET_DB / 10)


def _observe(recording: Recording) -> Curve:
    return track(recording.load().heard)


def semitones_to(source: Curve, references: Sequence[Curve]) -> float:
    """The shift that brings the median of the source to that of the target.

    Raises:
        NoReadingError: one side has no voiced frame.
    """
    voiced = np.concatenate([curve.f0[curve.voiced] for curve in references])
    target = Curve(voiced, np.ones(len(voiced), bool)).median
    return round(12 * float(np.log2(target / source.median)), 2)


def _share(part: np.ndarray, of: np.ndarray) -> float | None:
    return 100 * float(part[of].mean()) if of.any() else None


def _aligned(source: Curve, output: Curve) -> tuple[Curve, Curve]:
    """The frames that both have.

    Raises:
        ValueError: the recordings are not of one length.
    """
    lengths = len(source.f0), len(output.f0)
    if abs(lengths[0] - lengths[1]) > _SPARE:
        raise ValueError(
            f"source and output last {lengths[0] * FRAME:.2f} and "
            f"{lengths[1] * FRAME:.2f} s; pitch can only be compared frame by frame"
        )
    cut = slice(min(lengths))
    first, second = (Curve(c.f0[cut], c.voiced[cut]) for c in (source, output))
    return first, second


def compare_curves(source: Curve, output: Curve, semitones: float) -> Row:
    """How well the output keeps the melody of the source, moved by ``semitones``.

    Returns:
        ``rpa`` and ``octave_errors`` in % of the source's voiced frames,
        ``rpa_both_voiced`` in % of those voiced in both, ``median_cents`` (of the
        absolute error) and ``bias_cents`` (signed median) over the latter,
        ``voicing_error`` in % of all frames, ``voicing_lost`` in % of the voiced and
        ``voicing_added`` in % of the unvoiced frames of the source.

    Raises:
        ValueError: the recordings are not of one length.
        NoReadingError: the source has no voiced frame.

    Source:
        ``rpa`` is ``mir_eval.melody.raw_pitch_accuracy``: the output's decision on
        voicing does not count, its pitch does.
    """
    (before, voiced), (after, spoken) = _aligned(source, output)
    if not voiced.any():
        raise NoReadingError("no voiced frame in the source, so no pitch to keep")
    cents = 1200 * np.log2(after / before) - 100 * semitones
    right = np.abs(cents) <= TOLERANCE
    octaves = np.round(cents / 1200)
    other_octave = (octaves != 0) & (np.abs(cents - 1200 * octaves) <= TOLERANCE)
    both = voiced & spoken
    errors = cents[both] if both.any() else None
    return {
        "rpa": _share(right, voiced),
        "rpa_both_voiced": _share(right, both),
        "octave_errors": _share(other_octave, voiced),
        "median_cents": None if errors is None else float(np.median(np.abs(errors))),
        "bias_cents": None if errors is None else float(np.median(errors)),
        "voicing_error": 100 * float((voiced != spoken).mean()),
        "voicing_lost": _share(~spoken, voiced),
        "voicing_added": _share(spoken, ~voiced),
    }


def _compare(case: Case) -> Row:
    return compare_curves(case.source, case.output, case.semitones)


PITCH = Judge("f0", _observe, _compare, {"swift_f0": "swift-f0"}, references=True)
