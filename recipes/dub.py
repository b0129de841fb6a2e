"""A target voice in the time and on the pitch of others: ``python -m recipes.dub``.

Somebody says a sentence of the recordings (``make_strangers``), at his own pace, with his
own melody and pronunciation. The target's engine says the same phones, and that is moved
into his time and onto his melody (WORLD), at some pitch of the target's range, as a singer
would choose it: there is a recording of the target voice for just what the encoder and the
pitch network hear of the stranger, as in a conversion.

    python -m recipes.dub RECORDINGS/slt DUBBED/slt STRANGERS/slt... --encoder E --rmvpe R

``DUBBED/slt`` is what ``rvc-mlx train`` takes: it holds the recordings, and ``0012-0.ogg`` is
what the first stranger says in ``0012.ogg``.
"""

from __future__ import annotations

import argparse
import logging
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import mlx.core as mx
import numpy as np
from scipy.ndimage import uniform_filter1d
from scipy.special import softmax

from recipes.corpus import levelling, write_vorbis
from recipes.engines import Utterance
from recipes.harmonics import FRAME_SECONDS
from recipes.make_recordings import PEAK
from recipes.make_strangers import phones_of
from recipes.repeating import ENGINES, PAUSE, read
from recipes.vocoding import moved, sound_of
from rvc_mlx.audio import SAMPLE_RATE
from rvc_mlx.audio_io import load_audio
from rvc_mlx.engine import choose_engine
from rvc_mlx.loading import Encoder, PitchNet, read_weights
from rvc_mlx.models.contentvec import HOP_LENGTH, RECEPTIVE_FIELD
from rvc_mlx.pitch import FRAME_RATE, VOICING_THRESHOLD
from rvc_mlx.training.features import estimate_clip_f0
from rvc_mlx.training.files import write_bytes

log = logging.getLogger("recipes")

Phones = Callable[[np.ndarray], np.ndarray]

VERSION = "v2"  # of the bundled voices
WORST = 0.3  # mean disagreement of a pair that is not taken: they say something else
_STEPS = ((0, 0.1), (1, 0.0), (2, 0.1), (3, 0.3))  # frames to move on by, with costs
_SMOOTH = 5  # frames; more blurs the border between two phones
_SILENCE_DB = -45.0  # against the loud frames
_CERTAIN = 20.0  # logit of a phone that is known
_LEAST = 1e-3  # likelihood of two frames of different phones
_HOP = round(FRAME_SECONDS * SAMPLE_RATE)  # samples between frames of phones
_CENTRE = RECEPTIVE_FIELD / 2 / SAMPLE_RATE  # seconds, of the first frame
_PITCH_HOP = 1 / FRAME_RATE
_COMPRESSION = 0.3  # of the files
_SEMITONES = (-3.0, 5.0)  # above the target's own pitch, drawn for each sentence
_BLOCK = 40  # sentences that an engine says at a time
_PASSES = 2  # borders of phones are heard a little elsewhere once they have moved


def disagreement(own: np.ndarray, other: np.ndarray) -> np.ndarray:
    """``[F, G]`` in 0..1: how unlikely frames of two recordings are the same phone.

    Args:
        own: ``[F, P]`` logits of the phones.
        other: ``[G, P]`` of another recording.
    """
    same = softmax(own, axis=1) @ softmax(other, axis=1).T
    costs: np.ndarray = np.log(same + _LEAST) / np.log(_LEAST)
    return np.clip(costs, 0, 1)


def aligned(costs: np.ndarray) -> tuple[np.ndarray, float]:
    """Where in another recording each frame of a recording is said.

    Args:
        costs: ``[F, G]`` of each frame at each of the other's.

    Returns:
        The other's frames ``[F]``, never going back, and their mean cost.
    """
    F, G = costs.shape
    total = costs[0]
    came = np.zeros((F, G), np.int8)
    for frame in range(1, F):
        ways = np.full((len(_STEPS), G), np.inf)
        for row, (step, extra) in zip(ways, _STEPS, strict=True):
            row[step:] = total[: G - step] + extra
        came[frame] = ways.argmin(axis=0)
        total = ways.min(axis=0) + costs[frame]
    path = np.empty(F, int)
    path[-1] = int(total.argmin())
    for frame in range(F - 1, 0, -1):
        path[frame - 1] = path[frame] - _STEPS[came[frame, path[frame]]][0]
    return path, float(costs[np.arange(F), path].mean())


