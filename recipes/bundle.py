r"""Trained files to the models that the package brings along: ``python -m recipes.bundle``.

    python -m recipes.bundle --encoder content.safetensors --rmvpe rmvpe.safetensors \
        --voice slt=RUN --voice rms=RUN --recordings CORPUS/recordings \
        [--metrics REPORT.json ...] [--into rvc_mlx/bundled]

RUN is the folder of an ``rvc-mlx train`` run, or another voice's file in it. Weights are
written in half precision with their provenance, the indexes shrunk; then the staged set
is loaded and speaks. Only when all of that went well does it replace what was there.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recipes.bundle_metrics import sort_reports
from recipes.bundle_runs import VoiceRun, find_run
from recipes.exporting import halved
from rvc_mlx.audio_io import load_audio
from rvc_mlx.bundled_models import FOLDER, NETWORKS, SPEECH, VOICES
from rvc_mlx.checkpoint import Checkpoint, hash_file
from rvc_mlx.engine import choose_engine
from rvc_mlx.loading import read_weights
from rvc_mlx.pipeline import load_on
from rvc_mlx.retrieval import read_index
from rvc_mlx.training.index import build_index
from rvc_mlx.training.state import write_tensors

log = logging.getLogger("recipes")

MOST_BYTES = 60_000_000  # of all files together
INDEX_ROWS = 4096  # beyond, k-means centres stand for a voice's features
QUIETEST = 1e-3  # root mean square of a conversion that is not silent
LIMITS = (
    "Demonstration weights, trained on synthetic speech only. They show that the program "
    "works; they are no measure of what RVC sounds like. The public ContentVec and RMVPE, "
    "and voices trained with them on recordings of a person, are the way to quality; they "
    "load by the same code."
)

Reports = Mapping[str, Mapping[str, Any]]


class Parts(NamedTuple):
    """What is to be bundled."""

    encoder: Checkpoint
    rmvpe: Checkpoint
    runs: Sequence[VoiceRun]
    reports: Reports


def bundle(parts: Parts, into: Path) -> int:
    """Write the set, all or nothing.

    Args:
        parts: which fit together by what the runs say.
        into: folder that takes the files; those of other names stay.

    Returns:
        Bytes of all files.

    Raises:
        ValueError: they do not fit together, do not speak, or are too large.
        OSError: something cannot be read or written.
    """
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".bundling-", dir=into) as name:
        stage = Path(name)
        _write_networks(stage, parts)
        for run in parts.runs:
            _write_voice(stage, run, parts.reports.get(run.name, {}))
        files = sorted(path for path in stage.iterdir() if path.is_file())
        total = sum(path.stat().st_size for path in files)
        if total > MOST_BYTES:
            sizes = ", ".join(f"{path.name} {path.stat().st_size}" for path in files)
            raise ValueError(
                f"the files take {total} bytes ({sizes}); expected at most {MOST_BYTES}: "
                "train smaller networks"
            )
        for run in parts.runs:
            _speak(stage, run.name)
        for path in files:
            path.replace(into / path.name)
    return total


def _write_networks(stage: Path, parts: Parts) -> None:
    for kind, checkpoint in (("contentvec", parts.encoder), ("rmvpe", parts.rmvpe)):
        told = {**checkpoint.metadata, "kind": kind, "name": NETWORKS}
        _write(stage / f"{kind}.safetensors", checkpoint, told, parts.reports.get(kind))


def _write_voice(stage: Path, run: VoiceRun, reports: Mapping[str, Any]) -> None:
    checkpoint = read_weights(run.voice, "voice")
    networks = {
        "embedder_model": NETWORKS,
        "embedder_sha256": hash_file(stage / "contentvec.safetensors"),
        "pitch_model": NETWORKS,
        "pitch_sha256": hash_file(stage / "rmvpe.safetensors"),
    }
    told = {**checkpoint.metadata, "kind": "voice", "model_name": run.name}
    _write(
        stage / f"{run.name}.safetensors",
        checkpoint,
        {**told, **networks, **run.facts},
        reports,
    )
    build_index(
        read_index(run.index).vectors,
        stage / f"{run.name}.index",
        str(told["version"]),
        max_rows=INDEX_ROWS,
        centres=INDEX_ROWS,
    )


def _write(
    path: Path,
    checkpoint: Checkpoint,
    metadata: Mapping[str, Any],
    reports: Mapping[str, Any] | None,
) -> None:
    """The same bytes for the same weights and metadata, whenever they are written."""
    try:
        tensors = halved(checkpoint.tensors)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from error
    told = {**metadata, "limits": LIMITS, "metrics": reports or {}}
    texts = {name: json.dumps(value) for name, value in told.items()}
    write_tensors(path, tensors, texts)


def _speak(stage: Path, name: str) -> None:
    """Load a staged voice strictly and convert two seconds.

    Raises:
        ValueError: its parts do not fit together, or nothing is heard.
    """
    converter = load_on(
        choose_engine("cpu", "f32"),
        stage / f"{name}.safetensors",
        stage / f"{name}.index",
        encoder=stage / "contentvec.safetensors",
        rmvpe=stage / "rmvpe.safetensors",
    )
    audio = converter.convert(load_audio(SPEECH)[:32000], 16000).audio
    level = float(np.sqrt(np.square(audio).mean()))
    if not level > QUIETEST:  # also when it is not a number
        raise ValueError(
            f"{name}: it speaks at a level of {level:.2g}; expected more than "
            f"{QUIETEST:g}: train the voice longer"
        )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument("--rmvpe", type=Path, required=True)
    parser.add_argument(
        "--voice", action="append", required=True, metavar="NAME=RUN", dest="voices",
        help=f"each of {', '.join(VOICES)}: a run's folder, or a voice's file in it",
    )  # fmt: skip
    parser.add_argument(
        "--recordings", type=Path, required=True, help="of recipes.make_recordings"
    )
    parser.add_argument("--metrics", type=Path, nargs="*", default=[], action="extend")
    parser.add_argument("--into", type=Path, default=FOLDER)
    return parser.parse_args(arguments)


def _runs(options: argparse.Namespace) -> list[VoiceRun]:
    given = dict(text.partition("=")[::2] for text in options.voices)
    if sorted(given) != sorted(VOICES) or len(given) != len(options.voices):
        raise ValueError(
            f"--voice was given for {', '.join(given)}; expected one for each of "
            f"{', '.join(VOICES)}, as {VOICES[0]}=RUN"
        )
    return [
        find_run(
            name,
            Path(given[name]),
            {"features": options.encoder, "pitch": options.rmvpe},
            options.recordings,
        )
        for name in VOICES
    ]


def _hashes(options: argparse.Namespace, runs: Sequence[VoiceRun]) -> dict[str, set]:
    """Of the files that a report may have judged: a voice has two of equal weights."""
    voices = {
        run.name: {run.voice.with_suffix(suffix) for suffix in (".safetensors", ".pth")}
        for run in runs
    }
    files = {"contentvec": {options.encoder}, "rmvpe": {options.rmvpe}, **voices}
    return {
        name: {hash_file(path) for path in paths if path.is_file()}
        for name, paths in files.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, write, and say how large it is; returns the exit code."""
    options = _parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        encoder = read_weights(options.encoder, "contentvec")
        rmvpe = read_weights(options.rmvpe, "rmvpe")
        runs = _runs(options)
        reports = sort_reports(options.metrics, _hashes(options, runs))
        parts = Parts(encoder, rmvpe, runs, reports)
        total = bundle(parts, options.into)
    except (ValueError, OSError, ImportError) as error:
        log.error(f"recipes.bundle: {' '.join(str(error).split())}")
        return 1
    log.info(f"{options.into}: {total} bytes; now run tools/render_models.py")
    return 0


if __name__ == "__main__":
    sys.exit(main())
