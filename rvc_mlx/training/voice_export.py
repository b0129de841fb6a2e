"""Voices and training checkpoints in the layouts of the public programs.

A voice is the generator without its posterior encoder, in half precision, with
weight-norm pairs under their old names, and beside it the list of 18 settings and what
Applio and the WebUI show. ``G_*.pth`` and ``D_*.pth`` hold the float32 networks whole.
All are written without PyTorch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from rvc_mlx.checkpoint import read_checkpoint
from rvc_mlx.formats.torch_writer import write_torch
from rvc_mlx.models.voice_config import SynthesizerConfig, public_config
from rvc_mlx.training.files import read_json
from rvc_mlx.training.parametrization import to_torch
from rvc_mlx.training.plan import RUN
from rvc_mlx.training.presets import TrainingConfig
from rvc_mlx.training.state import replacing, write_tensors
from rvc_mlx.version import __version__

Tensors = Mapping[str, np.ndarray]

_SPELLINGS = {
    ".parametrizations.weight.original0": ".weight_g",
    ".parametrizations.weight.original1": ".weight_v",
}
_RATE_NAMES = {32000: "32k", 40000: "40k", 48000: "48k"}
_LISTED_SEGMENT = 32  # public voices say so, whatever they were trained with
_HALF_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class VoiceFacts:
    """What a voice's file says about it, beside its settings.

    Attributes:
        name: of the voice.
        epoch: epochs trained.
        step: steps trained.
        author: who made it.
        info: free text; empty for "<epoch>epoch", as the WebUI writes it.
        seconds: of recordings that it was trained on; None if unknown.
        speakers: whose embeddings were trained; the rows may be more.
        embedder: content encoder that it wants.
    """

    name: str = "voice"
    epoch: int = 0
    step: int = 0
    author: str = ""
    info: str = ""
    seconds: float | None = None
    speakers: int = 1
    embedder: str = "contentvec"


def voice_tensors(generator: Tensors) -> dict[str, np.ndarray]:
    """The half-precision state dict of a voice.

    Args:
        generator: float state dict in torch layout, with or without ``enc_q``; either
            spelling of weight norm.

    Raises:
        ValueError: a value is not finite or beyond half precision; names the tensor.
    """
    tensors: dict[str, np.ndarray] = {}
    for name, value in generator.items():
        if name.startswith("enc_q."):
            continue
        largest = float(np.abs(value).max()) if value.size else 0.0
        if not largest <= _HALF_MAX:  # also when it is not a number
            raise ValueError(
                f"{name}: its largest value is {largest:g}; half precision ends at "
                f"{_HALF_MAX:g}, so this network has diverged; export an earlier one"
            )
        tensors[_old_name(name)] = np.ascontiguousarray(value, np.float16)
    return tensors


def _old_name(name: str) -> str:
    for new, old in _SPELLINGS.items():
        if name.endswith(new):
            return name.removesuffix(new) + old
    return name


def voice_metadata(config: SynthesizerConfig, facts: VoiceFacts) -> dict[str, Any]:
    """Everything of a voice's file beside ``weight``, in the public order and types."""
    listed = config.as_list()
    listed[1] = _LISTED_SEGMENT
    rate = _RATE_NAMES.get(config.sample_rate, str(config.sample_rate))
    identity = (
        f"{facts.name}-{facts.epoch}-{facts.step}-{config.sample_rate}-"
        f"{config.version}-{listed}"
    )
    return {
        "config": listed,
        "info": facts.info or f"{facts.epoch}epoch",
        "sr": rate,
        "f0": int(config.f0),
        "version": config.version,
        "epoch": facts.epoch,
        "step": facts.step,
        "model_name": facts.name,
        "author": facts.author,
        "embedder_model": facts.embedder,
        "speakers_id": facts.speakers,
        "vocoder": config.vocoder,
        "dataset_length": _duration(facts.seconds),
        "model_hash": hashlib.sha256(identity.encode()).hexdigest(),
        "trained_by": f"rvc_mlx {__version__}",
    }


def _duration(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest:02}"


def write_voice(
    path: str | Path, generator: Tensors, config: SynthesizerConfig, facts: VoiceFacts
) -> None:
    """Write a voice; both formats hold the same tensors.

    Args:
        path: ``.pth`` as Applio and the WebUI load it, or ``.safetensors``.
        generator: see ``voice_tensors``.
        config: of the network.
        facts: what else the file says.

    Raises:
        ValueError: another suffix, or a network that has diverged.
        OSError: the file cannot be written; an existing one is unchanged.
    """
    path = Path(path)
    metadata = voice_metadata(config, facts)
    tensors = voice_tensors(generator)
    if path.suffix == ".pth":
        with replacing(path) as partial:
            write_torch(partial, {"weight": tensors, **metadata})
    elif path.suffix == ".safetensors":
        texts = {k: json.dumps(v) for k, v in {"kind": "voice", **metadata}.items()}
        with replacing(path) as partial:
            write_tensors(partial, tensors, texts)
    else:
        raise ValueError(
            f"{path}: a voice is written as .pth or .safetensors, not "
            f"{path.suffix or 'without a suffix'}; choose one of those names"
        )


