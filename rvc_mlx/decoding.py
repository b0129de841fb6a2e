"""From features to audio: the latent, then the vocoder in windows.

A window brings the vocoder's receptive field as context on both sides, so the result is
what decoding the whole segment at once would give, in bounded memory. All are as long as
the engine lets them be, the last one only as long as needed, in the engine's steps, or,
where a segment goes alone on a GPU, of a length that follows the other networks'.
Segments of one length share the networks' calls, and neighbouring windows of one length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from typing import Any

import numpy as np

from rvc_mlx import pitch
from rvc_mlx.arrays import Array, array_module, begin, neighbours, to_host, together
from rvc_mlx.loading import Voice
from rvc_mlx.noise import Noise
from rvc_mlx.report import Report
from rvc_mlx.segments import Segment

Draw = Callable[..., Array]


@dataclass(frozen=True)
class Piece:
    """A segment, and what its conversion draws on.

    Attributes:
        segment: its number is part of the noise's key.
        f0: ``[T]`` in Hz, None for a voice without F0.
        speaker: embedding ``[1, 1, gin_channels]`` float32.
        noise: where randomness comes from.
        owner: whose it is.
    """

    segment: Segment
    f0: np.ndarray | None
    speaker: np.ndarray
    noise: Noise
    owner: object = None

    def drawing(self, draw: Draw) -> Draw:
        """``draw`` for this segment: ``[1, rows, channels]`` of a name and a range."""
        return lambda name, *shape: draw(self.noise, name, self.segment.number, *shape)


@dataclass(frozen=True)
class Cut:
    """Frames of a segment that are decoded at once, and how many of them are kept."""

    first: int  # that is kept; the context begins before it
    length: int
    kept: int


class Plan:
    """Where the vocoder cuts segments, and noise for them: neither depends on a network.

    Args:
        voice: the voice.
        segments: that are computed together, each with where its randomness comes from.
    """

    def __init__(self, voice: Voice, segments: Sequence[tuple[Segment, Noise]]):
        self._voice, self._segments = voice, segments
        alone = len(segments) == 1
        self.cuts = [list(_cuts(voice, segment, alone)) for segment, _ in segments]
        self._drawn: dict[tuple[Any, ...], Array] = {}

    def draw(self) -> None:
        """Begin to draw what the prior and the source will ask for."""
        voice = self._voice
        for (segment, noise), cuts in zip(self._segments, self.cuts, strict=True):
            asked = [("prior", *_prior_noise(voice, segment.frames))]
            if voice.source is not None:
                asked += [("source", *_source_noise(voice, cut)) for cut in cuts]
            for name, *shape in asked:
                key = (noise, name, segment.number, *shape)
                if key not in self._drawn:
                    self._drawn[key] = noise.normal(name, segment.number, *shape)[None]
        begin(*self._drawn.values())

    def sharing_draws(self) -> Draw:
        """Noise for segments that are computed together; what several draw is made once."""

        def drawn(*key: Any) -> Array:
            noise, name, *which = key
            # From here on the cache holds it, as long as it serves.
            known = self._drawn.pop(key, None)
            return noise.normal(name, *which)[None] if known is None else known

        return cache(drawn)


def plan_of(voice: Voice, pieces: Sequence[Piece]) -> Plan:
    """A plan for pieces."""
    return Plan(voice, [(piece.segment, piece.noise) for piece in pieces])


def _cuts(voice: Voice, segment: Segment, alone: bool) -> Iterator[Cut]:
    first = segment.first
    around = segment.frames - (segment.last - segment.first)
    while first < segment.last:
        left = segment.last - first
        length = voice.plan_window(left, around) if alone else voice.window_frames(left)
        kept = min(length - 2 * voice.context, left)
        yield Cut(first, length, kept)
        first += kept


def _prior_noise(voice: Voice, frames: int) -> tuple[int, int, int, int]:
    """First and last frame, rows of a frame and channels."""
    return 0, frames, 1, voice.config.inter_channels


def _source_noise(voice: Voice, cut: Cut) -> tuple[int, int, int, int]:
    """Likewise; the source begins before a window, and ends behind it."""
    start = cut.first - voice.context - voice.source_context
    stop = start + cut.length + 2 * voice.source_context
    return start, stop, voice.config.samples_per_frame, voice.harmonics


def sample_latents(
    voice: Voice, features: Array, pieces: Sequence[Piece], plan: Plan
) -> Array:
    """Text encoder, prior sample and inverse flow of segments.

    Args:
        voice: the voice.
        features: ``[B, T, feature_size]`` float32, 100 frames per second.
        pieces: ``B`` segments of ``T`` frames.
        plan: for them.

    Returns:
        ``[B, T, inter_channels]`` float32, where the engine made it.
    """
    draw, shape = plan.sharing_draws(), _prior_noise(voice, features.shape[1])
    noise = [piece.drawing(draw)("prior", *shape) for piece in pieces]
    inputs = [features, together(noise), together([p.speaker for p in pieces])]
    if voice.config.f0:
        inputs.append(np.stack([pitch.quantize_f0(_f0(piece)) for piece in pieces]))
    return voice.prior.start(*inputs)


def _f0(piece: Piece) -> np.ndarray:
    assert piece.f0 is not None
    return piece.f0


@dataclass(frozen=True)
class _Window:
    """A cut of a piece."""

    piece: Piece
    row: int  # of the piece, among those that are computed together
    oscillator: Oscillator | None
    cut: Cut


@dataclass(frozen=True)
class Windows:
    """Windows under way: ``audio`` ``[B, n]`` may still be computing."""

    voice: Voice
    windows: Sequence[_Window]
    audio: Array

    def ended(self) -> Iterator[Piece]:
        """Pieces whose last window is among these."""
        for window in self.windows:
            if window.cut.first + window.cut.kept == window.piece.segment.last:
                yield window.piece

    def read(self, report: Report) -> Iterator[tuple[Piece, np.ndarray]]:
        """Each window's piece and its audio ``[n]`` float32, at the voice's rate."""
        with report.stage("vocoder"):
            audio = to_host(self.audio)
        U, context = self.voice.config.samples_per_frame, self.voice.context
        for window, row in zip(self.windows, audio, strict=True):
            yield window.piece, row[context * U : (context + window.cut.kept) * U]


def start_windows(
    voice: Voice,
    latents: Callable[[], Array],
    pieces: Sequence[Piece],
    plan: Plan,
    report: Report,
) -> Iterator[Windows]:
    """Begin to decode the kept frames of segments, window by window, in order.

    Args:
        voice: the voice.
        latents: begins those of whole segments, ``[B, T, inter_channels]`` float32; asked
            once, when the first source is begun, which wants nothing of them.
        pieces: ``B`` segments.
        plan: for them.
        report: takes the time of the stages.

    Yields:
        Neighbouring windows; a piece's have ``(last - first) * U`` samples in all.
    """
    planned = (
        window
        for row, (piece, cuts) in enumerate(zip(pieces, plan.cuts, strict=True))
        for window in _windows(voice, piece, row, cuts)
    )
    length, z = attrgetter("cut.length"), None
    for batch in neighbours(planned, length, length, voice.batch_frames):
        with report.stage("source"):
            excitation = _excitation(voice, batch, plan)
        z = latents() if z is None else z
        frames = [_frames(voice, z[window.row], window.cut)[None] for window in batch]
        speakers = together([window.piece.speaker for window in batch])
        with report.stage("vocoder"):
            audio = voice.vocoder.start(together(frames), speakers, *excitation)
        yield Windows(voice, batch, audio)


def _windows(
    voice: Voice, piece: Piece, row: int, cuts: Sequence[Cut]
) -> Iterator[_Window]:
    oscillator = None
    if voice.config.f0:
        oscillator = Oscillator(voice, _f0(piece), piece)
    for cut in cuts:
        yield _Window(piece, row, oscillator, cut)


def _frames(voice: Voice, z: Array, cut: Cut) -> Array:
    """What a window takes of a segment's latent ``[T, C]``."""
    return _cut(z, cut.first - voice.context, cut.length)


