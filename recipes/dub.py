"""A target voice in the time and on the pitch of others: ``python -m recipes.dub``.

Somebody else says a sentence of a recording (``make_strangers``), faster here, slower
there, with another melody. The recording's own sound is moved into that time and onto that
pitch (WORLD), so there is a recording of the target voice for just what the encoder and
the pitch network hear of the stranger: what a conversion is.

    python -m recipes.dub RECORDINGS/slt DUBBED/slt STRANGERS/slt... --encoder E --rmvpe R

``DUBBED/slt`` is what ``rvc-mlx train`` takes: it holds the recordings, and ``0012-0.ogg`` is
``0012`` in the time of the first stranger.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import soundfile as sf
from scipy.ndimage import uniform_filter1d
from scipy.special import softmax

from recipes.corpus import write_vorbis
from recipes.harmonics import FRAME_SECONDS
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
_SMOOTH = 7  # frames; less makes the sound hasten and halt
_SILENCE_DB = -45.0  # against the loud frames
_CERTAIN = 20.0  # logit of a phone that is known
_LEAST = 1e-3  # likelihood of two frames of different phones
_FRAME = HOP_LENGTH / SAMPLE_RATE  # seconds between features
_PITCH_HOP = 1 / FRAME_RATE
_COMPRESSION = 0.3  # of the files


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
        """``[F, P]`` of ``[n]`` at 16 kHz; what is silent is silence."""
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
        path: the recording's frame at each of the stranger's.
        T: times.
    """
    ahead = (path - np.arange(len(path))) * _FRAME
    smooth = uniform_filter1d(ahead, _SMOOTH, mode="nearest")
    time = np.arange(T) * FRAME_SECONDS
    centres = (np.arange(len(path)) + 0.5) * _FRAME
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


def dub(recording: Path, pairs: Sequence[tuple[Path, Path]], by: Networks) -> int:
    """Write a recording in the time of strangers, unless it is there.

    Args:
        recording: of the target voice.
        pairs: of each stranger his recording and the file to write.
        by: what hears them.

    Returns:
        How many are there; one who says something else is left out.
    """
    missing = [pair for pair in pairs if not pair[1].is_file()]
    if not missing:
        return len(pairs)
    found = len(pairs) - len(missing)
    logits = by.logits(load_audio(recording))
    sound = sound_of(*sf.read(recording))
    for stranger, target in missing:
        other = load_audio(stranger)
        path, cost = aligned(disagreement(by.logits(other), logits))
        if cost > WORST:
            continue
        T = int(len(other) / SAMPLE_RATE / FRAME_SECONDS) + 1
        f0 = estimate_clip_f0(by.pitch_net, other, VOICING_THRESHOLD)
        made = moved(sound, moments_of(path, T), melody(f0, T))
        made *= min(1.0, 0.95 / (np.abs(made).max() + 1e-9))
        write_vorbis(target, made.astype(np.float32), sound.rate, _COMPRESSION)
        found += 1
    return found


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
    recording: Path, folder: Path, strangers: Sequence[Path], files: tuple[Path, Path]
) -> int:
    copy = folder / recording.name
    if not copy.is_file():
        write_bytes(copy, recording.read_bytes())
    pairs = [
        (stranger, folder / f"{recording.stem}-{number}.ogg")
        for number, others in enumerate(strangers)
        if (stranger := others / f"{recording.stem}.ogg").is_file()
    ]
    return dub(recording, pairs, networks(*files))


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
    recordings = recordings_in(options.recordings)
    options.folder.mkdir(parents=True, exist_ok=True)
    run = partial(
        _job,
        folder=options.folder,
        strangers=options.strangers,
        files=(options.encoder, options.rmvpe),
    )
    with ProcessPoolExecutor(options.workers) as pool:
        done = sum(pool.map(run, recordings))
    log.info(f"{options.recordings}: {len(recordings)} sentences, {done} dubbed")


if __name__ == "__main__":
    main()
