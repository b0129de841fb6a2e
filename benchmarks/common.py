"""What every benchmark shares: options, models, test audio, timing, tables, JSON.

A measurement is honest when both sides get the same inputs, noise, precision and class
of device, when outputs are computed inside the timed call, and when every sample is kept.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# Before MLX: of two cuDNNs the one loaded first serves both, and PyTorch takes its own only.
if any((d.name or "").startswith("mlx-cuda") for d in distributions()):
    with suppress(ImportError):
        import torch  # noqa: F401

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from record import ROOT, describe_files, environment, machine_name, write_json

from rvc_mlx.audio_io import load_audio
from rvc_mlx.bench import Timing, peak_memory, time_calls

__all__ = [
    "Timing",
    "describe_files",
    "environment",
    "machine_name",
    "peak_memory",
    "time_calls",
    "write_json",
]

RESULTS = ROOT / "benchmarks" / "results"
TEST_MODELS = ROOT / ".test-models"  # made once, ignored by git
SPEECH_CLIP = ROOT / "tests" / "small_models" / "speech.flac"
SAMPLE_RATE = 16000
# Names of whole models of any size, as those of the tests have them.
OTHER_NAMES = {"hubert_base.pt": "contentvec", "v2_48k.pth": "voice.pth"}
OTHER_NAMES |= {"v2.index": "voice.index"}
MODEL_NAMES = "rmvpe.pt, " + ", ".join(f"{a} or {b}" for a, b in OTHER_NAMES.items())
LONG, LONG_RUNS = 180.0, 5  # seconds from which on so many runs are enough


class Models(NamedTuple):
    """Files of one conversion; ``index`` is None where faiss cannot make one."""

    hubert: Path
    rmvpe: Path
    voice: Path
    index: Path | None


def parser(
    description: str, *, runs: int = 5, precisions: Sequence[str] = ("auto", "f32")
) -> argparse.ArgumentParser:
    """A command line with the options that all scripts take."""
    made = argparse.ArgumentParser(description=description.split("\n", 1)[0])
    group = made.add_argument_group("what computes")
    group.add_argument(
        "--engine", choices=("auto", "openvino", "mlx", "mlx-cpu"), default="auto",
        help="of our side (default: auto: MLX on a GPU, else OpenVINO)",
    )  # fmt: skip
    group.add_argument(
        "--precision", nargs="+", default=list(precisions),
        choices=("auto", "f32", "bf16", "f16"),
        help="of our side; several run one after the other "
        f"(default: {' '.join(precisions)})",
    )  # fmt: skip
    group.add_argument(
        "--torch-device", choices=("cpu", "cuda", "mps"),
        help="of PyTorch (default: the class of device that our engine uses)",
    )  # fmt: skip
    group.add_argument(
        "--torch-precision", choices=("f32", "bf16", "f16", "same"), default="f32",
        help="of PyTorch (default: f32)",
    )  # fmt: skip
    made.add_argument(
        "--models", type=Path, metavar="DIR",
        help=f"folder with {MODEL_NAMES} (default: random full-size models, made "
        "once; tests/small_models has tiny ones)",
    )  # fmt: skip
    made.add_argument(
        "--runs", type=whole, default=runs,
        help=f"default: {runs}; from {LONG:g} s of audio on at most {LONG_RUNS}",
    )  # fmt: skip
    made.add_argument(
        "--output", type=Path, default=RESULTS, metavar="DIR", help="for the JSON"
    )
    return made


def add_sides(parser: argparse.ArgumentParser) -> None:
    """Add the options that give each side its voice, or leave one out."""
    parser.add_argument("--pt-model", type=Path, metavar="P", help="a voice .pth")
    parser.add_argument("--mlx-model", type=Path, metavar="M", help="the same for us")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--pytorch-only", action="store_true")
    only.add_argument("--mlx-only", action="store_true")


def model_file(name: str, folder: Path | None = None) -> Path:
    """A model by its name: of ``folder``, or a random one, made at its first use.

    Raises:
        FileNotFoundError: the folder lacks it.
    """
    if folder is not None:
        names = [name, OTHER_NAMES[name]] if name in OTHER_NAMES else [name]
        found = [folder / n for n in names if (folder / n).exists()]
        if not found:
            raise FileNotFoundError(
                f"{folder / name}: there is no such file; --models wants a folder with "
                f"{MODEL_NAMES}"
            )
        return found[0]
    if not (TEST_MODELS / name).exists():
        from tools.make_test_models import make_test_models

        print(f"making the random model {name} (once) ...", flush=True)
        making = TEST_MODELS / f".{name}.{os.getpid()}"
        try:
            make_test_models(making, [name])
            (making / name).rename(TEST_MODELS / name)
        finally:
            shutil.rmtree(making, ignore_errors=True)
    return TEST_MODELS / name


def has_faiss() -> bool:
    """Whether faiss can be imported."""
    try:
        import faiss  # noqa: F401
    except ImportError:
        return False
    return True


def models(folder: Path | None = None, index: bool = True) -> Models:
    """The files of a conversion; says so when the index must be left out."""
    if index and not has_faiss():
        print("faiss is not installed: converting without an index, on both sides")
        index = False
    names = ("hubert_base.pt", "rmvpe.pt", "v2_48k.pth")
    paths = [model_file(name, folder) for name in names]
    return Models(*paths, model_file("v2.index", folder) if index else None)


def synthetic_audio(seconds: float, seed: int = 0) -> np.ndarray:
    """Speech-like sound: voice, hiss and pauses; repeated after a minute.

    Returns:
        ``[seconds * 16000]`` float32 at 16 kHz, peak 0.6.
    """
    from tools.random_weights import synthetic_speech

    audio = synthetic_speech(min(seconds, 60.0), seed).audio
    return np.resize(audio, round(seconds * SAMPLE_RATE))


def real_audio(seconds: float, path: Path | None = None) -> np.ndarray:
    """The clip of the tests, or a file, repeated or cut: ``[n]`` float32 at 16 kHz."""
    audio = load_audio(path or SPEECH_CLIP)
    return np.resize(audio, round(seconds * SAMPLE_RATE)) if seconds else audio


def difference(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """How far two arrays of one shape are apart; the correlation is no measure of it.

    Raises:
        ValueError: their shapes differ.
    """
    if ours.shape != theirs.shape:
        raise ValueError(f"ours is {ours.shape}, PyTorch's is {theirs.shape}")
    ours, theirs = (x.astype(np.float64).ravel() for x in (ours, theirs))
    error = np.abs(ours - theirs)
    varied = ours.std() > 0 and theirs.std() > 0
    return {
        "max_abs": float(error.max()),
        "mean_abs": float(error.mean()),
        "scale": float(np.abs(theirs).mean()),
        "correlation": float(np.corrcoef(ours, theirs)[0, 1]) if varied else 1.0,
    }


def difference_f0(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """Cents between two F0 curves where both have voice, and where voicing agrees."""
    both = (ours > 0) & (theirs > 0)
    cents = np.abs(1200 * np.log2(ours[both] / theirs[both])) if both.any() else [0.0]
    return {
        "max_cents": float(np.max(cents)),
        "mean_cents": float(np.mean(cents)),
        "voicing_agreement": float(np.mean((ours > 0) == (theirs > 0))),
        "voiced": float(np.mean(theirs > 0)),
    }


def shown(value: Any) -> str:
    """A value as a table cell."""
    if isinstance(value, float):
        if 0.999 < value < 1:  # correlations
            return f"{value:.9f}"
        small = value != 0 and abs(value) < 1e-3
        return f"{value:.1e}" if small else f"{value:.4g}"
    return "-" if value is None else str(value)


def verdict(value: float | None, sign: str, goal: float) -> str:
    """``met``, ``missed`` or, for None, ``not measured``.

    Args:
        value: the figure.
        sign: ``"<="`` or ``">="``.
        goal: its limit.
    """
    if value is None:
        return "not measured"
    met = value <= goal if sign == "<=" else value >= goal
    return "met" if met else "missed"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A markdown table, padded so that a terminal shows it, too."""
    cells = [list(header), *[[shown(value) for value in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))
        for row in cells
    ]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths))
    return "\n".join(f"{line} |" for line in lines)


