"""The conversion: one way from a recording to the same words in another voice.

Everything streams: segments go through the networks one by one, and the steps that need
the whole recording (peak, high-pass, loudness, limit) are passes over spools, which move
from memory to temporary files when they grow long. An hour costs no more memory than ten
minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import numpy as np

from rvc_mlx.audio import SAMPLE_RATE, high_pass_spools, resample
from rvc_mlx.bundled_models import choose_voice
from rvc_mlx.engine import choose_engine
from rvc_mlx.file_run import FileProgress, FileRun
from rvc_mlx.job import Job, Nets, Progress
from rvc_mlx.loading import (
    Encoder,
    Engine,
    PitchNet,
    Voice,
    find_weights,
    read_weights,
)
from rvc_mlx.machine import cache_folder, in_parallel
from rvc_mlx.noise import Noise
from rvc_mlx.options import ConversionOptions
from rvc_mlx.report import Report
from rvc_mlx.retrieval import Blend, Index, blending, read_index
from rvc_mlx.schedule import convert_all
from rvc_mlx.spool import Spool

_SHORTEST_WARM_UP = 0.1  # seconds
# Between lengths of a warm-up: share of a recording, and seconds at least and at most. Lengths
# that networks meet are a sixteenth apart or more, or 5.12 s, and eight frames at least; a
# vocoder's windows that are planned are 2.56 s apart at most.
_WARM_UP_SHARE, _WARM_UP_LEAST, _WARM_UP_STEP = 1 / 17, 0.075, 2.5


class Conversion(NamedTuple):
    """A result.

    Attributes:
        audio: ``[m]`` float32 in -0.99..0.99, mono.
        sample_rate: Hz.
    """

    audio: np.ndarray
    sample_rate: int


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
        encoder.prepare(voice.config.version)
        self.voice = voice
        self.encoder = encoder
        self.pitch_net = pitch_net if voice.config.f0 else None
        self.index = index
        self._noise = engine.noise if engine else Noise
        self._high_pass = engine.high_pass if engine else high_pass_spools
        self._blend: Blend | None = None
        if index is not None:
            self._blend = (engine.blending if engine else blending)(index)
        self.device = engine.device if engine else ""
        self.precision = engine.precision if engine else ""

    def _nets(self) -> Nets:
        return Nets(
            self.voice,
            self.encoder,
            self.pitch_net,
            self._blend,
            self._noise,
            self._high_pass,
        )

    def warm_up(self, seconds: float, options: ConversionOptions | None = None) -> None:
        """Get ready for recordings of up to this length, so that none of them waits.

        Noise is converted: weights are loaded, models compiled or read back. On a GPU that
        is done for lengths so close to one another that any recording between them meets
        shapes that are known, some seventy for 30 seconds, and twice, since graphs are kept
        from the second time on; on a CPU one does for all.

        Args:
            seconds: of the longest recording; 0.1 or more.
            options: as the recordings will have them; the defaults if None.

        Raises:
            ValueError: less than 0.1 s, or options that do not fit the voice.
        """
        if not seconds >= _SHORTEST_WARM_UP:
            raise ValueError(
                f"warm_up is {seconds:g} s; expected {_SHORTEST_WARM_UP} s or more, the "
                "length of the longest recording"
            )
        options = options or ConversionOptions()
        lengths = [n for n in _warm_up_lengths(seconds) for _ in range(2)]
        if not self.encoder.batch_frames:  # the host computes, with one model for all
            lengths = lengths[:1]
        noise = np.random.default_rng(0).standard_normal(lengths[-1], np.float32) / 10
        for length in lengths:
            self.convert(noise[:length], SAMPLE_RATE, options)

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
        with self._job(audio, sample_rate, options, noise, f0) as job:
            report = Report()
            _, raw = next(convert_all(self._nets(), [job], report))
            return Conversion(job.whole(raw, report), job.output_rate)

    def convert_many(
        self,
        recordings: Sequence[np.ndarray],
        sample_rate: int | Sequence[int],
        options: ConversionOptions | None = None,
        *,
        noise: Noise | None = None,
    ) -> list[Conversion]:
        """Convert recordings in memory, several at a time where the device gains by it.

        On a GPU, recordings of one length share the calls of the networks.

        Args:
            recordings: each as ``convert`` takes it.
            sample_rate: of all of them, or of each, Hz.
            options: how; the defaults if None.
            noise: where randomness comes from; by default ``options.seed``.

        Returns:
            For each what ``convert`` gives for it alone, with the same noise: exactly on
            a CPU, to rounding on a GPU.

        Raises:
            ValueError: as ``convert``; names the recording by its number from 0. Or the
                numbers of recordings and of rates differ.
        """
        options = options or ConversionOptions()
        noise = noise or self._noise(options.seed)
        count = len(recordings)
        rates = [sample_rate] * count if isinstance(sample_rate, int) else sample_rate
        if len(rates) != count:
            raise ValueError(
                f"{count} recordings and {len(rates)} sample rates were given; expected "
                "one for each, or one for all"
            )
        order = sorted(range(count), key=lambda i: len(recordings[i]) / rates[i])
        with ExitStack() as stack:
            numbers: dict[Job, int] = {}
            refused: list[ValueError] = []

            def jobs() -> Iterator[Job]:
                for i in order:
                    try:
                        job = self._job(recordings[i], rates[i], options, noise)
                    except ValueError as error:
                        refused.append(_numbered(i, error))
                        return
                    numbers[stack.enter_context(job)] = i
                    yield job

            def finishing() -> Iterator[tuple[int, Callable[[], Conversion]]]:
                for job, raw in convert_all(self._nets(), jobs(), Report()):
                    if isinstance(job.failure, ValueError):
                        raise _numbered(numbers[job], job.failure)
                    yield numbers[job], _finishing(job, raw)

            # Beside the networks' way through the next ones.
            found = dict(in_parallel(lambda pair: (pair[0], pair[1]()), finishing()))
            if refused:
                raise refused[0]
        return [found[i] for i in range(count)]

    def _job(
        self,
        audio: np.ndarray,
        sample_rate: int,
        options: ConversionOptions,
        noise: Noise | None,
        f0: np.ndarray | None = None,
    ) -> Job:
        audio = _as_mono(audio)
        source = Spool.around(resample(audio, sample_rate, SAMPLE_RATE))
        return Job(self._nets(), source, len(audio), sample_rate, options, noise, f0)

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
        told = None if progress is None else lambda _, *seconds: progress(*seconds)
        files = [(Path(source), Path(target))]
        [(_, result)] = self.convert_files(
            files, options, subtype=subtype, progress=told
        )
        if isinstance(result, Exception):
            raise result
        return result

    def convert_files(
        self,
        files: Sequence[tuple[Path, Path]],
        options: ConversionOptions | None = None,
        *,
        subtype: str | None = None,
        progress: FileProgress | None = None,
    ) -> Iterator[tuple[int, Report | Exception]]:
        """Convert files to files, several at a time where the device gains by it.

        Args:
            files: sources and targets, see ``convert_file``.
            options: how; the defaults if None.
            subtype: ``"PCM_16"``, ``"PCM_24"`` or ``"FLOAT"``.
            progress: called with the number of a file in ``files``, seconds of it done
                and seconds in all.

        Yields:
            Number of a file that is done, and its report: stages hold the time since
            the file before, and that of finishing and writing it, which may go on beside
            the files behind it. Or the ``ValueError``, ``OSError`` or ``MemoryError`` that
            befell it; the others go on.
        """
        options = options or ConversionOptions()
        return FileRun(self._nets(), options, subtype, progress).convert(files)


def load(
    voice: str | Path,
    index: str | Path | None = None,
    *,
    encoder: str | Path | None = None,
    rmvpe: str | Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    warm_up: float = 0.0,
) -> VoiceConverter:
    """Load a voice and what it needs.

    Args:
        voice: an RVC voice: ``.pth``, ``.safetensors`` or ``.npz``, or the name of a
            bundled one.
        index: its ``.index`` file, or the name of a bundled one; None for no retrieval.
        encoder: content encoder; None finds the bundled or downloaded one that the
            voice names.
        rmvpe: pitch network; None finds the one that the voice names, likewise.
        device: ``"auto"``, ``"gpu"``, ``"cpu"`` or ``"mlx-cpu"``.
        precision: ``"auto"``, ``"f32"``, ``"bf16"`` or ``"f16"``.
        warm_up: seconds of the longest recording to be ready for, see
            ``VoiceConverter.warm_up``; 0: the first conversions do what they need.

    Returns:
        A converter; ``convert`` and ``convert_file`` can be called any number of times.

    Raises:
        ValueError: a file is of another kind, files do not fit together, or device or
            precision are not to be had.
        OSError: a file is missing or cannot be read.
    """
    engine = choose_engine(device, precision, cache_folder() / "compiled")
    converter = load_on(engine, voice, index, encoder=encoder, rmvpe=rmvpe)
    if warm_up:
        converter.warm_up(warm_up)
    return converter


def load_on(
    engine: Engine,
    voice: str | Path,
    index: str | Path | None = None,
    *,
    encoder: str | Path | None = None,
    rmvpe: str | Path | None = None,
) -> VoiceConverter:
    """As ``load``, on an engine that is there already."""
    if engine.high_pass is high_pass_spools:
        # A second, which the first conversion would wait for.
        Thread(target=import_module, args=("scipy.signal",), daemon=True).start()
    voice, index = choose_voice(voice, index)
    checkpoint = read_weights(voice, "voice")
    bound = Voice(checkpoint, engine)
    embedder = str(checkpoint.metadata.get("embedder_model") or "contentvec")
    encoder_path = encoder or find_weights("contentvec", embedder)
    net = None
    if bound.config.f0:
        wanted = str(checkpoint.metadata.get("pitch_model") or "rmvpe")
        path = rmvpe or find_weights("rmvpe", wanted)
        net = PitchNet(read_weights(path, "rmvpe"), engine)
    return VoiceConverter(
        bound,
        Encoder(read_weights(encoder_path, "contentvec"), engine),
        net,
        None if index is None else read_index(index),
        engine,
    )


def _finishing(job: Job, raw: Iterator[np.ndarray]) -> Callable[[], Conversion]:
    """What finishes a job whose blocks are there; or has finished it."""

    def finished(blocks: Iterator[np.ndarray]) -> Conversion:
        with job:
            return Conversion(job.whole(blocks, Report()), job.output_rate)

    if job.ends_aside:
        return partial(finished, iter(list(raw)))
    conversion = finished(raw)
    return lambda: conversion


def _warm_up_lengths(seconds: float) -> list[int]:
    """Samples at 16 kHz of recordings up to this length, the longest last.

    Freed GPU memory is kept for arrays of the same size, up to a limit; the oldest is given
    back first, and that of the longest recordings costs most to get again.
    """
    lengths = []
    while seconds > _SHORTEST_WARM_UP:
        lengths.append(round(seconds * SAMPLE_RATE))
        step = max(_WARM_UP_SHARE * seconds, _WARM_UP_LEAST)
        seconds -= min(step, _WARM_UP_STEP)
    return [round(_SHORTEST_WARM_UP * SAMPLE_RATE), *reversed(lengths)]


def _numbered(number: int, error: ValueError) -> ValueError:
    numbered = ValueError(f"recording {number}: {error}")
    numbered.__cause__ = error
    return numbered


def _as_mono(audio: np.ndarray) -> np.ndarray:
    audio = np.asarray(audio, np.float32)
    if audio.ndim == 2:
        audio = audio.mean(axis=1)
    if audio.ndim != 1:
        raise ValueError(
            f"audio has shape {audio.shape}; expected [samples] or [samples, channels]"
        )
    if len(audio) and not np.isfinite([audio.min(), audio.max()]).all():
        raise ValueError("audio holds NaN or infinite samples; expected -1..1")
    return audio
