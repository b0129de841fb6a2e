"""How good a voice is by now: held-out clips spoken anew from features and pitch alone.

Each clip goes the way of a conversion (text encoder, prior, inverse flow, vocoder), not
through the posterior encoder that training uses, and is compared with the recording:
L1 distance of log-mels always, F0 where there is a pitch network, likeness of the
speaker where resemblyzer is installed. Noise is seeded, so equal weights score equally.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
import soxr

from rvc_mlx.audio import SAMPLE_RATE
from rvc_mlx.loading import PitchNet
from rvc_mlx.models.synthesizer import Synthesizer
from rvc_mlx.noise import Noise
from rvc_mlx.pitch import VOICING_THRESHOLD, sample_cycles, sample_phases
from rvc_mlx.training.dataset import Batch
from rvc_mlx.training.features import estimate_clip_f0
from rvc_mlx.training.losses import log_mel, spectrogram
from rvc_mlx.training.parametrization import folded
from rvc_mlx.training.presets import TrainingConfig

SCORE = "validation/mel_l1"  # what chooses the best epoch: lower is better
_MIN_FRAMES = 60  # of a clip whose F0 is worth estimating (RMVPE's window is 64 ms)


@dataclass(frozen=True)
class Clip:
    """A recording of one item of a batch, without padding.

    Attributes:
        phone: features ``[T, C]`` float32.
        wave: ``[T * hop]`` float32.
        sid: speaker row.
        pitch: coarse pitch ``[T]``, None without F0.
        f0: in Hz ``[T]``, 0 where unvoiced, None without F0.
    """

    phone: np.ndarray
    wave: np.ndarray
    sid: int
    pitch: np.ndarray | None
    f0: np.ndarray | None


@dataclass(frozen=True)
class Spoken:
    """A clip's output beside its recording.

    Attributes:
        sample_rate: of both, Hz.
        output: ``[n]`` float32.
        target: ``[n]`` float32.
        output_mel: log-mel ``[T, n_mels]``.
        target_mel: log-mel ``[T, n_mels]``.
    """

    sample_rate: int
    output: np.ndarray
    target: np.ndarray
    output_mel: np.ndarray
    target_mel: np.ndarray


@dataclass(frozen=True)
class Scores:
    """Result of one validation.

    Attributes:
        values: mean over the clips, by name.
        clips: what was compared.
    """

    values: dict[str, float]
    clips: list[Spoken] = field(default_factory=list)


class Validator:
    """Speaks the same clips at every call.

    Args:
        config: of the run.
        batches: of held-out clips.
        limit: clips used at most.
        pitch_net: estimates the output's F0; None leaves those scores out.
        seed: of all noise.
        similarity: compare speakers, where resemblyzer is installed.
    """

    def __init__(
        self,
        config: TrainingConfig,
        batches: Iterable[Batch],
        limit: int = 8,
        pitch_net: PitchNet | None = None,
        seed: int = 0,
        similarity: bool = True,
    ):
        self._config = config
        self._clips = list(itertools.islice(_clips(batches, config.hop), limit))
        self._network = Synthesizer(config.model)
        self._pitch_net = pitch_net if config.model.f0 else None
        self._noise = Noise(seed)
        self._likeness = _Likeness(self._clips, config) if similarity else None

    def __len__(self) -> int:
        return len(self._clips)

    def __call__(self, generator: Mapping[str, mx.array]) -> Scores:
        """Score a generator's flat parameters (weight-norm pairs apart)."""
        weights = folded(generator)
        kept = [(k, v) for k, v in weights.items() if not k.startswith("enc_q.")]
        self._network.load_weights(kept, strict=True)
        totals: dict[str, list[float]] = {}
        spoken = []
        for number, clip in enumerate(self._clips):
            result = self._speak(clip, number)
            spoken.append(result)
            scores = {SCORE: _l1(result)}
            scores |= self._compare_f0(result.output, clip)
            if self._likeness:
                scores |= self._likeness(result.output, clip.sid)
            for name, value in scores.items():
                totals.setdefault(name, []).append(value)
        means = {name: float(np.mean(values)) for name, values in totals.items()}
        return Scores(means, spoken)

    def _speak(self, clip: Clip, number: int) -> Spoken:
        model, network = self._config.model, self._network
        T = len(clip.phone)
        noise = self._noise.normal("prior", number, 0, T, 1, model.inter_channels)
        g = network.emb_g(mx.array([[clip.sid]]))
        pitch = None if clip.pitch is None else mx.array(clip.pitch[None])
        z = network.prior(mx.array(clip.phone[None]), mx.array(noise[None]), g, pitch)
        audio = network.dec(z, g, self._excite(clip, number))
        target = mx.array(clip.wave[None])
        mels = [_log_mel(wave, self._config) for wave in (audio, target)]
        mx.eval(audio, mels)
        first, second = (np.array(mel[0]) for mel in mels)
        output = np.array(audio[0])
        return Spoken(model.sample_rate, output, clip.wave, first, second)

    def _excite(self, clip: Clip, number: int) -> mx.array | None:
        """The vocoder's source for the recording's own F0."""
        if clip.f0 is None:
            return None
        T, U = len(clip.f0), self._config.hop
        H = self._network.dec.HARMONICS
        cycles = sample_cycles(clip.f0, U)
        offset = self._noise.uniform("phase", number, H)
        offset[0] = 0
        noise = self._noise.normal("source", number, 0, T, U, H)
        inputs = (cycles > 0, sample_phases(cycles), offset[None], noise)
        arrays = [mx.array(np.asarray(x, np.float32)[None]) for x in inputs]
        return self._network.dec.m_source(*arrays)

    def _compare_f0(self, output: np.ndarray, clip: Clip) -> dict[str, float]:
        """Cents off where both are voiced, and share of frames voiced in one only."""
        if self._pitch_net is None or clip.f0 is None or len(clip.f0) < _MIN_FRAMES:
            return {}
        audio = soxr.resample(output, self._config.model.sample_rate, SAMPLE_RATE)
        found = estimate_clip_f0(self._pitch_net, audio, VOICING_THRESHOLD)
        T = min(len(found), len(clip.f0))
        found, wanted = found[:T], clip.f0[:T]
        both = (found > 0) & (wanted > 0)
        scores = {
            "validation/f0_voicing_error": float(np.mean((found > 0) != (wanted > 0)))
        }
        if both.any():
            cents = np.abs(1200 * np.log2(found[both] / wanted[both]))
            scores["validation/f0_cents"] = float(np.median(cents))
        return scores


