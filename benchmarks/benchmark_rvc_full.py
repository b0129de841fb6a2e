"""Complete synthesis on random inputs: text encoder, flow and generator in one go.

    python benchmarks/benchmark_rvc_full.py [--pt-model P] [--mlx-model M] [--runs N]
        [--seconds 5] [--no-warmup] [--pytorch-only] [--mlx-only]

Features, F0 and noise are the same on both sides; the first call draws the noise.
"""

from __future__ import annotations

import argparse
from typing import Any

import common
import numpy as np
from our_side import OurSynthesis, synthesis_inputs
from torch_side import OnDevice, synthesize
from twins import Sides, main_for_each, save

from rvc_mlx.loading import Voice, read_weights
from rvc_reference.loading import load_voice

HEADER = ("audio s", "ours s", "PyTorch s", "speed-up", "x realtime", "max abs")
HEADER += ("mean abs", "correlation")


def measure_length(
    voice: Voice, theirs: OnDevice | None, seconds: float, arguments: argparse.Namespace
) -> dict[str, Any]:
    """One length; ``margin`` frames more on each side are context on both sides."""
    margin, U = voice.context, voice.config.samples_per_frame
    frames = round(100 * seconds) + 2 * margin
    given = synthesis_inputs(frames, voice.config.feature_size)
    ours = OurSynthesis(voice, given.noise)
    made: dict[str, np.ndarray] = {}

    def run_ours() -> None:
        made["ours"] = ours.decode(ours.latent(given.features, given.f0), given.f0)

    def run_torch() -> None:
        assert theirs is not None
        made["torch"] = synthesize(theirs, given)[margin * U : (frames - margin) * U]

    calls = {} if arguments.pytorch_only else {"ours": run_ours}
    calls |= {"torch": run_torch} if theirs else {}
    warmup = 0 if arguments.no_warmup else 1
    runs = common.runs_at(seconds, arguments.runs)
    times = common.time_calls(list(calls.values()), runs, warmup)
    row: dict[str, Any] = {"seconds": seconds, "warmup": warmup}
    row |= {name: t.as_dict() for name, t in zip(calls, times, strict=True)}
    row["realtime_factor"] = seconds / times[0].median
    if len(calls) == 2:
        row["speedup"] = times[1].median / times[0].median
        row |= common.difference(made["ours"], made["torch"])
    return row


def measure(arguments: argparse.Namespace, sides: Sides) -> None:
    pt = arguments.pt_model or common.model_file("v2_48k.pth", arguments.models)
    mlx = arguments.mlx_model or pt
    voice = Voice(read_weights(mlx, "voice"), sides.engine)
    theirs = None if arguments.mlx_only else OnDevice(load_voice(pt), sides.torch)
    name = "rvc_full"
    if arguments.mlx_only or arguments.pytorch_only:
        name += "-mlx_only" if arguments.mlx_only else "-pytorch_only"
    rows = []
    for seconds in arguments.seconds:
        rows.append(measure_length(voice, theirs, seconds, arguments))
        save(arguments, sides, name, {"ours": mlx, "PyTorch": pt}, rows=rows)
    sides_s = [[r.get(x, {}).get("median_s") for x in ("ours", "torch")] for r in rows]
    numbers = ("speedup", "realtime_factor", "max_abs", "mean_abs", "correlation")
    cells = [
        [r["seconds"], *times] + [r.get(name) for name in numbers]
        for r, times in zip(rows, sides_s, strict=True)
    ]
    print(common.table(HEADER, cells))


def main() -> int:
    parser = common.parser(__doc__)
    common.add_sides(parser)
    parser.add_argument(
        "--seconds", type=common.seconds_list, default=[5.0], metavar="LIST"
    )
    parser.add_argument("--no-warmup", action="store_true", help="time the first call")
    return main_for_each(parser, measure)


if __name__ == "__main__":
    raise SystemExit(main())
