"""Reports of the judges, each to the file that it is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rvc_mlx.bundled_models import VOICES
from rvc_mlx.training.files import read_json


def sort_reports(
    paths: Sequence[Path], network: str
) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Name of a bundled file, without suffix, to its reports by their files' stems.

    Args:
        paths: what ``recipes.evaluate_content``, ``recipes.evaluate_pitch`` and
            ``benchmarks/evaluate_conversion.py`` wrote.
        network: name of the pitch network's file when it was judged.

    Raises:
        ValueError: a report is none of these, or judges others.
        OSError: it cannot be read.
    """
    reports: dict[str, dict[str, Mapping[str, Any]]] = {}
    for path in paths:
        for name, report in _read(path, network).items():
            if path.stem in reports.setdefault(name, {}):
                raise ValueError(f"{path}: a second report of that name; rename it")
            reports[name][path.stem] = report
    return reports


def _read(path: Path, network: str) -> dict[str, Mapping[str, Any]]:
    report = read_json(path)
    if isinstance(report, dict) and "frame_accuracy" in report:
        return {"contentvec": {k: v for k, v in report.items() if k != "encoder"}}
    if isinstance(report, dict) and "trackers" in report:
        return {"rmvpe": _pitch(path, report, network)}
    if isinstance(report, dict) and "voices" in report:
        return _voices(path, report)
    raise ValueError(
        f"{path}: this is no report that is known; expected one of "
        "recipes.evaluate_content, recipes.evaluate_pitch or evaluate_conversion.py"
    )


def _pitch(path: Path, report: Mapping[str, Any], network: str) -> Mapping[str, Any]:
    trackers = dict(report["trackers"])
    if network not in trackers:
        raise ValueError(
            f"{path}: judges {', '.join(trackers)}; expected {network} among them"
        )
    return {**report, "trackers": {"this network": trackers.pop(network), **trackers}}


def _voices(path: Path, report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    found = {
        voice["name"]: {"clips": len(voice["clips"]), **voice["summary"]}
        for voice in report["voices"]
        if voice["name"] in VOICES
    }
    if not found:
        names = ", ".join(voice["name"] for voice in report["voices"])
        raise ValueError(f"{path}: judges {names}; expected {' or '.join(VOICES)}")
    return found
