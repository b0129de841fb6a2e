"""Both sides of every comparison: our steps on an engine, and who stands against them.

PyTorch's half of it is in ``torch_side.py``, the parity of single layers in ``stages.py``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import torch
from common import TEST_MODELS, Models, describe_files, environment, write_json
from torch_side import Place

from rvc_mlx import pitch
from rvc_mlx.decoding import decode
from rvc_mlx.engine import (
    Run,
    Seam,
    Step,
    choose_engine,
    cpu_precisions,
    fingerprint,
    gpu_available,
)
from rvc_mlx.loading import Encoder, Engine, PitchNet, Voice, read_weights
from rvc_mlx.models.layers import load_strictly
from rvc_mlx.models.synthesizer import Synthesizer, sanitize
from rvc_mlx.noise import Noise
from rvc_mlx.pipeline import VoiceConverter
from rvc_mlx.report import Report
from rvc_mlx.retrieval import read_index
from rvc_mlx.segments import Segment

MLX_CPU_WINDOW = 50  # frames that the vocoder decodes at once on MLX's slow CPU
FRAME_LENGTHS = (50, 51, 70)  # at which seams of any length are traced


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

    @property
    def name(self) -> str:
        """For result files: back end, precision, PyTorch's if it is not the same."""
        alike = {"f32": "f32", "tf32": "tf32"}.get(self.precision, "f32")
        ours = f"{self.backend}-{self.precision}"
        theirs = self.torch.precision
        return ours if theirs == alike else f"{ours}-v-{theirs}"

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
    """
    arguments = parser.parse_args()
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
    return max(run.returncode for run in runs)


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
    facts = {
        "benchmark": name,
        "sides": sides.record(),
        "environment": environment(),
        "options": options,
        "models": describe_files(files),
    }
    return write_json(arguments.output, f"{name}-{sides.name}", facts | content)


Shapes = Sequence[tuple[tuple[int, ...], mx.Dtype]]


@dataclass(frozen=True)
class Network:
    """A network of ours of which single layers are to be bound.

    Attributes:
        path: its file.
        make: makes it, without weights.
        tensors: its weights.
    """

    path: Path
    make: Callable[[], nn.Module]
    tensors: Mapping[str, np.ndarray]

    def bind(
        self,
        engine: Engine,
        name: str,
        steps: Callable[[Any], Sequence[Step]],
        inputs: Callable[[int], Shapes],
        lengths: tuple[int, ...],
    ) -> Run:
        """A callable for some of its layers, as ``loading`` makes them for whole seams."""

        def build(dtype: mx.Dtype) -> Sequence[Step]:
            network = self.make()
            load_strictly(network, self.tensors)
            network.set_dtype(dtype)
            mx.eval(network.parameters())
            return steps(network)

        identity = fingerprint(self.path, name)
        return engine.bind(Seam(name, identity, build, inputs, lengths))


def voice_network(path: Path, config: Any) -> Network:
    """The voice of a file."""
    tensors = sanitize(read_weights(path, "voice").tensors)
    return Network(path, partial(Synthesizer, config), tensors)


def converter(files: Models, sides: Sides) -> VoiceConverter:
    """Our whole conversion."""
    return VoiceConverter(
        Voice(read_weights(files.voice, "voice"), sides.engine),
        Encoder(read_weights(files.hubert, "contentvec"), sides.engine),
        PitchNet(read_weights(files.rmvpe, "rmvpe"), sides.engine),
        read_index(files.index) if files.index else None,
        sides.engine,
    )


class SynthesisInputs(NamedTuple):
    """What a voice is fed with.

    Attributes:
        features: ``[T, C]`` float32, slowly moving, unit scale.
        f0: ``[T]`` float64 in Hz, with unvoiced stretches.
        noise: all randomness.
    """

    features: np.ndarray
    f0: np.ndarray
    noise: Noise


def synthesis_inputs(frames: int, width: int, seed: int = 0) -> SynthesisInputs:
    """Random inputs of a voice."""
    slow = np.random.default_rng(seed).standard_normal((frames // 2 + 2, width))
    features = ((slow[:-1] + slow[1:]) * 2**-0.5).repeat(2, axis=0)[:frames]
    t = np.arange(frames)
    f0 = 180 * 2 ** (0.5 * np.sin(t / 15)) * (t % 40 > 9)
    return SynthesisInputs(features.astype(np.float32), f0, Noise(seed))


class OurSynthesis:
    """The steps of a voice as a conversion runs them, on arrays in memory.

    Attributes:
        margin: frames on each side that serve the vocoder as context only.
    """

    def __init__(self, voice: Voice, noise: Noise, speaker: int = 0):
        self._voice, self._noise = voice, noise
        self._speaker = voice.speakers[speaker][None, None]
        self.margin = voice.context

    def latent(self, features: np.ndarray, f0: np.ndarray) -> np.ndarray:
        """Text encoder, prior sample and inverse flow: ``[1, T, inter]``."""
        T, width = len(features), self._voice.config.inter_channels
        noise = self._noise.normal("prior", 0, 0, T, 1, width)
        coarse = pitch.quantize_f0(f0)[None]
        return self._voice.prior(features[None], noise[None], self._speaker, coarse)

    def decode(self, z: np.ndarray, f0: np.ndarray) -> np.ndarray:
        """Source and vocoder: audio of all frames but the margins."""
        kept = Segment(0, 0, 0, self.margin, len(f0) - self.margin)
        blocks = decode(self._voice, z, f0, self._speaker, kept, self._noise, Report())
        return np.concatenate(list(blocks))
