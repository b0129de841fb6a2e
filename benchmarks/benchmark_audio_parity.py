"""Real audio through the whole pipeline both ways, with equal noise.

    python benchmarks/benchmark_audio_parity.py [--audio F] [--pt-model P] [--mlx-model M]
        [--seconds S] [--pytorch-only] [--mlx-only] [--runs N] [--save-outputs]
        [--output-dir D]

The default is float32: what is left is the order of the sums.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import common
import numpy as np
from stages import convert_ours, convert_torch, x_pad
from torch_side import TorchPipeline
from twins import Sides, converter, main_for_each, save

from rvc_mlx.audio_io import save_audio
from rvc_mlx.pitch import estimate_f0
from rvc_mlx.spectral import N_FFT, log_mel

N_MELS = 128
CORRELATION = 0.99999  # that two float32 waveforms must reach


def waveform_difference(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """Differences of two waveforms ``[n]`` of one rate, by every usual measure."""
    error = ours.astype(np.float64) - theirs
    power = np.mean(np.square(theirs, dtype=np.float64))
    noise = max(float(np.mean(error**2)), 1e-30)
    mels = [log_mel(np.pad(x, N_FFT // 2, "reflect"), N_MELS) for x in (ours, theirs)]
    return {
        **common.difference(ours, theirs),
        "snr_db": float(10 * np.log10(power / noise)),
        "rmse": noise**0.5,
        "rms_ratio": float(np.sqrt(np.mean(np.square(ours, dtype=np.float64)) / power)),
        "log_mel_mean_abs": float(np.abs(mels[0] - mels[1]).mean()),
        "log_mel_max_abs": float(np.abs(mels[0] - mels[1]).max()),
    }


class Heard(NamedTuple):
    """The input: ``[n]`` at 16 kHz, and each side's F0 of it."""

    clip: np.ndarray
    f0: dict[str, np.ndarray]


def draw(path: Path, heard: Heard, made: dict[str, np.ndarray], rate: int) -> None:
    """Spectrograms of input, outputs and their difference, and F0, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = {"input and F0": (heard.clip, common.SAMPLE_RATE)}
    shown |= {name: (audio, rate) for name, audio in made.items()}
    if len(made) == 2:
        error = 1000 * np.subtract(*made.values())
        shown["difference, amplified 1000 times"] = (error, rate)
    size = (10, 2.6 * len(shown))
    figure, grid = plt.subplots(len(shown), figsize=size, sharex=True, squeeze=False)
    for axis, (name, (audio, hz)) in zip(grid[:, 0], shown.items(), strict=True):
        limits = {"vmin": -140, "vmax": -30}
        axis.specgram(audio + 1e-9, NFFT=1024, Fs=hz, noverlap=768, **limits)
        axis.set(title=name, ylabel="Hz", ylim=(0, 8000))
    curves = grid[0, 0].twinx()
    for (name, f0), style in zip(heard.f0.items(), ("w-", "r:"), strict=False):
        curves.plot(np.arange(len(f0)) / 100, np.where(f0 > 0, f0, np.nan), style)
        curves.lines[-1].set_label(f"F0, {name}")
    curves.set(ylabel="F0, Hz", ylim=(0, 600))
    curves.legend(loc="upper right", facecolor="grey")
    grid[-1, 0].set_xlabel("seconds")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def save_outputs(
    folder: Path, heard: Heard, made: dict[str, np.ndarray], rate: int
) -> None:
    """Wavs of what was made, and the picture."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, audio in made.items():
        save_audio(folder / f"{name}.wav", audio, rate, "FLOAT")
    draw(folder / "spectrograms.png", heard, made, rate)
    print(f"wrote {', '.join(f'{name}.wav' for name in made)} and spectrograms.png")


def measure(arguments: argparse.Namespace, sides: Sides) -> int:
    files = common.models(arguments.models)
    pt = arguments.pt_model or files.voice
    files = files._replace(voice=arguments.mlx_model or pt)
    clip = common.real_audio(arguments.seconds, arguments.audio)
    made: dict[str, np.ndarray] = {}
    calls: dict[str, Callable[[], None]] = {}
    ours = converter(files, sides)
    net = ours.pitch_net
    if not arguments.pytorch_only:
        calls["ours"] = lambda: made.update(ours=convert_ours(ours, clip, x_pad(sides)))
    theirs = TorchPipeline(files._replace(voice=pt), sides.torch)
    if not arguments.mlx_only:
        calls["PyTorch"] = lambda: made.update(
            PyTorch=convert_torch(theirs, clip, x_pad(sides))
        )
    times = common.time_calls(list(calls.values()), arguments.runs)
    facts: dict[str, Any] = {"seconds": len(clip) / common.SAMPLE_RATE}
    facts |= {name: t.as_dict() for name, t in zip(calls, times, strict=True)}
    rows = [(f"{name}, s", t.median) for name, t in zip(calls, times, strict=True)]
    if len(made) == 2:
        facts |= waveform_difference(made["ours"], made["PyTorch"])
        facts["passed"] = facts["correlation"] >= CORRELATION
        rows += [(k, v) for k, v in facts.items() if isinstance(v, float | bool)]
    print(common.table(("measure", "value"), rows))
    if arguments.save_outputs or arguments.output_dir:
        folder = arguments.output_dir or arguments.output / "audio_parity"
        f0 = {"PyTorch": theirs.pitch.estimate_f0(clip)} if theirs.pitch else {}
        if net and "ours" in made:
            f0["ours"] = estimate_f0(net.salience, lambda a, b: clip[a:b], len(clip))
        rate = theirs.synthesizer.sample_rate
        save_outputs(folder, Heard(clip, f0), made, rate)
    only = "" if len(made) == 2 else f"-{'mlx' if 'ours' in made else 'pytorch'}_only"
    used = {**files._asdict(), "voice PyTorch": pt}
    save(arguments, sides, f"audio_parity{only}", used, **facts)
    if sides.precision == "f32" and not facts.get("passed", True):
        print(f"FAILED: the correlation is below {CORRELATION}")
        return 1
    return 0


def main() -> int:
    parser = common.parser(__doc__, runs=3, precisions=("f32",))
    common.add_sides(parser)
    parser.add_argument(
        "--audio", type=Path, metavar="F", help="default: the tests' clip"
    )
    parser.add_argument(
        "--seconds",
        type=common.seconds,
        default=0.0,
        help="repeat or cut to this (default: all)",
    )
    parser.add_argument(
        "--save-outputs", action="store_true", help="wavs and a picture"
    )
    parser.add_argument("--output-dir", type=Path, metavar="D", help="for these")
    return main_for_each(parser, measure)


if __name__ == "__main__":
    raise SystemExit(main())
