"""The conversion: one way from a recording to the same words in another voice.

Everything streams: segments go through the networks one by one, and the steps that need
the whole recording (peak, high-pass, loudness, limit) are passes over spools, which move
from memory to temporary files when they grow long. An hour costs no more memory than ten
minutes.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rvc_mlx.audio import SAMPLE_RATE, resample
from rvc_mlx.audio_io import AudioReader, AudioWriter, load_spool
from rvc_mlx.bundled_models import choose_voice
from rvc_mlx.engine import choose_engine
from rvc_mlx.job import Job, Nets, Progress
from rvc_mlx.loading import (
    Encoder,
    Engine,
    PitchNet,
    Voice,
    find_weights,
    read_weights,
)
from rvc_mlx.machine import cache_folder
from rvc_mlx.noise import Noise
from rvc_mlx.options import ConversionOptions
from rvc_mlx.output_format import check_output
from rvc_mlx.report import Report
from rvc_mlx.retrieval import Index, read_index
from rvc_mlx.spool import Spool


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
        self.device = engine.device if engine else ""
        self.precision = engine.precision if engine else ""

    def _nets(self) -> Nets:
        return Nets(self.voice, self.encoder, self.pitch_net, self.index, self._noise)

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
        with Spool.around(resample(audio, sample_rate, SAMPLE_RATE)) as source:
            job = Job(self._nets(), source, len(audio), sample_rate, options, noise, f0)
            return Conversion(job.whole(), job.output_rate)

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
            job = Job(
                self._nets(),
                spool,
                frames,
                reader.sample_rate,
                options,
                None,
                None,
                report,
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
        voice: an RVC voice: ``.pth``, ``.safetensors`` or ``.npz``, or the name of a
            bundled one.
        index: its ``.index`` file; None for the one that a bundled voice brings along,
            and for no retrieval with other voices; "" for none.
        encoder: content encoder; None finds the bundled or downloaded one that the
            voice names.
        rmvpe: pitch network; None finds the one that the voice names, likewise.
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
    return load_on(engine, voice, index, encoder=encoder, rmvpe=rmvpe)


def load_on(
    engine: Engine,
    voice: str | Path,
    index: str | Path | None = None,
    *,
    encoder: str | Path | None = None,
    rmvpe: str | Path | None = None,
) -> VoiceConverter:
    """As ``load``, on an engine that is there already."""
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
