"""Train the pitch network: ``python -m recipes.train_pitch CORPUS --work DIR``.

Stops after ``--minutes``; the same command continues. See ``recipes/README.md``.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator

import mlx.core as mx

from recipes import cli
from recipes.calibrate_pitch import calibrate
from recipes.exporting import corpus_facts, export, start_from
from recipes.optimisation import Batch, Training
from recipes.pitch_training import (
    CONFIG,
    PitchBatches,
    PitchTrainer,
    pitch_loss,
    prepare,
)
from recipes.running import Watch, prefetch, run, write_history
from rvc_mlx.models.rmvpe import RMVPEConfig
from rvc_mlx.training.distributed import Group, connect

log = logging.getLogger("recipes")


def prepared(
    batches: PitchBatches, first: int, n_mels: int, group: Group | None
) -> Iterator[Batch]:
    """Augmented batches from step ``first`` on; the host part runs ahead."""
    for batch in prefetch(batches, first, group):
        ready = prepare(batch, batches.length, n_mels)
        mx.async_eval(ready)
        yield ready


def main(arguments: list[str] | None = None) -> None:
    """Train, save, calibrate, export."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cli.add_training_options(parser)
    parser.add_argument(
        "--frames", type=int, default=160, help="per clip, 100 a second"
    )
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--config", type=json.loads, default={}, help="JSON of sizes")
    options = parser.parse_args(arguments)
    group = connect()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    shards = cli.read_corpus(options.corpus, options.leave_out)
    batches = PitchBatches(shards, options.batch, options.frames, options.seed)
    config = RMVPEConfig(**{**vars(CONFIG), **options.config})
    mx.random.seed(options.seed)
    network = PitchTrainer(config)
    if options.start:
        start_from(options.start, network.rmvpe, "rmvpe")
    training = Training(
        network,
        pitch_loss,
        cli.schedule(options, options.learning_rate),
        compiled=options.compile,
        group=group,
    )
    watch = Watch(
        options.work / "pitch.safetensors", options.minutes, options.log_every
    )
    cli.resume(training, watch)
    made = prepared(batches, training.step, config.n_mels, group)
    history = run(training, made, watch)
    if training.rank != 0:
        return
    speakers = sorted({shard.speaker for shard in shards if len(shard.f0)})
    facts = corpus_facts(options.corpus, speakers)
    facts["seed"] = str(options.seed)
    facts |= cli.start_facts(options)
    write_history(options.work / "pitch.jsonl", history, facts)
    if options.export:
        unseen = PitchBatches(
            shards, options.batch, options.frames, options.seed + 10**6
        )
        facts["threshold_before_calibration"] = (
            f"{calibrate(training.finished_network(), unseen):.4f}"
        )
        facts["steps"] = str(training.step)
        export(options.export, training.network.rmvpe, "rmvpe", facts)
        log.info(f"wrote {options.export}")


if __name__ == "__main__":
    main()
