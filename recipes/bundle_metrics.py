"""Reports of the judges, each to the file that it is about."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from rvc_mlx.training.files import read_json

_NETWORKS = {"content": "contentvec", "pitch": "rmvpe"}
# How it was measured, and verdicts: these stay in the report.
_LEFT_OUT = {"benchmark", "environment", "packages", "network", "goals"}

Figures = dict[str, dict[str, Any]]


def sort_reports(
    paths: Sequence[Path], hashes: Mapping[str, Collection[str]]
) -> dict[str, Figures]:
    """Name of a bundled file, without suffix, to its reports by their files' stems.

    Args:
        paths: what ``recipes.evaluate_content``, ``recipes.evaluate_pitch`` and
            ``benchmarks/evaluate_conversion.py`` wrote.
        hashes: name of a bundled file to the sha256 of the files that are the same.

    Raises:
        ValueError: a report is none of these, or judges other files.
        OSError: it cannot be read.
    """
    sorted_reports: dict[str, Figures] = {}
    for path in paths:
        for name, figures in _read(path, hashes).items():
            if path.stem in sorted_reports.setdefault(name, {}):
                raise ValueError(f"{path}: a second report of that name; rename it")
            sorted_reports[name][path.stem] = figures
    return sorted_reports


def _read(path: Path, hashes: Mapping[str, Collection[str]]) -> Figures:
    report = read_json(path)
    kind = report.get("benchmark") if isinstance(report, dict) else None
    if kind in _NETWORKS:
        file = report["network"]
        _require(path, file, hashes[_NETWORKS[kind]])
        if kind == "pitch":
            trackers = dict(report["trackers"])
            own = trackers.pop(file["file"])
            report["trackers"] = {"this network": own, **trackers}
        kept = {key: value for key, value in report.items() if key not in _LEFT_OUT}
        return {_NETWORKS[kind]: kept}
    if kind == "evaluation":
        return _voices(path, report["voices"], hashes)
    raise ValueError(
        f"{path}: this is no report that is known; expected one of "
        "recipes.evaluate_content, recipes.evaluate_pitch or evaluate_conversion.py"
    )


def _voices(
    path: Path,
    voices: Sequence[Mapping[str, Any]],
    hashes: Mapping[str, Collection[str]],
) -> Figures:
    found: Figures = {}
    for voice in voices:
        name = voice["name"]
        if name not in hashes:
            raise ValueError(f"{path}: judges {name}, which is not to be bundled")
        _require(path, voice["files"]["voice"], hashes[name])
        clips = {clip["source"] for clip in voice["clips"]}
        counts = {"clips": len(clips), "conversions": len(voice["clips"])}
        found[name] = {**counts, **voice["summary"]}
    return found


def _require(path: Path, file: Mapping[str, str], hashes: Collection[str]) -> None:
    if file["sha256"] not in hashes:
        raise ValueError(
            f"{path}: judges a {file['file']} of sha256 {file['sha256']}, not what is to "
            "be bundled; judge that"
        )
