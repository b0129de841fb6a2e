"""An evaluation for the eye: tables with goals, and a page of pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import table
from judge_pitch import FRAME, Curve, track
from judging import Recording, is_figure


class Shown(NamedTuple):
    """A figure of the summary.

    Attributes:
        judge: whose.
        metric: its name in the results.
        label: its name for people, with the unit.
        sign: ``"<="`` or ``">="`` where there is a goal.
        goal: the goal.
    """

    judge: str
    metric: str
    label: str
    sign: str = ""
    goal: float = 0.0

    def verdict(self, value: Any) -> str:
        """``met``, ``missed``, or nothing without goal or figure."""
        if not self.sign or not is_figure(value):
            return ""
        met = value <= self.goal if self.sign == "<=" else value >= self.goal
        return "met" if met else "missed"


SUMMARY = (
    Shown("f0", "rpa", "F0 within 50 cents, %", ">=", 95),
    Shown("f0", "rpa_both_voiced", "F0 within 50 cents where both voiced, %"),
    Shown("f0", "median_cents", "F0 error, median cents"),
    Shown("f0", "octave_errors", "F0 an octave off, %"),
    Shown("f0", "voicing_error", "voicing error, %"),
    Shown("speaker", "similarity_target", "similarity to target", ">=", 0.80),
    Shown("speaker", "similarity_source", "similarity to source"),
    Shown("speaker", "source_to_target", "source's similarity to target"),
    Shown("speaker", "nearer_target", "nearer target than source, %", ">=", 95),
    Shown("words", "character_error_source", "character error of source, %"),
    Shown("words", "character_error_output", "character error of output, %"),
    Shown("words", "character_gap", "character error added, points", "<=", 12),
    Shown("words", "word_error_source", "word error of source, %"),
    Shown("words", "word_error_output", "word error of output, %"),
    Shown("words", "word_gap", "word error added, points"),
    Shown("words", "character_drift", "characters heard differently, %"),
    Shown("phones", "accuracy_source", "phone frames right, source, %"),
    Shown("phones", "accuracy_output", "phone frames right, output, %"),
    Shown("phones", "agreement", "phone frames as in source, %"),
    Shown("dnsmos", "overall_source", "DNSMOS of source"),
    Shown("dnsmos", "overall_output", "DNSMOS of output"),
    Shown("dnsmos", "p808_output", "P.808 MOS of output"),
    Shown("loudness", "loudness_gap", "loudness, output - source, dB"),
    Shown("loudness", "clipped_output", "clipped samples per clip"),
    Shown("clicks", "clicks_source", "clicks in source"),
    Shown("clicks", "new_clicks", "clicks added", "<=", 0),
)
CLIP_COLUMNS = (
    Shown("f0", "rpa", "RPA"),
    Shown("f0", "median_cents", "cents"),
    Shown("f0", "voicing_error", "voicing"),
    Shown("speaker", "similarity_target", "to target"),
    Shown("speaker", "similarity_source", "to source"),
    Shown("words", "character_error_source", "CER source"),
    Shown("words", "character_error_output", "CER output"),
    Shown("words", "character_drift", "CER drift"),
    Shown("phones", "accuracy_output", "phones"),
    Shown("phones", "agreement", "phones agree"),
    Shown("dnsmos", "overall_output", "DNSMOS"),
    Shown("loudness", "loudness_gap", "dB"),
    Shown("clicks", "new_clicks", "clicks"),
)
PICTURE_HZ = 8000
_FLOOR_DB = 70.0  # below the loudest point of a spectrogram


def _cell(value: Any) -> Any:
    return round(value, 2) if isinstance(value, float) else value


def _found(judged: Mapping[str, Mapping[str, Any]], shown: Shown) -> Any:
    return judged.get(shown.judge, {}).get(shown.metric)


def summary_table(voices: Sequence[dict[str, Any]]) -> str:
    """A line per figure, a column per voice; figures that no voice has are left out."""
    rows = []
    for shown in SUMMARY:
        values = [_found(voice["summary"], shown) for voice in voices]
        if all(value is None for value in values):
            continue
        cells = [f"{table_cell(v)} {shown.verdict(v)}".strip() for v in values]
        goal = f"{shown.sign} {shown.goal:g}" if shown.sign else ""
        rows.append([shown.label, goal, *cells])
    return table(("figure", "goal", *(voice["name"] for voice in voices)), rows)


def table_cell(value: Any) -> str:
    """A figure with at most two decimals; ``-`` for none."""
    return "-" if value is None else f"{_cell(value):g}"


def clips_table(voices: Sequence[dict[str, Any]]) -> str:
    """A line per clip and voice."""
    clips = [clip for voice in voices for clip in voice["clips"]]
    columns = [
        shown
        for shown in CLIP_COLUMNS
        if any(_found(clip["judged"], shown) is not None for clip in clips)
    ]
    rows = [
        [clip["source"], voice["name"], table_cell(clip["semitones"])]
        + [table_cell(_found(clip["judged"], shown)) for shown in columns]
        for voice in voices
        for clip in voice["clips"]
    ]
    return table(("clip", "voice", "shift", *(s.label for s in columns)), rows)


def notes(voices: Sequence[dict[str, Any]]) -> list[str]:
    """What could not be measured and why, with the number of clips."""
    counted = Counter(
        f"{voice['name']}, {judge}: {values['note']}"
        for voice in voices
        for clip in voice["clips"]
        for judge, values in clip["judged"].items()
        if values.get("note")
    )
    return [f"{note} ({count} clips)" for note, count in counted.items()]


def missed_goals(voices: Sequence[dict[str, Any]]) -> list[str]:
    """The goals that a voice misses, in words."""
    return [
        f"{voice['name']}: {shown.label} is {table_cell(value)}, "
        f"the goal is {shown.sign} {shown.goal:g}"
        for voice in voices
        for shown in SUMMARY
        if shown.verdict(value := _found(voice["summary"], shown)) == "missed"
    ]


def write_report(path: Path, facts: dict[str, Any], picture: str) -> str:
    """Write the tables as markdown; returns them."""
    voices = facts["voices"]
    parts = [
        f"# Evaluation: {facts['label']}",
        f"{len(facts['sources'])} clips, judged by {', '.join(facts['judges'])}. "
        "What the figures mean: docs/EVALUATION.md.",
        summary_table(voices),
        clips_table(voices),
    ]
    if remarks := notes(voices):
        parts.append("Not measured:\n\n" + "\n".join(f"- {note}" for note in remarks))
    image = [f"![source and output]({picture})"] if picture else []
    path.write_text("\n\n".join([*parts, *image]) + "\n", "utf-8")
    return "\n\n".join(parts[1:])


class Panel(NamedTuple):
    """One spectrogram of the page.

    Attributes:
        title: above it.
        recording: what is shown.
        pitch: curves to draw over it, by name.
    """

    title: str
    recording: Recording
    pitch: dict[str, Curve]


def _draw(axis: Any, panel: Panel, seconds: float) -> Any:
    heard = panel.recording.load().heard
    power, _, _, image = axis.specgram(
        heard + 1e-9, NFFT=512, Fs=16000, noverlap=384, cmap="magma"
    )
    loudest = 10 * np.log10(power.max())
    image.set_clim(loudest - _FLOOR_DB, loudest)
    axis.set(ylim=(0, PICTURE_HZ), xlim=(0, seconds))
    axis.set_title(panel.title, fontsize=9)
    curves = axis.twinx()
    # Expected below, found on top: where they agree only the top one is seen.
    for (name, curve), style in zip(panel.pitch.items(), ("c-", "w--"), strict=False):
        shown = np.where(curve.voiced, curve.f0, np.nan)
        width = 2.4 if style == "c-" else 1.2
        curves.plot(np.arange(len(shown)) * FRAME, shown, style, lw=width, label=name)
    curves.set(ylim=(40, 640), yscale="log")
    curves.set_yticks([50, 100, 200, 400], ["50", "100", "200", "400"], fontsize=7)
    curves.minorticks_off()
    if curves.get_legend_handles_labels()[0]:
        curves.legend(
            loc="upper right", fontsize=7, facecolor="#333333", labelcolor="w"
        )
    return curves


def panels_of(
    source: Recording, outputs: Mapping[str, tuple[Recording, float]], measured: bool
) -> list[Panel]:
    """The panels of one clip: the source, then each voice with what was expected.

    Args:
        source: the recording.
        outputs: conversion and shift in semitones, by voice.
        measured: whether pitch can be tracked here.
    """
    if not measured:
        shown = {source.path.stem: source} | {n: out for n, (out, _) in outputs.items()}
        return [Panel(name, recording, {}) for name, recording in shown.items()]
    before = track(source.load().heard)
    panels = [Panel(f"source: {source.path.stem}", source, {"F0, Hz": before})]
    for name, (output, semitones) in outputs.items():
        expected = before._replace(f0=before.f0 * 2 ** (semitones / 12))
        pitch = {"source, shifted": expected, "output": track(output.load().heard)}
        panels.append(Panel(f"{name}, {semitones:+g} semitones", output, pitch))
    return panels


def draw_page(path: Path, rows: Sequence[Sequence[Panel]]) -> None:
    """A picture of spectrograms and F0: a row per clip, the source and every voice."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = len(rows[0])
    size = (1 + 5.2 * columns, 0.6 + 2.9 * len(rows))
    figure, grid = plt.subplots(len(rows), columns, figsize=size, squeeze=False)
    for axes, panels in zip(grid, rows, strict=True):
        seconds = max(len(p.recording.load().heard) / 16000 for p in panels)
        for axis, panel in zip(axes, panels, strict=True):
            _draw(axis, panel, seconds)
        axes[0].set_ylabel("Hz")
    for axis in grid[-1]:
        axis.set_xlabel("seconds")
    figure.text(0.995, 0.5, "F0, Hz", rotation=90, va="center", ha="right", fontsize=8)
    figure.tight_layout(rect=(0, 0, 0.985, 1))
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)
