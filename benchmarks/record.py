"""Result files: machine, versions, commit, models, and a name that tells them apart."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rvc_mlx import bench
from rvc_mlx.checkpoint import hash_file
from rvc_mlx.loading import file_in_folder

ROOT = Path(__file__).resolve().parents[1]
# What the name of a processor says beside its model.
_COMMON_WORDS = re.compile(
    r"\((r|tm)\)|\b(nvidia|geforce|tesla|intel|amd|apple|cpu|processor|\d+-core|"
    r"\d+ ?gb|hbm\d\w*|sxm\d*|pcie|nvl|with|radeon|graphics)\b|@.*",
    re.IGNORECASE,
)


def environment() -> dict[str, Any]:
    """Machine, versions of both sides, commit; no host names, no paths."""
    import torch

    facts = bench.environment()
    for name in ("torch", "faiss-cpu"):
        try:
            facts["versions"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts["versions"][name] = "not installed"
    if torch.cuda.is_available():
        facts["torch_gpu"] = torch.cuda.get_device_name()
        if facts["gpu"] == "none":  # the MLX installed here has no GPU back end
            facts["gpu"] = facts["torch_gpu"]
    facts["torch_threads"] = torch.get_num_threads()
    facts["MLX_ENABLE_TF32"] = os.environ.get("MLX_ENABLE_TF32", "not set")
    return facts | _commit()


def _commit() -> dict[str, Any]:
    """Commit, and whether the code differs from it; a copy without git may be told."""

    def git(*words: str) -> str | None:
        if shutil.which("git") is None:
            return None
        run = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return run.stdout.strip() if run.returncode == 0 else None

    if given := os.environ.get("BENCHMARK_COMMIT"):
        return {"commit": given, "dirty": None}
    if (commit := git("rev-parse", "HEAD")) is None:
        return {"commit": "", "dirty": None}
    generated = (":!benchmarks/results", ":!benchmarks/*.md", ":!docs")
    changes = git("status", "--porcelain", "--", ".", *generated)
    return {"commit": commit, "dirty": bool(changes)}


def describe_files(files: Mapping[str, Path | None]) -> dict[str, dict[str, str]]:
    """Name and hash of every file, for the record."""
    return {
        kind: {"file": path.name, "sha256": _hash_once(path)}
        for kind, path in files.items()
        if path is not None
    }


@functools.cache
def _hash_once(path: Path) -> str:
    """Of a file, or of the weights in a folder of transformers."""
    return hash_file(file_in_folder(path) if path.is_dir() else path)


def machine_name(backend: str, facts: Mapping[str, Any]) -> str:
    """What computes, for the name of a file: ``h100``, or ``xeon-8cores``.

    Args:
        backend: ``"openvino"``, ``"mlx-cpu"``, ``"cuda"`` or ``"metal"``.
        facts: of ``environment``: ``cpu``, ``cores`` and ``gpu``.
    """
    on_gpu = backend in ("cuda", "metal")
    words = _COMMON_WORDS.sub(" ", facts["gpu" if on_gpu else "cpu"])
    name = re.sub(r"[^a-z0-9]", "", words.lower())
    if on_gpu:
        return name or backend
    prefix = "mlx-" if backend == "mlx-cpu" else ""
    return f"{prefix}{name or 'cpu'}-{facts['cores']}cores"


def write_json(folder: Path, name: str, content: dict[str, Any]) -> Path:
    """Write a result, in one move: a run that is killed leaves the last one whole."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    making = path.with_suffix(f".{os.getpid()}.part")
    making.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    making.replace(path)
    rows = content.get("rows")
    print(f"wrote {path.name}{f', {len(rows)} rows' if rows else ''}", flush=True)
    return path
