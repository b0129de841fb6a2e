"""What this machine lends to this process, and how MLX is to use it."""

from __future__ import annotations

import os

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


def widen_cuda_caches() -> None:
    """Let MLX keep what it compiles and plans for CUDA; what is set already stays."""
    for name, value in _CUDA_CACHES.items():
        os.environ.setdefault(name, value)


def processors() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
