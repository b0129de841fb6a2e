"""One training step: discriminator and generator, forward, backward and AdamW.

    python benchmarks/benchmark_training.py [--preset 48k] [--batch-size 8] [--runs N]
        [--ways native,batched] [--precision bf16] [--frames 300] [--reference-blas]

Both sides start from the same weights and get the same batch and noise; the losses of
the first step are compared. Ours is timed once for each way to compute convolutions.
"""

from __future__ import annotations

import argparse
import os
import sys

if "--reference-blas" in sys.argv:  # to be said before the first import
    os.environ["RVC_MLX_OPENBLAS"] = "0"

import common
import mlx.core as mx
import numpy as np
import torch
from torch_side import Place

import rvc_reference.training as reference
from rvc_mlx import compiling
from rvc_mlx.machine import lend_openblas
from rvc_mlx.training.convolutions import Convolutions
from rvc_mlx.training.dataset import Batch
from rvc_mlx.training.forward import Draws, draw, step_inputs
from rvc_mlx.training.losses import spectrogram
from rvc_mlx.training.parametrization import Parameters, initial, to_torch
from rvc_mlx.training.presets import TrainingConfig, preset
from rvc_mlx.training.step import DTYPES, TrainStep
from rvc_reference.synthesizer import Synthesizer

WAYS = {
    "fitting": Convolutions.fitting(),
    "native": Convolutions(),
    "batched": Convolutions("batched", "batched", "windowed"),
    "unfolded": Convolutions("unfolded", "unfolded", "unfolded"),
    "tapped": Convolutions("tapped", "tapped", "unfolded"),
}
HEADER = ("convolutions", "ours s", "PyTorch s", "speed-up", "largest loss error")


def random_batch(config: TrainingConfig, size: int, frames: int) -> Batch:
    """Noise at the level of speech, all items full."""
    rng = np.random.default_rng(0)
    wave = rng.standard_normal((size, frames * config.hop), np.float32) / 10
    features = (size, frames, config.model.feature_size)
    return Batch(
        phone=rng.standard_normal(features, np.float32),
        lengths=np.full(size, frames, np.int32),
        pitch=rng.integers(1, 256, (size, frames)).astype(np.int32),
        pitchf=rng.uniform(80, 500, (size, frames)).astype(np.float32),
        spec=np.array(spectrogram(mx.array(wave), config)),
        wave=wave,
        sid=np.zeros(size, np.int32),
    )


class TorchStep:
    """PyTorch's side, from the same weights.

    Args:
        config: sizes.
        networks: parameters of generator and discriminator.
        place: where and how it computes.
    """

    def __init__(
        self,
        config: TrainingConfig,
        networks: tuple[Parameters, Parameters],
        place: Place,
    ):
        place.set_tf32()
        model = config.model
        pair = (
            Synthesizer(model.as_list(), model.version, model.f0, with_enc_q=True),
            reference.Discriminator(config.discriminator, config.discriminator_width),
        )
        for network, own in zip(pair, networks, strict=True):
            tensors = {k: torch.from_numpy(v) for k, v in to_torch(own).items()}
            network.load_state_dict(tensors)
            network.to(place.device)
        mel = reference.MelConfig(
            model.sample_rate, config.n_fft, config.hop, config.win, config.n_mels
        )
        self._place = place
        self._step = reference.TrainStep(*pair, mel, config.segment_frames)

    def __call__(self, batch: Batch, draws: Draws) -> dict[str, float]:
        """One step; the losses."""
        device, dtype = self._place.device, self._place.dtype
        inputs = step_inputs(batch, draws).items()
        x = {k: torch.from_numpy(np.array(v)).to(device) for k, v in inputs}
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            losses = self._step(x)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return losses


