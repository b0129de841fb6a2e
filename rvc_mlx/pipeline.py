"""The conversion: one way from a recording to the same words in another voice.

Everything streams: the recording lies in a temporary file, segments go through the
networks one by one, and the steps that need the whole file (peak, high-pass, loudness,
limit) are passes over such files. An hour costs no more memory than five minutes.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rvc_mlx import pitch
from rvc_mlx.audio import SAMPLE_RATE, high_pass_spool, resample, resample_blocks
from rvc_mlx.audio_io import AudioReader, AudioWriter, load_spool
from rvc_mlx.download import cache_folder
from rvc_mlx.engine import choose_engine
from rvc_mlx.loading import (
    Encoder,
    Engine,
    PitchNet,
    Voice,
    find_weights,
    read_weights,
)
from rvc_mlx.loudness import (
    Envelope,
    SilenceGate,
    limit_gain,
    match_loudness_blocks,
    normalize_gain,
    peak,
    rms_points,
)
from rvc_mlx.noise import Noise
from rvc_mlx.options import ConversionOptions
from rvc_mlx.output_format import check_output
from rvc_mlx.retrieval import Index, blend_features, read_index
from rvc_mlx.spool import Spool

log = logging.getLogger("rvc_mlx")

FRAME = pitch.FRAME_LENGTH  # samples of 16 kHz audio per frame
MIN_SAMPLES = 160  # shortest recording at 16 kHz: 10 ms

Progress = Callable[[float, float], None]


class Conversion(NamedTuple):
    """A result.

    Attributes:
        audio: ``[m]`` float32 in -0.99..0.99, mono.
        sample_rate: Hz.
    """

    audio: np.ndarray
    sample_rate: int


@dataclass
class Report:
    """What a conversion did.

    Attributes:
        seconds: length of the recording.
        samples: samples written.
        sample_rate: of the result, Hz.
        stages: seconds spent per stage.
    """

    seconds: float = 0.0
    samples: int = 0
    sample_rate: int = 0
    stages: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time inside the block to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.stages[name] = self.stages.get(name, 0.0) + spent


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


def _pad_frames(options: ConversionOptions) -> int:
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
    cuts = []
    for middle in range(center, length, center):
        start, stop = middle - query, min(middle + query, length)
        half = FRAME // 2
        window = audio.read_reflected(start - half, stop + half).astype(np.float64)
        sums = np.cumsum(np.concatenate([[0.0], window]))
        quiet = np.abs(sums[FRAME:] - sums[:-FRAME])[: stop - start]
        cut = start + int(quiet.argmin())
        cuts.append(cut - cut % FRAME)
    return cuts


def plan_segments(audio: Spool, options: ConversionOptions) -> list[Segment]:
    """Cut a recording into segments with context.

    By default every frame of the recording has its frame of output; with
    ``reference_lengths`` segments are as long as the original's, whose features end
    up to two frames early.
    """
    length = len(audio)
    pad = _pad_frames(options)
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


class VoiceConverter:
    """A voice, an encoder and a pitch net, ready to convert; see ``load``.

    Attributes:
        voice: the voice.
        encoder: what hears the words.
        pitch_net: what hears the pitch; None for a voice without F0.
        index: features of the voice's training data, or None.
        device: what computes, in words.
        precision: ``"f32"``, ``"bf16"`` or ``"f16"``.
    """

    def __init__(
        self,
        voice: Voice,
        encoder: Encoder,
        pitch_net: PitchNet | None,
        index: Index | None = None,
        engine: Engine | None = None,
    ):
        width = encoder.config.feature_size(voice.config.version)
        if width != voice.config.feature_size:
            raise ValueError(
                f"{voice.path}: this voice wants {voice.config.feature_size}-wide "
                f"features ({voice.config.version}), but {encoder.path} gives {width}; "
                "pass the encoder it was trained with"
            )
        if index is not None and index.width != width:
            raise ValueError(
                f"{index.path}: this index holds {index.width}-wide "
                f"features, the voice uses {width}; pass the index made for it"
            )
        if voice.config.f0 and pitch_net is None:
            raise ValueError(
                f"{voice.path}: this voice needs pitch; pass an RMVPE file"
            )
        self.voice = voice
        self.encoder = encoder
        self.pitch_net = pitch_net if voice.config.f0 else None
        self.index = index
        self.device = engine.device if engine else ""
        self.precision = engine.precision if engine else ""

    @property
    def sample_rate(self) -> int:
        """Rate of the voice, Hz."""
        return self.voice.config.sample_rate

    def convert(
        self,
        audio: np.ndarray,
        sample_rate: int,
        options: ConversionOptions | None = None,
        *,
        noise: Noise | None = None,
        f0: np.ndarray | None = None,
    ) -> Conversion:
        """Convert a recording in memory.

        Args:
            audio: ``[n]`` or ``[n, channels]`` float in -1..1; channels are averaged.
            sample_rate: its rate, Hz.
            options: how; the defaults if None.
            noise: where randomness comes from; by default ``options.seed``.
            f0: pitch to use instead of the estimate: ``[T]`` Hz, 100 per second, of the
                recording padded by ``x_pad`` on both sides.

        Returns:
            ``round(n * rate_out / sample_rate)`` samples (fewer with
            ``reference_lengths``) and their rate.

        Raises:
            ValueError: empty, too short, NaN, or options that do not fit the voice.
        """
        options = options or ConversionOptions()
        audio = _as_mono(audio)
        with Spool() as source:
            source.append(resample(audio, sample_rate, SAMPLE_RATE))
            job = _Job(self, source, len(audio), sample_rate, options, noise, f0)
            blocks = list(job.run())
        return Conversion(np.concatenate(blocks), job.output_rate)

    def convert_file(
        self,
        source: str | Path,
        target: str | Path,
        options: ConversionOptions | None = None,
        *,
        subtype: str | None = None,
        progress: Progress | None = None,
    ) -> Report:
        """Convert a file to a file, streaming.

        Args:
            source: any sound file that can be read.
            target: wav, flac, mp3 or ogg; written whole or not at all.
            options: how; the defaults if None.
            subtype: ``"PCM_16"``, ``"PCM_24"`` or ``"FLOAT"``.
            progress: called with seconds done and seconds in all.

        Raises:
            ValueError: the recording, an option or the target does not fit.
            OSError: a file cannot be read or written.
        """
        options = options or ConversionOptions()
        rate = options.output_rate or self.sample_rate
        check_output(target, rate, subtype)
        report = Report(sample_rate=rate)
        with ExitStack() as stack:
            with report.stage("load"):
                reader = stack.enter_context(AudioReader(source))
                spool, frames = load_spool(reader)
                stack.enter_context(spool)
            job = _Job(
                self, spool, frames, reader.sample_rate, options, None, None, report
            )
            with AudioWriter(target, rate, subtype) as writer:
                for block in job.run(progress):
                    with report.stage("write"):
                        writer.write(block)
                report.samples = writer.frames
        report.seconds = frames / reader.sample_rate
        return report


def load(
    voice: str | Path,
    index: str | Path | None = None,
    *,
    encoder: str | Path | None = None,
    rmvpe: str | Path | None = None,
    device: str = "auto",
    precision: str = "auto",
) -> VoiceConverter:
    """Load a voice and what it needs.

    Args:
        voice: an RVC voice: ``.pth``, ``.safetensors`` or ``.npz``.
        index: its ``.index`` file, or None to convert without retrieval.
        encoder: content encoder; None finds the downloaded one that the voice names.
        rmvpe: pitch network; None finds the downloaded one.
        device: ``"auto"``, ``"gpu"``, ``"cpu"`` or ``"mlx-cpu"``.
        precision: ``"auto"``, ``"f32"``, ``"bf16"`` or ``"f16"``.

    Returns:
        A converter; ``convert`` and ``convert_file`` can be called any number of times.

    Raises:
        ValueError: a file is of another kind, files do not fit together, or device or
            precision are not to be had.
        OSError: a file is missing or cannot be read.
    """
    engine = choose_engine(device, precision, cache_folder() / "compiled")
    checkpoint = read_weights(voice, "voice")
    bound = Voice(checkpoint, engine)
    embedder = str(checkpoint.metadata.get("embedder_model") or "contentvec")
    encoder_path = encoder or find_weights("contentvec", embedder)
    net = None
    if bound.config.f0:
        path = rmvpe or find_weights("rmvpe", "rmvpe")
        net = PitchNet(read_weights(path, "rmvpe"), engine)
    return VoiceConverter(
        bound,
        Encoder(read_weights(encoder_path, "contentvec"), engine),
        net,
        None if index is None else read_index(index),
        engine,
    )


def _as_mono(audio: np.ndarray) -> np.ndarray:
    audio = np.asarray(audio, np.float32)
    if audio.ndim == 2:
        audio = audio.mean(axis=1)
    if audio.ndim != 1:
        raise ValueError(
            f"audio has shape {audio.shape}; expected [samples] or [samples, channels]"
        )
    if not np.isfinite(audio).all():
        raise ValueError("audio holds NaN or infinite samples; expected -1..1")
    return audio


class _Job:
    """One conversion under way."""

    def __init__(
        self,
        converter: VoiceConverter,
        source: Spool,
        source_frames: int,
        source_rate: int,
        options: ConversionOptions,
        noise: Noise | None,
        f0: np.ndarray | None,
        report: Report | None = None,
    ):
        voice = converter.voice
        if len(source) < MIN_SAMPLES:
            raise ValueError(
                f"the recording is {1000 * source_frames / source_rate:.1f} ms long; "
                "expected 10 ms or more"
            )
        _check_options(voice, options)
        _check_f0(voice, f0, len(source) // FRAME + 2 * _pad_frames(options))
        self.converter, self.voice, self.options = converter, voice, options
        self.source = source
        self.noise = noise or Noise(options.seed)
        self.given_f0 = f0
        self.report = report or Report()
        self.output_rate = options.output_rate or voice.config.sample_rate
        self.target = round(source_frames * self.output_rate / source_rate)
        self.speaker = voice.speakers[options.speaker][None, None]

    def run(self, progress: Progress | None = None) -> Iterator[np.ndarray]:
        """Blocks of the result, from its first sample on."""
        with ExitStack() as stack:
            with self.report.stage("prepare"):
                gain = normalize_gain(peak(self.source.blocks()))
                filtered = stack.enter_context(high_pass_spool(self.source, gain=gain))
                segments = plan_segments(filtered, self.options)
                if all(segment.last <= segment.first for segment in segments):
                    raise ValueError(
                        "the recording is so short that the original gives nothing for "
                        "it; expected 25 ms or more with reference_lengths"
                    )
            with self.report.stage("pitch"):
                f0 = self._f0(filtered, segments)
            raw = stack.enter_context(Spool())
            envelope = Envelope(self.voice.config.sample_rate // 2)
            total = len(self.source) / SAMPLE_RATE
            for segment in segments:
                for block in self._convert_segment(filtered, segment, f0):
                    raw.append(block)
                    envelope.add(block)
                    if progress:
                        rate = self.voice.config.sample_rate
                        progress(min(len(raw) / rate, total), total)
            with self.report.stage("finish"):
                finish = self._finisher(filtered, raw, envelope)
                gain = limit_gain(peak(finish()))
            for block in finish():
                yield np.float32(gain) * block
            if progress:
                progress(total, total)

    def _f0(self, filtered: Spool, segments: Sequence[Segment]) -> np.ndarray | None:
        """Shifted F0 ``[T]`` of the padded recording in Hz; None without F0."""
        net = self.converter.pitch_net
        if net is None:
            return None
        options = self.options
        pad = _pad_frames(options) * FRAME
        length = segments[-1].start + segments[-1].samples
        if self.given_f0 is not None:
            f0 = np.pad(
                self.given_f0, (0, max(0, length // FRAME + 1 - len(self.given_f0)))
            )
        else:
            f0 = pitch.estimate_f0(
                net.salience,
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
            f0 = pitch.overlay_f0(f0, points, _pad_frames(options))
        return f0

    def _convert_segment(
        self, filtered: Spool, segment: Segment, f0: np.ndarray | None
    ) -> Iterator[np.ndarray]:
        """Blocks of the segment's output at the voice's rate."""
        start = segment.start - _pad_frames(self.options) * FRAME
        audio = filtered.read_reflected(start, start + segment.samples)
        frames = segment.frames
        if f0 is not None:
            first = segment.start // FRAME
            f0 = f0[first : first + frames]
        with self.report.stage("content"):
            raw = self.converter.encoder.encode(audio, self.voice.config.version)
        with self.report.stage("index"):
            features = self._features(raw, f0, frames)
        with self.report.stage("prior"):
            z = self._latent(features, f0, segment)
        return self._decode(z, f0, segment)

    def _features(
        self, raw: np.ndarray, f0: np.ndarray | None, frames: int
    ) -> np.ndarray:
        """Retrieval, doubling to 100 frames per second, and protection of consonants."""
        options, index = self.options, self.converter.index
        doubled = raw.repeat(2, axis=0)[:frames]
        if index is None or options.index_rate == 0:
            return doubled
        blended = blend_features(
            raw, index, options.index_rate, exact=options.index_exact
        )
        blended = blended.repeat(2, axis=0)[:frames]
        if f0 is None or options.protect >= 0.5:
            return blended
        share = np.where(f0 < 1, options.protect, 1.0).astype(np.float32)[:, None]
        return share * blended + (1 - share) * doubled

    def _latent(
        self, features: np.ndarray, f0: np.ndarray | None, segment: Segment
    ) -> np.ndarray:
        """Latent ``[1, T, inter_channels]`` of a segment."""
        T, width = len(features), self.voice.config.inter_channels
        noise = self.noise.normal("prior", segment.number, 0, T, 1, width)
        inputs = [features[None], noise[None], self.speaker]
        if f0 is not None:
            inputs.append(pitch.quantize_f0(f0)[None])
        return self.voice.prior(*inputs)

    def _decode(
        self, z: np.ndarray, f0: np.ndarray | None, segment: Segment
    ) -> Iterator[np.ndarray]:
        """Decode the kept frames in windows of one length, with context on both sides."""
        voice = self.voice
        U = voice.config.samples_per_frame
        core = voice.window - 2 * voice.context
        oscillator = (
            _Oscillator(voice, f0, self.noise, segment.number)
            if f0 is not None
            else None
        )
        for first in range(segment.first, segment.last, core):
            start = first - voice.context
            inputs = [_window(z[0], start, voice.window)[None], self.speaker]
            if oscillator:
                with self.report.stage("source"):
                    inputs += oscillator.window(start)
            with self.report.stage("vocoder"):
                audio = voice.vocoder(*inputs)[0]
            count = min(core, segment.last - first)
            yield audio[voice.context * U : (voice.context + count) * U]

    def _finisher(
        self, filtered: Spool, raw: Spool, envelope: Envelope
    ) -> Callable[[], Iterator[np.ndarray]]:
        """A pass over the raw output: loudness, silence, output rate, exact length."""
        options, rate = self.options, self.voice.config.sample_rate
        mix = options.volume_envelope
        source_points = (
            rms_points(filtered.blocks(), SAMPLE_RATE // 2) if mix != 1 else np.ones(1)
        )
        output_points = envelope.points()
        gate = None if options.reference_lengths else SilenceGate(self.source)

        def finish() -> Iterator[np.ndarray]:
            blocks = match_loudness_blocks(
                raw.blocks(), source_points, output_points, len(raw), mix
            )
            if gate:
                blocks = _gated(blocks, gate, rate)
            blocks = resample_blocks(blocks, rate, self.output_rate)
            return blocks if options.reference_lengths else _cut(blocks, self.target)

        return finish


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


def _window(frames: np.ndarray, start: int, length: int) -> np.ndarray:
    """Frames ``start..start + length`` of ``[T, ...]``, zeros beyond the end."""
    piece = frames[start : start + length]
    missing = length - len(piece)
    return (
        np.pad(piece, ((0, missing), *((0, 0),) * (frames.ndim - 1)))
        if missing
        else piece
    )


class _Oscillator:
    """Excitation and noises of any window of a segment."""

    def __init__(self, voice: Voice, f0: np.ndarray, noise: Noise, segment: int):
        U = voice.config.samples_per_frame
        cycles = pitch.sample_cycles(f0, U, voice.config.vocoder == "RefineGAN")
        self._voiced = (cycles > 0).astype(np.float32)
        self._phases = pitch.sample_phases(cycles)
        offset = noise.uniform("phase", segment, voice.harmonics)
        offset[0] = 0  # the fundamental starts at phase 0
        self._offset = offset[None, None]
        self._voice, self._noise, self._segment = voice, noise, segment

    def window(self, start: int) -> list[np.ndarray]:
        """Vocoder inputs after the speaker, for a window from frame ``start``."""
        voice, U = self._voice, self._voice.config.samples_per_frame
        assert voice.source is not None
        begin = start - voice.source_context
        length = voice.window + 2 * voice.source_context
        noise = self._noise.normal(
            "source", self._segment, begin, begin + length, U, voice.harmonics
        )
        source = voice.source(
            _window(self._voiced, begin, length)[None],
            _window(self._phases, begin, length)[None],
            self._offset,
            noise[None],
        )
        return [
            source,
            *(self._stage_noise(start, i) for i in range(len(voice.noise_shapes))),
        ]

    def _stage_noise(self, start: int, stage: int) -> np.ndarray:
        per_frame, channels = self._voice.noise_shapes[stage]
        stop = start + self._voice.window
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
        return np.concatenate(parts, axis=1)[None]


def _gated(
    blocks: Iterator[np.ndarray], gate: SilenceGate, rate: int
) -> Iterator[np.ndarray]:
    position = 0
    for block in blocks:
        yield block * gate.gain(position, position + len(block), rate)
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
