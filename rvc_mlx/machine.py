"""What this machine lends to this process, and how MLX is to use it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# To be set before MLX is imported. Its own limits suit one model with one
# length: 128 plans of cuDNN, for example, where one conversion takes about 200 for each
# length and a training step 300. Beyond them everything is planned anew each time, and
# MLX may end the process ("Cache thrashing").
_CUDA_CACHES = {
    "MLX_CUDA_CONV_CACHE_SIZE": "16384",
    "MLX_CUDA_GRAPH_CACHE_SIZE": "4096",
    "MLX_CUDA_SDPA_CACHE_SIZE": "1024",
    "MLX_CUDA_SDPA_BACKWARD_CACHE_SIZE": "1024",
    "MLX_CUDA_FFT_CACHE_SIZE": "256",
    "MLX_ENABLE_CACHE_THRASHING_CHECK": "0",
}


def cache_folder() -> Path:
    """Where weights and compiled models are kept: ``$RVC_MLX_HOME`` or ``~/.cache/rvc_mlx``."""
    home = os.environ.get("RVC_MLX_HOME")
    return Path(home).expanduser() if home else Path.home() / ".cache" / "rvc_mlx"


def widen_cuda_caches() -> None:
    """Let MLX keep what it compiles and plans for CUDA; what is set already stays."""
    if sys.platform != "linux":
        return
    for name, value in _CUDA_CACHES.items():
        os.environ.setdefault(name, value)
    # MLX's own folder for compiled kernels is below /tmp; it may not outlive the day.
    import importlib.metadata  # 30 ms, which only this needs

    try:
        version = importlib.metadata.version("mlx")
    except importlib.metadata.PackageNotFoundError:
        return
    folder = cache_folder() / "compiled" / f"cuda-mlx-{version}"
    os.environ.setdefault("MLX_PTX_CACHE_DIR", str(folder))


def processors() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