def measure(arguments: argparse.Namespace) -> None:
    config = preset(arguments.preset, "v2", True, 1)
    networks = initial(config, 0)
    batch = random_batch(config, arguments.batch_size, arguments.frames)
    draws = draw(config, batch, 0, 0)
    place = torch_place(arguments)
    theirs = None if arguments.mlx_only else TorchStep(config, networks, place)
    expected = theirs(batch, draws) if theirs else {}
    rows = []
    for way in arguments.ways:
        ours = TrainStep(
            config, *networks, precision=arguments.precision, convolutions=WAYS[way],
            compiled=arguments.compiled,
        )  # fmt: skip

        def step(ours: TrainStep = ours) -> dict[str, mx.array]:
            losses = ours(batch, draws)
            mx.eval(ours.state, losses)
            return losses

        first = {k: v.item() for k, v in step().items()}
        calls = [step] if theirs is None else [step, lambda: theirs(batch, draws)]
        times = common.time_calls(calls, arguments.runs)
        row = {"way": way, **vars(WAYS[way])}
        row |= {n: t.as_dict() for n, t in zip(("ours", "torch"), times, strict=False)}
        if theirs:
            row["speedup"] = times[1].median / times[0].median
            errors = {k: abs(first[k] / value - 1) for k, value in expected.items()}
            row["loss_errors"], row["largest_loss_error"] = errors, max(errors.values())
        rows.append(row)
    sides = [[r.get(x, {}).get("median_s") for x in ("ours", "torch")] for r in rows]
    last = [[r.get("speedup"), r.get("largest_loss_error")] for r in rows]
    cells = [[r["way"], *s, *end] for r, s, end in zip(rows, sides, last, strict=True)]
    print(common.table(HEADER, cells))
    save(arguments, place, rows)


def torch_place(arguments: argparse.Namespace) -> Place:
    """PyTorch on the same class of device, its float32 like ours."""
    kind = arguments.torch_device or ("cuda" if mx.cuda.is_available() else "cpu")
    return Place(torch.device(kind), label(arguments.precision))


def label(precision: str) -> str:
    """A precision in words: MLX's float32 on CUDA is TF32 unless that is switched off."""
    return "tf32" if precision == "f32" and mx.cuda.is_available() else precision


def save(arguments: argparse.Namespace, place: Place, rows: list[dict]) -> None:
    """Write the result file."""
    gpu = mx.default_device().type == mx.DeviceType.gpu
    backend = ("cuda" if mx.cuda.is_available() else "metal") if gpu else "mlx-cpu"
    precision = label(arguments.precision)
    sides = {
        "backend": backend,
        "device": str(mx.default_device()),
        "precision": precision,
        "torch_device": place.device.type,
        "torch_precision": place.precision,
        "blas": "OpenBLAS" if lend_openblas() else "of MLX's wheel",
    }
    name = f"training-{arguments.preset}"
    name += "-reference_blas" if arguments.reference_blas else ""
    machine = common.environment()
    content = {
        "benchmark": name,
        "sides": sides,
        "options": {
            "preset": arguments.preset,
            "batch_size": arguments.batch_size,
            "frames": arguments.frames,
            "compiled": arguments.compiled,
        },
        "environment": machine,
        "rows": rows,
    }
    file = f"{name}-{common.machine_name(backend, machine)}-{precision}"
    common.write_json(arguments.output, file, content)


def chosen_ways(text: str) -> list[str]:
    """Names of ways, separated by commas."""
    ways = text.split(",")
    if unknown := set(ways) - set(WAYS):
        raise argparse.ArgumentTypeError(f"{unknown} are none of {', '.join(WAYS)}")
    return ways


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--preset", choices=("small", "32k", "40k", "48k"), default="small"
    )
    parser.add_argument("--batch-size", type=common.whole, default=4)
    parser.add_argument(
        "--frames", type=common.whole, default=300, help="of a clip, 100 a second"
    )
    parser.add_argument("--runs", type=common.whole, default=5)
    parser.add_argument("--precision", choices=tuple(DTYPES), default="f32")
    parser.add_argument(
        "--ways", type=chosen_ways, default=["fitting"], metavar="LIST",
        help=f"of {', '.join(WAYS)} (default: fitting, what training takes here)",
    )  # fmt: skip
    parser.add_argument("--torch-device", choices=("cpu", "cuda", "mps"))
    parser.add_argument("--mlx-only", action="store_true")
    parser.add_argument(
        "--compile", dest="compiled", choices=compiling.WAYS,
        help="the step (default: traced on a GPU, no on the CPU)",
    )  # fmt: skip
    parser.add_argument(
        "--reference-blas", action="store_true",
        help="MLX's CPU back end without OpenBLAS, as it comes on Linux",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=common.Path, default=common.RESULTS, metavar="DIR"
    )
    measure(parser.parse_args())
    return 0


if __name__ == "__main__":
    raise SystemExit(common.exit_code(main))
