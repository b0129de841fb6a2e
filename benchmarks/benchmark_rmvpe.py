"""F0 by RMVPE: our engine against PyTorch over the length of the audio.

    python benchmarks/benchmark_rmvpe.py [--quick] [--seconds 5,30,60,180,300]

Everything from samples to F0 is inside the timed call: mel, U-Net, BiGRU, decoding.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import common
import numpy as np
from our_side import find_f0
from torch_side import TorchPitch
from twins import Sides, main_for_each, save

from rvc_mlx import pitch
from rvc_mlx.arrays import to_host
from rvc_mlx.loading import PitchNet, read_weights
from rvc_mlx.spectral import N_FFT
from rvc_reference import rmvpe

LENGTHS = [5.0, 30.0, 60.0, 180.0, 300.0]
QUICK_LENGTHS = [2.0, 4.0, 8.0]
HEADER = ("audio s", "ours s", "PyTorch s", "speed-up", "x realtime", "ours s per s")
HEADER += ("max cents", "mean cents", "voicing equal")


def measure_length(
    net: PitchNet, theirs: TorchPitch, seconds: float, runs: int
) -> dict[str, Any]:
    """One length: both timings, and how far the two curves are apart."""
    audio = common.synthetic_audio(seconds)
    curves: dict[str, np.ndarray] = {}

    def ours() -> None:
        curves["ours"] = find_f0(net, audio)

    def reference() -> None:
        curves["torch"] = theirs.estimate_f0(audio)

    times = common.time_calls([ours, reference], common.runs_at(seconds, runs))
    return {
        "seconds": seconds,
        "ours": times[0].as_dict(),
        "torch": times[1].as_dict(),
        "speedup": times[1].median / times[0].median,
        "realtime_factor": seconds / times[0].median,
        "compute_per_second": times[0].median / seconds,
        **common.difference_f0(curves["ours"], curves["torch"]),
    }


def measure_parts(net: PitchNet, theirs: TorchPitch, runs: int) -> dict[str, Any]:
    """Where the time of five seconds goes: mel, network, decoding; medians in seconds."""
    audio = common.synthetic_audio(5.0)
    padded = np.pad(audio, N_FFT // 2, mode="reflect")
    mel = to_host(net.log_mel(padded, net.config.n_mels))[:480][None]
    salience = net.salience(mel)[0]
    calls = {
        "ours mel": lambda: to_host(net.log_mel(padded, net.config.n_mels)),
        "PyTorch mel": lambda: theirs.log_mel(audio).cpu(),
        "ours network": lambda: net.salience(mel),
        "PyTorch network": lambda: theirs.salience(mel),
        "ours decoding": lambda: pitch.decode_salience(salience),
        "PyTorch decoding": lambda: rmvpe.decode(salience),
    }
    times = common.time_calls(list(calls.values()), runs)
    return {name: time.median for name, time in zip(calls, times, strict=True)}


def measure(arguments: argparse.Namespace, sides: Sides) -> None:
    path = common.model_file("rmvpe.pt", arguments.models)
    net = PitchNet(read_weights(path, "rmvpe"), sides.engine)
    theirs = TorchPitch(path, sides.torch)
    lengths = arguments.seconds or (QUICK_LENGTHS if arguments.quick else LENGTHS)
    name = "rmvpe-quick" if arguments.quick else "rmvpe"
    if arguments.step:
        step, _, side = arguments.step.partition(":")
        arguments.output = arguments.output / "steps"
        name = f"{step}.{side}"
    parts = measure_parts(net, theirs, arguments.runs)
    print(common.table(("5 s of audio", "median s"), list(parts.items())))
    rows = []
    for seconds in lengths:
        rows.append(measure_length(net, theirs, seconds, arguments.runs))
        save(arguments, sides, name, {"rmvpe": path}, rows=rows, parts_s=parts)
    numbers = ("speedup", "realtime_factor", "compute_per_second")
    numbers += ("max_cents", "mean_cents", "voicing_agreement")
    cells = [
        [r["seconds"], r["ours"]["median_s"], r["torch"]["median_s"]]
        + [r[name] for name in numbers]
        for r in rows
    ]
    print(common.table(HEADER, cells))


def _step(text: str) -> str:
    name, _, side = text.partition(":")
    if not name or Path(name).name != name or side not in ("before", "after"):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME:before or NAME:after")
    return text


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="short lengths only")
    parser.add_argument(
        "--seconds", type=common.seconds_list, metavar="LIST", help="lengths, 5,30,60"
    )
    parser.add_argument(
        "--step", type=_step, metavar="NAME:before|after",
        help="file the result as one side of an optimisation step",
    )  # fmt: skip
    parser.add_argument("--note", default="", help="what the step changed")
    return main_for_each(parser, measure)


if __name__ == "__main__":
    raise SystemExit(main())
