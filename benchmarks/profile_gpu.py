"""Where the time of a conversion goes on an NVIDIA GPU, per stage and kernel family.

    python benchmarks/profile_gpu.py [--seconds 30] [--runs 7] [--precision f32 bf16]

Each network runs alone, on what a real conversion of that length gave it: its time on
the clock, the time its kernels took (CUPTI, through PyTorch's profiler), arithmetic and
least memory traffic of its products, and how much of the card's roof that is. The roof
is measured first: a large matrix product of the same type, and a large copy.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import common
import mlx.core as mx
import numpy as np
import torch
from stages import convert_ours
from twins import Sides, converter, main_for_each, save

from rvc_mlx.arrays import Array
from rvc_mlx.engine import MLXEngine, Run, Seam
from rvc_mlx.models.rmvpe import GRU

# Words in a kernel's name, in the order in which they decide.
FAMILIES = {
    "own convolution": (
        *("fused_conv", "residual_step", "image_conv", "plane_conv"),
        "waveform",
    ),
    "own GRU": ("gru",),
    "attention": ("sdpa", "attention", "flash"),
    "convolution": ("conv", "dgrad", "wgrad", "fprop", "winograd", "im2col", "unfold"),
    "matrix product": ("gemm", "gemv", "cutlass", "splitk", "matmul", "nvjet"),
    "norm, softmax": ("norm", "softmax"),
    "reduction": ("reduce", "scan", "arg", "strongest_bins"),
    "Fourier transform": ("fft",),
    "copy": (
        *("copy", "memcpy", "memset", "transpose", "nchw", "nhwc", "windows"),
        "seen_samples",
    ),
    "gather": ("gather", "scatter", "index"),
    "random": ("random", "rbits"),
    "element-wise": (
        *("unary", "binary", "ternary", "elementwise", "arange", "compiled"),
        *("gelu", "gate", "joined", "pooled", "groups_together", "normed_weights"),
        *("harmonic_source", "rectified", "high_pass"),
    ),
}
STAGES = (
    "stage",
    "calls",
    "ms",
    "kernels ms",
    "kernels",
    "GFLOP",
    "TFLOP/s",
    "of roof",
)
STAGES += ("GB at least", "TB/s", "of copy")


def family(kernel: str) -> str:
    """Family of a CUDA kernel, by its name."""
    lower = kernel.lower()
    for name, words in FAMILIES.items():
        if any(word in lower for word in words):
            return name
    return "other"


@dataclass
class Work:
    """Arithmetic and least traffic of the products in a traced function.

    Attributes:
        flops: multiplications and additions.
        values: numbers read and written if every product read and wrote memory once.
    """

    flops: float = 0.0
    values: float = 0.0

    def add(
        self, inputs: Sequence[tuple[int, ...]], output: tuple[int, ...], per: float
    ) -> None:
        """One product with ``per`` operations for each value of its output."""
        self.flops += per * math.prod(output)
        self.values += math.prod(output) + sum(map(math.prod, inputs))


def count_work(
    steps: Sequence[Any], arrays: Sequence[mx.array], dtype: mx.Dtype = mx.float32
) -> Work:
    """Count the products of a seam's steps of that type on inputs of these shapes."""
    work = Work()
    types = [dtype if a.dtype == mx.float32 else a.dtype for a in arrays]
    arguments = [mx.zeros(a.shape, t) for a, t in zip(arrays, types, strict=True)]
    with mx.stream(mx.cpu):  # traced only: nothing is computed
        for step in steps:
            if isinstance(step, GRU):
                arguments = [_count_gru(work, step, arguments[0]).astype(dtype)]
                continue
            events: list[dict[str, Any]] = []
            mx.export_function(events.append, lambda *a, s=step: s(*a), *arguments)
            for event in events:
                if event["type"] == "primitive":
                    _count(work, event)
                elif event["type"] == "outputs":
                    shapes = [(shape, dtype) for _, shape, dtype in event["outputs"]]
            arguments = [mx.zeros(shape, dtype) for shape, dtype in shapes]
    return work


