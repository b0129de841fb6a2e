"""The original's whole offline conversion, in eager PyTorch.

The classic variant: the signed sum as cut criterion, unvoiced frames at 0 Hz, no
cross-fade, and an output that is a few frames shorter than the input. One deviation:
index distances are clamped to 1e-8, because an exact hit gives NaN upstream.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
import torch
from scipy import signal
from torch import Tensor

from rvc_reference.contentvec import ContentVec
from rvc_reference.loading import load_contentvec, load_rmvpe, load_voice
from rvc_reference.noise import Noise, SeededNoise
from rvc_reference.rmvpe import RMVPE, estimate_f0
from rvc_reference.synthesizer import Synthesizer

SAMPLE_RATE = 16000
WINDOW = 160
HIGH_PASS = signal.butter(5, 48, btype="high", fs=SAMPLE_RATE)
NEIGHBOURS = 8


@dataclass(frozen=True)
class ReferenceOptions:
    """Settings of one conversion.

    Attributes:
        pitch: shift in semitones.
        index_rate: share of the retrieved features, 0..1.
        protect: share of the blended features in unvoiced frames; 0.5 is off.
        rms_mix_rate: 1 keeps the model's loudness, 0 imposes the source's.
        sid: speaker row.
        pad_mode: how RMVPE's mel is padded, "reflect" or "constant".
        x_pad: context on both sides of a segment, in seconds.
        x_query: half the stretch that is searched for a cut, in seconds.
        x_center: distance of the cuts, in seconds.
        x_max: longest audio that is not cut, in seconds.
    """

    pitch: float = 0
    index_rate: float = 0.0
    protect: float = 0.33
    rms_mix_rate: float = 1.0
    sid: int = 0
    pad_mode: str = "reflect"
    x_pad: float = 1
    x_query: int = 6
    x_center: int = 38
    x_max: int = 41


def load_audio(path: str | Path) -> np.ndarray:
    """Read a file as mono float64 ``[N]`` at 16 kHz (mean of channels, soxr VHQ)."""
    audio, rate = soundfile.read(path, dtype="float64", always_2d=True)
    mono = audio.mean(axis=1)
    return (
        mono if rate == SAMPLE_RATE else soxr.resample(mono, rate, SAMPLE_RATE, "VHQ")
    )


def prepare(audio: np.ndarray) -> np.ndarray:
    """Limit the peak of ``[N]`` to 0.95 and take away what is below 48 Hz (float64)."""
    audio = np.asarray(audio, np.float64)
    peak = np.abs(audio).max() / 0.95
    return signal.filtfilt(*HIGH_PASS, audio / peak if peak > 1 else audio)


def quantize_f0(f0: np.ndarray) -> np.ndarray:
    """Give the coarse pitch ``[T]`` int64 in 1..255 of F0 in Hz."""
    mel = 1127 * np.log1p(np.asarray(f0, np.float64) / 700)
    low, high = 1127 * np.log1p(np.array([50.0, 1100.0]) / 700)
    bins = np.where(mel > 0, (mel - low) * 254 / (high - low) + 1, 0)
    return np.rint(np.clip(bins, 1, 255)).astype(np.int64)


def find_cuts(audio: np.ndarray, options: ReferenceOptions) -> list[int]:
    """Give the cut points, in samples of ``audio``, each a multiple of 160.

    Near every ``x_center`` seconds: the first place at which the absolute value of
    the *signed* sum over 160 samples is smallest.
    """
    if len(audio) + WINDOW <= options.x_max * SAMPLE_RATE:
        return []
    padded = np.pad(audio, WINDOW // 2, mode="reflect")
    reach, step = options.x_query * SAMPLE_RATE, options.x_center * SAMPLE_RATE
    cuts = []
    for centre in range(step, len(audio), step):
        start, stop = centre - reach, min(centre + reach, len(audio))
        total = np.zeros(stop - start)
        for offset in range(WINDOW):
            total += padded[start + offset : stop + offset]
        cuts.append((start + int(np.abs(total).argmin())) // WINDOW * WINDOW)
    return cuts


def rms_points(audio: np.ndarray, rate: int) -> np.ndarray:
    """Give the rms of one-second frames every half second, zeros beyond the ends."""
    hop = rate // 2
    padded = np.pad(audio.astype(np.float64), hop)
    energy = np.concatenate([[0.0], np.cumsum(padded**2)])
    starts = np.arange(1 + len(audio) // hop) * hop
    return np.sqrt(np.maximum(energy[starts + 2 * hop] - energy[starts], 0) / (2 * hop))


def match_loudness(
    source: np.ndarray, output: np.ndarray, output_rate: int, mix: float
) -> np.ndarray:
    """Move the loudness of ``output`` ``[m]`` towards that of ``source`` (16 kHz)."""

    def spread(points: np.ndarray) -> np.ndarray:
        place = (np.arange(len(output)) + 0.5) * len(points) / len(output) - 0.5
        return np.interp(place, np.arange(len(points)), points)

    wanted = spread(rms_points(source, SAMPLE_RATE))
    given = np.maximum(spread(rms_points(output, output_rate)), 1e-6)
    return output * wanted ** (1 - mix) * given ** (mix - 1)


class ReferencePipeline:
    """Everything between a 16 kHz recording and the converted waveform.

    Args:
        contentvec: the content encoder.
        rmvpe: the F0 network; None for a voice without F0, or when f0 is always given.
        synthesizer: the voice.
        index: path of a faiss index, or None.
    """

    def __init__(
        self,
        contentvec: ContentVec,
        rmvpe: RMVPE | None,
        synthesizer: Synthesizer,
        index: str | Path | None = None,
    ) -> None:
        self.contentvec = contentvec.eval()
        self.rmvpe = None if rmvpe is None else rmvpe.eval()
        self.synthesizer = synthesizer.eval()
        self.index = None
        if index is not None:
            import faiss

            self.index = faiss.read_index(str(index))
            self.vectors = self.index.reconstruct_n(0, self.index.ntotal)

    def f0_contour(
        self,
        padded: np.ndarray,
        options: ReferenceOptions,
        f0: np.ndarray | None = None,
    ) -> np.ndarray | None:
        """Give the shifted F0 of the padded audio, cut to whole frames; None without F0.

        Raises:
            ValueError: when the voice needs F0 and there is neither a network nor f0,
                or f0 is too short.
        """
        if not self.synthesizer.f0:
            return None
        if f0 is None:
            if self.rmvpe is None:
                raise ValueError("this voice needs f0: give rmvpe, or f0 to convert")
            f0 = estimate_f0(self.rmvpe, padded, pad_mode=options.pad_mode)
        frames = len(padded) // WINDOW
        if len(f0) < frames:
            raise ValueError(f"f0 has {len(f0)} frames; the padded audio has {frames}")
        return np.asarray(f0, np.float64)[:frames] * 2 ** (options.pitch / 12)

    def blend(self, features: np.ndarray, rate: float) -> np.ndarray:
        """Mix ``[F, C]`` with the weighted mean of the eight nearest index vectors."""
        distance, ids = self.index.search(features, NEIGHBOURS)
        weight = np.square(1 / np.maximum(distance, 1e-8))
        weight /= weight.sum(axis=1, keepdims=True)
        found = (self.vectors[ids] * weight[..., None]).sum(axis=1)
        return (rate * found + (1 - rate) * features).astype(np.float32)

    def phone(
        self, audio: np.ndarray, f0: np.ndarray | None, options: ReferenceOptions
    ) -> Tensor:
        """Give the voice's input features ``[1, T, C]`` of one segment.

        ``T`` is the smaller of ``len(audio) // 160`` and twice the feature count.
        """
        wave = torch.from_numpy(audio.astype(np.float32))[None]
        raw = self.contentvec.extract(wave, self.synthesizer.version)
        features = raw
        if self.index is not None and options.index_rate > 0:
            blended = self.blend(raw[0].numpy(), options.index_rate)
            features = torch.from_numpy(blended)[None]
        frames = min(len(audio) // WINDOW, 2 * raw.shape[1])
        phone = features.repeat_interleave(2, dim=1)[:, :frames]
        if f0 is None or options.protect >= 0.5 or features is raw:
            return phone
        share = np.where(f0[:frames] < 1, options.protect, 1.0).astype(np.float32)
        share = torch.from_numpy(share)[None, :, None]
        return share * phone + (1 - share) * raw.repeat_interleave(2, dim=1)[:, :frames]

    def convert_segment(
        self,
        audio: np.ndarray,
        f0: np.ndarray | None,
        segment: int,
        noise: Noise,
        options: ReferenceOptions,
    ) -> np.ndarray:
        """Convert one padded segment; gives float32, without the padding's share."""
        phone = self.phone(audio, f0, options)
        frames = phone.shape[1]
        prior, vocoder_noise = self.synthesizer.draw(noise, segment, frames)
        pitch = hertz = None
        if f0 is not None:
            pitch = torch.from_numpy(quantize_f0(f0[:frames]))[None]
            hertz = torch.from_numpy(f0[:frames].astype(np.float32))[None]
        wave = self.synthesizer.infer(
            phone, pitch, hertz, options.sid, prior, vocoder_noise
        )
        crop = round(self.synthesizer.sample_rate * options.x_pad)
        return wave[0].numpy()[crop:-crop]

    def convert_segments(
        self,
        padded: np.ndarray,
        f0: np.ndarray | None,
        cuts: list[int],
        noise: Noise,
        options: ReferenceOptions,
    ) -> np.ndarray:
        """Convert the padded audio between the cuts and join the parts as they are."""
        context = 2 * round(options.x_pad * SAMPLE_RATE)
        parts = []
        for segment, start in enumerate([0, *cuts]):
            stop = cuts[segment] + context if segment < len(cuts) else len(padded)
            piece = padded[start : stop + WINDOW]
            part_f0 = None if f0 is None else f0[start // WINDOW : stop // WINDOW]
            parts.append(self.convert_segment(piece, part_f0, segment, noise, options))
        return np.concatenate(parts)

    @torch.inference_mode()
    def convert(
        self,
        audio: np.ndarray,
        *,
        noise: Noise | None = None,
        f0: np.ndarray | None = None,
        **options: Any,
    ) -> np.ndarray:
        """Convert a recording.

        Args:
            audio: ``[N]`` float32 or float64 at 16 kHz, as loaded; the peak is
                limited and the high-pass applied here.
            noise: a noise object; None draws from seed 0.
            f0: a contour in Hz to use in place of RMVPE's, for the *padded* audio
                (``x_pad`` seconds more at both ends): one value per 160 samples.
            options: fields of ``ReferenceOptions``.

        Returns:
            ``[m]`` float32 at the model rate, up to 25 ms shorter than the input.
        """
        settings = ReferenceOptions(**options)
        noise = SeededNoise(0) if noise is None else noise
        audio = prepare(audio)
        pad = round(settings.x_pad * SAMPLE_RATE)
        padded = np.pad(audio, pad, mode="reflect")
        contour = self.f0_contour(padded, settings, f0)
        output = self.convert_segments(
            padded, contour, find_cuts(audio, settings), noise, settings
        )
        if settings.rms_mix_rate != 1:
            rate = self.synthesizer.sample_rate
            output = match_loudness(audio, output, rate, settings.rms_mix_rate)
        peak = np.abs(output).max() / 0.99
        return (output / peak if peak > 1 else output).astype(np.float32)

    def convert_file(
        self, source: str | Path, target: str | Path, **options: Any
    ) -> None:
        """Convert a file into a 16-bit WAV at the model rate."""
        output = self.convert(load_audio(source), **options)
        soundfile.write(target, output, self.synthesizer.sample_rate, subtype="PCM_16")


def load_reference(
    voice_pth: str | Path,
    contentvec_path: str | Path,
    rmvpe_path: str | Path | None = None,
    index: str | Path | None = None,
) -> ReferencePipeline:
    """Load everything that a conversion needs; every load is strict."""
    rmvpe = None if rmvpe_path is None else load_rmvpe(rmvpe_path)
    return ReferencePipeline(
        load_contentvec(contentvec_path), rmvpe, load_voice(voice_pth), index
    )
