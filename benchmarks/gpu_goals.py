"""What a GPU has to reach, and whether it did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from common import table
from gpu_table import place, shown_results
from tables import Result

OURS, HALF = "ours tf32", "ours f16"
TF32, DEFAULT = "PyTorch tf32", "PyTorch default"

Rows = dict[str, dict[str, Any]]


class Goal(NamedTuple):
    """One figure and its limit.

    Attributes:
        what: for people, with the unit.
        figure: of a result's rows, by name; None where a cell is missing.
        limit: ``"<= 50"`` or ``">= 2"``.
    """

    what: str
    figure: Callable[[Rows], float | None]
    limit: str

    def verdict(self, value: float | None) -> str:
        """``met``, ``missed`` or ``not measured``."""
        if value is None:
            return "not measured"
        sign, limit = self.limit.split()
        met = value <= float(limit) if sign == "<=" else value >= float(limit)
        return "met" if met else "missed"


def milliseconds(row: str, side: str) -> Callable[[Rows], float | None]:
    """The median of a cell."""

    def figure(rows: Rows) -> float | None:
        median = rows.get(row, {}).get("sides", {}).get(side, {}).get("median_s")
        return None if median is None else 1e3 * median

    return figure


def ratio(above: tuple[str, str], below: tuple[str, str]) -> Callable[[Rows], Any]:
    """How many times one cell's median another's is; cells are row and side."""

    def figure(rows: Rows) -> float | None:
        first, second = (milliseconds(*cell)(rows) for cell in (above, below))
        return first / second if first and second else None

    return figure


def _speed_up(row: str, theirs: str, ours: str) -> Callable[[Rows], Any]:
    return ratio((row, theirs), (row, ours))


def _over_known(row: str, side: str) -> Callable[[Rows], Any]:
    return ratio((row, side), ("new-length-again", side))


def _real_time(row: str, side: str) -> Callable[[Rows], Any]:
    def figure(rows: Rows) -> float | None:
        took = milliseconds(row, side)(rows)
        return 1e3 * rows[row]["seconds"] / took if took else None

    return figure


GOALS = (
    Goal("RMVPE, 30 s, float32: ms", milliseconds("rmvpe", OURS), "<= 16"),
    Goal("RMVPE, 30 s, half: ms", milliseconds("rmvpe", HALF), "<= 11"),
    Goal("RMVPE, 5 minutes: ms", milliseconds("rmvpe-long", OURS), "<= 110"),
    Goal(
        "HuBERT, float32: times as fast as PyTorch with TF32",
        _speed_up("hubert", TF32, OURS),
        ">= 1.3",
    ),
    Goal(
        "HuBERT, half: times as fast as PyTorch's float32 as it comes",
        _speed_up("hubert", DEFAULT, HALF),
        ">= 2",
    ),
    Goal(
        "synthesizer, float32: times as fast as PyTorch with TF32",
        _speed_up("synthesizer", TF32, OURS),
        ">= 1.6",
    ),
    Goal(
        "synthesizer, half: times as fast as PyTorch's float32 as it comes",
        _speed_up("synthesizer", DEFAULT, HALF),
        ">= 2.5",
    ),
    Goal("conversion, 30 s, float32: ms", milliseconds("conversion", OURS), "<= 50"),
    Goal(
        "conversion, float32: times as fast as PyTorch with TF32",
        _speed_up("conversion", TF32, OURS),
        ">= 3.2",
    ),
    Goal("conversion, 30 s, half: ms", milliseconds("conversion", HALF), "<= 32"),
    Goal("conversion, 10 minutes: ms", milliseconds("conversion-long", OURS), "<= 700"),
    Goal(
        "64 clips of 10 s, half: times real time", _real_time("many", HALF), ">= 2000"
    ),
    Goal("first conversion: ms", milliseconds("first", OURS), "<= 3000"),
    *(
        Goal(f"{what}: times its third conversion", _over_known(row, side), "<= 1.2")
        for row, told in (("new-length", ""), ("new-length-warm", ", warmed up"))
        for side, what in (
            (OURS, f"a new length{told}, float32"),
            (HALF, f"a new length{told}, half"),
        )
    ),
)


def goals(results: list[Result]) -> str:
    """Every goal with what each machine reached."""
    rows = []
    for result in shown_results(results):
        found = {row["row"]: row for row in result["rows"]}
        for goal in GOALS:
            value = goal.figure(found)
            verdict = goal.verdict(value)
            rows.append([*place(result), goal.what, goal.limit, value, verdict])
    header = ("machine", "commit", "what", "goal", "reached", "verdict")
    return table(header, rows or [["-", *["not measured"] * (len(header) - 1)]])