def _count(work: Work, event: dict[str, Any]) -> None:
    inputs = [shape for _, shape, _ in event["inputs"]]
    output = event["outputs"][0][1]
    if event["name"] == "Convolution":
        # Zeros between the inputs take part in no product.
        dilation = math.prod(event["arguments"][4])
        work.add(inputs, output, 2 * math.prod(inputs[1][1:]) / dilation)
    elif event["name"] in ("Matmul", "AddMM"):
        work.add(inputs[:2], output, 2 * inputs[0][-1])


def _count_gru(work: Work, gru: GRU, x: mx.array) -> mx.array:
    B, T, C = x.shape
    H = gru.hidden_size
    work.add([x.shape, (6 * H, C), (6 * H, H)], (B, T, 2 * H), 6 * (C + H))
    return mx.zeros((B, T, 2 * H))


@dataclass
class Recorded:
    """A bound seam that counts its calls and keeps what it was last given."""

    seam: Seam
    run: Run
    calls: int = 0
    given: tuple[Array, ...] = field(default=())

    def __call__(self, *arrays: Array) -> np.ndarray:
        """As ``Run.__call__``."""
        self.calls, self.given = self.calls + 1, arrays
        return self.run(*arrays)

    def start(self, *arrays: Array) -> Array:
        """As ``Run.start``."""
        self.calls, self.given = self.calls + 1, arrays
        return self.run.start(*arrays)


class RecordingEngine:
    """An engine that hands out ``Recorded`` seams."""

    def __init__(self, engine: Any):
        self._engine = engine
        self.recorded: list[Recorded] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def bind(self, seam: Seam) -> Recorded:
        """The seam on the engine inside."""
        self.recorded.append(Recorded(seam, self._engine.bind(seam)))
        return self.recorded[-1]

    def watch(self, call: Callable[[], Any]) -> list[Recorded]:
        """The seams that one ``call`` runs, as it leaves them: later calls do not count."""
        for stage in self.recorded:
            stage.calls = 0
        call()
        return [replace(stage) for stage in self.recorded if stage.calls]


def kernel_times(call: Callable[[], Any], runs: int) -> dict[str, tuple[float, float]]:
    """Milliseconds and launches of each CUDA kernel of one call, means over ``runs``."""
    from torch.profiler import ProfilerActivity, profile

    torch.zeros(1, device="cuda")  # the profiler needs PyTorch's context
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(runs):
            call()
        torch.cuda.synchronize()
    times: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in profiled.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name][0] += event.device_time / 1000 / runs
            times[event.name][1] += 1 / runs
    return {name: (ms, count) for name, (ms, count) in times.items()}


def measure_roof(dtype: mx.Dtype) -> dict[str, float]:
    """FLOP/s of a matrix product of 8192 and bytes/s of a copy of 1 GiB."""
    a = mx.random.normal((8192, 8192)).astype(dtype)
    x = mx.zeros((1 << 28,), mx.float32)
    mx.eval(a, x)

    def seconds(call: Callable[[], mx.array]) -> float:
        return median_time(lambda: mx.eval(call()), 7)

    return {
        "flops": 2 * 8192**3 / seconds(lambda: a @ a),
        "bytes": 2 * x.nbytes / seconds(lambda: x + 1),
    }


def median_time(call: Callable[[], Any], runs: int) -> float:
    """Seconds, median of ``runs`` after two more."""
    return common.time_calls([call], runs, 2)[0].median


