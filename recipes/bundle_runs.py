"""What the folder of a training run tells of its voice, and whether all of it is there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.calibrate_pitch import CALIBRATED_FROM
from recipes.exporting import PROVENANCE, corpus_facts
from recipes.make_recordings import SPEAKERS_OF
from recipes.speakers import ENGINE_PACKAGES, SPEAKERS
from recipes.strangers import STRANGERS
from rvc_mlx.checkpoint import hash_file, read_checkpoint
from rvc_mlx.training.features import SETTINGS
from rvc_mlx.training.files import read_json
from rvc_mlx.training.plan import RUN

_MADE_BY = {"features": "encoder_sha256", "pitch": "rmvpe_sha256"}


@dataclass(frozen=True)
class VoiceRun:
    """A voice to bundle.

    Attributes:
        name: under which it is bundled.
        voice: its file.
        index: its index.
        facts: provenance beside what its file says.
    """

    name: str
    voice: Path
    index: Path
    facts: Mapping[str, Any]


def find_run(
    name: str, path: Path, networks: Mapping[str, Path], recordings: Path
) -> VoiceRun:
    """Find a voice and what it was made with.

    Args:
        name: under which it is bundled.
        path: the run's folder, or another of its voices, as ``slt_40e_8000s.safetensors``.
        networks: files of the encoder (``"features"``) and of the pitch network
            (``"pitch"``) that it is bundled with; the latter may have been calibrated
            again since.
        recordings: of ``recipes.make_recordings``, with its provenance.

    Raises:
        FileNotFoundError: a part is not there.
        ValueError: the voice was trained with other networks.
    """
    folder = path if path.is_dir() else path.parent
    stem = read_json(_required(folder / RUN, "the run's settings"))["name"]
    voice = folder / f"{stem}.safetensors" if path.is_dir() else path
    made_with = read_json(_required(folder / SETTINGS, "what it learnt from"))
    for part, network in networks.items():
        wanted, found = made_with[part][_MADE_BY[part]], hash_file(network)
        if wanted == found:
            continue
        before = str(read_checkpoint(network).metadata.get(CALIBRATED_FROM, ""))
        if part != "pitch" or wanted not in before:
            raise ValueError(
                f"{voice}: trained with a network of sha256 {wanted}, but {network} has "
                f"{found}; give the file that it was trained with"
            )
    return VoiceRun(
        name,
        _required(voice, "the voice"),
        _required(folder / f"{stem}.index", "its index"),
        _facts(name, folder, recordings),
    )


def _required(path: Path, what: str) -> Path:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: there is no such file; expected {what}, as rvc-mlx train leaves it"
        )
    return path


def _facts(name: str, folder: Path, recordings: Path) -> dict[str, Any]:
    """Provenance: as of an exported network, with the packages of this speaker only.

    A voice that was trained on from another says from which.
    """
    if not (recordings / PROVENANCE).is_file():
        raise FileNotFoundError(
            f"{recordings}: has no {PROVENANCE}; give the folder that "
            "recipes.make_recordings made"
        )
    speaker = SPEAKERS[SPEAKERS_OF[name]]
    facts = corpus_facts([recordings], [speaker.name])
    used = {*ENGINE_PACKAGES[speaker.engine], speaker.package}
    versions = facts["packages"].split()
    facts["packages"] = " ".join(v for v in versions if v.split("=")[0] in used)
    if (folder / STRANGERS).is_file():
        made_with = read_json(folder / STRANGERS)["made_with"]
        packages = {k: v for one in made_with for k, v in one["packages"].items()}
        named = {
            k: v
            for k, v in packages.items()
            if k.startswith("kokoro") or k == "espeak-ng"
        }
        facts["strangers"] = "the same sentences by voices of Kokoro-82M (Apache-2.0): "
        facts["strangers"] += " ".join(f"{k}={v}" for k, v in sorted(named.items()))
    plan = read_json(folder / RUN)
    start = "; ".join(plan.get("started_from", ()))
    facts |= {"started_from": start} if start else {}
    return {**facts, "seed": plan["options"]["seed"]}
