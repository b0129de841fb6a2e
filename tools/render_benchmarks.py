"""Write the documents that hold measurements, from the result files.

    python tools/render_benchmarks.py [--results benchmarks/results] [--root .] [--check]

Writes ``benchmarks/BENCHMARK_RESULTS.md``, ``docs/BENCHMARKS.md``,
``docs/INFERENCE_PARITY_ACHIEVED.md``, ``docs/RMVPE_OPTIMIZATION.md`` and the pictures in
``docs/images``. ``--check`` writes nothing and fails if a document is not up to date.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import gpu_goals
import gpu_table
import tables

ROOT = Path(__file__).resolve().parents[1]

NOTICE = "<!-- Made by tools/render_benchmarks.py from benchmarks/results; do not edit. -->\n"
METHOD = """\
Both sides convert the same samples with the same models and the same random numbers.
Ours is this program; PyTorch is `rvc_reference`, plain eager PyTorch with the structure
of the original. The models are full-size networks with random weights, whose
activations have the scale of trained ones; time does not depend on the values.

- Outputs are computed and copied to the host inside the timed call, on both sides.
- After a call to warm up, or as many as a file's options tell, the two sides are timed in
  turns (file to file: each in a process of its own); tables show medians, the files every
  sample.
- `tf32` means that float32 products may use TF32, on both sides; `f32` that neither may.
  Where it may, ours multiplies numbers of float16 in the content encoder's layers, the pitch
  network's convolutions and the vocoder's residual blocks: they have as many bits of fraction,
  and all sums are float32. `default` is
  PyTorch's float32 as it comes, with TF32 in convolutions alone.
- *First run ever* includes the compilation of the networks, which is kept; *cold* is a
  fresh process from its start to the written file; *warm* is the next conversion.
- Peak memory is the largest resident memory of a fresh process, and for GPUs what the
  framework had allocated at most.
- The H200 rows were measured on one GPU of a machine whose other GPUs trained voices or ran
  another benchmark: what waits for the host is slower there than on an idle machine, on
  both sides. Only what a GPU is judged by has rows of an idle one, with 16 cores.
- There, *first* is the first conversion of a process whose kernels are on disk: another
  one compiled them. *new-length* is recordings of seven other lengths, *again* the same for
  the third time, *warm* for the first time after `warm_up`.
- Differences are absolute. The correlation is shown because others show it: it is
  nearly blind to errors.

