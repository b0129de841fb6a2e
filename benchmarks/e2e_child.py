"""One side of ``benchmark_e2e.py`` in a process of its own: convert, then say how it went.

    python benchmarks/e2e_child.py SPECIFICATION

The specification and the answer, the last line printed, are JSON. The modules of the
other side are not imported: start-up time and memory are those of one side.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

STARTED = time.perf_counter()

Convert = Callable[[], dict[str, float]]


def prepare_ours(given: dict[str, Any]) -> tuple[Convert, dict[str, Any]]:
    """Our program: load, and a call that converts and gives seconds per stage."""
    import rvc_mlx

    imported = time.perf_counter() - STARTED
    converter = rvc_mlx.load(
        given["voice"],
        given["index"],
        encoder=given["hubert"],
        rmvpe=given["rmvpe"],
        device=given["device"],
        precision=given["precision"],
    )
    rate = given["index_rate"]

    def convert() -> dict[str, float]:
        options = rvc_mlx.ConversionOptions(index_rate=rate)
        report = converter.convert_file(given["source"], given["target"], options)
        return report.stages

    facts = {"device": converter.device, "precision": converter.precision}
    return convert, {"import_s": imported, **facts}


def prepare_torch(given: dict[str, Any]) -> tuple[Convert, dict[str, Any]]:
    """PyTorch's reference: the same."""
    from types import SimpleNamespace

    import torch
    from torch_side import Place, TorchPipeline

    imported = time.perf_counter() - STARTED
    place = Place(torch.device(given["torch_device"]), given["torch_precision"])
    place.set_tf32()
    names = ("voice", "index", "hubert", "rmvpe")
    pipeline = TorchPipeline(SimpleNamespace(**{n: given[n] for n in names}), place)

    def convert() -> dict[str, float]:
        pipeline.stages.clear()
        rate = given["index_rate"]
        pipeline.convert_file(given["source"], given["target"], index_rate=rate)
        return dict(pipeline.stages)

    facts = {"device": given["torch_device"], "precision": given["torch_precision"]}
    return convert, {"import_s": imported, **facts}


def gpu_peak(side: str) -> int:
    """Largest GPU memory, bytes; 0 without a GPU."""
    if side == "ours":
        from rvc_mlx.bench import gpu_peak_memory

        return gpu_peak_memory()
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def resident_peak() -> int:
    """Largest resident memory of this process, bytes."""
    import resource

    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss there counts the parent before exec, too
        [line] = [x for x in status.read_text().splitlines() if x.startswith("VmHWM")]
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> int:
    given = json.loads(sys.argv[1])
    side = given["side"]
    convert, facts = {"ours": prepare_ours, "torch": prepare_torch}[side](given)
    facts["load_s"] = time.perf_counter() - STARTED - facts["import_s"]
    start = time.perf_counter()
    first_stages = convert()
    facts |= {"first_s": time.perf_counter() - start, "first_stages_s": first_stages}
    facts["finished"] = time.time()
    warm, stages = [], []
    for _ in range(given["runs"]):
        start = time.perf_counter()
        stages.append(convert())
        warm.append(time.perf_counter() - start)
    facts |= {"warm_s": warm, "stages_s": stages}
    facts |= {"peak_memory_bytes": resident_peak(), "gpu_peak_bytes": gpu_peak(side)}
    print(json.dumps(facts))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
