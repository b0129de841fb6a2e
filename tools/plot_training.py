"""Draw the losses and scores of training runs from their ``metrics.jsonl``.

    python tools/plot_training.py RUN [RUN ...] -o training.png

RUN is a run's folder or its ``metrics.jsonl``. Losses are means of 20 logged steps. What no
run has logged is left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

PANELS = {
    "train/loss_mel": "mel loss, training",
    "validation/mel_l1": "mel distance of held-out clips, spoken as a conversion",
    "train/loss_kl": "KL loss",
    "train/loss_content": "content loss",
    "train/loss_fm": "feature matching loss",
    "train/loss_d": "discriminator's loss",
    "validation/f0_cents": "F0 of held-out clips, median cents off",
}
MEAN_OF = 20  # logged steps


def read(run: Path) -> tuple[str, list[dict[str, float]]]:
    """A run's name and the rows of its log.

    Raises:
        ValueError: there is no log, or it is none of a run.
    """
    path = run / "metrics.jsonl" if run.is_dir() else run
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        if not all(isinstance(row["step"], int) for row in rows) or not rows:
            raise ValueError("no row has a step")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path}: {error}; expected the metrics.jsonl of a training run"
        ) from error
    place = path.resolve()
    return place.parent.name if place.name == "metrics.jsonl" else place.stem, rows


def curve(rows: Sequence[dict[str, float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values ``[n]`` of one number, training losses smoothed."""
    found = [(row["step"], row[name]) for row in rows if name in row]
    steps, values = np.array(found, float).reshape(-1, 2).T
    if name.startswith("train/") and len(values) > MEAN_OF:
        values = np.convolve(values, np.full(MEAN_OF, 1 / MEAN_OF), "valid")
        steps = steps[MEAN_OF - 1 :]
    return steps, values


def draw(runs: Sequence[Path], path: Path) -> None:
    """Write the picture."""
    logs = [read(run) for run in runs]
    logged = {name for _, rows in logs for row in rows for name in row}
    panels = {name: title for name, title in PANELS.items() if name in logged}
    if not panels:
        raise ValueError(
            f"no losses in the logs; expected one of {', '.join(PANELS)}: train longer"
        )
    height = -(-len(panels) // 2)
    figure, axes = plt.subplots(
        height, 2, figsize=(11, 3 * height), sharex=True, squeeze=False
    )
    used, unused = axes.flat[: len(panels)], axes.flat[len(panels) :]
    for axis in unused:
        axis.set_axis_off()
    for axis, (name, title) in zip(used, panels.items(), strict=True):
        for label, rows in logs:
            steps, values = curve(rows, name)
            marker = "." if name.startswith("validation/") else None
            axis.plot(steps, values, label=label, marker=marker)
        axis.set_title(title, fontsize=10)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0, 0].legend()
    for axis in used[-2:]:
        axis.set_xlabel("steps")
        axis.tick_params(labelbottom=True)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    options = parser.parse_args()
    try:
        draw(options.runs, options.output)
    except (OSError, ValueError) as error:
        print(f"plot_training: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
