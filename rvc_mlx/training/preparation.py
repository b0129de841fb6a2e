"""From recordings to what a run reads: clips, features, pitch and their list."""

from __future__ import annotations

import argparse
import hashlib
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rvc_mlx.checkpoint import hash_file
from rvc_mlx.download import locate
from rvc_mlx.engine import choose_engine
from rvc_mlx.loading import Encoder, Engine, PitchNet, find_weights, read_weights
from rvc_mlx.machine import cache_folder
from rvc_mlx.training import features, filelist
from rvc_mlx.training.filelist import Entry
from rvc_mlx.training.plan import choose_config, stored_plan
from rvc_mlx.training.preprocess import preprocess

_LOG = logging.getLogger("rvc_mlx")


def prepare(folder: Path, arguments: argparse.Namespace) -> None:
    """Make what is not there yet; without recordings it must all be there.

    Raises:
        ValueError: inputs that do not fit, or nothing in them can be trained on.
        OSError: something is missing, or cannot be read or written.
    """
    inputs = [Path(item) for item in arguments.inputs + arguments.more]
    if not inputs:
        if not (folder / filelist.FILELIST).is_file():
            raise FileNotFoundError(
                f"{folder}: no prepared data in this folder; name the folders of the "
                "recordings"
            )
        return
    stored = stored_plan(folder, arguments)
    model = (stored.config if stored else choose_config(arguments)).model
    workers = arguments.cpu_cores
    with _bar("recordings") as progress:
        report = preprocess(
            inputs, folder, model.sample_rate, workers=workers, progress=progress
        )
    if report.problems:
        lost = sum(not problem.used for problem in report.problems)
        _LOG.info(
            "%d remarks on the recordings, %d on what is left out of them: see %s",
            len(report.problems), lost, report.folder / "report.txt",
        )  # fmt: skip
    encoder = find_encoder(arguments)
    pitch_net = find_pitch_net(arguments, required=True) if model.f0 else None
    with _bar("features") as progress:
        features.extract_features(
            folder, encoder, pitch_net, model.version, progress=progress
        )
    filelist.write_filelist(folder, mutes=arguments.include_mutes, f0=model.f0)


def _engine(arguments: argparse.Namespace) -> Engine:
    return choose_engine(arguments.device, "f32", cache_folder() / "compiled")


def find_encoder(arguments: argparse.Namespace) -> Encoder:
    """The content encoder that was named or downloaded.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is something else.
    """
    path = arguments.encoder or find_weights("contentvec", "contentvec")
    return Encoder(read_weights(path, "contentvec"), _engine(arguments))


def find_pitch_net(arguments: argparse.Namespace, required: bool) -> PitchNet | None:
    """The pitch network that was named or downloaded.

    Raises:
        FileNotFoundError: it is required and there is none.
        ValueError: the file is something else.
    """
    path = arguments.rmvpe or (
        find_weights("rmvpe", "rmvpe") if required else locate("rmvpe")
    )
    if path is None:
        return None
    return PitchNet(read_weights(path, "rmvpe"), _engine(arguments))


@contextmanager
def _bar(name: str) -> Iterator[Callable[[float, float], None] | None]:
    """A progress bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def hash_data(folder: Path, entries: Sequence[Entry]) -> str:
    """Changes when the clips, their order, speakers, lengths or features change."""
    digest = hashlib.sha256()
    for entry in entries:
        line = f"{entry.wave.name} {entry.wave.stat().st_size} {entry.speaker}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
        if features.from_elsewhere(entry.features):
            digest.update(hash_file(entry.features).encode())
    settings = folder / features.SETTINGS
    if settings.is_file():
        digest.update(settings.read_bytes())
    return digest.hexdigest()
