"""What a file is, what a machine can do, and whether a conversion works on it."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np

from rvc_mlx.audio_io import load_audio
from rvc_mlx.bundled_models import (
    DEMO_VOICE,
    NETWORKS,
    SPEECH,
    VOICES,
    bundled_index,
    bundled_network,
    bundled_voice,
    choose_voice,
)
from rvc_mlx.checkpoint import hash_file, read_checkpoint
from rvc_mlx.download import PUBLIC_WEIGHTS, locate
from rvc_mlx.engine import (
    choose_engine,
    cpu_precisions,
    gpu_available,
    openvino_available,
)
from rvc_mlx.loading import file_in_folder, kind_of
from rvc_mlx.machine import cache_folder, lend_openblas
from rvc_mlx.models.voice_config import SynthesizerConfig, public_config
from rvc_mlx.pipeline import load
from rvc_mlx.retrieval import read_index

_PACKAGES = ("mlx", "openvino", "numpy", "scipy", "soundfile", "soxr", "av")


def describe_file(name: str | Path) -> dict[str, Any]:
    """Facts about a model or index file, or a bundled voice by its name, for a person.

    Raises:
        ValueError: it is neither.
        OSError: it cannot be read.
    """
    path, _ = choose_voice(name)
    facts: dict[str, Any] = {"file": str(path)}
    if path.suffix == ".index":
        index = read_index(path)
        facts |= {
            "kind": "retrieval index",
            "vectors": len(index),
            "width": index.width,
            "cells": len(index.centroids),
        }
    else:
        facts |= _describe_checkpoint(path)
    if path.is_file():
        facts |= {"bytes": path.stat().st_size, "sha256": hash_file(path)}
    return facts


def _describe_checkpoint(path: Path) -> dict[str, Any]:
    if path.is_dir():
        path = file_in_folder(path)
    checkpoint = read_checkpoint(path)
    tensors, metadata = checkpoint.tensors, checkpoint.metadata
    kind = kind_of(tensors)
    facts: dict[str, Any] = {"kind": kind or "unknown model"}
    if kind == "voice":
        listed = metadata.get("config")
        if listed is None:
            facts["kind"] = "training checkpoint of a voice"
            listed = public_config(tensors)
        config = SynthesizerConfig.from_tensors(listed, tensors)
        facts |= {
            "version": f"{config.version} ({config.feature_size}-wide features)",
            "sample rate": f"{config.sample_rate} Hz",
            "pitch": "yes" if config.f0 else "no",
            "vocoder": config.vocoder,
            "speakers": config.spk_embed_dim,
        }
    facts |= {
        "tensors": len(tensors),
        "parameters": sum(value.size for value in tensors.values()),
        "types": ", ".join(sorted({str(value.dtype) for value in tensors.values()})),
    }
    plain = {k: v for k, v in metadata.items() if isinstance(v, str | int | float)}
    facts |= {f"says {name}": value for name, value in plain.items()}
    if checkpoint.foreign:
        facts["left aside"] = ", ".join(checkpoint.foreign)
    return facts


def examine(device: str, precision: str) -> tuple[dict[str, dict[str, Any]], bool]:
    """Versions, devices, weights found, and a one-second conversion.

    Args:
        device: see ``choose_engine``.
        precision: see ``choose_engine``.

    Returns:
        Sections of facts, and whether the test conversion worked.
    """
    engine = choose_engine(device, precision)
    facts: dict[str, dict[str, Any]] = {
        "versions": {"python": platform.python_version()} | _versions(),
        "device": {
            "MLX GPU": "yes" if gpu_available() else "no",
            "MLX CPU": lend_openblas()
            or "MLX's own BLAS (on Linux the slow reference)",
            "OpenVINO": _openvino(),
            "used": engine.device,
            "precision": engine.precision,
        },
        "bundled models": _bundled(),
        "weights": {"folder": str(cache_folder())}
        | {name: _found(name) for name in PUBLIC_WEIGHTS},
    }
    facts["self-test"], healthy = _self_test(device, precision)
    return facts, healthy


def _versions() -> dict[str, str]:
    found = {}
    for name in ("rvc-mlx", *_PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _openvino() -> str:
    return ", ".join(cpu_precisions()) if openvino_available() else "not installed"


def _bundled() -> dict[str, str]:
    files = {
        f"{NETWORKS} {kind}": bundled_network(kind) for kind in ("contentvec", "rmvpe")
    }
    files |= {f"voice {name}": bundled_voice(name) for name in VOICES}
    return {
        name: f"{path}, sha256 {hash_file(path)}" if path.is_file() else "MISSING"
        for name, path in files.items()
    }


def _found(name: str) -> str:
    path = locate(name)
    if path is None:
        return f"not found (rvc-mlx download {name})"
    return f"{path}, sha256 {hash_file(path)}"


def _self_test(device: str, precision: str) -> tuple[dict[str, Any], bool]:
    """Convert one second with the bundled models, twice."""
    files = bundled_voice(DEMO_VOICE), bundled_index(DEMO_VOICE)
    converter = load(*files, device=device, precision=precision)
    audio = load_audio(SPEECH)[16000:32000]
    first = converter.convert(audio, 16000).audio
    start = time.perf_counter()
    second = converter.convert(audio, 16000).audio
    spent = time.perf_counter() - start
    checks = {
        "length": len(first) == converter.sample_rate,
        "finite": bool(np.isfinite(first).all()),
        "audible": bool(np.sqrt(np.mean(first**2)) > 1e-3),
        "repeatable": bool(np.array_equal(first, second)),
    }
    facts: dict[str, Any] = {k: "ok" if ok else "FAILED" for k, ok in checks.items()}
    facts["speed"] = f"{1 / spent:.1f} x realtime (bundled models, small)"
    return facts, all(checks.values())
