"""What computes on each side of a comparison, and scripts that run once per precision.

Our networks are in ``our_side.py``, PyTorch's in ``torch_side.py``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import torch
from common import (
    TEST_MODELS,
    Models,
    describe_files,
    environment,
    exit_code,
    machine_name,
    write_json,
)
from torch_side import Place

from rvc_mlx.engine import (
    choose_engine,
    cpu_precisions,
    gpu_available,
)
from rvc_mlx.loading import Encoder, Engine, PitchNet, Voice, read_weights
from rvc_mlx.pipeline import VoiceConverter
from rvc_mlx.retrieval import read_index

MLX_CPU_WINDOW = 50  # frames that the vocoder decodes at once on MLX's slow CPU


@dataclass(frozen=True)
class Sides:
    """What computes on each side.

    Attributes:
        engine: ours.
        backend: ``"openvino"``, ``"cuda"``, ``"metal"`` or ``"mlx-cpu"``.
        precision: ours, in words; ``"tf32"`` is float32 with TF32 products.
        torch: where and how PyTorch computes.
    """

    engine: Engine
    backend: str
    precision: str
    torch: Place

    def name(self, facts: Mapping[str, Any]) -> str:
        """For result files: machine and precision; PyTorch's where it is not usual.

        Args:
            facts: the machine, as of ``environment``.
        """
        usual = {"cuda": "cuda", "metal": "mps"}.get(self.backend, "cpu")
        alike = {"f32": "f32", "tf32": "tf32"}.get(self.precision, "f32")
        ours = f"{machine_name(self.backend, facts)}-{self.precision}"
        theirs = [] if self.torch.device.type == usual else [self.torch.device.type]
        theirs += [] if self.torch.precision == alike else [self.torch.precision]
        return "-v-".join([ours, *["-".join(theirs)] * bool(theirs)])

    def record(self) -> dict[str, str]:
        """For a result file."""
        return {
            "backend": self.backend,
            "device": self.engine.device,
            "precision": self.precision,
            "torch_device": self.torch.device.type,
            "torch_precision": self.torch.precision,
        }


def engine_device(engine: str) -> str:
    """The device name of ``choose_engine`` for a choice of ``--engine``."""
    if engine == "mlx":
        return "gpu" if gpu_available() else "mlx-cpu"
    return {"openvino": "cpu", "mlx-cpu": "mlx-cpu"}.get(
        engine, "gpu" if gpu_available() else "cpu"
    )


def precision_label(device: str, precision: str) -> str:
    """What a precision means on a device: ``auto`` is named by what it does."""
    if precision != "auto":
        return precision
    if device == "gpu":
        return "tf32" if mx.cuda.is_available() else "auto"
    return "bf16" if device == "cpu" and "bf16" in cpu_precisions() else "f32"


def torch_precision(label: str, asked: str, device: str) -> str:
    """PyTorch's precision beside ours; TF32 is allowed on both sides or on none."""
    if asked == "same":
        return label
    return "tf32" if device == "cuda" and (label, asked) == ("tf32", "f32") else asked


def distinct_precisions(arguments: argparse.Namespace) -> dict[str, str]:
    """The precisions asked for, by what they mean here, in their order."""
    device = engine_device(arguments.engine)
    found: dict[str, str] = {}
    for precision in arguments.precision:
        found.setdefault(precision_label(device, precision), precision)
    return found


def choose_sides(arguments: argparse.Namespace, keep: bool = True) -> Sides:
    """The two sides that the options ask for.

    Args:
        arguments: of ``common.parser``; the first of several precisions counts.
        keep: keep compiled models between runs.

    Raises:
        ValueError: engine, precision or PyTorch device are not to be had here.
    """
    device = engine_device(arguments.engine)
    asked = arguments.precision[0]
    engine = choose_engine(device, asked, TEST_MODELS / "compiled" if keep else None)
    if device == "mlx-cpu":
        engine.window_frames = MLX_CPU_WINDOW
    gpu = "cuda" if mx.cuda.is_available() else "metal"
    backend = {"cpu": "openvino", "gpu": gpu}.get(device, device)
    label = precision_label(device, asked)
    torch_device = _torch_device(arguments.torch_device, backend)
    theirs = torch_precision(label, arguments.torch_precision, torch_device.type)
    place = Place(torch_device, theirs)
    place.set_tf32()
    return Sides(engine, backend, label, place)


def _torch_device(asked: str | None, backend: str) -> torch.device:
    kind = asked or {"cuda": "cuda", "metal": "mps"}.get(backend, "cpu")
    usable = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not usable[kind]:
        raise ValueError(
            f"our side runs on {backend}, but this PyTorch has no {kind}; install one "
            "that has, or compare with another device: --torch-device cpu"
        )
    return torch.device(kind)


def main_for_each(
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace, Sides], int | None],
    keep: bool = True,
) -> int:
    """Run a script: once per distinct precision, each in a process of its own.

    TF32 is decided once per process, and memory of one would count for the next.

    Returns:
        Its exit code; 1 and a line on stderr for bad input.
    """
    arguments = parser.parse_args()
    return exit_code(lambda: _measure_each(arguments, measure, keep))


def _measure_each(
    arguments: argparse.Namespace,
    measure: Callable[[argparse.Namespace, Sides], int | None],
    keep: bool,
) -> int:
    distinct = distinct_precisions(arguments)
    if len(distinct) == 1:
        sides = choose_sides(arguments, keep)
        print(
            f"ours: {sides.engine.device}, {sides.precision}; PyTorch {torch.__version__}: "
            f"{sides.torch.device.type}, {sides.torch.precision}",
            flush=True,
        )
        return measure(arguments, sides) or 0
    runs = [
        subprocess.run([sys.executable, *sys.argv, "--precision", precision])
        for precision in distinct.values()
    ]
    return 1 if any(run.returncode for run in runs) else 0  # below 0: killed


def save(
    arguments: argparse.Namespace,
    sides: Sides,
    name: str,
    files: Mapping[str, Path | None],
    **content: Any,
) -> Path:
    """Write a result: what computed, machine, versions, inputs, and the content."""
    options = {
        key: value.name if isinstance(value, Path) else value
        for key, value in vars(arguments).items()
        if key not in ("output", "output_dir")
    }
    machine = environment()
    facts = {
        "benchmark": name,
        "sides": sides.record(),
        "environment": machine,
        "options": options,
        "models": describe_files(files),
    }
    file = f"{name}-{sides.name(machine)}"
    return write_json(arguments.output, file, facts | content)


def converter(files: Models, sides: Sides) -> VoiceConverter:
    """Our whole conversion."""
    return VoiceConverter(
        Voice(read_weights(files.voice, "voice"), sides.engine),
        Encoder(read_weights(files.hubert, "contentvec"), sides.engine),
        PitchNet(read_weights(files.rmvpe, "rmvpe"), sides.engine),
        read_index(files.index) if files.index else None,
        sides.engine,
    )
