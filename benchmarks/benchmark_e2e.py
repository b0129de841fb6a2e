"""File to file in fresh processes: cold, warm, stage by stage, and peak memory.

    python benchmarks/benchmark_e2e.py [--seconds 5,30] [--runs 5] [--cold-runs 3]
    python benchmarks/benchmark_e2e.py --memory 30,600,3600 [--torch-limit 600]

*First run* is the very first on a machine, with nothing compiled; *cold* is a fresh
process after that, from its start to the written file; *warm* is the next conversion in
the same process. ``--memory`` converts each length once and records the peak.
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
            RuntimeError: it failed, with its last words.
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
            raise RuntimeError(
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


def measure_speed(
    runner: Runner, side: str, arguments: argparse.Namespace, **more: Any
) -> list[dict[str, Any]]:
    """First run, cold runs of the shortest clip, warm runs of every clip."""
    shortest = min(arguments.seconds)
    first = None
    if side == "ours":  # PyTorch compiles nothing
        first = runner.run(side, shortest, **more)["cold_s"]
        print(f"ours {more['label']}: first run {first:.2f} s", flush=True)
    rows = []
    for seconds in arguments.seconds:
        again = arguments.cold_runs - 1 if seconds == shortest else 0
        cold = [runner.run(side, seconds, **more)["cold_s"] for _ in range(again)]
        facts = runner.run(side, seconds, arguments.runs, **more)
        row = summarise(facts, [*cold, facts["cold_s"]])
        row["first_run_s"] = first if seconds == shortest else None
        rows.append(row)
        print(f"{side} {seconds:g} s: warm {row['warm_median_s']:.3f} s", flush=True)
    return rows


def print_speed(rows: list[dict[str, Any]]) -> None:
    """Times, speed-ups against PyTorch, and the stages."""
    theirs = {
        (r["precision"], r["seconds"]): r["warm_median_s"]
        for r in rows
        if r["side"] == "torch"
    }
    for r in rows:
        key = r.get("against", r["precision"]), r["seconds"]
        r["speedup"] = theirs[key] / r["warm_median_s"]
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
    runner: Runner, arguments: argparse.Namespace, variants: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """One conversion of every length in a process of its own."""
    rows = []
    for variant in variants:
        limit = arguments.torch_limit if variant["side"] == "torch" else float("inf")
        runner.run(**variant, seconds=5.0)  # compile, where nothing is compiled yet
        for seconds in arguments.memory:
            if seconds <= limit:
                rows.append(summarise(runner.run(**variant, seconds=seconds)))
                print(f"{variant['side']} {seconds:g} s done", flush=True)
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
        if arguments.memory:
            rows = measure_memory(runner, arguments, variants)
            save(arguments, sides, "memory", files._asdict(), rows=rows)
            return
        rows = []
        for variant in variants:
            rows += measure_speed(runner, arguments=arguments, **variant)
    print_speed(rows)
    save(arguments, sides, "e2e", files._asdict(), rows=rows)


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument(
        "--seconds", type=common.seconds_list, default=[5.0, 30.0], metavar="LIST"
    )
    parser.add_argument("--cold-runs", type=int, default=3, help="default: 3")
    parser.add_argument(
        "--memory", type=common.seconds_list, metavar="LIST", help="peak by length"
    )
    parser.add_argument(
        "--torch-limit", type=float, default=600, metavar="S",
        help="longest clip for PyTorch's memory, which grows with it (default: 600)",
    )  # fmt: skip
    arguments = parser.parse_args()
    measure(arguments, choose_sides(arguments))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
