"""What a GPU has to reach, and whether it did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from common import verdict
from gpu_table import place, ratio, shown_results, table_of_gpus
from tables import Result

OURS, HALF = "ours tf32", "ours f16"
TF32, DEFAULT = "PyTorch tf32", "PyTorch default"

Rows = dict[str, dict[str, Any]]
Figure = Callable[[Rows], float | None]


class Goal(NamedTuple):
    """One figure and its limit.

    Attributes:
        what: for people, with the unit.
        figure: of a result's rows, by name; None where a cell is missing.
        sign: ``"<="`` or ``">="``.
        limit: the limit.
    """

    what: str
    figure: Figure
    sign: str
    limit: float


def _median(rows: Rows, row: str, side: str) -> float | None:
    """Of a cell, seconds."""
    return rows.get(row, {}).get("sides", {}).get(side, {}).get("median_s")


def _milliseconds(row: str, side: str) -> Figure:
    return lambda rows: ratio(_median(rows, row, side), 1e-3)


def _times(above: tuple[str, str], below: tuple[str, str]) -> Figure:
    """How many times one cell's median another's is; cells are row and side."""
    return lambda rows: ratio(_median(rows, *above), _median(rows, *below))


def _real_time(row: str, side: str) -> Figure:
    return lambda rows: ratio(
        rows.get(row, {}).get("seconds"), _median(rows, row, side)
    )


def _faster(what: str, row: str, theirs: str, ours: str, limit: float) -> Goal:
    told = {TF32: "PyTorch with TF32", DEFAULT: "PyTorch's float32 as it comes"}
    kind = "half" if ours == HALF else "float32"
    return Goal(
        f"{what}, {kind}: times as fast as {told[theirs]}",
        _times((row, theirs), (row, ours)),
        ">=",
        limit,
    )


GOALS = (
    Goal("RMVPE, 30 s, float32: ms", _milliseconds("rmvpe", OURS), "<=", 16),
    Goal("RMVPE, 30 s, half: ms", _milliseconds("rmvpe", HALF), "<=", 11),
    Goal("RMVPE, 5 minutes: ms", _milliseconds("rmvpe-long", OURS), "<=", 110),
    _faster("HuBERT", "hubert", TF32, OURS, 1.3),
    _faster("HuBERT", "hubert", DEFAULT, HALF, 2),
    _faster("synthesizer", "synthesizer", TF32, OURS, 1.6),
    _faster("synthesizer", "synthesizer", DEFAULT, HALF, 2.5),
    Goal("conversion, 30 s, float32: ms", _milliseconds("conversion", OURS), "<=", 50),
    _faster("conversion", "conversion", TF32, OURS, 3.2),
    Goal("conversion, 30 s, half: ms", _milliseconds("conversion", HALF), "<=", 32),
    Goal(
        "conversion, 10 minutes: ms", _milliseconds("conversion-long", OURS), "<=", 700
    ),
    Goal(
        "64 clips of 10 s, half: times real time", _real_time("many", HALF), ">=", 2000
    ),
    Goal("first conversion: ms", _milliseconds("first", OURS), "<=", 3000),
    *(
        Goal(
            f"a new length{told}, {kind}: times its third conversion",
            _times((row, side), ("new-length-again", side)),
            "<=",
            1.2,
        )
        for row, told in (("new-length", ""), ("new-length-warm", ", warmed up"))
        for side, kind in ((OURS, "float32"), (HALF, "half"))
    ),
)


def goals(results: list[Result]) -> str:
    """Every goal with what each machine reached."""
    rows = []
    for result in shown_results(results):
        found = {row["row"]: row for row in result["rows"]}
        for what, figure, sign, limit in GOALS:
            value = figure(found)
            told = verdict(value, sign, limit)
            rows.append([*place(result), what, f"{sign} {limit:g}", value, told])
    header = ("machine", "commit", "what", "goal", "reached", "verdict")
    return table_of_gpus(header, rows)
