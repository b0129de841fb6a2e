"""Measuring: timed calls, peak memory, the machine, and the benchmark ``rvc-mlx bench``.

The scripts under ``benchmarks/`` build on the same functions.
"""

from __future__ import annotations

import gc
import importlib.metadata
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from rvc_mlx.audio_io import load_audio, save_audio
from rvc_mlx.bundled_models import DEMO_VOICE, SPEECH
from rvc_mlx.engine import choose_engine, gpu_available
from rvc_mlx.loading import Engine
from rvc_mlx.machine import memory_bytes, processors
from rvc_mlx.pipeline import VoiceConverter, load_on
from rvc_mlx.report import Report

_PACKAGES = ("rvc-mlx", "mlx", "openvino", "numpy", "scipy", "soxr")


@dataclass(frozen=True)
class Timing:
    """Seconds of every timed call, in the order of the calls."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median of the samples, seconds."""
        return statistics.median(self.samples)

    def as_dict(self) -> dict[str, Any]:
        """Median, minimum and every sample."""
        return {
            "median_s": self.median,
            "min_s": min(self.samples),
            "samples_s": list(self.samples),
        }


def time_calls(
    calls: Sequence[Callable[[], object]], runs: int = 5, warmup: int = 1
) -> list[Timing]:
    """Time calls in turns, so that a slow moment of the machine meets all of them.

    Args:
        calls: each returns when its result is computed (numpy arrays are).
        runs: timed calls of each, 1 or more.
        warmup: calls of each before, not timed.

    Returns:
        One timing per call.
    """
    for _ in range(warmup):
        for call in calls:
            call()
    samples: list[list[float]] = [[] for _ in calls]
    for _ in range(runs):
        for call, times in zip(calls, samples, strict=True):
            gc.collect()
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return [Timing(tuple(times)) for times in samples]


def peak_memory() -> int:
    """Largest resident memory of this process so far, bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss there counts the parent before exec, too
        [line] = [x for x in status.read_text().splitlines() if x.startswith("VmHWM")]
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def gpu_peak_memory() -> int:
    """Largest memory that MLX held on the GPU since its last reset, bytes; 0 without."""
    return mx.get_peak_memory() if gpu_available() else 0


def environment() -> dict[str, Any]:
    """The machine and the versions that a measurement depends on; no names or paths."""
    gpu = mx.device_info(mx.Device(mx.gpu)) if gpu_available() else {}
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": processors(),
        "memory_gib": round(memory_bytes() / 2**30),
        "gpu": gpu.get("device_name", "none"),
        "python": platform.python_version(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "not set"),
        "versions": versions,
    }


def _cpu_name() -> str:
    if sys.platform == "darwin":
        words = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(words, capture_output=True, text=True).stdout.strip()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor() or platform.machine()


@dataclass(frozen=True)
class BenchFiles:
    """What a benchmark converts with; see ``rvc_mlx.load``.

    Attributes:
        voice: file or name of the voice.
        index: its index, or None.
        encoder: content encoder; None for the one that the voice names.
        rmvpe: pitch network; None for the one that the voice names.
    """

    voice: str = DEMO_VOICE
    index: str | None = None
    encoder: str | None = None
    rmvpe: str | None = None

    def converter(self, engine: Engine) -> VoiceConverter:
        """The models, loaded."""
        return load_on(
            engine, self.voice, self.index, encoder=self.encoder, rmvpe=self.rmvpe
        )


def run_benchmark(
    files: BenchFiles, seconds: float, runs: int, device: str, precision: str
) -> dict[str, Any]:
    """Convert a clip of speech from file to file, first cold, then warm.

    Args:
        files: models.
        seconds: length of the clip, 0.1 or more.
        runs: warm conversions, 1 or more.
        device: see ``choose_engine``.
        precision: see ``choose_engine``.

    Returns:
        A report that JSON can hold: the machine, the device that computed; seconds of
        the first start and conversion (``first_run_s``), of one with compiled models
        (``compiled_start_s``), of what the first spent on compiling (``compile_s``, the
        difference; MLX keeps its kernels in the process and in the user's cache), and of
        warm runs with their stages; how much faster than the audio lasts
        (``realtime_factor``), its inverse (``rtf``) and peak memory in bytes.

    Raises:
        ValueError: a number is out of range, or files or device do not fit.
        OSError: a file cannot be read.
    """
    if not 0.1 <= seconds < math.inf or runs < 1:
        raise ValueError(
            f"{seconds} s and {runs} runs were asked for; expected 0.1 s and 1 run or more"
        )
    if gpu_available():
        mx.reset_peak_memory()
    with tempfile.TemporaryDirectory(prefix="rvc-mlx-bench-") as folder:
        source, target = Path(folder, "in.wav"), Path(folder, "out.wav")
        speech = load_audio(SPEECH)
        save_audio(source, np.resize(speech, round(seconds * 16000)), 16000)
        reports: list[Report] = []

        def start() -> tuple[VoiceConverter, float]:
            begin = time.perf_counter()
            engine = choose_engine(device, precision, Path(folder, "compiled"))
            converter = files.converter(engine)
            converter.convert_file(source, target)
            return converter, time.perf_counter() - begin

        _, first = start()
        converter, compiled = start()
        [timing] = time_calls(
            [lambda: reports.append(converter.convert_file(source, target))], runs, 0
        )
    return {
        "device": converter.device,
        "precision": converter.precision,
        "voice": converter.voice.path.name,
        "seconds": seconds,
        "first_run_s": first,
        "compiled_start_s": compiled,
        "compile_s": max(0.0, first - compiled),
        "warm": timing.as_dict(),
        "stages_s": reports[-1].stages,
        "realtime_factor": seconds / timing.median,
        "rtf": timing.median / seconds,
        "peak_memory_bytes": peak_memory(),
        "gpu_peak_memory_bytes": gpu_peak_memory(),
        "environment": environment(),
    }


def summary(report: dict[str, Any]) -> list[str]:
    """Lines that tell a person what ``run_benchmark`` found."""
    stages = ", ".join(f"{name} {s:.2f}" for name, s in report["stages_s"].items())
    rows = {
        "device": f"{report['device']}, {report['precision']}",
        "voice": report["voice"],
        "audio": f"{report['seconds']:g} s",
        "first run": f"{report['first_run_s']:.2f} s, of which {report['compile_s']:.2f} s "
        "to compile",
        "start, compiled": f"{report['compiled_start_s']:.2f} s",
        "warm": f"{report['warm']['median_s']:.3f} s "
        f"(median of {len(report['warm']['samples_s'])})",
        "stages, s": stages,
        "speed": f"{report['realtime_factor']:.1f} x realtime (RTF {report['rtf']:.3g})",
        "peak memory": f"{report['peak_memory_bytes'] / 2**20:.0f} MiB",
    }
    if report["gpu_peak_memory_bytes"]:
        gpu = report["gpu_peak_memory_bytes"] / 2**20
        rows["peak GPU memory"] = f"{gpu:.0f} MiB"
    width = max(map(len, rows))
    return [f"{name:<{width}}  {value}" for name, value in rows.items()]
