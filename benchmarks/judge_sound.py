"""Sound: how loud it is, whether it clicks, and how clean a listener would call it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from clicks import find_clicks
from judging import (
    Case,
    Judge,
    NoReadingError,
    Recording,
    Row,
    foreign_code,
    mean_values,
)
from scipy.signal import lfilter

from rvc_mlx.audio import resample

_SAME_CLICK = 0.02  # seconds within which a click of the source explains one
_AT_JOIN = 0.01  # seconds around a join
_DNSMOS_SAMPLES = 144160  # 9.01 s, the window of DNSMOS
# K-weighting at 48 kHz: a shelf for the head, then a high-pass (ITU-R BS.1770-5, annex 1).
_SHELF = (
    [1.53512485958697, -2.69169618940638, 1.19839281085285],
    [1.0, -1.69065929318241, 0.73248077421585],
)
_HIGH_PASS = ([1.0, -2.0, 1.0], [1.0, -1.99004745483398, 0.99007225036621])


def integrated_loudness(x: np.ndarray, rate: int) -> float:
    """Loudness of ``[n]`` float in LUFS, silence and pauses gated out.

    Raises:
        NoReadingError: all of it is below -70 LUFS.

    Source:
        ITU-R BS.1770-5, annex 1, for one channel.
    """
    x = resample(np.asarray(x, np.float32), rate, 48000).astype(np.float64)
    for b, a in (_SHELF, _HIGH_PASS):
        x = lfilter(b, a, x)
    length, step = 19200, 4800  # 400 ms, three quarters shared
    x = np.pad(x, (0, max(0, length - len(x))))
    sums = np.concatenate(([0.0], np.cumsum(x**2)))
    starts = np.arange(0, len(x) - length + 1, step)
    power = (sums[starts + length] - sums[starts]) / length
    with np.errstate(divide="ignore"):
        power = power[-0.691 + 10 * np.log10(power) > -70]
        if not len(power):
            raise NoReadingError("silence (below -70 LUFS)")
        gate = -0.691 + 10 * np.log10(power.mean()) - 10
        power = power[-0.691 + 10 * np.log10(power) > gate]
    return float(-0.691 + 10 * np.log10(power.mean()))


def _observe_loudness(recording: Recording) -> Row:
    sound = recording.load()
    peak = float(np.abs(sound.full).max())
    return {
        "lufs": integrated_loudness(sound.full, sound.rate),
        "peak_db": 20 * float(np.log10(peak)),
        "clipped": int((np.abs(sound.full) >= 0.999).sum()),
    }


def _compare_loudness(case: Case) -> Row:
    sides = (("source", case.source), ("output", case.output))
    values = {f"{name}_{side}": heard[name] for side, heard in sides for name in heard}
    return values | {"loudness_gap": case.output["lufs"] - case.source["lufs"]}


def _observe_clicks(recording: Recording) -> np.ndarray:
    sound = recording.load()
    return find_clicks(sound.full, sound.rate)


def _distances(times: np.ndarray, others: Sequence[float] | np.ndarray) -> np.ndarray:
    """From each of some times ``[k]`` to the nearest of others; infinite for none."""
    apart = np.abs(np.subtract.outer(times, np.asarray(others, float)))
    return np.min(apart, axis=1, initial=np.inf)


def _compare_clicks(case: Case) -> Row:
    new = case.output[_distances(case.output, case.source) > _SAME_CLICK]
    # Where the joins are not known, any place may be one.
    at_joins = (
        new if case.joins is None else new[_distances(new, case.joins) < _AT_JOIN]
    )
    joins = {} if case.joins is None else {"joins": len(case.joins)}
    return joins | {
        "clicks_at_joins": len(at_joins),
        "clicks_source": len(case.source),
        "clicks_output": len(case.output),
        "new_clicks": len(new),
        "new_at": [round(float(at), 4) for at in new],
    }


def _summarize_clicks(rows: Sequence[Row]) -> Row:
    """Sums: one click in a thousand clips is one too many."""
    names = ("joins", "clicks_at_joins", "clicks_source", "clicks_output", "new_clicks")
    return {
        name: sum(row[name] for row in rows if name in row)
        for name in names
        if any(name in row for row in rows)
    }


def _observe_dnsmos(recording: Recording) -> Row:
    with foreign_code():
        from speechmos import dnsmos

        samples = np.clip(recording.load().heard, -1, 1)
        # Short clips are repeated to one window; the tool would take up to nine of them.
        samples = np.resize(samples, max(len(samples), _DNSMOS_SAMPLES))
        scores: dict[str, Any] = dnsmos.run(samples, 16000)
    names = {"overall": "ovrl_mos", "speech": "sig_mos", "background": "bak_mos"}
    names["p808"] = "p808_mos"
    return {ours: float(scores[theirs]) for ours, theirs in names.items()}


def _compare_dnsmos(case: Case) -> Row:
    sides = (("source", case.source), ("output", case.output))
    values = {f"{name}_{side}": heard[name] for side, heard in sides for name in heard}
    return values | {"overall_lost": case.source["overall"] - case.output["overall"]}


LOUDNESS = Judge(
    "loudness", _observe_loudness, _compare_loudness, summarize=mean_values
)
CLICKS = Judge("clicks", _observe_clicks, _compare_clicks, summarize=_summarize_clicks)
DNSMOS = Judge(
    "dnsmos",
    _observe_dnsmos,
    _compare_dnsmos,
    {
        "speechmos": "speechmos",
        "librosa": "librosa",
        "onnxruntime": "onnxruntime",
        "requests": "requests",
    },
)
