"""Strangers and target voices that say the same at the same moments, for the encoder.

Phones alone leave much open: how an encoder renders a moment between two of them, it is not
told. In the clips of ``dub`` a target voice says what a stranger says, sound for sound. From
the stranger's features the target's spectra must follow, and both must have equal features::

    stranger ── view a ── encoder ── features a ── mouth ── target's spectra
                                         ║ equal
    target ──── view b ── encoder ── features b ── mouth ── target's spectra
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import scipy.fft

from recipes.corpus import Shard
from recipes.make_recordings import SPEAKERS_OF
from recipes.phones import UNKNOWN
from recipes.speakers import KOKORO
from recipes.strangers import stranger_of
from rvc_mlx.audio import SAMPLE_RATE
from rvc_mlx.audio_io import load_audio
from rvc_mlx.models.contentvec import RECEPTIVE_FIELD
from rvc_mlx.spectral import triangles

CEPSTRA = 24  # of each frame of a spectrum
SPECTRUM_HOP = 160  # samples between spectra: 10 ms
PER_FRAME = 2  # spectra for each of the encoder's frames
LEFT_OUT = 40  # every so many sentences one is kept for tests

_N_FFT, _WINDOW, _BANDS = 512, 400, 40
_FLOOR = 1e-4  # of a band's magnitude, before the logarithm
_WIDTH, _KERNEL = 256, 5  # of the mouth's layers


def cepstra(samples: np.ndarray) -> np.ndarray:
    """Smooth log-mel spectra.

    Args:
        samples: ``[n]`` float at 16 kHz.

    Returns:
        ``[1 + n // SPECTRUM_HOP, CEPSTRA]`` float32, of frames whose middle is sample
        ``t * SPECTRUM_HOP``: the first cosines of 40 log-mel bands.
    """
    padded = np.pad(samples.astype(np.float32), _WINDOW // 2)
    windows = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[::SPECTRUM_HOP]
    magnitudes = np.abs(np.fft.rfft(windows * np.hanning(_WINDOW), _N_FFT, axis=1))
    mels = np.linspace(0, np.log1p(SAMPLE_RATE / 2 / 700), _BANDS + 2)
    bands = magnitudes @ triangles(700 * np.expm1(mels), SAMPLE_RATE, _N_FFT)
    spectra = scipy.fft.dct(np.log(np.maximum(bands, _FLOOR)), axis=1, norm="ortho")
    found: np.ndarray = spectra[:, :CEPSTRA].astype(np.float32)
    return found


@dataclass(frozen=True)
class Pair:
    """A sentence by a stranger and by a target voice, moment by moment.

    Attributes:
        a: the stranger's clip.
        b: the target's, as long; the same if the target itself is heard.
        spectra: ``[T, CEPSTRA]`` float32 of the target, see ``scaled``.
        voice: number of the target voice.
    """

    a: Shard
    b: Shard
    spectra: np.ndarray
    voice: int


def read_pairs(groups: Sequence[Sequence[Path]], workers: int = 16) -> list[Pair]:
    """All pairs but those of every ``LEFT_OUT``-th sentence.

    Args:
        groups: of each voice the folder of ``recipes.dub`` and those of its strangers,
            in the order in which it was given them.
        workers: threads.

    Raises:
        FileNotFoundError: a folder is empty, or a stranger's recording is missing.
        ValueError: there are dubbed recordings of more strangers than were given, or one
            is too short; or a folder is not named after a target voice.
    """
    for folder, *_ in groups:
        if folder.name not in SPEAKERS_OF:
            raise ValueError(
                f"{folder}: expected a folder called {' or '.join(SPEAKERS_OF)}"
            )
    jobs: list[tuple[Path, Path | None, int]] = []
    for voice, (folder, *strangers) in enumerate(groups):
        paths = sorted(path for path in folder.glob("*.*") if _sentence(path) >= 0)
        if not paths:
            raise FileNotFoundError(f"{folder}: no recordings; recipes.dub makes them")
        kept = [path for path in paths if _sentence(path) % LEFT_OUT != LEFT_OUT - 1]
        jobs += [(path, stranger_of(path, strangers), voice) for path in kept]
    with ThreadPoolExecutor(workers) as pool:
        pairs = list(pool.map(lambda job: _read(*job), jobs))
    return scaled(pairs)


def parallel_speakers(groups: Sequence[Sequence[Path]]) -> set[str]:
    """Names, of ``recipes.speakers``, of all who may be heard in parallel speech."""
    if not groups:
        return set()
    # ``make_strangers`` mixes the voices of Kokoro that are not kept for tests.
    strangers = {speaker.name for speaker in KOKORO if not speaker.test}
    return strangers | {SPEAKERS_OF[folder.name] for folder, *_ in groups}


def _sentence(path: Path) -> int:
    """The number of a recording's sentence; -1 for other files."""
    said = path.stem.partition("-")[0]
    return int(said) if said.isdigit() else -1


def _read(path: Path, stranger: Path | None, voice: int) -> Pair:
    target = load_audio(path)
    other = target if stranger is None else load_audio(stranger)
    n = min(len(target), len(other))
    if n < RECEPTIVE_FIELD:
        raise ValueError(
            f"{path}: {n} samples with {stranger or 'itself'}; expected "
            f"{RECEPTIVE_FIELD} or more, make both again"
        )
    return Pair(
        _one_clip("" if stranger else path.parent.name, other[:n]),
        _one_clip(path.parent.name, target[:n]),
        cepstra(target[:n]),
        voice,
    )


def _one_clip(speaker: str, samples: np.ndarray) -> Shard:
    """A clip whose phones are not told."""
    n, none = len(samples), np.zeros(0)
    rounded = np.rint(np.clip(samples, -1, 1) * 32767).astype(np.int16)
    classes, ends = np.array([UNKNOWN], np.uint8), np.array([n], np.int32)
    return Shard(speaker, rounded, ends, classes, ends, none, none)


def scaled(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs with spectra about 0, half-way to equal variance of all cepstra.

    A plain distance would hear little but the loudness, one of equal variance listens to
    ripples as much.
    """
    scales = {}
    for voice in {pair.voice for pair in pairs}:
        every = np.concatenate([pair.spectra for pair in pairs if pair.voice == voice])
        mean, spread = every.mean(axis=0), every.std(axis=0) + 1e-6
        scales[voice] = mean, np.sqrt(spread * spread.mean())

    def spectra(pair: Pair) -> np.ndarray:
        mean, scale = scales[pair.voice]
        found: np.ndarray = ((pair.spectra - mean) / scale).astype(np.float32)
        return found

    return [replace(pair, spectra=spectra(pair)) for pair in pairs]


def spectra_at(pair: Pair, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The target's spectra at some samples.

    Args:
        pair: a pair.
        times: ``[K]`` samples, fractional, also beyond the ends.

    Returns:
        ``[K, CEPSTRA]`` float32, and ``[K]`` float32: 1 within the clip, else 0.
    """
    place = np.clip(times / SPECTRUM_HOP, 0, len(pair.spectra) - 1.001)
    index = place.astype(int)
    part = (place - index)[:, None]
    found = pair.spectra[index] * (1 - part) + pair.spectra[index + 1] * part
    within = (times >= 0) & (times < len(pair.b.samples))
    return found.astype(np.float32), within.astype(np.float32)


class Mouth(nn.Module):
    """Features to spectra of each target voice; only there to train the encoder."""

    def __init__(self, width: int, voices: int):
        super().__init__()
        pad = _KERNEL // 2
        self.layers = [
            nn.Conv1d(width, _WIDTH, _KERNEL, padding=pad),
            nn.Conv1d(_WIDTH, _WIDTH, _KERNEL, padding=pad),
        ]
        self.out = nn.Linear(_WIDTH, voices * PER_FRAME * CEPSTRA)
        self._voices = voices

    def __call__(self, features: mx.array) -> mx.array:
        """``[B, F, C]`` to ``[B, voices, F * PER_FRAME, CEPSTRA]``."""
        x = features
        for layer in self.layers:
            x = nn.relu(layer(x))
        B, F, _ = x.shape
        x = self.out(x).reshape(B, F, self._voices, PER_FRAME, CEPSTRA)
        return x.transpose(0, 2, 1, 3, 4).reshape(B, self._voices, -1, CEPSTRA)


def spectral_distance(
    spoken: mx.array, voice: mx.array, spectra: mx.array, within: mx.array
) -> mx.array:
    """Mean absolute difference of spectra, within the clips.

    Args:
        spoken: ``[B, voices, K, CEPSTRA]`` of ``Mouth``.
        voice: ``[B]`` int32, which of them counts.
        spectra: ``[B, K, CEPSTRA]``.
        within: ``[B, K]`` in 0..1.
    """
    index = mx.broadcast_to(
        voice[:, None, None, None], (len(spoken), 1, *spoken.shape[2:])
    )
    own = mx.take_along_axis(spoken, index, axis=1)[:, 0].astype(mx.float32)
    difference = mx.abs(own - spectra).mean(axis=-1) * within
    return difference.sum() / mx.maximum(within.sum(), 1)
