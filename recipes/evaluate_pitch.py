"""Judge pitch trackers on exactly known F0: ``python -m recipes.evaluate_pitch``.

The network beside harvest, swift-f0 and torchcrepe where they are installed, on the same
clips, clean and in noise.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recipes.corpus import Shard, find_shards, read_shards
from recipes.goals import Goal, describe
from recipes.pitch_training import f0_at
from recipes.trackers import OTHERS, Tracker, tracker
from rvc_mlx.audio import SAMPLE_RATE
from rvc_mlx.machine import processors
from rvc_mlx.pitch import FRAME_LENGTH

log = logging.getLogger("recipes")

_LONGEST = 6 * SAMPLE_RATE  # samples of a clip
_CLEAN = np.inf  # dB
# What a pitch network is to reach, by the noise and the score of it.
GOALS = {
    (_CLEAN, "rpa"): Goal("F0 within 50 cents, %", ">=", 97),
    (5.0, "rpa"): Goal("F0 within 50 cents in noise of 5 dB, %", ">=", 90),
    (_CLEAN, "vde"): Goal("voicing error, %", "<=", 4),
    (_CLEAN, "octave"): Goal("octave errors, %", "<=", 1),
}


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


def judge_named(
    name: str, network: Path | None, clips: Sequence[Known], snr: float
) -> dict[str, float]:
    """The same by name, for a process of its own."""
    return judge(tracker(name, network), clips, snr)


def _one_thread() -> None:
    """Processes share the cores; threads inside them would only wait for each other."""
    os.environ["OMP_NUM_THREADS"] = "1"


def judge_all(
    trackers: Mapping[str, Path | None],
    clips: Sequence[Known],
    snrs: Sequence[float],
    workers: int,
) -> dict[str, dict[str, dict[str, float]]]:
    """Scores of every tracker, by its name and the noise.

    Args:
        trackers: names, and the file of those that are networks.
        clips: what they hear.
        snrs: noise in dB below the clip, infinite for none.
        workers: processes; 1 listens in this one.
    """
    tasks = [
        (name, file, clips, snr) for name, file in trackers.items() for snr in snrs
    ]
    if min(workers, len(tasks)) <= 1:
        found = [judge_named(*task) for task in tasks]
    else:
        context = multiprocessing.get_context("spawn")  # forked threads would hang
        with ProcessPoolExecutor(workers, context, _one_thread) as pool:
            found = list(pool.map(judge_named, *zip(*tasks, strict=True)))
    scores: dict[str, dict[str, dict[str, float]]] = {name: {} for name in trackers}
    for (name, _, _, snr), row in zip(tasks, found, strict=True):
        scores[name][noise_name(snr)] = row
    return scores


def noise_name(snr: float) -> str:
    """Noise in words: ``"clean"``, ``"5 dB"``."""
    return f"{snr:g} dB" if np.isfinite(snr) else "clean"


def reached(
    scores: Mapping[str, Mapping[str, float]], clips: int
) -> list[dict[str, Any]]:
    """A row per goal of one tracker's scores by noise."""
    rows = []
    for (snr, kind), goal in GOALS.items():
        score = scores.get(noise_name(snr), {}).get(kind)
        rows.append(goal.row(None if score is None else 100 * score, clips))
    return rows


def chosen_trackers(network: Path | None, only: bool) -> dict[str, Path | None]:
    """Names of the network and of the others that are installed, with their file."""
    chosen: dict[str, Path | None] = {network.name: network} if network else {}
    for name, (module, _) in {} if only else OTHERS.items():
        if importlib.util.find_spec(module):
            chosen[name] = None
        else:
            log.info(f"{name}: {module} is not installed; left out")
    return chosen


def main(arguments: list[str] | None = None) -> None:
    """Print a JSON report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("corpus", nargs="+", type=Path)
    parser.add_argument("--network", type=Path)
    parser.add_argument("--clips", type=int, default=60)
    parser.add_argument("--snr", nargs="*", type=float, default=[np.inf, 20, 10, 5, 0])
    parser.add_argument("--only-network", action="store_true")
    parser.add_argument("--workers", type=int, default=processors(), help="processes")
    parser.add_argument("--report", type=Path, help="write the JSON here too")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    trackers = chosen_trackers(options.network, options.only_network)
    if not trackers:
        parser.error(
            "no tracker to judge: give --network, or install one of the others"
        )
    shards = read_shards(find_shards(options.corpus))
    clips = known_clips(shards, options.clips)
    scores = judge_all(trackers, clips, options.snr, options.workers)
    report = {
        "benchmark": "pitch",
        **describe(options.network, options.corpus, [OTHERS[n][0] for n in OTHERS]),
        "speakers": sorted({shard.speaker for shard in shards}),
        "clips": len(clips),
        "seconds": round(sum(len(clip.audio) for clip in clips) / SAMPLE_RATE, 1),
        "trackers": scores,
    }
    if options.network:
        report["goals"] = reached(scores[options.network.name], len(clips))
    text = json.dumps(report, indent=1)
    log.info(text)
    if options.report:
        options.report.parent.mkdir(parents=True, exist_ok=True)
        options.report.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
