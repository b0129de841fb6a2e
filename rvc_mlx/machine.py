"""What this machine lends to this process, and how MLX is to use it."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TypeVar

_MOST_THREADS = 16  # of one piece of work; numpy holds Python's lock between its calls
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_WORKER = "rvc-mlx-worker"  # begins the names of such threads

Item = TypeVar("Item")
Result = TypeVar("Result")

# To be set before MLX is imported. Its own limits suit one model with one
# length: 128 plans of cuDNN, for example, where one conversion takes about 200 for each
# length and a training step 300. Beyond them everything is planned anew each time, and
# MLX may end the process ("Cache thrashing").
# Kernels are launched one by one: to collect them into graphs, as MLX does by itself,
# costs more than it saves where most of them are short.
_CUDA_SETTINGS = {
    "MLX_CUDA_CONV_CACHE_SIZE": "16384",
    "MLX_CUDA_GRAPH_CACHE_SIZE": "4096",
    "MLX_CUDA_SDPA_CACHE_SIZE": "1024",
    "MLX_CUDA_SDPA_BACKWARD_CACHE_SIZE": "1024",
    "MLX_CUDA_FFT_CACHE_SIZE": "256",
    "MLX_ENABLE_CACHE_THRASHING_CHECK": "0",
    "MLX_USE_CUDA_GRAPHS": "0",
}


def cache_folder() -> Path:
    """Where weights and compiled models are kept: ``$RVC_MLX_HOME`` or ``~/.cache/rvc_mlx``."""
    home = os.environ.get("RVC_MLX_HOME")
    return Path(home).expanduser() if home else Path.home() / ".cache" / "rvc_mlx"


def set_up_cuda() -> None:
    """Tell MLX how to use CUDA and to keep what it compiles; what is set already stays."""
    if sys.platform != "linux":
        return
    for name, value in _CUDA_SETTINGS.items():
        os.environ.setdefault(name, value)
    # MLX's own folder for compiled kernels is below /tmp; it may not outlive the day.
    import importlib.metadata  # 30 ms, which only this needs

    try:
        version = importlib.metadata.version("mlx")
    except importlib.metadata.PackageNotFoundError:
        return
    folder = cache_folder() / "compiled" / f"cuda-mlx-{version}"
    os.environ.setdefault("MLX_PTX_CACHE_DIR", str(folder))


# As the wheel of faiss-cpu carries them, each after those that it needs.
_FAISS_LIBRARIES = ("libquadmath-*", "libgfortran-*", "libgomp-*", "libopenblas*")
_SYSTEM_LIBRARY = "libopenblas.so.0"


@cache
def lend_openblas() -> str | None:
    """Let MLX's CPU back end multiply matrices by OpenBLAS where there is one.

    The Linux wheels of MLX carry the reference BLAS, which is about 30 times slower. The
    first library that offers a symbol to the whole process serves it, so this must come
    before MLX is imported; later it has no effect. ``RVC_MLX_OPENBLAS=0`` forbids it.

    Returns:
        What was loaded: the library in faiss-cpu's wheel, or the system's; None where
        there is neither, MLX was imported before, or it is forbidden.
    """
    forbidden = os.environ.get("RVC_MLX_OPENBLAS") == "0"
    if sys.platform != "linux" or "mlx.core" in sys.modules or forbidden:
        return None
    libraries = _openblas_of_faiss() or [_SYSTEM_LIBRARY]
    try:
        for name in libraries:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return None
    return libraries[-1]


def _openblas_of_faiss() -> list[str]:
    try:
        spec = importlib.util.find_spec("faiss")
    except ImportError:  # hidden from this process
        return []
    if spec is None or spec.origin is None:
        return []
    folder = Path(spec.origin).parent.parent / "faiss_cpu.libs"
    found = [sorted(folder.glob(pattern)) for pattern in _FAISS_LIBRARIES]
    return [str(paths[0]) for paths in found if paths] if found[-1] else []


def processors() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int:
    """Memory of this machine, or of the container that this process may fill."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        allowed = _CGROUP_LIMIT.read_text().strip()
    except OSError:  # not Linux, or no version 2 of control groups
        return physical
    return min(int(allowed), physical) if allowed.isdigit() else physical


def in_parallel(
    function: Callable[[Item], Result], items: Iterable[Item]
) -> Generator[Result, None, None]:
    """``function`` of every item, in order, on the processors that there are.

    Results wait to be taken for no more than two items a thread, so memory is bounded.
    Within such work, more of it is done on the one processor that is there.

    Args:
        function: releases Python's lock for most of its time, as numpy does.
        items: what it is called with; taken on the caller's thread.
    """
    threads = min(_MOST_THREADS, processors())
    if isinstance(items, Sized):
        threads = min(threads, len(items))
    if threads < 2 or threading.current_thread().name.startswith(_WORKER):
        yield from map(function, items)
        return
    with ThreadPoolExecutor(threads, _WORKER) as pool:
        waiting: deque[Future[Result]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if waiting[0].done() or len(waiting) == 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
