"""One comparison and its tolerance: rows, their table, and the assertion on them."""

from __future__ import annotations

from typing import Any

import numpy as np
from common import difference, difference_f0, table

Row = dict[str, Any]


def parity_row(
    stage: str, ours: Any, theirs: Any, largest: float, mean: float | None = None
) -> Row:
    """How far two results are apart, beside the tolerance.

    Args:
        stage: its name.
        ours: array.
        theirs: array of the same shape.
        largest: tolerance of the largest absolute difference.
        mean: of the mean; a fifth of ``largest`` if None.
    """
    mean = largest / 5 if mean is None else mean
    facts = difference(np.asarray(ours), np.asarray(theirs))
    passed = facts["max_abs"] <= largest and facts["mean_abs"] <= mean
    return {
        "stage": stage,
        **facts,
        "max_tolerance": largest,
        "mean_tolerance": mean,
        "passed": bool(passed),
    }


def require(rows: list[Row]) -> None:
    """Raise AssertionError if a row fails, naming all that do."""
    failed = [
        f"{row['stage']}: max {row['max_abs']:.1e} (tolerance "
        f"{row['max_tolerance']:.1e}), mean {row['mean_abs']:.1e} "
        f"({row['mean_tolerance']:.1e})"
        for row in rows
        if not row["passed"]
    ]
    assert not failed, "; ".join(failed)
    assert rows, "nothing was compared"


def parity_table(rows: list[Row]) -> str:
    """The rows as a table; correlation is shown for information only."""
    names = ("stage", "max_abs", "mean_abs", "max_tolerance", "mean_tolerance")
    names += ("scale", "correlation")
    header = [name.replace("_", " ") for name in names]
    verdicts = ["ok" if row["passed"] else "FAILED" for row in rows]
    cells = [
        [*(row[name] for name in names), verdict]
        for row, verdict in zip(rows, verdicts, strict=True)
    ]
    return table((*header, "verdict"), cells)


def f0_rows(ours: np.ndarray, theirs: np.ndarray, name: str = "RMVPE") -> list[Row]:
    """F0 within 0.01 cent, and voicing the same in every frame."""
    facts = difference_f0(ours, theirs)
    both = (ours > 0) & (theirs > 0)
    cents = 1200 * np.log2(ours[both] / theirs[both])
    same = parity_row(f"{name}: voicing", ours > 0, theirs > 0, 0.0)
    row = parity_row(f"{name}: F0, cents", cents, np.zeros_like(cents), 0.01)
    return [row | facts, same | facts]