def write_training_checkpoint(
    path: str | Path,
    model: Tensors,
    epoch: int,
    learning_rate: float,
    config: SynthesizerConfig | None = None,
) -> None:
    """Write ``G_*.pth`` or ``D_*.pth`` in the public layout, without optimiser.

    Public trainers take such a file as a pretrained one. To continue a run of this
    program bit by bit, its own state is there.

    Args:
        path: the file.
        model: float32 state dict in torch layout.
        epoch: epochs done.
        learning_rate: the one the run started with.
        config: of a generator, so that a voice of any size can be extracted from it.

    Raises:
        OSError: the file cannot be written; an existing one is unchanged.
    """
    value = {
        "model": {_old_name(name): array for name, array in model.items()},
        "iteration": epoch,
        "optimizer": {},
        "learning_rate": learning_rate,
    }
    if config is not None:
        value["config"] = config.as_list()
    with replacing(path) as partial:
        write_torch(partial, value)


def extract_voice(
    source: str | Path, targets: Sequence[Path], facts: VoiceFacts
) -> SynthesizerConfig:
    """Turn a training checkpoint of the generator into a voice.

    Args:
        source: ``G_*.pth`` of this program or of a public one, with or without a config;
            or ``state.safetensors`` in a run's folder, which holds the generator as it is
            now.
        targets: ``.pth`` or ``.safetensors`` files to write.
        facts: what the voice's file says; epoch and step are the checkpoint's, and of a
            run what its own voices say, except the name, the info and an author.

    Returns:
        The voice's settings.

    Raises:
        ValueError: it is no generator, or one of none of RVC's sizes, or a state away
            from its run.
        OSError: a file cannot be read or written.
    """
    checkpoint = read_checkpoint(source)
    tensors: Tensors = checkpoint.tensors
    metadata: Mapping[str, Any] = checkpoint.metadata
    if "progress" in metadata and "identity" in metadata:
        tensors, metadata = _generator_of_run(source, tensors, metadata)
        told = _facts_of_run(Path(source).parent)
        author = facts.author or told.author
        facts = replace(told, name=facts.name, info=facts.info, author=author)
    if "enc_p.emb_phone.weight" not in tensors or "emb_g.weight" not in tensors:
        hint = (
            "a discriminator; give the G_*.pth beside it"
            if any(name.startswith("discriminators.") for name in tensors)
            else "no generator of RVC; expected a G_*.pth"
        )
        raise ValueError(f"{source}: this is {hint}")
    try:
        listed = metadata.get("config") or public_config(tensors)
        config = SynthesizerConfig.from_tensors(listed, tensors)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    epoch, step = (_integer(metadata.get(name)) for name in ("iteration", "step"))
    facts = replace(facts, epoch=epoch, step=step)
    floats = {name: value.astype(np.float32) for name, value in tensors.items()}
    for target in targets:
        write_voice(target, floats, config, facts)
    return config


def _generator_of_run(
    source: str | Path, tensors: Tensors, metadata: Mapping[str, Any]
) -> tuple[Tensors, dict[str, Any]]:
    """A run's state as a training checkpoint of its generator."""
    try:
        config = TrainingConfig.from_dict(metadata["identity"]["config"]).model
        epoch, step = (metadata["progress"][name] for name in ("epoch", "step"))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{source}: this is no saved run of rvc-mlx train") from error
    generator = {
        name.removeprefix("g."): mx.array(value)
        for name, value in tensors.items()
        if name.startswith("g.")
    }
    found = {"config": config.as_list(), "iteration": epoch, "step": step}
    return to_torch(generator), found


def _facts_of_run(folder: Path) -> VoiceFacts:
    """What the voices of a run say, from its settings and the voice that it has so far."""
    path = folder / RUN
    if not path.is_file():
        raise ValueError(
            f"{path}: there is no such file, which tells what the voice was made with; "
            "leave the state in its run's folder"
        )
    told = read_json(path)
    try:
        facts = VoiceFacts(
            told["name"], author=told["author"], embedder=told["embedder"]
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: these are no settings of a run") from error
    voice = folder / f"{facts.name}.safetensors"
    if not voice.is_file():
        return facts
    known = read_checkpoint(voice).metadata
    parts = str(known.get("dataset_length") or "").split(":")
    if len(parts) == 3 and all(part.isdigit() for part in parts):
        hours, minutes, seconds = map(int, parts)
        facts = replace(facts, seconds=3600 * hours + 60 * minutes + seconds)
    return replace(facts, speakers=_integer(known.get("speakers_id")) or 1)


def _integer(value: Any) -> int:
    return int(value) if isinstance(value, int | float) and math.isfinite(value) else 0
