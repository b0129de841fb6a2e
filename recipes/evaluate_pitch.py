"""Judge pitch trackers on exactly known F0: ``python -m recipes.evaluate_pitch``.

The network beside harvest, swift-f0 and torchcrepe where they are installed, on the same
clips, clean and in noise.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from recipes.corpus import Shard, find_shards, read_shards
from recipes.harmonics import world
from recipes.pitch_training import f0_at
from rvc_mlx.audio import SAMPLE_RATE
from rvc_mlx.loading import read_weights
from rvc_mlx.models import rmvpe
from rvc_mlx.models.layers import load_strictly
from rvc_mlx.models.rmvpe import RMVPE, RMVPEConfig
from rvc_mlx.pitch import FRAME_LENGTH, VOICING_THRESHOLD, estimate_f0

log = logging.getLogger("recipes")

# [n] at 16 kHz to [n // 160 + 1] Hz. As in mir_eval, a tracker's guess where it hears no
# voice is negative, and 0 where it has none.
Tracker = Callable[[np.ndarray], np.ndarray]

_LONGEST = 6 * SAMPLE_RATE  # samples of a clip


@dataclass(frozen=True)
class Known:
    """A clip and its truth.

    Attributes:
        audio: ``[n]`` float32 at 16 kHz.
        f0: ``[n // 160 + 1]`` Hz, 0 where unvoiced.
    """

    audio: np.ndarray
    f0: np.ndarray


def known_clips(shards: Sequence[Shard], count: int) -> list[Known]:
    """``count`` clips, evenly taken from the shards with F0."""
    found = []
    for shard in shards:
        start = 0
        for end in map(int, shard.clips):
            stop = min(end, start + _LONGEST)
            x = shard.samples[start:stop].astype(np.float32) / 32768
            times = start + FRAME_LENGTH * np.arange(len(x) // FRAME_LENGTH + 1)
            f0, voiced = f0_at(shard, np.minimum(times, stop - 1))
            if len(x) > SAMPLE_RATE:
                found.append(Known(x, f0 * voiced))
            start = end
    chosen = np.linspace(0, len(found) - 1, min(count, len(found))).round().astype(int)
    return [found[i] for i in chosen]


def add_noise(
    audio: np.ndarray, snr: float, rng: np.random.Generator, pink: bool
) -> np.ndarray:
    """White or pink noise ``snr`` dB below the clip, both measured over all of it."""
    noise = rng.standard_normal(len(audio))
    if pink:
        spectrum = np.fft.rfft(noise)
        spectrum /= np.sqrt(np.maximum(np.arange(len(spectrum)), 1))
        noise = np.fft.irfft(spectrum, len(audio))
    scale = np.sqrt(
        np.square(audio).mean() / np.square(noise).mean() / 10 ** (snr / 10)
    )
    return (audio + scale * noise).astype(np.float32)


def score(truth: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """Errors of one F0 against another.

    Args:
        truth: ``[T]`` Hz, 0 where unvoiced.
        found: ``[T]`` of a `Tracker`.

    Returns:
        ``rpa``: raw pitch accuracy, share of truly voiced frames found within 50 cents,
        guesses included; ``rpa_heard``: the same without them; ``vde``: frames with the
        wrong voicing; ``missed`` and ``false``: its two kinds, of the voiced and of the
        unvoiced; ``octave``: co-voiced frames that are off by about one or more octaves
        (within 100 cents of a multiple of 1200); ``cents``: median error of co-voiced
        frames.
    """
    T = min(len(truth), len(found))
    truth, found = truth[:T], found[:T]
    voiced, heard = truth > 0, found > 0
    guess = np.where(found == 0, 1.0, np.abs(found))
    error = np.abs(1200 * np.log2(guess / np.where(voiced, truth, 1.0)))
    right = voiced & (error < 50)
    cents = error[voiced & heard]
    octaves = np.round(cents / 1200)
    wrong = (octaves >= 1) & (np.abs(cents - 1200 * octaves) < 100)
    return {
        "rpa": float(right.sum() / max(voiced.sum(), 1)),
        "rpa_heard": float((right & heard).sum() / max(voiced.sum(), 1)),
        "vde": float((voiced != heard).mean()),
        "missed": float((voiced & ~heard).sum() / max(voiced.sum(), 1)),
        "false": float((heard & ~voiced).sum() / max((~voiced).sum(), 1)),
        "octave": float(wrong.mean()) if len(cents) else 0.0,
        "cents": float(np.median(cents)) if len(cents) else 0.0,
    }


def network_tracker(path: Path) -> Tracker:
    """An RMVPE network of any size, with RVC's threshold and decoding."""
    tensors = rmvpe.sanitize(read_weights(path, "rmvpe").tensors)
    config = RMVPEConfig.from_tensors(tensors)
    network = RMVPE(config)
    load_strictly(network, tensors)

    def track(audio: np.ndarray) -> np.ndarray:
        seen: dict[bytes, np.ndarray] = {}

        def salience(mel: np.ndarray) -> np.ndarray:
            key = mel.tobytes()
            if key not in seen:
                seen[key] = np.array(network(mx.array(mel)))
            return seen[key]

        heard, guess = (
            estimate_f0(
                salience,
                lambda start, stop: audio[start:stop],
                len(audio),
                config.n_mels,
                threshold,
                frames_multiple=1 << config.levels,
            )
            for threshold in (VOICING_THRESHOLD, 0.0)
        )
        return np.where(heard > 0, heard, -guess)

    return track


def harvest_tracker() -> Tracker:
    """WORLD's harvest, 50 to 1100 Hz."""
    pyworld = world()

    def track(audio: np.ndarray) -> np.ndarray:
        x = audio.astype(np.float64)
        return pyworld.harvest(x, SAMPLE_RATE, 50.0, 1100.0, frame_period=10.0)[0]

    return track


def swift_tracker() -> Tracker:
    """swift-f0, voiced from the confidence .5 on, put on frames of 10 ms."""
    from swift_f0 import SwiftF0

    detector = SwiftF0(threads=1, spin=False)

    def track(audio: np.ndarray) -> np.ndarray:
        result = detector.detect(audio, SAMPLE_RATE)
        times = np.arange(len(audio) // FRAME_LENGTH + 1) * FRAME_LENGTH / SAMPLE_RATE
        own = np.asarray(result.timestamps)
        voiced = np.asarray(result.confidence) >= 0.5
        if voiced.sum() < 2:
            return np.zeros(len(times))
        log_f0 = np.log(np.asarray(result.pitch_hz)[voiced])
        nearest = np.abs(times[:, None] - own).argmin(axis=1)
        sign = np.where(voiced[nearest], 1, -1)
        return sign * np.exp(np.interp(times, own[voiced], log_f0))

    return track


def crepe_tracker() -> Tracker:
    """Torchcrepe's tiny network with Viterbi decoding, voiced above .21."""
    if importlib.util.find_spec("torchaudio") is None:
        # It is imported for loading files and for resampling, which is not done here.
        sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    import torch  # noqa: TID251
    import torchcrepe

    def track(audio: np.ndarray) -> np.ndarray:
        f0, sure = torchcrepe.predict(
            torch.from_numpy(audio)[None],
            SAMPLE_RATE,
            FRAME_LENGTH,
            50.0,
            1100.0,
            model="tiny",
            return_periodicity=True,
        )
        return np.where(sure[0].numpy() > 0.21, 1, -1) * f0[0].numpy()

    return track


_OTHERS: dict[str, tuple[str, Callable[[], Tracker]]] = {
    "harvest": ("pyworld", harvest_tracker),
    "swift-f0": ("swift_f0", swift_tracker),
    "torchcrepe tiny": ("torchcrepe", crepe_tracker),
}


def judge(tracker: Tracker, clips: Sequence[Known], snr: float) -> dict[str, float]:
    """Scores over all clips together, in noise of ``snr`` dB (infinite for none)."""
    rng = np.random.default_rng(0)
    truths, found = [], []
    for i, clip in enumerate(clips):
        noisy = clip.audio
        if np.isfinite(snr):
            noisy = add_noise(clip.audio, snr, rng, pink=i % 2 == 1)
        f0 = tracker(noisy)
        T = min(len(f0), len(clip.f0))
        truths.append(clip.f0[:T])
        found.append(f0[:T])
    return score(np.concatenate(truths), np.concatenate(found))


def main(arguments: list[str] | None = None) -> None:
    """Print a JSON report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("corpus", nargs="+", type=Path)
    parser.add_argument("--network", type=Path)
    parser.add_argument("--clips", type=int, default=60)
    parser.add_argument("--snr", nargs="*", type=float, default=[np.inf, 20, 10, 5, 0])
    parser.add_argument("--only-network", action="store_true")
    parser.add_argument("--report", type=Path, help="write the JSON here too")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    clips = known_clips(read_shards(find_shards(options.corpus)), options.clips)
    trackers: dict[str, Tracker] = {}
    if options.network:
        trackers[options.network.name] = network_tracker(options.network)
    for name, (module, make) in _OTHERS.items():
        if options.only_network:
            continue
        if importlib.util.find_spec(module):
            trackers[name] = make()
        else:
            log.info(f"{name}: {module} is not installed; left out")
    report = {
        name: {f"{snr:g} dB": judge(tracker, clips, snr) for snr in options.snr}
        for name, tracker in trackers.items()
    }
    text = json.dumps({"clips": len(clips), "trackers": report}, indent=1)
    log.info(text)
    if options.report:
        options.report.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
