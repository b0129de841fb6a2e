"""From features to audio: the latent, then the vocoder in windows.

A window brings the vocoder's receptive field as context on both sides, so the result is
what decoding the whole segment at once would give, in bounded memory. All are as long as
the engine lets them be, the last one only as long as needed, in the engine's steps.
Segments of one length share the networks' calls, and neighbouring windows of one length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from operator import attrgetter

import numpy as np

from rvc_mlx import pitch
from rvc_mlx.arrays import Array, array_module, neighbours, to_host, together
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


def sharing_draws() -> Draw:
    """Noise for pieces that are computed together; what several draw is made once."""
    return cache(lambda noise, name, *key: noise.normal(name, *key)[None])


def sample_latents(voice: Voice, features: Array, pieces: Sequence[Piece]) -> Array:
    """Text encoder, prior sample and inverse flow of segments.

    Args:
        voice: the voice.
        features: ``[B, T, feature_size]`` float32, 100 frames per second.
        pieces: ``B`` segments of ``T`` frames.

    Returns:
        ``[B, T, inter_channels]`` float32, where the engine made it.
    """
    T, width, draw = features.shape[1], voice.config.inter_channels, sharing_draws()
    noise = [piece.drawing(draw)("prior", 0, T, 1, width) for piece in pieces]
    inputs = [features, together(noise), together([p.speaker for p in pieces])]
    if voice.config.f0:
        inputs.append(np.stack([pitch.quantize_f0(_f0(piece)) for piece in pieces]))
    return voice.prior.start(*inputs)


def _f0(piece: Piece) -> np.ndarray:
    assert piece.f0 is not None
    return piece.f0


@dataclass(frozen=True)
class _Window:
    """Frames of a piece that are decoded at once, and how many of them are kept."""

    piece: Piece
    z: Array  # [T, C] of the whole segment
    oscillator: Oscillator | None
    first: int  # that is kept; the context begins before it
    length: int
    kept: int


@dataclass(frozen=True)
class Windows:
    """Windows under way: ``audio`` ``[B, n]`` may still be computing."""

    voice: Voice
    windows: Sequence[_Window]
    audio: Array

    def ended(self) -> Iterator[Piece]:
        """Pieces whose last window is among these."""
        for window in self.windows:
            if window.first + window.kept == window.piece.segment.last:
                yield window.piece

    def read(self, report: Report) -> Iterator[tuple[Piece, np.ndarray]]:
        """Each window's piece and its audio ``[n]`` float32, at the voice's rate."""
        with report.stage("vocoder"):
            audio = to_host(self.audio)
        U, context = self.voice.config.samples_per_frame, self.voice.context
        for window, row in zip(self.windows, audio, strict=True):
            yield window.piece, row[context * U : (context + window.kept) * U]


def start_windows(
    voice: Voice, z: Array, pieces: Sequence[Piece], report: Report
) -> Iterator[Windows]:
    """Begin to decode the kept frames of segments, window by window, in order.

    Args:
        voice: the voice.
        z: latents ``[B, T, inter_channels]`` float32 of whole segments.
        pieces: ``B`` segments.
        report: takes the time of the stages.

    Yields:
        Neighbouring windows; a piece's have ``(last - first) * U`` samples in all.
    """
    planned = (
        w for zi, piece in zip(z, pieces, strict=True) for w in _plan(voice, zi, piece)
    )
    length = attrgetter("length")
    for batch in neighbours(planned, length, length, voice.batch_frames):
        inputs = [
            together(
                [_cut(w.z, w.first - voice.context, w.length)[None] for w in batch]
            ),
            together([w.piece.speaker for w in batch]),
        ]
        with report.stage("source"):
            inputs += _excitation(voice, batch)
        with report.stage("vocoder"):
            audio = voice.vocoder.start(*inputs)
        yield Windows(voice, batch, audio)


def _plan(voice: Voice, z: Array, piece: Piece) -> Iterator[_Window]:
    segment, oscillator = piece.segment, None
    if voice.config.f0:
        oscillator = Oscillator(voice, _f0(piece), piece)
    first = segment.first
    while first < segment.last:
        length = voice.window_frames(segment.last - first)
        kept = min(length - 2 * voice.context, segment.last - first)
        yield _Window(piece, z, oscillator, first, length, kept)
        first += kept


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


def _excitation(voice: Voice, windows: Sequence[_Window]) -> list[Array]:
    """Vocoder inputs after the speaker: nothing, or the source and a stage's noises."""
    if voice.source is None:
        return []
    U, draw, rows = voice.config.samples_per_frame, sharing_draws(), []
    margin = voice.source_context
    for window in windows:
        assert window.oscillator is not None
        start = window.first - voice.context - margin
        length = window.length + 2 * margin
        noise = window.piece.drawing(draw)(
            "source", start, start + length, U, voice.harmonics
        )
        rows.append([*window.oscillator.inputs(start, length), noise])
    source = voice.source.start(*map(together, zip(*rows, strict=True)))
    stages = range(len(voice.noise_shapes))
    return [source, *(_stage_noise(voice, windows, draw, i) for i in stages)]


def _stage_noise(
    voice: Voice, windows: Sequence[_Window], draw: Draw, stage: int
) -> Array:
    """Noises of a stage's six places side by side, ``[B, rows, 6 * channels]``."""
    rows = []
    for window in windows:
        start = window.first - voice.context
        shape = (start, start + window.length, *voice.noise_shapes[stage])
        drawn = window.piece.drawing(draw)
        parts = [
            drawn(f"adain.{stage}.{branch}.{place}", *shape)
            for branch in range(3)
            for place in (0, 2)
        ]
        rows.append(array_module(parts[0]).concatenate(parts, axis=2))
    return together(rows)
