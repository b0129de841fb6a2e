"""The figures that a GPU is judged by, ours in several precisions beside PyTorch's.

    python benchmarks/benchmark_gpu.py [--only ROW,ROW] [--seconds 30] [--index]

Each network alone, whole conversions from array to array of a short and a long
recording, many clips together, and the first calls: after loading, at new lengths, at
those for the third time, and at new lengths after ours has been warmed up for that.
The result is written after every row. ``torch.compile`` comes last, as it takes longest.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import common
import mlx.core as mx
import numpy as np
import torch
from gpu_sides import Side, compiled_side, default_side, our_sides, torch_sides
from our_side import synthesis_inputs
from twins import choose_sides, distinct_precisions

from rvc_mlx.bench import Timing
from rvc_mlx.loading import Voice, read_weights

WARM_UPS = 2  # calls before those that are timed
FIRST_ROWS = ("first", "new-length", "new-length-again", "new-length-warm")
ROWS = (*FIRST_ROWS, "hubert", "rmvpe", "rmvpe-long", "synthesizer")
ROWS += ("conversion", "conversion-long", "many")
NEW_LENGTHS = tuple(0.9 - 0.037 * i for i in range(7))  # parts of the usual length

Call = Callable[[Side], Any]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        seconds: of audio that a call takes.
        call: what is timed, of any side.
        network: whether it is a network alone; there PyTorch takes part as it comes and
            through ``torch.compile``, too.
    """

    seconds: float
    call: Call
    network: bool = False


