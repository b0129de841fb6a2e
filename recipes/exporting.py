"""Trained weights to the file that users load: torch layout, half precision, provenance."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from recipes.speakers import PACKAGES, SPEAKERS
from rvc_mlx.checkpoint import save_checkpoint
from rvc_mlx.loading import read_weights
from rvc_mlx.models.layers import load_strictly, to_torch_axes
from rvc_mlx.version import __version__

PROVENANCE = "provenance.json"  # beside the parts of a corpus


def torch_tensors(network: nn.Module) -> dict[str, np.ndarray]:
    """All parameters and running statistics by name, float32, in torch's layout."""
    arrays = {
        name: np.array(value.astype(mx.float32))
        for name, value in tree_flatten(network.parameters())
    }
    for path, module in network.named_modules():
        name = f"{path}.weight"
        if (axes := to_torch_axes(module)) and name in arrays:
            arrays[name] = np.ascontiguousarray(arrays[name].transpose(axes))
    return arrays


def halved(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors as float16.

    Raises:
        ValueError: a value does not fit; names the tensor.
    """
    halves = {}
    for name, value in tensors.items():
        with np.errstate(over="ignore"):
            halves[name] = value.astype(np.float16)
        if not np.isfinite(halves[name]).all():
            raise ValueError(f"{name}: {np.abs(value).max():.3g} does not fit float16")
    return halves


def export(
    path: Path, network: nn.Module, kind: str, metadata: Mapping[str, Any]
) -> None:
    """Write float16 weights and their provenance as ``.safetensors``.

    Args:
        path: target.
        network: a ``ContentVec`` or ``RMVPE``.
        kind: ``"contentvec"`` or ``"rmvpe"``.
        metadata: beside the kind.

    Raises:
        ValueError: a weight does not fit float16.
    """
    tensors = halved(torch_tensors(network))
    path.parent.mkdir(parents=True, exist_ok=True)
    made = {"kind": kind, "trained_by": f"rvc_mlx {__version__} recipes"}
    save_checkpoint(path, tensors, {**made, **metadata})


def start_from(path: Path, network: nn.Module, kind: str) -> None:
    """Load exported weights into a network that is to be trained further.

    Args:
        path: of ``export``.
        network: of the same sizes.
        kind: as in ``export``.

    Raises:
        ValueError: the file is something else, or of another size.
        OSError: it cannot be read.
    """
    load_strictly(network, read_weights(path, kind).tensors)


def write_provenance(
    folder: Path,
    seed: int,
    others: Mapping[str, str] | None = None,
    **settings: float,
) -> None:
    """Write which versions of which packages made a corpus.

    Packages that are not installed are left out, as on a system without ``dpkg``.

    Args:
        folder: of the corpus.
        seed: of its draws.
        others: versions of packages that are not Debian's, or that made what the corpus is
            made of; they go before those that are installed.
        settings: what else the corpus depends on, by name.
    """
    told = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Package} ${Version}\n", *PACKAGES],
        capture_output=True,
        text=True,
        check=False,
    )
    versions = dict(line.split(" ", 1) for line in told.stdout.splitlines())
    folder.mkdir(parents=True, exist_ok=True)
    versions |= others or {}
    text = json.dumps({"packages": versions, "seed": seed, **settings}, indent=1)
    (folder / PROVENANCE).write_text(text + "\n", "utf-8")


def corpus_packages(folders: Sequence[Path]) -> dict[str, str]:
    """Versions of the packages that made a corpus, from beside its parts."""
    packages: dict[str, str] = {}
    for folder in folders:
        for path in (folder / PROVENANCE, folder.parent / PROVENANCE):
            if path.is_file():
                packages |= json.loads(path.read_text("utf-8"))["packages"]
    return packages


def corpus_facts(folders: Sequence[Path], speakers: Sequence[str]) -> dict[str, str]:
    """What metadata tells about a corpus: speakers, licences and package versions."""
    packages = corpus_packages(folders)
    licences = sorted({SPEAKERS[s].licence for s in speakers if s in SPEAKERS})
    return {
        "speakers": " ".join(sorted(speakers)),
        "licences_of_voices": "; ".join(licences),
        "packages": " ".join(f"{k}={v}" for k, v in sorted(packages.items())),
        "corpus": "synthesised speech only, no recordings",
    }
