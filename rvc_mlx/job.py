"""One recording on its way: the steps before, between and after the networks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rvc_mlx import pitch
from rvc_mlx.arrays import Excerpt
from rvc_mlx.audio import SAMPLE_RATE, HighPass, high_pass_spools, resample_blocks
from rvc_mlx.decoding import Piece
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
from rvc_mlx.retrieval import Blend
from rvc_mlx.segments import FRAME, Segment, pad_frames, plan_segments
from rvc_mlx.spool import BLOCK, Spool

_WAITING = 8 << 20  # bytes at most of a result that waits to be finished beside others
MIN_SAMPLES = 160  # shortest recording at 16 kHz: 10 ms

Progress = Callable[[float, float], None]


@dataclass(frozen=True)
class Nets:
    """What a conversion runs on; see ``VoiceConverter``.

    Attributes:
        blend: retrieval, None without an index.
        noise: a seed to its random numbers.
        high_pass: what takes away the lowest sounds before the networks hear recordings.
    """

    voice: Voice
    encoder: Encoder
    pitch_net: PitchNet | None
    blend: Blend | None
    noise: Callable[[int], Noise] = Noise
    high_pass: HighPass = high_pass_spools


def prepare_all(nets: Nets, jobs: Sequence[Job]) -> None:
    """Filter recordings together and plan their segments; see ``Job.failure``."""
    try:
        gains = [job.gain for job in jobs]
        recordings = nets.high_pass([job.source for job in jobs], gains)
    except (ValueError, OSError) as error:
        if len(jobs) == 1:
            jobs[0].failure = error
            return
        for job in jobs:  # only one of them, as a rule
            prepare_all(nets, [job])
        return
    for job, filtered in zip(jobs, recordings, strict=True):
        job.plan(filtered)


class Job:
    """One recording on its way: what is done to it between the networks.

    Attributes:
        options: how it is converted.
        length: samples at 16 kHz that the networks hear, about.
        segments: once it is prepared.
        f0: shifted F0 ``[T]`` of the padded recording in Hz, once it is known; None for
            a voice without F0.
        joins: where windows or segments met so far in its output, seconds from its start.
        failure: what went wrong while it was prepared.
    """

    def __init__(
        self,
        nets: Nets,
        source: Spool,
        source_frames: int,
        source_rate: int,
        options: ConversionOptions,
        noise: Noise | None = None,
        f0: np.ndarray | None = None,
    ):
        voice = nets.voice
        if len(source) < MIN_SAMPLES:
            raise ValueError(
                f"the recording is {1000 * source_frames / source_rate:.1f} ms long; "
                "expected 10 ms or more"
            )
        _check_options(voice, options)
        self._pad = pad_frames(options)
        _check_f0(voice, f0, len(source) // FRAME + 2 * self._pad)
        self.voice, self.options = voice, options
        self.source = source
        self.length = len(source) + 2 * self._pad * FRAME
        self.noise = noise or nets.noise(options.seed)
        self.given_f0 = f0
        self.output_rate = options.output_rate or voice.config.sample_rate
        self.target = round(source_frames * self.output_rate / source_rate)
        self.speaker = voice.speakers[options.speaker][None, None]
        self.segments: list[Segment] = []
        self.f0: np.ndarray | None = None
        self.joins: list[float] = []
        self.failure: Exception | None = None

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Forget the recording."""
        self.source.close()
        if hasattr(self, "_filtered"):
            self._filtered.close()

    @property
    def gain(self) -> float:
        """What brings the recording to the level that the networks are used to."""
        return normalize_gain(peak(self.source.blocks()))

    def plan(self, filtered: Spool) -> None:
        """Plan the segments of the filtered recording; see ``failure``."""
        self._filtered = filtered
        try:
            self.segments = plan_segments(filtered, self.options)
            if all(segment.last <= segment.first for segment in self.segments):
                raise ValueError(
                    "the recording is so short that the original gives nothing for it; "
                    "expected 25 ms or more with reference_lengths"
                )
        except (ValueError, OSError) as error:
            self.failure = error

    @property
    def ends_aside(self) -> bool:
        """Whether another thread may finish it, once all its blocks are there.

        A long one needs its blocks one by one, and loudness is compared with what the
        networks heard: a thread that asks a device for that is given a stream, for good.
        """
        samples = len(self.source) * self.voice.config.sample_rate // SAMPLE_RATE
        short = samples * np.float32().nbytes <= _WAITING
        return short and self.options.volume_envelope == 1

    @cached_property
    def _gate(self) -> SilenceGate:
        return SilenceGate(self.source)

    def find_silence(self) -> None:
        """Find out where the recording is silent, which the result will be, too."""
        if self.options.reference_lengths or not len(self.source):  # nobody asks
            return
        with suppress(OSError):  # then ``whole`` and ``blocks`` raise it
            _ = self._gate

    @property
    def padded_length(self) -> int:
        """Samples at 16 kHz of the padded recording, once it is prepared."""
        return self.segments[-1].start + self.segments[-1].samples

    def heard(self, start: int, stop: int) -> Excerpt:
        """Samples of the padded recording at 16 kHz, where the filter left them."""
        pad = self._pad * FRAME
        return self._filtered.excerpt(start - pad, stop - pad)

    def heard_on_host(self, start: int, stop: int) -> np.ndarray:
        """As ``heard``, ``[stop - start]`` float32 on the host."""
        pad = self._pad * FRAME
        return self._filtered.read_reflected(start - pad, stop - pad)

    def take_f0(self, f0: np.ndarray) -> None:
        """Keep F0 ``[T]`` in Hz of the padded recording, with the changes asked for."""
        missing = self.padded_length // FRAME + 1 - len(f0)
        self.f0 = self._changed_f0(np.pad(f0, (0, max(0, missing))))

    def piece(self, segment: Segment) -> Piece:
        """A segment, ready for the voice."""
        f0 = self.f0
        if f0 is not None:
            first = segment.start // FRAME
            f0 = f0[first : first + segment.frames]
        return Piece(segment, f0, self.speaker, self.noise, self)

    def observed(
        self, raw: Iterator[np.ndarray], progress: Progress | None
    ) -> Iterator[np.ndarray]:
        """The segments' output as it is; keeps its joins.

        Args:
            raw: at the voice's rate.
            progress: called with seconds done and seconds in all.
        """
        done, rate = 0, self.voice.config.sample_rate
        total = len(self.source) / SAMPLE_RATE
        for block in raw:
            if done:
                self.joins.append(done / rate)
            done += len(block)
            if progress:
                progress(min(done / rate, total), total)
            yield block

    def blocks(self, raw: Iterator[np.ndarray], report: Report) -> Iterator[np.ndarray]:
        """Blocks of the result, from its first sample on.

        Args:
            raw: the segments' output at the voice's rate.
            report: takes the time of the stages.
        """
        finished, gain = self._finished(raw, report)
        with finished:
            for block in finished.blocks():
                yield block if gain == 1 else gain * block

    def whole(self, raw: Iterator[np.ndarray], report: Report) -> np.ndarray:
        """The result in one piece; see ``blocks``."""
        finished, gain = self._finished(raw, report)
        audio = finished.take()
        if gain != 1:
            audio *= gain
        return audio

    def _finished(
        self, raw: Iterator[np.ndarray], report: Report
    ) -> tuple[Spool, np.float32]:
        """The result before its limiter, and the gain of that."""
        if self.options.volume_envelope != 1:
            raw = self._matched(raw)
        finished = self.source.like(expected=self.target)
        loudest = 0.0
        try:
            with report.stage("finish"):
                for block in self._fitted(raw):
                    loudest = max(loudest, peak([finished.append(block)]))
        except BaseException:
            finished.close()
            raise
        return finished, np.float32(limit_gain(loudest))

    def _matched(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The blocks with the recording's loudness, which needs all of them first."""
        points = rms_points(self._filtered.blocks(), SAMPLE_RATE // 2)
        envelope = Envelope(self.voice.config.sample_rate // 2)
        with self.source.like() as raw:
            for block in blocks:
                envelope.add(raw.append(block))
            match = LoudnessMatch(
                points, envelope.points(), len(raw), self.options.volume_envelope
            )
            yield from in_parallel(
                lambda start: match.apply(
                    raw.read(start, min(start + BLOCK, len(raw))), start
                ),
                range(0, len(raw), BLOCK),
            )

    def _fitted(self, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """The blocks with silence where it was, at the output's rate and length."""
        rate = self.voice.config.sample_rate
        if self.options.reference_lengths:
            return resample_blocks(blocks, rate, self.output_rate)
        gated = _gated(blocks, self._gate, rate)
        return _cut(resample_blocks(gated, rate, self.output_rate), self.target)

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