def planned_rows(seconds: float, clips: int, voice: Voice) -> dict[str, Row]:
    """Every row but those of first calls.

    Args:
        seconds: length of the short recording; the long one is 20 times as long.
        clips: how many are converted together, each a third as long.
        voice: of which inputs for the synthesizer are made.
    """
    short = common.real_audio(seconds)
    longer, long = np.tile(short, 10), np.tile(short, 20)
    many = [np.roll(short, 1000 * i)[: len(short) // 3] for i in range(clips)]
    frames = round(100 * seconds) + 2 * voice.context
    inputs = synthesis_inputs(frames, voice.config.feature_size)
    return {
        "hubert": Row(seconds, lambda side: side.hubert(short), True),
        "rmvpe": Row(seconds, lambda side: side.rmvpe(short), True),
        "rmvpe-long": Row(10 * seconds, lambda side: side.rmvpe(longer)),
        "synthesizer": Row(seconds, lambda side: side.synthesizer(inputs), True),
        "conversion": Row(seconds, lambda side: side.convert(short)),
        "conversion-long": Row(20 * seconds, lambda side: side.convert(long)),
        "many": Row(clips * seconds / 3, lambda side: side.convert_many(many)),
    }


def time_cell(call: Callable[[], Any], runs: int, most: float) -> dict[str, Any]:
    """Time a call after two to warm up; fewer times, but once at least, after ``most`` s.

    The first call may compile for long, and of ours the second keeps the graphs that later
    ones replay. They do not count for ``most``.
    """
    result: Any = None

    def timed() -> float:
        nonlocal result
        start = time.perf_counter()
        result = call()
        return time.perf_counter() - start

    samples: list[float] = []
    gc.collect()
    gc.disable()  # as timeit does; a collection before each call would empty the caches
    try:
        first, *_ = [timed() for _ in range(WARM_UPS)]
        while len(samples) < runs and (not samples or sum(samples) < most):
            samples.append(timed())
    finally:
        gc.enable()
    cell = {"first_s": first, **Timing(tuple(samples)).as_dict()}
    return cell | {"finite": is_finite(result)}


def is_finite(result: Any) -> bool:
    """Whether all numbers of an array, or of a list of them, are finite."""
    arrays = result if isinstance(result, list) else [result]
    return all(bool(np.isfinite(array).all()) for array in arrays)


def first_calls(side: Side, seconds: float, warm: bool) -> dict[str, dict[str, Any]]:
    """The first conversion of a side, and those of lengths that it has not met.

    Args:
        side: that has done nothing yet.
        seconds: of the first conversion.
        warm: whether another of its kind, which is warmed up, meets those lengths, too.
    """
    short = common.real_audio(seconds)

    def timed(side: Side, parts: Sequence[float]) -> dict[str, Any]:
        times, finite = [], True
        for part in parts:
            start = time.perf_counter()
            audio = side.convert(short[: round(part * len(short))])
            times.append(time.perf_counter() - start)
            finite &= is_finite(audio)
        return {**Timing(tuple(times)).as_dict(), "finite": finite}

    cells = {"first": timed(side, (1.0,)), "new-length": timed(side, NEW_LENGTHS)}
    _, cells["new-length-again"] = [timed(side, NEW_LENGTHS) for _ in range(2)]
    start = time.perf_counter()
    if warm and (warmed := side.warmed(seconds)):
        took = time.perf_counter() - start
        cells["new-length-warm"] = timed(warmed, NEW_LENGTHS) | {"warm_up_s": took}
    return cells


@dataclass
class Table:
    """The cells measured so far; ``rows`` are in order, cells by the side's name."""

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    def put(self, row: str, seconds: float, side: str, cell: dict[str, Any]) -> None:
        """Keep a cell, and tell it.

        Raises:
            ValueError: our result holds numbers that are not finite.
        """
        found = self.rows.setdefault(row, {"row": row, "seconds": seconds, "sides": {}})
        found["sides"][side] = cell
        told = cell.get("failed") or f"{1e3 * cell['median_s']:.1f} ms"
        finite = cell.get("finite", True)
        print(f"{row}, {seconds:g} s, {side}: {told}", "" if finite else "(not finite)")
        if side.startswith("ours") and not finite:
            raise ValueError(
                f"{row}, {side}: the result holds numbers that are not finite"
            )

    def text(self) -> str:
        """The table in milliseconds, with the realtime factor of our fastest."""
        names = list({n: None for row in self.rows.values() for n in row["sides"]})
        cells = []
        for row in self.rows.values():
            times = [row["sides"].get(n, {}).get("median_s") for n in names]
            ours = [t for n, t in zip(names, times, strict=True) if "ours" in n and t]
            factor = row["seconds"] / min(ours) if ours else None
            times_ms = [1e3 * t if t else None for t in times]
            cells.append([row["row"], row["seconds"], *times_ms, factor])
        header = ("row", "audio s", *(f"{n}, ms" for n in names), "x realtime, ours")
        return common.table(header, cells)


def release() -> None:
    """Give back what the frameworks keep of a GPU's memory."""
    gc.collect()
    mx.clear_cache()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def attempt(call: Callable[[], dict[str, Any]], side: str) -> dict[str, Any]:
    """The cell, or why PyTorch could not give it; errors of ours are not caught."""
    if side.startswith("ours"):
        return call()
    try:
        return call()
    except RuntimeError as error:  # out of memory, or torch.compile cannot
        return {"failed": (str(error).strip() or repr(error)).splitlines()[0][:200]}


class Benchmark:
    """The run of all chosen rows on all sides.

    Args:
        arguments: of the command line.
    """

    def __init__(self, arguments: argparse.Namespace):
        self._arguments = arguments
        self._start = time.monotonic()
        self._files = common.models(arguments.models, arguments.index)
        self._described = common.describe_files(self._files._asdict())
        self._ours = []
        for precision in distinct_precisions(arguments).values():
            one = argparse.Namespace(**vars(arguments) | {"precision": [precision]})
            self._ours.append(choose_sides(one))
        self._table = Table()

    def run(self) -> None:
        """Measure and print."""
        asked, one = self._arguments, self._ours[0]
        place = one.torch._replace(precision="tf32" if one.backend == "cuda" else "f32")
        sides, default = our_sides(self._files, self._ours), {}
        if not asked.mlx_only:
            sides |= torch_sides(self._files, place)
            default = default_side(self._files, place)
        if any(map(self._wanted, FIRST_ROWS)):
            warm = self._wanted("new-length-warm")
            for name, side in sides.items():
                for row, cell in first_calls(side, asked.seconds, warm).items():
                    self._table.put(row, asked.seconds, name, cell)
            self._keep()
        voice = Voice(read_weights(self._files.voice, "voice"), one.engine)
        rows = planned_rows(asked.seconds, asked.clips, voice)
        rows = {name: row for name, row in rows.items() if self._wanted(name)}
        for name, row in rows.items():
            self._measure(name, row, sides | default if row.network else sides)
        if asked.compile and not asked.mlx_only:
            compiled = compiled_side(self._files, place)
            for name, row in rows.items():
                if row.network:
                    self._measure(name, row, compiled)
        print(self._table.text())

    def _wanted(self, row: str) -> bool:
        return not self._arguments.only or row in self._arguments.only

    def _measure(self, name: str, row: Row, sides: Mapping[str, Side]) -> None:
        asked = self._arguments
        for side, subject in sides.items():
            call = partial(row.call, subject)
            cell = attempt(partial(time_cell, call, asked.runs, asked.most), side)
            self._table.put(name, row.seconds, side, cell)
        release()
        self._keep()

    def _keep(self) -> None:
        """Write what there is so far."""
        one, asked = self._ours[0], self._arguments
        sides = one.record() | {"precision": ", ".join(s.precision for s in self._ours)}
        options = {n: getattr(asked, n) for n in ("seconds", "clips", "runs", "most")}
        options["warm_ups"] = WARM_UPS
        machine = common.environment()
        content = {
            "benchmark": "gpu",
            "sides": sides,
            "environment": machine,
            "options": options,
            "models": self._described,
            "minutes": (time.monotonic() - self._start) / 60,
            "rows": list(self._table.rows.values()),
        }
        file = f"gpu-{common.machine_name(one.backend, machine)}"
        common.write_json(asked.output, file, content)


def names(text: str) -> list[str]:
    """Names of rows, separated by commas."""
    found = text.split(",")
    if unknown := set(found) - set(ROWS):
        raise argparse.ArgumentTypeError(
            f"{', '.join(sorted(unknown))}: no such row; the rows are {', '.join(ROWS)}"
        )
    return found


def main() -> int:
    parser = common.parser(__doc__ or "", runs=7, precisions=("auto", "bf16", "f16"))
    parser.add_argument("--only", type=names, metavar="ROW,ROW", help=", ".join(ROWS))
    parser.add_argument("--seconds", type=float, default=30.0, help="default: 30")
    parser.add_argument("--clips", type=int, default=64, help="together; default: 64")
    parser.add_argument(
        "--most", type=float, default=8.0, metavar="S",
        help="seconds after which a cell takes no more samples (default: 8)",
    )  # fmt: skip
    parser.add_argument("--index", action="store_true", help="convert with an index")
    parser.add_argument("--mlx-only", action="store_true")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True,
        help="time torch.compile too, last of all",
    )  # fmt: skip
    Benchmark(parser.parse_args()).run()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
