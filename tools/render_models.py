"""Write ``docs/MODELS.md`` from the bundled models themselves.

    python tools/render_models.py [--models rvc_mlx/bundled] [--output docs/MODELS.md] [--check]

``--check`` writes nothing and fails if the document is not up to date.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from evaluation_report import SUMMARY, table_cell

from rvc_mlx.bundled_models import FOLDER, NETWORKS, VOICES
from rvc_mlx.checkpoint import hash_file, read_checkpoint
from rvc_mlx.retrieval import read_index

ROOT = Path(__file__).resolve().parents[1]
NOTICE = "<!-- Made by tools/render_models.py from the models; do not edit. -->\n"
WHAT = {
    "contentvec.safetensors": f"content encoder, `{NETWORKS}`",
    "rmvpe.safetensors": f"pitch network, `{NETWORKS}`",
    **{f"{name}.safetensors": f"voice `{name}`" for name in VOICES},
    **{f"{name}.index": f"index of voice `{name}`" for name in VOICES},
    "speech.flac": "clip that the demo converts",
}
FACTS = {  # metadata to what a person calls it, in this order
    "speakers": "speakers",
    "corpus": "corpus",
    "dataset_length": "recordings, h:min:s",
    "packages": "made by the packages",
    "licences_of_voices": "licences of the speakers' voices",
    "seed": "seed",
    "strangers": "strangers heard in training",
    "started_from": "started from",
    "parallel": "voices of the parallel speech",
    "mean_of": "mean of",
    "sharpened": "sharpened from",
    "f0_threshold": "asks for `--f0-threshold`",
    "f0_onset": "asks for `--f0-onset`, frames",
    "f0_offset": "asks for `--f0-offset`, frames",
    "calibrated_from": "calibrated again from",
    "false_frames_per_missed_one": "false frames that a missed one counted as",
    "steps": "steps",
    "step": "steps",
    "epoch": "epochs",
    "trained_by": "trained by",
}
GOALS_FROM = "natural"  # the evaluation that a voice's goals are read from
UNINTELLIGIBLE = 50.0  # % of wrong words from which on most are not understood
Table = Sequence[Sequence[Any]]


def table(header: Sequence[str], rows: Table) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_cell, value)) or "-"
    if value is None:
        return "-"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|")


def files(folder: Path) -> str:
    """Every file with its size and hash."""
    rows = [
        (f"`{name}`", what, (folder / name).stat().st_size, hash_file(folder / name))
        for name, what in WHAT.items()
    ]
    total = sum(row[2] for row in rows)
    shown = table(("file", "what", "bytes", "sha256"), rows)
    return f"{shown}\n\n{total} bytes in all.\n"


def figures(title: str, values: Mapping[str, Any]) -> list[str]:
    """Nested figures as tables: one of rows and columns where all rows have the same."""
    inner = {k: v for k, v in values.items() if isinstance(v, Mapping) and v}
    lists = {
        name: value
        for name, value in values.items()
        if isinstance(value, list) and value and isinstance(value[0], Mapping)
    }
    plain = [
        (name, value)
        for name, value in values.items()
        if name not in lists and not isinstance(value, Mapping)
    ]
    parts = [f"**{title}**\n"]
    if plain:
        parts.append(table(("figure", "value"), plain) + "\n")
    for name, items in lists.items():
        columns = list(dict.fromkeys(key for item in items for key in item))
        rows = [[item.get(key) for key in columns] for item in items]
        parts += [f"**{title}, {name}**\n", table(columns, rows) + "\n"]
    headers = [list(row) for row in inner.values()]
    leaves = [value for row in inner.values() for value in row.values()]
    alike = headers and all(names == headers[0] for names in headers)
    if alike and not any(isinstance(value, Mapping | list) for value in leaves):
        matrix = [(name, *row.values()) for name, row in inner.items()]
        return [*parts, table(("", *headers[0]), matrix) + "\n"]
    for name, row in inner.items():
        parts += figures(f"{title}, {name}", row)
    return parts if len(parts) > 1 else []


def verdict(summary: Mapping[str, Any]) -> list[str]:
    """What a voice reached of its goals, and whether its words are understood.

    Args:
        summary: judge to its figures, of one evaluation; empty for a network.
    """
    rows = []
    for shown in SUMMARY:
        if shown.sign and shown.judge in summary:
            value = summary[shown.judge].get(shown.metric)
            goal = f"{shown.sign} {shown.goal:g}"
            rows.append((shown.label, goal, table_cell(value), shown.verdict(value)))
    if not rows:
        return []
    met = sum(row[-1] == "met" for row in rows)
    told = f"Meets {met} of {len(rows)} goals"
    words = summary.get("words", {})
    wrong, before = words.get("word_error_output"), words.get("word_error_source")
    if wrong is not None:
        share = f"{wrong:.0f} % of the words wrong, in the source {before:.0f} %"
        told += f"; a recogniser gets {share}"
        if wrong >= UNINTELLIGIBLE:
            told += ": mostly not intelligible"
    header = ("goal", "target", "reached", "verdict")
    return [f"**{told}.**\n", table(header, rows) + "\n"]


def model(path: Path) -> str:
    """One network: sizes, provenance, figures."""
    checkpoint = read_checkpoint(path)
    told = checkpoint.metadata
    count = sum(value.size for value in checkpoint.tensors.values())
    rows = [("parameters", count)]
    rows += [
        (label, told[name])
        for name, label in FACTS.items()
        if told.get(name) is not None
    ]
    parts = [f"## {path.name}\n", table(("", ""), rows) + "\n"]
    parts += verdict(told["metrics"].get(GOALS_FROM, {}))
    if path.with_suffix(".index").exists():
        index = read_index(path.with_suffix(".index"))
        parts.append(
            f"Its index holds {len(index)} vectors of {index.width} numbers: features of "
            "its recordings, or their k-means centres.\n"
        )
    if told["metrics"]:
        for name, report in told["metrics"].items():
            parts += figures(name, report)
    else:
        parts.append("Not judged: no figures came with it.\n")
    return "\n".join(parts)


def voices(folder: Path) -> str:
    """A line for every voice: how long it was trained and what that reached."""
    lines = []
    for name in VOICES:
        told = read_checkpoint(folder / f"{name}.safetensors").metadata
        reached = verdict(told["metrics"].get(GOALS_FROM, {}))
        words = reached[0].strip("*.\n") if reached else "Not judged"
        lines.append(f"- `{name}`, {told['step']} training steps: {words}.\n")
    return "".join(lines)


def clip(path: Path) -> str:
    """The clip, from its tags."""
    with soundfile.SoundFile(path) as file:
        tags = file.copy_metadata()
        seconds = file.frames / file.samplerate
    rows = [("seconds", seconds), ("spoken", tags["title"]), ("by", tags["artist"])]
    rows += [("licence", tags["license"]), ("made by the packages", tags["comment"])]
    return f"## {path.name}\n\n{table(('', ''), rows)}\n"


def document(folder: Path) -> str:
    """All of ``docs/MODELS.md``."""
    networks = [name for name in WHAT if name.endswith(".safetensors")]
    limits = read_checkpoint(folder / networks[0]).metadata["limits"]
    return "\n".join(
        [
            "# The bundled models\n",
            f"{limits}\n",
            "`rvc-mlx download` and the README say how to get the public ones. "
            "[recipes/README.md](../recipes/README.md) makes the bundled ones from "
            "nothing; `python -m recipes.bundle` writes them.\n",
            voices(folder),
            files(folder),
            *(model(folder / name) for name in networks),
            clip(folder / "speech.flac"),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--models", type=Path, default=FOLDER, metavar="DIR")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "MODELS.md")
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    given = parser.parse_args(arguments)
    text = NOTICE + document(given.models)
    if not given.check:
        given.output.write_text(text, "utf-8")
        print(f"wrote {given.output.name}")
        return 0
    current = given.output.read_text("utf-8") if given.output.exists() else ""
    if current != text:
        print(
            f"{given.output.name} is not up to date: run python tools/render_models.py"
        )
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
