"""From features to audio: the latent, then the vocoder in windows.

A window brings the vocoder's receptive field as context on both sides, so the result is
what decoding the whole segment at once would give, in bounded memory. All are as long as
the engine lets them be, the last one only as long as needed, in the engine's steps.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rvc_mlx import pitch
from rvc_mlx.arrays import Array, array_module, one_ahead, to_host
from rvc_mlx.loading import Voice
from rvc_mlx.noise import Noise
from rvc_mlx.report import Report
from rvc_mlx.segments import Segment


def sample_latent(
    voice: Voice,
    features: Array,
    f0: np.ndarray | None,
    speaker: np.ndarray,
    segment: Segment,
    noise: Noise,
) -> Array:
    """Text encoder, prior sample and inverse flow of a segment.

    Args:
        voice: the voice.
        features: ``[T, feature_size]`` float32, 100 frames per second.
        f0: ``[T]`` in Hz, None for a voice without F0.
        speaker: embedding ``[1, 1, gin_channels]`` float32.
        segment: its number is part of the noise's key.
        noise: source of the prior's noise.

    Returns:
        ``[1, T, inter_channels]`` float32, where the engine made it.
    """
    T, width = len(features), voice.config.inter_channels
    draw = noise.normal("prior", segment.number, 0, T, 1, width)
    inputs = [features[None], draw[None], speaker]
    if f0 is not None:
        inputs.append(pitch.quantize_f0(f0)[None])
    return voice.prior.start(*inputs)


def decode(
    voice: Voice,
    z: Array,
    f0: np.ndarray | None,
    speaker: np.ndarray,
    segment: Segment,
    noise: Noise,
    report: Report,
) -> Iterator[np.ndarray]:
    """Decode the kept frames of a segment; a window is begun before the last is read.

    Args:
        voice: the voice.
        z: latent ``[1, T, inter_channels]`` float32 of the whole segment.
        f0: ``[T]`` in Hz, None for a voice without F0.
        speaker: embedding ``[1, 1, gin_channels]`` float32.
        segment: which frames are kept; its number is part of the noise's key.
        noise: source of the excitation's noise.
        report: takes the time of the stages, and the places of the joins.

    Yields:
        Audio ``[n]`` float32 at the voice's rate, ``(last - first) * U`` samples in all.
    """
    for audio in one_ahead(_windows(voice, z, f0, speaker, segment, noise, report)):
        with report.stage("vocoder"):
            block = to_host(audio)
        yield block


def _windows(
    voice: Voice,
    z: Array,
    f0: np.ndarray | None,
    speaker: np.ndarray,
    segment: Segment,
    noise: Noise,
    report: Report,
) -> Iterator[Array]:
    """Audio ``[n]`` of the windows, where the engine computes it; see ``decode``."""
    U = voice.config.samples_per_frame
    most, step = voice.window - 2 * voice.context, voice.window_step
    oscillator = None if f0 is None else Oscillator(voice, f0, noise, segment.number)
    first = segment.first
    while first < segment.last:
        place = segment.start // pitch.FRAME_LENGTH + first - segment.first
        if place:
            report.joins.append(place / pitch.FRAME_RATE)
        core = min(most, -(-(segment.last - first) // step) * step)
        start, length = first - voice.context, core + 2 * voice.context
        inputs = [_window(z[0], start, length)[None], speaker]
        if oscillator:
            with report.stage("source"):
                inputs += oscillator.window(start, length)
        count = min(core, segment.last - first)
        first += count
        with report.stage("vocoder"):
            audio = voice.vocoder.start(*inputs)[0]
            audio = audio[voice.context * U : (voice.context + count) * U]
        yield audio


def _window(frames: Array, start: int, length: int) -> Array:
    """Frames ``start..start + length`` of ``[T, C]``, zeros beyond the end."""
    piece = frames[start : start + length]
    missing = length - piece.shape[0]
    return array_module(piece).pad(piece, ((0, missing), (0, 0))) if missing else piece


class Oscillator:
    """Excitation and noises of any window of a segment."""

    def __init__(self, voice: Voice, f0: np.ndarray, noise: Noise, segment: int):
        U = voice.config.samples_per_frame
        cycles = pitch.sample_cycles(f0, U, voice.glides)
        self._start = pitch.frame_phases(cycles)
        self._cycles = cycles[:, : U if voice.glides else 1].astype(np.float32)
        offset = noise.uniform("phase", segment, voice.harmonics)
        offset[0] = 0  # the fundamental starts at phase 0
        self._offset = offset[None, None]
        self._voice, self._noise, self._segment = voice, noise, segment

    def window(self, start: int, frames: int) -> list[Array]:
        """Vocoder inputs after the speaker, for a window from frame ``start``."""
        voice, U = self._voice, self._voice.config.samples_per_frame
        assert voice.source is not None
        begin = start - voice.source_context
        length = frames + 2 * voice.source_context
        noise = self._noise.normal(
            "source", self._segment, begin, begin + length, U, voice.harmonics
        )
        source = voice.source.start(
            _window(self._cycles, begin, length)[None],
            _window(self._start, begin, length)[None],
            self._offset,
            noise[None],
        )
        return [
            source,
            *(
                self._stage_noise(start, frames, i)
                for i in range(len(voice.noise_shapes))
            ),
        ]

    def _stage_noise(self, start: int, frames: int, stage: int) -> Array:
        per_frame, channels = self._voice.noise_shapes[stage]
        stop = start + frames
        parts = [
            self._noise.normal(
                f"adain.{stage}.{branch}.{place}",
                self._segment,
                start,
                stop,
                per_frame,
                channels,
            )
            for branch in range(3)
            for place in (0, 2)
        ]
        joined: Array = array_module(parts[0]).concatenate(parts, axis=1)[None]
        return joined
