"""The table of the figures that a GPU is judged by."""

from __future__ import annotations

from typing import Any

from common import table
from tables import Result, chosen, commit, machine

GPU_SIDES = ("ours tf32", "ours bf16", "ours f16", "PyTorch tf32", "PyTorch f16")
GPU_SIDES += ("PyTorch default", "PyTorch tf32, compiled")


def gpu(results: list[Result]) -> str:
    """What a GPU is judged by: medians in milliseconds."""
    header = ("machine", "commit", "what", "audio, s")
    header += tuple(f"{name}, ms" for name in GPU_SIDES)
    header += ("x realtime, best of ours", "speed-up, best against best")
    header += ("fewest runs of a cell",)
    rows = [
        [*place(result), row["row"], row["seconds"]]
        + [_milliseconds(row["sides"].get(name)) for name in GPU_SIDES]
        + [ratio(row["seconds"], _best(row, "ours"))]
        + [ratio(_best(row, "PyTorch"), _best(row, "ours")), _fewest(row)]
        for result in shown_results(results)
        for row in result["rows"]
    ]
    return table_of_gpus(header, rows)


def table_of_gpus(header: tuple[str, ...], rows: list) -> str:
    """The table, or one that says that nobody has measured a GPU."""
    return table(header, rows or [["-", *["not measured"] * (len(header) - 1)]])


def shown_results(results: list[Result]) -> list[Result]:
    """Those of GPUs."""
    return [
        result
        for result in chosen(results, "gpu")
        if result["sides"]["backend"] in ("cuda", "metal")
    ]


def place(result: Result) -> tuple[str, str]:
    """The GPU with the host's cores, for many of these times are the host's; commit."""
    cores = f"{machine(result)}, {result['environment']['cores']} cores"
    return cores, commit(result, 7)


def _milliseconds(cell: dict | None) -> Any:
    if cell is None:
        return None
    return "failed" if "failed" in cell else 1e3 * cell["median_s"]


def _fewest(row: dict) -> int | None:
    cells = [cell for cell in row["sides"].values() if "samples_s" in cell]
    return min((len(cell["samples_s"]) for cell in cells), default=None)


def _best(row: dict, program: str) -> float | None:
    times = [
        cell["median_s"]
        for name, cell in row["sides"].items()
        if name.startswith(program) and "median_s" in cell
    ]
    return min(times, default=None)


def ratio(above: float | None, below: float | None) -> float | None:
    """``above / below``; None where one of them is missing."""
    return above / below if above and below else None
