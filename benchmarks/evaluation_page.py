"""An evaluation for the eye: spectrograms and F0 of sources and outputs on one page."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from judge_pitch import FRAME, Curve, track
from judging import Recording

PICTURE_HZ = 8000
COLOURS = 128  # of the picture: a third of the bytes, and no difference to be seen
_FLOOR_DB = 70.0  # below the loudest point of a spectrogram


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
    faint = 1e-7 * np.random.default_rng(0).standard_normal(len(heard))  # no log of 0
    power, _, _, image = axis.specgram(
        heard + faint, NFFT=512, Fs=16000, noverlap=384, cmap="magma"
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
    from PIL import Image

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
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=100, metadata={"Software": None})
    plt.close(figure)
    Image.open(drawn).convert("RGB").quantize(COLOURS).save(path, optimize=True)
