"""What a run was started with, kept in its folder.

With ``run.json`` there, ``rvc-mlx train -o FOLDER --resume`` needs no other options;
those that are given take the place of what is kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from rvc_mlx.checkpoint import read_checkpoint
from rvc_mlx.models.voice_config import SynthesizerConfig
from rvc_mlx.training import filelist
from rvc_mlx.training.files import read_json, write_json
from rvc_mlx.training.presets import MEL_SCALES, TrainingConfig, preset
from rvc_mlx.training.run_options import RunOptions

RUN = "run.json"
_SPEAKERS = "emb_g.weight"


@dataclass(frozen=True)
class Plan:
    """Everything that was chosen about a run, but its data and its device.

    Attributes:
        config: the network's sizes.
        options: the run's.
        name: of the voice.
        author: who made it.
        embedder: name of the content encoder.
        hold_out: share of the clips kept for validation.
        validation_clips: clips spoken at each validation.
        started_from: pretrained files, each with its hash; none: random weights.
    """

    config: TrainingConfig
    options: RunOptions
    name: str
    author: str = ""
    embedder: str = "contentvec"
    hold_out: float = 0.02
    validation_clips: int = 8
    started_from: Sequence[str] = ()

    def save(self, folder: Path) -> None:
        """Keep the plan in the run's folder.

        Raises:
            OSError: the file cannot be written.
        """
        write_json(folder / RUN, asdict(self))

    def identity(self, world: int, data: str) -> dict[str, Any]:
        """What a continued run must share to go the same way, see ``write_state``.

        Args:
            world: processes that train together.
            data: see ``preparation.hash_data``.
        """
        kept = (
            "batch_size", "learning_rate", "decay", "precision", "adversarial_from",
            "seed",
        )  # fmt: skip
        return {
            "config": asdict(self.config),
            **{name: getattr(self.options, name) for name in kept},
            "hold_out": self.hold_out,
            "processes": world,
            "data": data,
        }

    @staticmethod
    def defaults() -> dict[str, Any]:
        """``identity`` of a run from before there were the options, as far as they go."""
        config = {**_defaults(TrainingConfig), "model": _defaults(SynthesizerConfig)}
        return {"config": config, **_defaults(RunOptions)}


def _defaults(kind: Any) -> dict[str, Any]:
    """Defaults of a dataclass, by field; those of later options change nothing."""
    return {f.name: f.default for f in fields(kind) if f.default is not MISSING}


_PLANNED = ("name", "author", "embedder", "hold_out", "validation_clips")
_CONFIG = ("prior_share", "content_weight")
_OPTIONS = tuple(field.name for field in fields(RunOptions))


def stored_plan(folder: Path, arguments: argparse.Namespace) -> Plan | None:
    """The plan of the run that is to be continued; None where one starts.

    Raises:
        ValueError: the file is damaged.
        OSError: it cannot be read.
    """
    path = folder / RUN
    if not arguments.resume or not path.exists():
        return None
    values = read_json(path)
    try:
        config = TrainingConfig.from_dict(values.pop("config"))
        return Plan(config, RunOptions(**values.pop("options")), **values)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: this is no plan of a run ({error}); start anew with --force"
        ) from error


def make_plan(folder: Path, arguments: argparse.Namespace) -> Plan:
    """The kept plan of a continued run, or a new one; with the options that are given.

    Raises:
        ValueError: options do not fit each other or the prepared data.
        OSError: a file cannot be read.
    """
    plan = stored_plan(folder, arguments)
    if plan is None:
        entries = filelist.read_filelist(folder / filelist.FILELIST)
        width = np.load(entries[0].features, mmap_mode="r").shape[1]
        speakers = 1 + max(entry.speaker for entry in entries)
        config = choose_config(arguments, speakers, width)
        if config.model.version != arguments.version and not arguments.config:
            raise ValueError(
                f"the features have {width} numbers each, which no voice of "
                f"{arguments.version} has (v1: 256, v2: others); pass the other "
                "--version, or prepare the data with another --encoder"
            )
        plan = Plan(config, RunOptions(), folder.name)
    given = {k: v for k, v in vars(arguments).items() if v is not None}
    options = {name: given[name] for name in _OPTIONS if name in given}
    planned = {name: given[name] for name in _PLANNED if name in given}
    weights = {name: given[name] for name in _CONFIG if name in given}
    if "multiscale_mel" in given:
        weights["mel_scales"] = MEL_SCALES if given["multiscale_mel"] else ()
    return replace(
        plan,
        config=replace(plan.config, **weights),
        options=replace(plan.options, **options),
        **planned,
    )


def choose_config(
    arguments: argparse.Namespace, speakers: int = 1, width: int | None = None
) -> TrainingConfig:
    """Sizes of a new run: a file's, or a preset's.

    Args:
        arguments: of the command line.
        speakers: in the data.
        width: of its features; None for the version's.

    Raises:
        ValueError: the file holds something else, or there is no such preset.
        OSError: a file cannot be read.
    """
    if arguments.config:
        path = Path(arguments.config)
        try:
            return TrainingConfig.from_dict(read_json(path))
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: these are no sizes of a run ({error}); take the 'config' of a "
                f"{RUN} as an example"
            ) from error
    if arguments.speakers:
        speakers = arguments.speakers
    elif arguments.pretrained_g:
        tensors = read_checkpoint(arguments.pretrained_g).tensors
        if _SPEAKERS in tensors:
            speakers = max(speakers, tensors[_SPEAKERS].shape[0])
    return preset(
        arguments.preset,
        arguments.version,
        arguments.f0,
        speakers,
        width,
        arguments.vocoder,
    )