def _clips(batches: Iterable[Batch], hop: int) -> Iterable[Clip]:
    """Items of batches, cut to their lengths, each recording once."""
    seen = set()
    for batch in batches:
        for b, length in enumerate(np.array(batch.lengths)):
            T = int(length)
            wave = np.array(batch.wave[b, : T * hop])
            key = wave.tobytes()
            if key in seen or not wave.any():
                continue  # a batch is topped up by repetition; silence teaches nothing
            seen.add(key)
            yield Clip(
                np.array(batch.phone[b, :T]),
                wave,
                int(batch.sid[b]),
                None if batch.pitch is None else np.array(batch.pitch[b, :T]),
                None if batch.pitchf is None else np.array(batch.pitchf[b, :T]),
            )


def _log_mel(wave: mx.array, config: TrainingConfig) -> mx.array:
    return log_mel(spectrogram(wave, config), config)


def _l1(spoken: Spoken) -> float:
    return float(np.abs(spoken.output_mel - spoken.target_mel).mean())


class _Likeness:
    """Cosine of resemblyzer's speaker embeddings: outputs against the recordings."""

    def __init__(self, clips: list[Clip], config: TrainingConfig):
        self._rate = config.model.sample_rate
        self._encoder: Any = None
        if importlib.util.find_spec("resemblyzer") is None:
            return
        from resemblyzer import VoiceEncoder

        self._encoder = VoiceEncoder("cpu", verbose=False)
        self._speakers: dict[int, np.ndarray] = {}
        for sid in {clip.sid for clip in clips}:
            waves = [clip.wave for clip in clips if clip.sid == sid]
            mean = np.mean([self._embed(wave) for wave in waves], axis=0)
            self._speakers[sid] = mean / np.linalg.norm(mean)

    def __call__(self, output: np.ndarray, sid: int) -> dict[str, float]:
        if self._encoder is None:
            return {}
        cosine = float(self._embed(output) @ self._speakers[sid])
        return {"validation/similarity": cosine}

    def _embed(self, wave: np.ndarray) -> np.ndarray:
        from resemblyzer import preprocess_wav

        return self._encoder.embed_utterance(preprocess_wav(wave, self._rate))
