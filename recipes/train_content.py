"""Train the content encoder: ``python -m recipes.train_content CORPUS --work DIR``.

Stops after ``--minutes``; the same command continues. See ``recipes/README.md``.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from recipes import cli
from recipes.content_training import (
    CONFIG,
    ContentBatches,
    ContentTrainer,
    ContentWeights,
    content_loss,
    prepare,
)
from recipes.exporting import corpus_facts, export, start_from
from recipes.optimisation import Batch, Training
from recipes.parallel import parallel_speakers, read_pairs
from recipes.running import Watch, prefetch, run, write_history
from rvc_mlx.models.contentvec import ContentVecConfig
from rvc_mlx.training.distributed import Group, connect

log = logging.getLogger("recipes")


def prepared(
    batches: ContentBatches, first: int, frames: int, group: Group | None
) -> Iterator[Batch]:
    """Augmented batches from step ``first`` on; the host part runs ahead."""
    for batch in prefetch(batches, first, group):
        ready = prepare(batch, frames)
        mx.async_eval(ready)
        yield ready


def export_encoder(
    path: Path, training: Training, config: ContentVecConfig, facts: Mapping[str, str]
) -> None:
    """Write the encoder, and the phone classifier beside it as ``.head.safetensors``."""
    network = training.finished_network()
    told = {"num_heads": config.num_heads, "steps": training.step, **facts}
    export(path, network.encoder, "contentvec", told)
    head = dict(tree_flatten(network.head.parameters()))
    mx.save_safetensors(str(path.with_suffix(".head.safetensors")), head)


def main(arguments: list[str] | None = None) -> None:
    """Train, save, export."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cli.add_training_options(parser)
    parser.add_argument("--frames", type=int, default=200, help="per clip, 50 a second")
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--pair", type=float, default=ContentWeights.pair)
    parser.add_argument("--speaker", type=float, default=ContentWeights.speaker)
    parser.add_argument("--spectra", type=float, default=ContentWeights.spectra)
    parser.add_argument(
        "--parallel",
        type=Path,
        nargs="+",
        action="append",
        default=[],
        metavar="FOLDER",
        help="of recipes.dub, and the strangers it was given; once for each voice",
    )
    parser.add_argument("--precision", choices=("bf16", "f32"), default="bf16")
    parser.add_argument("--config", type=json.loads, default={}, help="JSON of sizes")
    options = parser.parse_args(arguments)
    group = connect()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    shards = cli.read_corpus(options.corpus, options.leave_out)
    shards = [shard for shard in shards if len(shard.classes)]
    pairs = read_pairs(options.parallel)
    batches = ContentBatches(
        shards, options.batch, options.frames, options.seed, pairs=pairs
    )
    config = ContentVecConfig(**{**vars(CONFIG), **options.config})
    mx.random.seed(options.seed)
    network = ContentTrainer(config, len(batches.speakers), len(options.parallel))
    if options.start:
        start_from(options.start, network.encoder, "contentvec")
        head = mx.load(str(options.start.with_suffix(".head.safetensors")))
        network.head.load_weights(list(head.items()))
    training = Training(
        network,
        content_loss(ContentWeights(options.pair, options.speaker, options.spectra)),
        cli.schedule(options, options.learning_rate),
        mx.bfloat16 if options.precision == "bf16" else mx.float32,
        compiled=options.compile,
        group=group,
    )
    watch = Watch(
        options.work / "content.safetensors", options.minutes, options.log_every
    )
    cli.resume(training, watch)
    made = prepared(batches, training.step, options.frames, group)
    history = run(training, made, watch)
    if training.rank != 0:
        return
    strangers = [folder.parent for _, *others in options.parallel for folder in others]
    heard = {*batches.speakers, *parallel_speakers(options.parallel)}
    facts = corpus_facts([*options.corpus, *strangers], sorted(heard))
    facts["seed"] = str(options.seed)
    if pairs:
        facts["parallel"] = " ".join(folder.name for folder, *_ in options.parallel)
    facts |= cli.start_facts(options)
    write_history(options.work / "content.jsonl", history, facts)
    if options.export:
        export_encoder(options.export, training, config, facts)
        log.info(f"wrote {options.export}")


if __name__ == "__main__":
    main()
