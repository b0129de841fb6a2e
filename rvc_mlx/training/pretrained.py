"""Fine-tuning from public ``f0G*.pth`` and ``f0D*.pth``: every tensor loaded or named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from rvc_mlx.checkpoint import name_and_hash, read_checkpoint
from rvc_mlx.training.parametrization import Parameters, from_torch, initial, to_torch
from rvc_mlx.training.presets import TrainingConfig

_SPEAKERS = "emb_g.weight"
_PHONES = "enc_p.emb_phone.weight"
_POSTERIOR = "enc_q."


@dataclass(frozen=True)
class Pretrained:
    """Where a fine-tuning run starts.

    Attributes:
        generator: parameters.
        discriminator: parameters.
        notes: one line for each file, and for each tensor not taken as it is.
        sources: name and hash of each file.
    """

    generator: Parameters
    discriminator: Parameters
    notes: tuple[str, ...]
    sources: tuple[str, ...]


def load_pretrained(
    generator: str | Path | None,
    discriminator: str | Path | None,
    config: TrainingConfig,
    seed: int,
) -> Pretrained:
    """Read pretrained parameters; what has no file starts random.

    Two differences are allowed, and a note says so: another number of speakers (rows of
    ``emb_g`` that the file lacks stay random, rows that the run lacks are left out), and
    a finished voice, which has no posterior encoder ``enc_q``: that starts random.

    Args:
        generator: ``f0G*.pth``, ``G*.pth`` or ``G_*.pth``, or a finished voice.
        discriminator: ``f0D*.pth``, ``D*.pth`` or ``D_*.pth``.
        config: of the run.
        seed: of the random parameters.

    Raises:
        ValueError: a tensor is missing, not known or of another shape; all are named.
        OSError: a file cannot be read.
    """
    own = initial(config, seed)
    files = (generator, discriminator)
    notes: list[str] = []
    parts = [
        parameters if path is None else _load(Path(path), parameters, notes)
        for path, parameters in zip(files, own, strict=True)
    ]
    sources = tuple(name_and_hash(path) for path in files if path is not None)
    return Pretrained(parts[0], parts[1], tuple(notes), sources)


def _load(path: Path, own: Parameters, notes: list[str]) -> Parameters:
    tensors = read_checkpoint(path).tensors
    loaded = from_torch(tensors)
    if _SPEAKERS in loaded and _SPEAKERS in own:
        loaded[_SPEAKERS] = _speakers(path, loaded[_SPEAKERS], own[_SPEAKERS], notes)
    random = _posterior(loaded, own)
    _require_all(path, {**random, **loaded}, own)
    notes.append(f"{path.name}: all {len(tensors)} tensors loaded")
    if random:
        notes.append(
            f"{path.name}: a finished voice, without posterior encoder: the "
            f"{len(to_torch(random))} tensors of {_POSTERIOR} start random"
        )
    return {**random, **loaded}


def _posterior(loaded: Parameters, own: Parameters) -> Parameters:
    """This run's posterior encoder where a voice's file has none of it."""
    if any(name.startswith(_POSTERIOR) for name in loaded) or _PHONES not in loaded:
        return {}
    return {name: value for name, value in own.items() if name.startswith(_POSTERIOR)}


def _speakers(
    path: Path, theirs: mx.array, ours: mx.array, notes: list[str]
) -> mx.array:
    rows, wanted = theirs.shape[0], ours.shape[0]
    if rows == wanted or theirs.shape[1:] != ours.shape[1:]:
        return theirs
    fate = (
        f"rows {wanted} to {rows - 1} are left out"
        if rows > wanted
        else f"rows {rows} to {wanted - 1} start random"
    )
    notes.append(
        f"{path.name}: {_SPEAKERS} has {rows} speakers, this run {wanted}: {fate}"
    )
    return mx.concatenate([theirs[:wanted], ours[rows:]])


def _require_all(
    path: Path, loaded: Mapping[str, mx.array], own: Mapping[str, mx.array]
) -> None:
    problems = [f"{name} is missing" for name in own if name not in loaded]
    problems += [f"{name} is not known" for name in loaded if name not in own]
    wrong = [k for k in own if k in loaded and loaded[k].shape != own[k].shape]
    if wrong:
        theirs = to_torch({k: loaded[k] for k in wrong})
        ours = to_torch({k: own[k] for k in wrong})
        problems += [
            f"{k} is {theirs[k].shape}, this run wants {ours[k].shape}" for k in wrong
        ]
    if problems:
        raise ValueError(
            f"{path}: {len(problems)} tensors do not fit this run{_hint(loaded, own)}: "
            + "; ".join(problems)
        )


def _hint(loaded: Mapping[str, mx.array], own: Mapping[str, mx.array]) -> str:
    """The likely reason, for the usual mistakes."""
    if (_PHONES in own) != (_PHONES in loaded):
        return " (generator and discriminator files may be swapped)"
    pitch = "enc_p.emb_pitch.weight"
    if (pitch in own) != (pitch in loaded):
        return " (one of the two is with pitch, f0G*.pth, the other without, G*.pth)"
    if _PHONES not in own:
        return " (v1 has 7 discriminators, v2 has 9; give the file of this version)"
    return " (give the file of this sample rate and version)"