def profile_stage(
    stage: Recorded, dtype: mx.Dtype, roof: dict[str, float], runs: int
) -> dict[str, Any]:
    """One network alone."""
    arrays = [a if isinstance(a, mx.array) else mx.array(a) for a in stage.given]
    mx.eval(arrays)

    def call() -> None:
        mx.eval(stage.run.start(*arrays))

    seconds = median_time(call, runs)
    kernels = kernel_times(call, runs)
    families: dict[str, float] = defaultdict(float)
    for name, (ms, _) in kernels.items():
        families[family(name)] += ms
    # Of another type: prior and vocoder share one network, and the engine may have put
    # kernels of its own into that of its type.
    counted = mx.bfloat16 if dtype == mx.float32 else mx.float32
    work = count_work(stage.seam.build(counted), arrays, counted)
    exact = stage.seam.exact or dtype == mx.float32
    return {
        "stage": stage.seam.name,
        "calls": stage.calls,
        "shapes": [list(a.shape) for a in arrays],
        "seconds": seconds,
        "kernel_seconds": sum(ms for ms, _ in kernels.values()) / 1000,
        "launches": sum(count for _, count in kernels.values()),
        "flops": work.flops,
        "bytes": work.values * (4 if exact else 2),
        "flops_of_roof": work.flops / seconds / roof["flops"],
        "bytes_of_roof": work.values * (4 if exact else 2) / seconds / roof["bytes"],
        "families_ms": dict(sorted(families.items(), key=lambda item: -item[1])),
        "slowest_kernels_ms": dict(
            sorted(
                ((name[:120], ms) for name, (ms, _) in kernels.items()),
                key=lambda item: -item[1],
            )[:12]
        ),
    }


def measure(arguments: argparse.Namespace, sides: Sides) -> int:
    """Convert once, then profile every network that took part."""
    if sides.backend != "cuda" or not torch.cuda.is_available():
        raise SystemExit(
            f"profile_gpu needs an NVIDIA GPU with MLX CUDA and PyTorch's CUDA build; "
            f"here {sides.engine.device} and PyTorch {torch.__version__} were found"
        )
    assert isinstance(sides.engine, MLXEngine)
    engine = RecordingEngine(sides.engine)
    files = common.models(arguments.models)
    clip = common.real_audio(arguments.seconds, arguments.audio)
    watched = Sides(engine, sides.backend, sides.precision, sides.torch)  # type: ignore[arg-type]
    ours = converter(files, watched)

    def convert() -> Any:
        return convert_ours(ours, clip, 1.0)

    convert()
    stages = engine.watch(convert)
    whole = median_time(convert, arguments.runs)
    dtypes = {"bf16": mx.bfloat16, "f16": mx.float16}
    dtype = dtypes.get(sides.engine.precision, mx.float32)
    roof = measure_roof(dtype)
    rows = [profile_stage(stage, dtype, roof, arguments.runs) for stage in stages]
    print(_report(rows, whole, roof))
    save(
        arguments, sides, "profile", files._asdict(), whole=whole, roof=roof, rows=rows
    )
    return 0


def _report(rows: list[dict[str, Any]], whole: float, roof: dict[str, float]) -> str:
    stages = [
        [
            row["stage"],
            row["calls"],
            1e3 * row["seconds"],
            1e3 * row["kernel_seconds"],
            round(row["launches"]),
            row["flops"] / 1e9,
            row["flops"] / row["seconds"] / 1e12,
            f"{row['flops_of_roof']:.1%}",
            row["bytes"] / 1e9,
            row["bytes"] / row["seconds"] / 1e12,
            f"{row['bytes_of_roof']:.1%}",
        ]
        for row in rows
    ]
    families = [
        [row["stage"], name, ms]
        for row in rows
        for name, ms in row["families_ms"].items()
    ]
    alone = sum(row["seconds"] * row["calls"] for row in rows)
    return (
        f"roof: {roof['flops'] / 1e12:.0f} TFLOP/s, {roof['bytes'] / 1e12:.2f} TB/s; "
        f"whole conversion {1e3 * whole:.1f} ms, its networks alone {1e3 * alone:.1f} ms\n"
        f"{common.table(STAGES, stages)}\n\n"
        f"{common.table(('stage', 'kernel family', 'ms'), families)}"
    )


def main() -> int:
    """The command line."""
    parser = common.parser(__doc__ or "", runs=7, precisions=("f32", "bf16"))
    parser.add_argument(
        "--seconds", type=common.seconds, default=30, help="default: 30"
    )
    parser.add_argument(
        "--audio", type=Path, help="a recording (default: the tests' clip)"
    )
    return main_for_each(parser, measure)


if __name__ == "__main__":
    raise SystemExit(main())
