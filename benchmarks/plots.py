"""Pictures of the documents, made from the result files and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from common import grouped_stages
from tables import MIB, Result, chosen, labels, machine

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def _finish(figure: Any, path: Path, bottom: float = 0.0) -> None:
    figure.tight_layout(rect=(0, bottom, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    # No date and no version inside: the same results give the same bytes.
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


def _length_axis(axis: Any, lengths: set[float]) -> None:
    """Logarithmic, with the measured lengths as its only marks."""
    shown = sorted(lengths)
    axis.set(xlabel="seconds of audio", xscale="log", ylim=(0, None))
    axis.set_xticks(shown, [f"{length:g}" for length in shown])
    axis.minorticks_off()


def plot_speedup(results: list[Result], path: Path) -> bool:
    """Speed-up of RMVPE over PyTorch by the length of the audio."""
    found = chosen(results, "rmvpe")
    if not found:
        return False
    figure, axis = plt.subplots(figsize=(8, 4.5))
    for result in found:
        rows = result["rows"]
        lengths = [row["seconds"] for row in rows]
        _, ours, theirs = labels(result)
        label = f"{machine(result)}: {ours} against PyTorch {theirs}"
        axis.plot(lengths, [row["speedup"] for row in rows], "o-", label=label)
    axis.axhline(1, color="grey", lw=1, ls=":")
    axis.set(title="RMVPE, samples to F0", ylabel="times as fast as PyTorch")
    _length_axis(axis, {row["seconds"] for r in found for row in r["rows"]})
    axis.legend(fontsize=8)
    _finish(figure, path)
    return True


def plot_memory(results: list[Result], path: Path) -> bool:
    """Peak memory of a conversion by the length of the audio: of CPUs, and of GPUs."""
    found = chosen(results, "memory")
    if not found:
        return False
    panels = {
        "resident memory, CPU": [r for r in found if not _on_gpu(r)],
        "GPU memory": [r for r in found if _on_gpu(r)],
    }
    panels = {title: those for title, those in panels.items() if those}
    size = (8, 4.5 * len(panels))
    figure, axes = plt.subplots(len(panels), figsize=size, squeeze=False)
    for axis, (title, those) in zip(axes[:, 0], panels.items(), strict=True):
        for result in those:
            _draw_memory(axis, result)
        axis.set(title=f"Peak of a conversion: {title}", ylabel="MiB")
        _length_axis(axis, {row["seconds"] for r in those for row in r["rows"]})
        axis.legend(fontsize=8)
    _finish(figure, path)
    return True


def _on_gpu(result: Result) -> bool:
    return result["sides"]["backend"] in ("cuda", "metal")


def _draw_memory(axis: Any, result: Result) -> None:
    """A line for each program and precision of one result."""
    name = "gpu_peak_bytes" if _on_gpu(result) else "peak_memory_bytes"
    for side, precision in dict.fromkeys(
        (row["side"], row["precision"]) for row in result["rows"]
    ):
        rows = [
            row
            for row in result["rows"]
            if (row["side"], row["precision"]) == (side, precision)
        ]
        program = "ours" if side == "ours" else "PyTorch"
        axis.plot(
            [row["seconds"] for row in rows],
            [row[name] / MIB for row in rows],
            "o-" if side == "ours" else "s--",
            label=f"{machine(result)}: {program}, {precision}",
        )


def _stage_bars(results: list[Result]) -> list[tuple[str, dict[str, float], float]]:
    """Name, stages as shares of PyTorch's time on that machine, and the seconds."""
    bars = []
    for result in chosen(results, "e2e"):
        compared = [row for row in result["rows"] if row.get("speedup")]
        if not compared:  # cut short before PyTorch's first row
            continue
        longest = max(row["seconds"] for row in compared)
        rows = [row for row in compared if row["seconds"] == longest]
        theirs = {r["precision"]: r for r in rows if r["side"] == "torch"}
        for row in rows:
            against = theirs[row.get("against", row["precision"])]["warm_median_s"]
            groups = grouped_stages(row["stages_s"], row["warm_median_s"])
            shares = {name: 100 * value / against for name, value in groups.items()}
            program = "ours" if row["side"] == "ours" else "PyTorch"
            name = f"{machine(result)}\n{program}, {row['precision']}, {longest:g} s"
            bars.append((name, shares, row["warm_median_s"]))
    return bars


def plot_stages(results: list[Result], path: Path) -> bool:
    """Where the time of a warm conversion goes, for the longest clip of each result."""
    bars = _stage_bars(results)
    if not bars:
        return False
    figure, axis = plt.subplots(figsize=(9, 1.8 + 0.6 * len(bars)))
    left = [0.0] * len(bars)
    for group in bars[0][1]:
        widths = [shares[group] for _, shares, _ in bars]
        axis.barh(range(len(bars)), widths, left=left, label=group)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for place, (end, (_, _, seconds)) in enumerate(zip(left, bars, strict=True)):
        axis.text(end + 1, place, f"{seconds:.3g} s", va="center", fontsize=8)
    axis.set_yticks(range(len(bars)), [name for name, _, _ in bars], fontsize=8)
    axis.invert_yaxis()
    axis.set(title="A warm conversion, file to file", xlim=(0, 1.1 * max(left)))
    axis.set_xlabel("% of PyTorch's time on the same machine")
    figure.legend(fontsize=8, ncols=7, loc="lower center")
    _finish(figure, path, bottom=0.1)
    return True