# What a person looks for, and what both programs call it.
STAGES = {
    "load": ("load", "prepare"),
    "HuBERT": ("content",),
    "RMVPE": ("pitch",),
    "index": ("index",),
    "synthesis": ("prior", "source", "vocoder", "synthesis"),
    "write": ("finish", "write"),
}


def grouped_stages(stages: Mapping[str, float], total: float) -> dict[str, float]:
    """Seconds per group of stages; ``other`` is what no stage names."""
    groups = {
        group: sum(stages.get(name, 0.0) for name in names)
        for group, names in STAGES.items()
    }
    return groups | {"other": max(0.0, total - sum(groups.values()))}


def seconds_list(text: str) -> list[float]:
    """Lengths of an option: ``5,30,300``."""
    return [seconds(part) for part in text.replace(",", " ").split()]


def seconds(text: str) -> float:
    """One length of an option; 0.1 s or more.

    Raises:
        argparse.ArgumentTypeError: it is not.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.1 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no length of 0.1 s or more")
    return value


def whole(text: str) -> int:
    """A number of runs of an option; 1 or more.

    Raises:
        argparse.ArgumentTypeError: it is not.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 1 or more")
    return int(text)


def runs_at(seconds: float, runs: int) -> int:
    """Timed calls at a length: five are enough where one takes long by itself."""
    return min(runs, LONG_RUNS) if seconds >= LONG else runs


def exit_code(main: Callable[[], int | None]) -> int:
    """Run a script: what it ends with; bad input gives one line on stderr, and 1."""
    try:
        return main() or 0
    except (ValueError, OSError) as error:
        named = isinstance(error, OSError) and error.strerror and error.filename
        text = f"{error.filename}: {error.strerror}" if named else str(error)
        print(f"error: {' '.join(text.split())}", file=sys.stderr)
        return 1


def run_checks(checks: Sequence[Callable[[], None]]) -> int:
    """Run test functions as a script: a table, and 1 if any of them failed."""
    rows = []
    for check in checks:
        start = time.perf_counter()
        try:
            check()
            verdict, why = "passed", ""
        except AssertionError as error:
            verdict, why = "FAILED", str(error).strip().split("\n", 1)[0]
        rows.append([check.__name__, verdict, time.perf_counter() - start, why])
        print(f"{check.__name__}: {verdict} {why}", flush=True)
    failed = sum(row[1] != "passed" for row in rows)
    print(table(("check", "verdict", "seconds", "why"), rows))
    print(f"{len(rows) - failed} passed, {failed} failed")
    return 1 if failed or not rows else 0
