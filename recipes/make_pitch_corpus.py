"""Synthesise the corpus with exact F0: ``python -m recipes.make_pitch_corpus``.

Clips of the speech corpus keep their spectral envelopes and get other contours; several
per clip, since the analysis costs more than the synthesis. Shards that exist are kept.
``--rough`` makes a share of them creak, as many a person's voice does.
"""

from __future__ import annotations

import argparse
import logging
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from recipes.contours import random_contour
from recipes.corpus import Clip, Shard, find_shards, make_clip, read_shard, write_shard
from recipes.exporting import corpus_packages, write_provenance
from recipes.harmonics import analyse, random_roughness, resynthesise, warp_formants
from rvc_mlx.audio import SAMPLE_RATE

log = logging.getLogger("recipes")

_CONTOURS = 3  # per clip
_LONGEST = 6 * SAMPLE_RATE  # samples used of a clip
_LEAST_VOICED = 0.15  # share of frames


def sung_clips(
    samples: np.ndarray, rng: np.random.Generator, rough: float = 0.0
) -> list[Clip]:
    """A recording on several contours, formants warped; none if it is hardly voiced.

    Args:
        samples: ``[n]`` float32 at 16 kHz.
        rng: source of randomness.
        rough: share of them whose voice creaks.
    """
    analysis = analyse(samples)
    if analysis.voiced.mean() < _LEAST_VOICED:
        return []
    clips = []
    for _ in range(_CONTOURS):
        warped = warp_formants(analysis, np.exp(rng.uniform(np.log(0.8), np.log(1.25))))
        contour = random_contour(analysis, rng)
        creak = None
        if rough and rng.random() < rough:  # without it, the draws are as they were
            creak = random_roughness(len(contour), rng)
        clips.append(
            make_clip(
                resynthesise(warped, contour, rng, creak),
                f0=contour,
                voiced=analysis.voiced,
            )
        )
    return clips


def make_shard(
    source: Path,
    stem: Path,
    minutes: float,
    seed: int,
    deadline: float,
    rough: float = 0.0,
) -> str:
    """Write one shard from clips of ``source`` unless it exists or the time is over.

    Returns:
        One line for the log.
    """
    if stem.with_suffix(".npz").is_file() and stem.with_suffix(".ogg").is_file():
        return f"{stem.name}: there already"
    if time.time() > deadline:
        return f"{stem.name}: not made, time is over"
    began = time.time()
    rng = np.random.default_rng([seed, zlib.crc32(stem.name.encode())])
    shard = read_shard(source)
    clips: list[Clip] = []
    seconds = 0.0
    for index in rng.permutation(len(shard.clips)):
        made = sung_clips(_one_clip(shard, index), rng, rough)
        clips += made
        seconds += sum(len(clip.samples) for clip in made) / SAMPLE_RATE
        if seconds >= 60 * minutes:
            break
    write_shard(stem, clips)
    took = time.time() - began
    return f"{stem.name}: {len(clips)} clips, {seconds:.0f} s in {took:.0f} s"


def _one_clip(shard: Shard, index: int) -> np.ndarray:
    start = shard.clips[index - 1] if index else 0
    stop = min(shard.clips[index], start + _LONGEST)
    return shard.samples[start:stop].astype(np.float32) / 32768


def main(arguments: list[str] | None = None) -> None:
    """Make the corpus."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("speech", type=Path, help="folder of the speech corpus")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parts", type=int, default=2)
    parser.add_argument("--speakers", nargs="*", help="only these (default: all)")
    parser.add_argument("--leave-out", nargs="*", default=["rms"])
    parser.add_argument("--shard-minutes", type=float, default=4.0, help="per shard")
    parser.add_argument("--minutes", type=float, default=1e6, help="then start no more")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--rough", type=float, default=0.0, help="share whose voice creaks (default: 0)"
    )
    options = parser.parse_args(arguments)
    if not 0 <= options.rough <= 1:
        raise ValueError(f"--rough {options.rough:g}; expected a share, 0 to 1")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    # What spoke is not only what is installed now.
    made_with = corpus_packages([options.speech])
    told = {"rough": options.rough} if options.rough else {}
    write_provenance(options.folder, options.seed, others=made_with, **told)
    deadline = time.time() + 60 * options.minutes
    sources = [
        path
        for path in find_shards([options.speech])
        if (name := path.stem.rsplit("-", 1)[0]) not in options.leave_out
        and (not options.speakers or name in options.speakers)
    ]
    order = np.random.default_rng(options.seed).permutation(len(sources))
    with ProcessPoolExecutor(options.workers) as pool:
        jobs = [
            pool.submit(
                make_shard,
                sources[index],
                options.folder / f"part-{i % options.parts}" / sources[index].stem,
                options.shard_minutes,
                options.seed,
                deadline,
                options.rough,
            )
            for i, index in enumerate(order)
        ]
        for job in jobs:
            log.info(job.result())


if __name__ == "__main__":
    main()
