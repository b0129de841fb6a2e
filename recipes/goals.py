"""What trained networks are to reach, and what a report tells of how it was measured."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.exporting import corpus_packages
from rvc_mlx.bench import environment
from rvc_mlx.checkpoint import hash_file


@dataclass(frozen=True)
class Goal:
    """A figure with a bound.

    Attributes:
        label: of the figure, with its unit.
        sign: ``">="`` or ``"<="``.
        target: the bound.
    """

    label: str
    sign: str
    target: float

    def row(self, value: float | None, clips: int) -> dict[str, Any]:
        """What was reached over so many clips; None where it was not measured."""
        if value is None:
            verdict = "not measured"
        else:
            met = value >= self.target if self.sign == ">=" else value <= self.target
            verdict = "met" if met else "missed"
        return {
            "goal": self.label,
            "target": f"{self.sign} {self.target:g}",
            "reached": value,
            "clips": clips,
            "verdict": verdict,
        }


def describe(
    network: Path | None, corpus: Sequence[Path], tools: Sequence[str] = ()
) -> dict[str, Any]:
    """Machine, versions, commit, the network's file and the corpus's packages.

    Args:
        network: the file that is judged, or None.
        corpus: folders of the clips.
        tools: modules beside the program's own whose versions matter.
    """
    facts = environment()
    owners = importlib.metadata.packages_distributions()
    for tool in tools:
        for package in owners.get(tool, []):
            facts["versions"][package] = importlib.metadata.version(package)
    facts["commit"] = _commit()
    told: dict[str, Any] = {"environment": facts, "packages": corpus_packages(corpus)}
    if network is not None:
        told["network"] = {"file": network.name, "sha256": hash_file(network)}
    return told


def _commit() -> str:
    """Commit, with ``-dirty`` where the code differs from it; a copy may be told."""
    if given := os.environ.get("BENCHMARK_COMMIT"):
        return given
    words = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(
            words, cwd=Path(__file__).parent, capture_output=True, text=True
        )
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"
