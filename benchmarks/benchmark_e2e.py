"""File to file in fresh processes: cold, warm, stage by stage, and peak memory.

    python benchmarks/benchmark_e2e.py [--seconds 5,30] [--runs 5] [--cold-runs 3]
    python benchmarks/benchmark_e2e.py --memory 5,30,600,3600 [--torch-limit 600]

*First run* is the very first on a machine, with nothing compiled; *cold* is a fresh
process after that, from its start to the written file; *warm* is the next conversion in
the same process. ``--memory`` converts each length once and records the peak, of the
process and, on a GPU, of what the framework allocated there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
from twins import (
    Sides,
    choose_sides,
    distinct_precisions,
    engine_device,
    save,
    torch_precision,
)

from rvc_mlx.audio_io import save_audio

CHILD = Path(__file__).with_name("e2e_child.py")
MIB = 1 << 20


@dataclass(frozen=True)
class Runner:
    """Starts children on one set of files.

    Attributes:
        common: what every child is told.
        folder: holds their sound files and, below it, our compiled models.
    """

    common: dict[str, Any]
    folder: Path

    def run(
        self, side: str, seconds: float, runs: int = 0, **more: Any
    ) -> dict[str, Any]:
        """Convert a clip in a fresh process; ``cold_s`` counts from its start.

        Raises:
            ChildProcessError: it failed, with its last words.
        """
        source = self.folder / f"{seconds:g}.wav"
        if not source.exists():
            save_audio(source, common.synthetic_audio(seconds), common.SAMPLE_RATE)
        given = self.common | more | {"side": side, "runs": runs}
        given |= {"source": str(source), "target": str(self.folder / "out.wav")}
        environment = os.environ | {"RVC_MLX_HOME": str(self.folder / "home")}
        words = [sys.executable, str(CHILD), json.dumps(given)]
        begin = time.time()
        done = subprocess.run(words, capture_output=True, text=True, env=environment)
        if done.returncode:
            last = "\n".join(done.stderr.strip().splitlines()[-3:])
            raise ChildProcessError(
                f"{side}, {seconds:g} s: the process ended with {done.returncode} "
                f"(-9: out of memory): {last}"
            )
        facts = json.loads(done.stdout.strip().splitlines()[-1])
        facts["cold_s"] = facts.pop("finished") - begin
        facts["precision"] = more.get("label", facts["precision"])
        return {**more, "side": side, "seconds": seconds, **facts}


def summarise(facts: dict[str, Any], cold: list[float] | None = None) -> dict[str, Any]:
    """Medians of a child's samples, which stay in it."""
    stages = facts.pop("stages_s")
    names = list(stages[-1]) if stages else []
    middle = {n: statistics.median(s.get(n, 0.0) for s in stages) for n in names}
    facts |= {"stages_s": middle, "cold_samples_s": cold or [facts["cold_s"]]}
    facts["cold_s"] = statistics.median(facts["cold_samples_s"])
    if facts["warm_s"]:
        facts["warm_median_s"] = statistics.median(facts["warm_s"])
        facts["realtime_factor"] = facts["seconds"] / facts["warm_median_s"]
    return facts


Variant = dict[str, Any]
Save = Callable[[list[dict[str, Any]]], object]


def measure_speed(
    runner: Runner, arguments: argparse.Namespace, variants: list[Variant], save: Save
) -> list[dict[str, Any]]:
    """First run and cold runs of the shortest clip, warm runs of every clip.

    ``save`` is given the rows after each of them.
    """
    rows = []
    lengths = sorted(arguments.seconds)
    for seconds, variant in by_length(lengths, variants, arguments.torch_limit):
        shortest = seconds == lengths[0]
        first = None
        if shortest and variant["side"] == "ours":  # PyTorch compiles nothing
            first = runner.run(seconds=seconds, **variant)["cold_s"]
        again = arguments.cold_runs - 1 if shortest else 0
        cold = [runner.run(seconds=seconds, **variant)["cold_s"] for _ in range(again)]
        runs = common.runs_at(seconds, arguments.runs)
        facts = runner.run(seconds=seconds, runs=runs, **variant)
        row = summarise(facts, [*cold, facts["cold_s"]])
        rows.append(row | {"first_run_s": first})
        add_speedups(rows)
        save(rows)
    return rows


def by_length(
    lengths: Sequence[float], variants: Sequence[Variant], torch_limit: float
) -> Iterator[tuple[float, Variant]]:
    """Every length with every variant; PyTorch up to its limit."""
    for seconds in lengths:
        for variant in variants:
            if variant["side"] == "ours" or seconds <= torch_limit:
                yield seconds, variant