def read_head(path: Path) -> Phones:
    """The phone classifier that ``train_content`` writes beside the encoder."""
    head = mx.load(str(path))
    weight, bias = (
        np.array(head[name].astype(mx.float32)) for name in ("weight", "bias")
    )
    return lambda features: features @ weight.T + bias


@dataclass(frozen=True)
class Networks:
    """What hears the recordings.

    Attributes:
        encoder: of the features.
        phones: features ``[F, C]`` to logits.
        pitch_net: of the strangers' F0.
    """

    encoder: Encoder
    phones: Phones
    pitch_net: PitchNet

    def logits(self, audio: np.ndarray) -> np.ndarray:
        """``[F, P]`` of ``[n]`` at 16 kHz, every 5 ms; what is silent is silence.

        The encoder is four times slower, so it hears the recording at four shifts.
        """
        longer = np.pad(audio, (0, HOP_LENGTH)).astype(np.float32)
        shifts = [self._heard(longer[k:]) for k in range(0, HOP_LENGTH, _HOP)]
        frames = min(map(len, shifts))
        together = np.stack([heard[:frames] for heard in shifts], axis=1)
        return together.reshape(-1, together.shape[-1])

    def _heard(self, audio: np.ndarray) -> np.ndarray:
        found = self.phones(self.encoder.encode(audio, VERSION))
        # The encoder holds a last phone for as long as a breath is left of it.
        found[silent(audio, len(found))] = _CERTAIN * np.eye(found.shape[1])[0]
        return found


def silent(audio: np.ndarray, frames: int) -> np.ndarray:
    """``[frames]`` bool: which frames of ``[n]`` at 16 kHz are far below the loud ones."""
    windows = np.lib.stride_tricks.sliding_window_view(audio, RECEPTIVE_FIELD)
    level = np.square(windows[::HOP_LENGTH][:frames]).mean(axis=1)
    quiet: np.ndarray = level < np.quantile(level, 0.95) * 10 ** (_SILENCE_DB / 10)
    return quiet


@cache
def networks(encoder: Path, rmvpe: Path) -> Networks:
    """The process's networks, on the CPU."""
    engine = choose_engine("cpu", "f32", None)
    return Networks(
        Encoder(read_weights(encoder, "contentvec"), engine),
        read_head(encoder.with_suffix(".head.safetensors")),
        PitchNet(read_weights(rmvpe, "rmvpe"), engine),
    )


def moments_of(path: np.ndarray, T: int) -> np.ndarray:
    """Seconds of the recording at each of ``T`` times, 5 ms apart, never going back.

    Args:
        path: the recording's frame at each of the stranger's, both 5 ms apart.
        T: times.
    """
    ahead = (path - np.arange(len(path))) * FRAME_SECONDS
    smooth = uniform_filter1d(ahead, _SMOOTH, mode="nearest")
    time = np.arange(T) * FRAME_SECONDS
    centres = _CENTRE + np.arange(len(path)) * FRAME_SECONDS
    return np.maximum.accumulate(time + np.interp(time, centres, smooth))


def melody(f0: np.ndarray, T: int) -> np.ndarray:
    """F0 at ``T`` times, 5 ms apart, of F0 every 10 ms; 0 where unvoiced."""
    time = np.arange(T) * FRAME_SECONDS
    index = np.minimum((time / _PITCH_HOP).round().astype(int), len(f0) - 1)
    known = np.flatnonzero(f0)
    if not len(known):
        return np.zeros(T)
    line = np.exp(np.interp(time, known * _PITCH_HOP, np.log(f0[known])))
    return np.where(f0[index] > 0, line, 0)