def _cut(frames: Array, start: int, length: int) -> Array:
    """Frames ``start..start + length`` of ``[T, C]``, zeros beyond the end."""
    piece = frames[start : start + length]
    missing = length - piece.shape[0]
    return array_module(piece).pad(piece, ((0, missing), (0, 0))) if missing else piece


class Oscillator:
    """Excitation of any window of a segment, before its network."""

    def __init__(self, voice: Voice, f0: np.ndarray, piece: Piece):
        U = voice.config.samples_per_frame
        cycles = pitch.sample_cycles(f0, U, voice.glides)
        self._start = pitch.frame_phases(cycles)
        self._cycles = cycles[:, : U if voice.glides else 1].astype(np.float32)
        offset = piece.noise.uniform("phase", piece.segment.number, voice.harmonics)
        offset[0] = 0  # the fundamental starts at phase 0
        self._offset = offset[None, None]

    def inputs(self, start: int, length: int) -> list[Array]:
        """Cycles, phases and phase offset of frames ``start..start + length``."""
        cycles, phases = (
            _cut(values, start, length)[None] for values in (self._cycles, self._start)
        )
        return [cycles, phases, self._offset]


def _excitation(voice: Voice, windows: Sequence[_Window], plan: Plan) -> list[Array]:
    """Vocoder inputs after the speaker: nothing, or the source and a stage's noises."""
    if voice.source is None:
        return []
    draw, rows = plan.sharing_draws(), []
    for window in windows:
        assert window.oscillator is not None
        start, stop, *shape = _source_noise(voice, window.cut)
        noise = window.piece.drawing(draw)("source", start, stop, *shape)
        rows.append([*window.oscillator.inputs(start, stop - start), noise])
    source = voice.source.start(*map(together, zip(*rows, strict=True)))
    stages = range(len(voice.noise_shapes))
    return [source, *(_stage_noise(voice, windows, draw, i) for i in stages)]


def _stage_noise(
    voice: Voice, windows: Sequence[_Window], draw: Draw, stage: int
) -> Array:
    """Noises of a stage's six places side by side, ``[B, rows, 6 * channels]``."""
    rows = []
    for window in windows:
        start = window.cut.first - voice.context
        shape = (start, start + window.cut.length, *voice.noise_shapes[stage])
        drawn = window.piece.drawing(draw)
        parts = [
            drawn(f"adain.{stage}.{branch}.{place}", *shape)
            for branch in range(3)
            for place in (0, 2)
        ]
        rows.append(array_module(parts[0]).concatenate(parts, axis=2))
    return together(rows)
