"""What ``rvc-mlx train`` and ``rvc-mlx index`` do: the parts of a run, put together."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from rvc_mlx.engine import gpu_available
from rvc_mlx.training import filelist
from rvc_mlx.training.commands import refuse_overwrite, say
from rvc_mlx.training.dataset import TrainingSet, cache_size
from rvc_mlx.training.distributed import Group, agree, connect, rank_of, share_start
from rvc_mlx.training.features import made_features
from rvc_mlx.training.filelist import Entry
from rvc_mlx.training.files import locked, make_folders
from rvc_mlx.training.index import CENTRES, build_index
from rvc_mlx.training.keeper import Keeper
from rvc_mlx.training.listener import Listener, make_listener
from rvc_mlx.training.monitor import Monitor
from rvc_mlx.training.plan import RUN, Plan, make_plan
from rvc_mlx.training.preparation import (
    find_encoder,
    find_pitch_net,
    hash_data,
    prepare,
)
from rvc_mlx.training.pretrained import Pretrained, load_pretrained
from rvc_mlx.training.state import Progress
from rvc_mlx.training.step import AdamW, TrainStep
from rvc_mlx.training.trainer import STATE, Trainer
from rvc_mlx.training.validation import Validator
from rvc_mlx.training.voice_export import VoiceFacts

_LOG = logging.getLogger("rvc_mlx")
_INDEX_ROWS = {"faiss": sys.maxsize, "kmeans": CENTRES}  # beyond them, k-means


def train(arguments: argparse.Namespace) -> int:
    """Run ``rvc-mlx train``; returns the exit code.

    Raises:
        ValueError: the arguments do not fit each other, the data or the earlier run.
        OSError: something cannot be read or written.
        RuntimeError: the run has diverged, or the device failed.
        ImportError: an optional package that is wanted is missing.
    """
    _LOG.setLevel(logging.INFO)
    folder = Path(arguments.output).absolute()
    _choose_device(arguments.device)
    _check_start(folder, arguments)
    group = connect()
    rank, _ = rank_of(group)
    if rank == 0:
        make_folders(folder)
        prepare(folder, arguments)
    agree([0.0], group)  # the others wait for the data
    plan = make_plan(folder, arguments)
    with locked(folder) if rank == 0 else nullcontext():
        progress = _run(folder, plan, arguments, group)
    if rank == 0:
        _finish(folder, plan, arguments, progress)
    return 0


def _choose_device(name: str) -> None:
    if name == "gpu" and not gpu_available():
        raise ValueError("--device gpu: MLX has no GPU here; leave the option out")
    if name == "cpu":
        mx.set_default_device(mx.cpu)


def _check_start(folder: Path, arguments: argparse.Namespace) -> None:
    """Refuse before the hours of work what would fail or lose something after them."""
    if (folder / STATE).exists() and not (arguments.resume or arguments.force):
        raise FileExistsError(
            f"{folder}: a run is in this folder; continue it with --resume, or replace "
            "it with --force"
        )
    if arguments.index and importlib.util.find_spec("faiss") is None:
        raise ModuleNotFoundError(
            "the index at the end needs faiss; install it with: pip install "
            "'rvc-mlx[train]' (or pass --index no)"
        )


def _run(
    folder: Path, plan: Plan, arguments: argparse.Namespace, group: Group | None
) -> Progress:
    rank, world = rank_of(group)
    config, options = plan.config, plan.options
    entries = filelist.read_filelist(folder / filelist.FILELIST)
    trained, held_out = filelist.hold_out(entries, plan.hold_out, options.seed)
    data = TrainingSet(
        folder,
        config,
        options.batch_size,
        options.seed,
        entries=trained,
        cache_bytes=cache_size(world),
    )
    start = load_pretrained(
        arguments.pretrained_g, arguments.pretrained_d, config, options.seed
    )
    if arguments.resume:  # before the ranks meet, after which the first writes the plan
        _check_sources(folder, plan, start)
    trainer = Trainer(
        folder,
        config,
        options,
        _networks(folder, plan, start, arguments, group),
        data,
        _validator(folder, plan, arguments, held_out, rank) if held_out else None,
        _keeper(folder, plan, data, bool(arguments.save_only_latest)),
        group,
    )
    identity = plan.identity(world, hash_data(folder, entries))
    if arguments.resume:
        trainer.resume(identity, plan.defaults())
    if rank != 0:
        return trainer.run(identity, None)
    if arguments.force:
        (folder / STATE).unlink(missing_ok=True)
    done = trainer.progress
    if not done.step:
        plan = replace(plan, started_from=start.sources)
    plan.save(folder)
    _LOG.info(
        "%d clips with silence, %d held out, %d steps per epoch; %d epochs on %s, %s",
        len(trained), len(held_out), data.steps(world), options.epochs,
        mx.default_device(), options.precision,
    )  # fmt: skip
    with Monitor(folder, done.step, done.epoch, arguments.tensorboard) as monitor:
        return trainer.run(identity, monitor)


def _check_sources(folder: Path, plan: Plan, start: Pretrained) -> None:
    """Refuse to begin a run again, which has saved nothing, from other weights."""
    same = list(plan.started_from) == list(start.sources)
    if same or (folder / STATE).exists() or not (folder / RUN).exists():
        return
    kept, given = (
        " and ".join(sources) or "random weights"
        for sources in (plan.started_from, start.sources)
    )
    raise ValueError(
        f"{folder}: this run was started from {kept}, not {given}, and has saved nothing "
        "yet; give the same --pretrained-g and --pretrained-d, or start anew with --force"
    )


def _networks(
    folder: Path,
    plan: Plan,
    start: Pretrained,
    arguments: argparse.Namespace,
    group: Group | None,
) -> TrainStep:
    options = plan.options
    for note in start.notes:
        _LOG.info("%s", note)
    step = TrainStep(
        plan.config,
        start.generator,
        start.discriminator,
        optimizer=AdamW(options.learning_rate),
        precision=options.precision,
        listener=_listener(folder, plan, arguments),
        world=group,
        compiled=arguments.compile,
    )
    if group:
        step.state = share_start(step.state, group)
    return step


def _listener(
    folder: Path, plan: Plan, arguments: argparse.Namespace
) -> Listener | None:
    """None where nobody is to listen.

    Raises:
        ValueError: the encoder is not the one that made the features.
        OSError: there is none, or it cannot be read.
    """
    if not plan.config.content_weight:
        return None
    encoder = find_encoder(arguments)
    known = made_features(folder, encoder)
    if known is False:
        raise ValueError(
            f"{encoder.path}: another encoder made the features in {folder}; "
            "--content-weight needs that one, pass it with --encoder"
        )
    if known is None:
        say(
            f"{folder} does not tell which encoder made its features; {encoder.path} is "
            "taken for it"
        )
    return make_listener(encoder, plan.config)


def _validator(
    folder: Path,
    plan: Plan,
    arguments: argparse.Namespace,
    held_out: list[Entry],
    rank: int,
) -> Validator | None:
    """Rank 0 has one that scores everything; the others only know that there is one."""
    if not plan.validation_clips:
        return None
    seed = plan.options.seed
    batches = TrainingSet(folder, plan.config, 1, seed, entries=held_out).batches(0)
    if rank != 0:
        return Validator(plan.config, batches, 1, similarity=False)
    pitch_net = find_pitch_net(arguments, required=False)
    if pitch_net is None and plan.config.model.f0:
        _LOG.info("no F0 scores: no pitch network found (option --rmvpe)")
    return Validator(
        plan.config,
        batches,
        plan.validation_clips,
        pitch_net,
        seed,
        arguments.similarity,
    )


def _keeper(folder: Path, plan: Plan, data: TrainingSet, only_latest: bool) -> Keeper:
    # Each stretch of sound once, whatever number of features it has.
    frames = sum({(i.entry.wave, i.first): i.frames for i in data.items}.values())
    facts = VoiceFacts(
        plan.name,
        author=plan.author,
        seconds=frames * plan.config.hop / plan.config.model.sample_rate,
        speakers=1 + max(item.entry.speaker for item in data.items),
        embedder=plan.embedder,
    )
    rate = plan.options.learning_rate
    return Keeper(folder, plan.config.model, facts, rate, only_latest)


def _finish(
    folder: Path, plan: Plan, arguments: argparse.Namespace, progress: Progress
) -> None:
    if arguments.index:
        path = folder / f"{plan.name}.index"
        _build(folder, path, plan.config.model.version, arguments)
        say(f"index {path}")
    voice = folder / f"{plan.name}.pth"
    early = ", stopped early" if progress.stopped else ""
    best = f", best epoch {progress.best_epoch}" if progress.best_epoch else ""
    say(f"voice {voice}: {progress.epoch} epochs, {progress.step} steps{best}{early}")


def _build(
    folder: Path, path: Path, version: str, arguments: argparse.Namespace
) -> None:
    rows = _INDEX_ROWS.get(arguments.index_algorithm)
    if rows is None:
        build_index(folder, path, version)
    else:
        build_index(folder, path, version, max_rows=rows)


def index_folder(arguments: argparse.Namespace) -> int:
    """Run ``rvc-mlx index``; returns the exit code.

    Raises:
        ModuleNotFoundError: faiss is missing.
        ValueError: there are no usable features.
        OSError: something cannot be read or written.
    """
    folder = Path(arguments.folder).absolute()
    target = Path(arguments.output or folder / f"{folder.name}.index")
    refuse_overwrite([target], arguments.force)
    _build(folder, target, arguments.version, arguments)
    say(f"{folder} -> {target}")
    return 0