def dub(
    said: Utterance, stranger: Path, target: Path, semitones: float, by: Networks
) -> bool:
    """Write what the target says in the time of a stranger.

    Args:
        said: by the target's engine.
        stranger: a recording of the same phones.
        target: the file to write.
        semitones: above the target's own pitch.
        by: what hears them.

    Returns:
        Whether it was written: not when the two are not heard to say the same.
    """
    other = load_audio(stranger)
    T = int(len(other) / SAMPLE_RATE / FRAME_SECONDS) + 1
    line = melody(estimate_clip_f0(by.pitch_net, other, VOICING_THRESHOLD), T)
    theirs, times = by.logits(other), np.arange(T) * FRAME_SECONDS
    made = said.samples.astype(np.float64)
    sound = sound_of(made, said.rate)
    moments: np.ndarray | None = None  # of what the engine said
    for _ in range(_PASSES):
        own = by.logits(replace(said, samples=made).at_16k())
        path, cost = aligned(disagreement(theirs, own))
        if cost > WORST:
            return False
        heard = moments_of(path, T)
        moments = heard if moments is None else np.interp(heard, times, moments)
        made = moved(sound, moments, line, semitones)
    made *= levelling(made, PEAK)
    write_vorbis(target, made.astype(np.float32), said.rate, _COMPRESSION)
    return True


def recordings_in(folder: Path) -> list[Path]:
    """The numbered recordings of a folder, sorted.

    Raises:
        FileNotFoundError: there are none.
    """
    found = [path for path in folder.glob("*.*") if path.stem.isdigit()]
    if not found:
        raise FileNotFoundError(
            f"{folder}: no recordings 0000.flac and so on; recipes.make_recordings "
            "writes them"
        )
    return sorted(found)


def _job(
    pairs: Sequence[tuple[Path, Path]], voice: str, files: tuple[Path, Path]
) -> int:
    """Dub recordings of strangers to the files beside them; how many worked."""
    by = networks(*files)
    lines = [phones_of(stranger).read_text("utf-8") for stranger, _ in pairs]
    sentences = [read(line) for line in lines]
    for sentence, (stranger, _) in zip(sentences, pairs, strict=True):
        if all(word == PAUSE for word in sentence):
            raise ValueError(f"{phones_of(stranger)}: nothing is said; remove it")
    said = ENGINES[voice](sentences)
    done = 0
    for one, (stranger, target) in zip(said, pairs, strict=True):
        rng = np.random.default_rng(zlib.crc32(target.name.encode()))
        done += dub(one, stranger, target, rng.uniform(*_SEMITONES), by)
    return done


def main(arguments: list[str] | None = None) -> None:
    """Dub all recordings of a folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recordings", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("strangers", type=Path, nargs="+")
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument("--rmvpe", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    voice = options.recordings.name
    if voice not in ENGINES:
        raise ValueError(
            f"{options.recordings}: no engine speaks as {voice}; expected a folder "
            f"called {' or '.join(ENGINES)}"
        )
    recordings = recordings_in(options.recordings)
    for others in options.strangers:
        if not any(others.glob("*.ogg")):
            raise FileNotFoundError(
                f"{others}: no strangers; recipes.make_strangers writes them"
            )
    pairs = [
        (stranger, options.folder / f"{recording.stem}-{number}.ogg")
        for recording in recordings
        for number, others in enumerate(options.strangers)
        if (stranger := others / f"{recording.stem}.ogg").is_file()
    ]
    for stranger, _ in pairs:
        if not phones_of(stranger).is_file():
            raise FileNotFoundError(
                f"{phones_of(stranger)}: not there; the command of "
                "recipes.make_strangers that made the folder adds it"
            )
    options.folder.mkdir(parents=True, exist_ok=True)
    for recording in recordings:
        copy = options.folder / recording.name
        if not copy.is_file():
            write_bytes(copy, recording.read_bytes())
    missing = [pair for pair in pairs if not pair[1].is_file()]
    blocks = [missing[i : i + _BLOCK] for i in range(0, len(missing), _BLOCK)]
    run = partial(_job, voice=voice, files=(options.encoder, options.rmvpe))
    with ProcessPoolExecutor(options.workers) as pool:
        done = sum(pool.map(run, blocks))
    log.info(
        f"{options.recordings}: {done} sentences dubbed, {len(missing) - done} left "
        f"out, {len(pairs) - len(missing)} there already"
    )


if __name__ == "__main__":
    main()
