"""One conversion under way: the steps between a spooled recording and its output."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from rvc_mlx import pitch
from rvc_mlx.arrays import Array, array_module, one_ahead, to_host
from rvc_mlx.audio import SAMPLE_RATE, high_pass_spool, resample_blocks
from rvc_mlx.decoding import decode, sample_latent
from rvc_mlx.loading import Encoder, PitchNet, Voice
from rvc_mlx.loudness import (
    Envelope,
    LoudnessMatch,
    SilenceGate,
    limit_gain,
    normalize_gain,
    peak,
    rms_points,
)
from rvc_mlx.machine import in_parallel
from rvc_mlx.noise import Noise
from rvc_mlx.options import ConversionOptions
from rvc_mlx.report import Report
from rvc_mlx.retrieval import Index, blend_features
from rvc_mlx.segments import FRAME, Segment, pad_frames, plan_segments
from rvc_mlx.spool import BLOCK, Spool

MIN_SAMPLES = 160  # shortest recording at 16 kHz: 10 ms

Progress = Callable[[float, float], None]


@dataclass(frozen=True)
class Nets:
    """What a conversion runs on; see ``VoiceConverter``."""

    voice: Voice
    encoder: Encoder
    pitch_net: PitchNet | None
    index: Index | None
    noise: Callable[[int], Noise] = Noise


class Job:
    """One conversion under way."""

    def __init__(
        self,
        nets: Nets,
        source: Spool,
        source_frames: int,
        source_rate: int,
        options: ConversionOptions,
        noise: Noise | None,
        f0: np.ndarray | None,
        report: Report | None = None,
    ):
        voice = nets.voice
        if len(source) < MIN_SAMPLES:
            raise ValueError(
                f"the recording is {1000 * source_frames / source_rate:.1f} ms long; "
                "expected 10 ms or more"
            )
        _check_options(voice, options)
        _check_f0(voice, f0, len(source) // FRAME + 2 * pad_frames(options))
        self.nets, self.voice, self.options = nets, voice, options
        self.source = source
        self.noise = noise or nets.noise(options.seed)
        self.given_f0 = f0
        self.report = report or Report()
        self.output_rate = options.output_rate or voice.config.sample_rate
        self.target = round(source_frames * self.output_rate / source_rate)
        self.speaker = voice.speakers[options.speaker][None, None]

    def run(self, progress: Progress | None = None) -> Iterator[np.ndarray]:
        """Blocks of the result, from its first sample on."""
        finished, gain = self._finished(progress)
        with finished:
            for block in finished.blocks():
                yield block if gain == 1 else gain * block

    def whole(self) -> np.ndarray:
        """The result in one piece."""
        finished, gain = self._finished(None)
        audio = finished.take()
        if gain != 1:
            audio *= gain
        return audio

    def _finished(self, progress: Progress | None) -> tuple[Spool, np.float32]:
        """The result before its limiter, and the gain of that."""
        with self.report.stage("prepare"):
            gain = normalize_gain(peak(self.source.blocks()))
            filtered = high_pass_spool(self.source, gain=gain)
        with filtered, ExitStack() as stack:
            with self.report.stage("prepare"):
                segments = plan_segments(filtered, self.options)
                if all(segment.last <= segment.first for segment in segments):
                    raise ValueError(
                        "the recording is so short that the original gives nothing for "
                        "it; expected 25 ms or more with reference_lengths"
                    )
            encoded = one_ahead(self._encoded(filtered, segments))
            first = next(encoded)  # a device computes it beside the host's part of F0
            gate = None if self.options.reference_lengths else SilenceGate(self.source)
            with self.report.stage("pitch"):
                f0 = self._f0(filtered, segments)
            blocks = self._converted(segments, itertools.chain([first], encoded), f0)
            if progress:
                blocks = self._observed(blocks, progress)
            if self.options.volume_envelope != 1:
                blocks = self._matched(blocks, filtered)
            finished = stack.enter_context(self.source.like(expected=self.target))
            loudest = 0.0
            with self.report.stage("finish"):
                for block in self._fitted(blocks, gate):
                    finished.append(block)
                    loudest = max(loudest, peak([block]))
            if progress:
                total = len(self.source) / SAMPLE_RATE
                progress(total, total)
            stack.pop_all()  # the caller's from now on
            return finished, np.float32(limit_gain(loudest))

    def _observed(
        self, blocks: Iterator[np.ndarray], progress: Progress
    ) -> Iterator[np.ndarray]:
        """The same blocks at the voice's rate, each told to ``progress`` first."""
        done, total = 0, len(self.source) / SAMPLE_RATE
        for block in blocks:
            done += len(block)
            progress(min(done / self.voice.config.sample_rate, total), total)
            yield block

    def _f0(self, filtered: Spool, segments: Sequence[Segment]) -> np.ndarray | None:
        """Shifted F0 ``[T]`` of the padded recording in Hz; None without F0."""
        net = self.nets.pitch_net
        if net is None:
            return None
        options = self.options
        pad = pad_frames(options) * FRAME
        length = segments[-1].start + segments[-1].samples
        if self.given_f0 is not None:
            f0 = np.pad(
                self.given_f0, (0, max(0, length // FRAME + 1 - len(self.given_f0)))
            )
        else:
            f0 = pitch.estimate_f0(
                net.salience.start,
                lambda start, stop: filtered.read_reflected(start - pad, stop - pad),
                length,
                net.config.n_mels,
                options.f0_threshold,
                net.frames_multiple,
                options.mel_padding,
            )
        return self._changed_f0(f0)

    def _changed_f0(self, f0: np.ndarray) -> np.ndarray:
        """Apply autotune, proposal, shift and pitch file, in this order."""
        options = self.options
        shift = options.pitch
        if options.f0_autotune:
            f0 = pitch.autotune_f0(f0, options.f0_autotune_strength)
        if options.proposed_pitch:
            shift += pitch.propose_shift(f0, options.proposed_pitch_threshold)
        f0 = pitch.shift_f0(f0, shift)
        if options.f0_file:
            points = pitch.read_f0_file(options.f0_file)
            f0 = pitch.overlay_f0(f0, points, pad_frames(options))
        return f0

    def _encoded(self, filtered: Spool, segments: Sequence[Segment]) -> Iterator[Array]:
        """Content features ``[F, C]`` of each segment."""
        for segment in segments:
            start = segment.start - pad_frames(self.options) * FRAME
            audio = filtered.read_reflected(start, start + segment.samples)
            with self.report.stage("content"):
                features = self.nets.encoder.start(audio, self.voice.config.version)
            yield features

    def _converted(
        self,
        segments: Sequence[Segment],
        encoded: Iterable[Array],
        f0: np.ndarray | None,
    ) -> Iterator[np.ndarray]:
        """Blocks of the segments' output at the voice's rate."""
        for segment, raw in zip(segments, encoded, strict=True):
            yield from self._convert_segment(segment, raw, f0)

    def _convert_segment(
        self, segment: Segment, raw: Array, f0: np.ndarray | None
    ) -> Iterator[np.ndarray]:
        """Blocks of the segment's output at the voice's rate."""
        frames = segment.frames
        if f0 is not None:
            first = segment.start // FRAME
            f0 = f0[first : first + frames]
        with self.report.stage("index"):
            features = self._features(raw, f0, frames)
        with self.report.stage("prior"):
            z = sample_latent(
                self.voice, features, f0, self.speaker, segment, self.noise
            )
        return decode(self.voice, z, f0, self.speaker, segment, self.noise, self.report)

    def _features(self, raw: Array, f0: np.ndarray | None, frames: int) -> Array:
        """Retrieval, doubling to 100 frames per second, and protection of consonants."""
        options, index = self.options, self.nets.index
        if index is None or options.index_rate == 0:
            doubled: Array = array_module(raw).repeat(raw, 2, axis=0)[:frames]
            return doubled
        raw = to_host(raw)
        doubled = raw.repeat(2, axis=0)[:frames]
        blended = blend_features(
            raw, index, options.index_rate, exact=options.index_exact
        )
        blended = blended.repeat(2, axis=0)[:frames]
        if f0 is None or options.protect >= 0.5:
            return blended
        share = np.where(f0 < 1, options.protect, 1.0).astype(np.float32)[:, None]
        return share * blended + (1 - share) * doubled

    def _matched(
        self, blocks: Iterable[np.ndarray], filtered: Spool
    ) -> Iterator[np.ndarray]:
        """The blocks with the recording's loudness, which needs all of them first."""
        points = rms_points(filtered.blocks(), SAMPLE_RATE // 2)
        envelope = Envelope(self.voice.config.sample_rate // 2)
        with self.source.like() as raw:
            for block in blocks:
                raw.append(block)
                envelope.add(block)
            match = LoudnessMatch(
                points, envelope.points(), len(raw), self.options.volume_envelope
            )
            yield from in_parallel(
                lambda start: match.apply(
                    raw.read(start, min(start + BLOCK, len(raw))), start
                ),
                range(0, len(raw), BLOCK),
            )

    def _fitted(
        self, blocks: Iterator[np.ndarray], gate: SilenceGate | None
    ) -> Iterator[np.ndarray]:
        """The blocks with silence where it was, at the output's rate and length."""
        rate = self.voice.config.sample_rate
        if gate:
            blocks = _gated(blocks, gate, rate)
        blocks = resample_blocks(blocks, rate, self.output_rate)
        return blocks if self.options.reference_lengths else _cut(blocks, self.target)


def _check_options(voice: Voice, options: ConversionOptions) -> None:
    """Raise for options that this voice cannot follow."""
    speakers = len(voice.speakers)
    if options.speaker >= speakers:
        raise ValueError(
            f"speaker {options.speaker} was asked for, but {voice.path} has speakers "
            f"0 to {speakers - 1}"
        )
    needed = (voice.context + voice.source_context) / 100
    if options.x_pad < needed:
        raise ValueError(
            f"x_pad is {options.x_pad} s; this voice's vocoder needs {needed} s or more"
        )
    defaults = ConversionOptions()
    pitch_options = ("pitch", "f0_file", "f0_autotune", "proposed_pitch")
    given = [
        name
        for name in pitch_options
        if getattr(options, name) != getattr(defaults, name)
    ]
    if given and not voice.config.f0:
        raise ValueError(
            f"{voice.path}: this voice has no pitch input, so {', '.join(given)} cannot "
            "work; leave it out"
        )


def _check_f0(voice: Voice, f0: np.ndarray | None, frames: int) -> None:
    """Raise for a given F0 that this voice cannot take or that is too short."""
    if f0 is None:
        return
    if not voice.config.f0:
        raise ValueError(f"{voice.path}: this voice has no pitch input; leave out f0")
    if f0.ndim != 1 or len(f0) < frames:
        raise ValueError(
            f"f0 has shape {f0.shape}; expected [{frames}] or more: one value per 10 ms "
            "of the recording and of x_pad seconds before and after it"
        )
    if not (np.isfinite(f0) & (f0 >= 0)).all():
        raise ValueError("f0 holds values that are not 0 Hz (unvoiced) or more")


def _gated(
    blocks: Iterator[np.ndarray], gate: SilenceGate, rate: int
) -> Iterator[np.ndarray]:
    position = 0
    for block in blocks:
        yield gate.apply(block, position, rate)
        position += len(block)


def _cut(blocks: Iterator[np.ndarray], total: int) -> Iterator[np.ndarray]:
    """Exactly ``total`` samples."""
    left = total
    for block in blocks:
        yield block[:left]
        left -= len(block[:left])
        if left == 0:
            return
    yield np.zeros(left, np.float32)
