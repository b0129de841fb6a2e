"""Options that the training commands share."""

from __future__ import annotations

import argparse
import fnmatch
import logging
from collections.abc import Sequence
from pathlib import Path

from recipes.corpus import Shard, find_shards, read_shards, speaker_of
from recipes.optimisation import Schedule, Training
from recipes.running import Watch
from rvc_mlx import compiling
from rvc_mlx.checkpoint import name_and_hash

log = logging.getLogger("recipes")


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Corpus, limits and paths."""
    parser.add_argument("corpus", nargs="+", type=Path, help="folders with shards")
    parser.add_argument("--work", type=Path, required=True, help="folder of the state")
    parser.add_argument("--steps", type=int, default=20000, help="of the training")
    parser.add_argument(
        "--total-minutes", type=float, default=1e9, help="of the training, all calls"
    )
    parser.add_argument("--minutes", type=float, default=1e9, help="of this call")
    parser.add_argument("--leave-out", nargs="*", default=[], help="speakers, or f*")
    parser.add_argument("--batch", type=int, default=64, help="per process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument(
        "--compile", choices=compiling.WAYS, default="traced", help="the step"
    )
    parser.add_argument("--start", type=Path, help="exported weights to start from")
    parser.add_argument("--export", type=Path, help="write the weights here afterwards")


def read_corpus(folders: Sequence[Path], leave_out: Sequence[str]) -> list[Shard]:
    """Decode the shards of all speakers but some.

    Raises:
        ValueError: a name in ``leave_out`` is nobody's.
    """
    paths = find_shards(folders)
    names = {speaker_of(path) for path in paths}
    for pattern in leave_out:
        if not fnmatch.filter(names, pattern):
            raise ValueError(
                f"--leave-out {pattern}: no such speaker; there are "
                f"{', '.join(sorted(names))}"
            )
    out = {name for pattern in leave_out for name in fnmatch.filter(names, pattern)}
    shards = read_shards([path for path in paths if speaker_of(path) not in out])
    hours = sum(len(shard.samples) for shard in shards) / 16000 / 3600
    log.info(f"{len(shards)} shards, {len(names - out)} speakers, {hours:.2f} h")
    return shards


def schedule(options: argparse.Namespace, learning_rate: float) -> Schedule:
    """The schedule that the options ask for."""
    return Schedule(learning_rate, options.steps, options.total_minutes)


def start_facts(options: argparse.Namespace) -> dict[str, str]:
    """What the metadata tells of the weights that a training started from, if of any."""
    return {"started_from": name_and_hash(options.start)} if options.start else {}


def resume(training: Training, watch: Watch) -> None:
    """Load the state if there is one."""
    if watch.checkpoint.is_file():
        training.load(watch.checkpoint)
        log.info(f"continuing at step {training.step} of {watch.checkpoint}")