def add_speedups(rows: list[dict[str, Any]]) -> None:
    """Tell how much faster than PyTorch each row is; None where PyTorch has none."""
    theirs = {
        (r["precision"], r["seconds"]): r["warm_median_s"]
        for r in rows
        if r["side"] == "torch"
    }
    for r in rows:
        other = theirs.get((r.get("against", r["precision"]), r["seconds"]))
        r["speedup"] = other / r["warm_median_s"] if other else None


def print_speed(rows: list[dict[str, Any]]) -> None:
    """Times, speed-ups against PyTorch, and the stages."""
    header = ("side", "precision", "audio s", "first run s", "cold s", "warm s")
    header += ("speed-up", "x realtime", "peak MiB", "GPU MiB")
    cells = [
        [r["side"], r["precision"], r["seconds"], r["first_run_s"], r["cold_s"]]
        + [r["warm_median_s"], r["speedup"], r["realtime_factor"]]
        + [r[name] // MIB for name in ("peak_memory_bytes", "gpu_peak_bytes")]
        for r in rows
    ]
    print(common.table(header, cells))
    cells = []
    for r in rows:
        groups = common.grouped_stages(r["stages_s"], r["warm_median_s"])
        cells.append([r["side"], r["precision"], r["seconds"], *groups.values()])
    print("\nwarm, seconds per stage")
    print(common.table(("side", "precision", "audio s", *groups), cells))


def measure_memory(
    runner: Runner, arguments: argparse.Namespace, variants: list[Variant], save: Save
) -> list[dict[str, Any]]:
    """One conversion of every length in a process of its own.

    ``save`` is given the rows after each of them.
    """
    rows = []
    for variant in variants:
        if variant["side"] == "ours" and runner.common["device"] == "cpu":
            runner.run(seconds=5.0, **variant)  # compiling takes memory, too
    lengths = sorted(arguments.memory)
    for seconds, variant in by_length(lengths, variants, arguments.torch_limit):
        rows.append(summarise(runner.run(seconds=seconds, **variant)))
        save(rows)
    header = ("side", "precision", "audio s", "peak MiB", "GPU MiB", "s in all")
    names = ("side", "precision", "seconds", "peak_memory_bytes", "gpu_peak_bytes")
    cells = [[r[n] // MIB if "bytes" in n else r[n] for n in names] for r in rows]
    cells = [[*cell, r["first_s"]] for cell, r in zip(cells, rows, strict=True)]
    print(common.table(header, cells))
    return rows


def measure(arguments: argparse.Namespace, sides: Sides) -> None:
    files = common.models(arguments.models)
    given = {k: str(v) if v else None for k, v in files._asdict().items()}
    given |= {"index_rate": 0.75 if files.index else 0.0}
    given |= {"device": engine_device(arguments.engine)}
    kind = sides.torch.device.type
    given |= {"torch_device": kind}
    variants: list[dict[str, Any]] = []
    for label, precision in distinct_precisions(arguments).items():
        against = torch_precision(label, arguments.torch_precision, kind)
        ours = {"side": "ours", "precision": precision, "label": label}
        variants.append({**ours, "against": against})
    variants += [
        {"side": "torch", "torch_precision": precision}
        for precision in dict.fromkeys(v["against"] for v in variants)
    ]
    with tempfile.TemporaryDirectory(prefix="rvc-mlx-e2e-") as folder:
        runner = Runner(given, Path(folder))
        name = "memory" if arguments.memory else "e2e"
        measure_rows = measure_memory if arguments.memory else measure_speed
        rows = measure_rows(
            runner,
            arguments,
            variants,
            lambda rows: save(arguments, sides, name, files._asdict(), rows=rows),
        )
    if not arguments.memory:
        print_speed(rows)


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument(
        "--seconds", type=common.seconds_list, default=[5.0, 30.0], metavar="LIST"
    )
    parser.add_argument("--cold-runs", type=common.whole, default=3, help="default: 3")
    parser.add_argument(
        "--memory", type=common.seconds_list, metavar="LIST", help="peak by length"
    )
    parser.add_argument(
        "--torch-limit", type=common.seconds, default=600, metavar="S",
        help="longest clip for PyTorch, whose memory grows with it (default: 600)",
    )  # fmt: skip
    arguments = parser.parse_args()
    return common.exit_code(lambda: measure(arguments, choose_sides(arguments)))


if __name__ == "__main__":
    raise SystemExit(main())