Each table can be made again with the command above it; see `benchmarks/README.md`.
"""
SECTIONS = (
    ("RMVPE: samples to F0", "benchmark_rmvpe.py", tables.rmvpe),
    (
        "RMVPE: where five seconds go, in seconds",
        "benchmark_rmvpe.py",
        tables.rmvpe_parts,
    ),
    ("The networks alone", "benchmark_components.py", tables.components),
    ("Complete synthesis", "benchmark_rvc_full.py", tables.rvc_full),
    ("File to file", "benchmark_e2e.py", tables.e2e),
    ("File to file: seconds per stage, warm", "benchmark_e2e.py", tables.e2e_stages),
    ("Peak memory by length", "benchmark_e2e.py --memory 5,30,600,3600", tables.memory),
    ("What a GPU is judged by", "benchmark_gpu.py", gpu_table.gpu),
    ("Goals of a GPU", "benchmark_gpu.py", gpu_goals.goals),
    ("A training step", "benchmark_training.py", tables.training),
    ("Waveforms of real audio", "benchmark_audio_parity.py", tables.audio_parity),
)
PICTURES = {
    "rmvpe_speedup.png": "RMVPE: speed-up by length",
    "memory.png": "peak memory by length",
    "stages.png": "stages of a conversion",
}


def sections(results: list[tables.Result]) -> str:
    """Every table under its heading and command."""
    return "\n".join(
        f"## {title}\n\n`python benchmarks/{command}`\n\n{make(results)}\n"
        for title, command, make in SECTIONS
    )


def benchmark_results(results: list[tables.Result]) -> str:
    """``benchmarks/BENCHMARK_RESULTS.md``."""
    listed = tables.environments(results)
    head = "# Benchmark results\n\nMethod and pictures: [BENCHMARKS](../docs/BENCHMARKS.md)."
    return f"{head}\n\n{sections(results)}\n## Result files\n\n{listed}\n"


def benchmarks(results: list[tables.Result], pictures: list[str]) -> str:
    """``docs/BENCHMARKS.md``."""
    shown = "\n".join(f"![{PICTURES[name]}](images/{name})\n" for name in pictures)
    return f"# Benchmarks\n\n{METHOD}\n{shown}\n{sections(results)}"


def parity(results: list[tables.Result], folder: Path) -> str:
    """``docs/INFERENCE_PARITY_ACHIEVED.md``."""
    rows = tables.parity_rows(results, folder)
    failing = sum(tables.verdict(row) != "ok" for row in rows)
    state = f"{len(rows)} comparisons, {failing} beyond their tolerance."
    measured = {
        f"- {row['engine']}: {row['machine']}, commit {row['commit'][:12]}"
        for row in rows
        if row.get("machine")
    }
    state += "".join(f"\n{line}" for line in ["", *sorted(measured)])
    return (
        "# Parity with PyTorch\n\n"
        "Largest and mean absolute difference of each stage from PyTorch's reference, in "
        "float32, with the same inputs, weights and noise, beside the tolerance of the "
        "test that holds it. A comparison beyond its tolerance shows as failing.\n\n"
        f"{state}\n\n{tables.parity(rows)}\n"
    )


def step(before: tables.Result, after: tables.Result) -> str:
    """The lengths of an optimisation step, before and after."""
    old = {row["seconds"]: row for row in before["rows"]}
    rows = []
    for row in after["rows"]:
        if past := old.get(row["seconds"]):
            times = [past["ours"]["median_s"], row["ours"]["median_s"]]
            cents = [past["max_cents"], row["max_cents"]]
            rows.append([row["seconds"], *times, times[0] / times[1], *cents])
    header = ("audio, s", "before, s", "after, s", "gain")
    return tables.table((*header, "before, max cents", "after, max cents"), rows)


def optimization(folder: Path) -> str:
    """``docs/RMVPE_OPTIMIZATION.md``: steps that have a file before and one after."""
    parts = [
        "# How RMVPE became fast\n\nEvery step with what was measured before and after "
        "it, by `python benchmarks/benchmark_rmvpe.py --step NAME:before` and `:after`.\n"
    ]
    found = {r["file"]: r for r in tables.read_results(folder / "steps")}
    for before_file, before in found.items():
        name, _, rest = before_file.partition(".before")
        after = found.get(f"{name}.after{rest}") or next(
            (r for f, r in found.items() if f.startswith(f"{name}.after")), None
        )
        if not rest or after is None:
            continue
        note = after["options"]["note"] or before["options"]["note"]
        files = f"`{before_file}`, `{after['file']}`"
        who = " → ".join(", ".join(tables.labels(r)[:2]) for r in (before, after))
        parts.append(f"## {name}\n\n{note}\n\n{who}. Files: {files}.\n")
        parts.append(step(before, after) + "\n")
    if len(parts) == 1:
        parts.append("No step has been measured yet.\n")
    return "\n".join(parts)


def draw(results: list[tables.Result], folder: Path) -> list[str]:
    """Draw what there are results for, and nothing else; gives the pictures' names."""
    import plots

    makers = (plots.plot_speedup, plots.plot_memory, plots.plot_stages)
    drawn = []
    for name, make in zip(PICTURES, makers, strict=True):
        if make(results, folder / name):
            drawn.append(name)
        else:
            (folder / name).unlink(missing_ok=True)
    return drawn


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR"
    )
    parser.add_argument("--root", type=Path, default=ROOT, metavar="DIR")
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    given = parser.parse_args()
    results = tables.read_results(given.results)
    images = given.root / "docs" / "images"
    pictures = (
        [name for name in PICTURES if (images / name).exists()]
        if given.check
        else draw(results, images)
    )
    documents = {
        "benchmarks/BENCHMARK_RESULTS.md": benchmark_results(results),
        "docs/BENCHMARKS.md": benchmarks(results, pictures),
        "docs/INFERENCE_PARITY_ACHIEVED.md": parity(results, given.results),
        "docs/RMVPE_OPTIMIZATION.md": optimization(given.results),
    }
    stale = []
    for name, text in documents.items():
        path = given.root / name
        if given.check:
            current = path.read_text("utf-8") if path.exists() else ""
            stale += [name] if current != NOTICE + text else []
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(NOTICE + text, "utf-8")
        print(f"wrote {name}")
    for name in stale:
        print(f"{name} is not up to date: run python tools/render_benchmarks.py")
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
