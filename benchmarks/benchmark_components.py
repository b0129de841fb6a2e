"""Each network alone, on identical inputs: time, speed-up, difference.

    python benchmarks/benchmark_components.py [--component encoder|generator|rmvpe|hubert|flow]
        [--pt-model P] [--mlx-model M] [--runs N] [--seconds S]

``--pt-model`` and ``--mlx-model`` name the file of the component: of a voice for
encoder, flow and generator (or without ``--component``), else of the network itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import common
import numpy as np
import stages
from our_side import OurSynthesis, copied, synthesis_inputs, voice_network
from torch_side import OnDevice, TorchPitch, decode
from twins import Sides, main_for_each, save

from rvc_mlx.loading import Encoder, PitchNet, Voice, read_weights
from rvc_reference.loading import load_contentvec, load_voice
from rvc_reference.pipeline import quantize_f0

COMPONENTS = ("hubert", "rmvpe", "encoder", "flow", "generator")
FILES = {"hubert": "hubert_base.pt", "rmvpe": "rmvpe.pt"}
HEADER = ("component", "ours s", "PyTorch s", "speed-up", "max abs", "mean abs")
HEADER += ("scale", "correlation")

Call = Callable[[], Any]


class Paths(NamedTuple):
    """File of our side and of PyTorch's."""

    mlx: Path
    pt: Path


def hubert(sides: Sides, paths: Paths, seconds: float) -> tuple[Call, Call]:
    """Audio to content features."""
    audio = common.synthetic_audio(seconds)
    ours = Encoder(read_weights(paths.mlx, "contentvec"), sides.engine)
    theirs = OnDevice(load_contentvec(paths.pt), sides.torch)
    return (
        lambda: copied(ours.encode(audio, "v2")),
        lambda: theirs.run(lambda net, x: net.extract(x, "v2"), audio[None])[0],
    )


def rmvpe(sides: Sides, paths: Paths, seconds: float) -> tuple[Call, Call]:
    """Log-mel to salience."""
    ours = PitchNet(read_weights(paths.mlx, "rmvpe"), sides.engine)
    theirs = TorchPitch(paths.pt, sides.torch)
    mel = theirs.log_mel(common.synthetic_audio(seconds))[0].T.cpu().numpy()
    mel = np.ascontiguousarray(mel[None, : len(mel) // 32 * 32])
    return lambda: copied(ours.salience(mel)), lambda: theirs.salience(mel)


def _voices(sides: Sides, paths: Paths) -> tuple[Voice, OnDevice]:
    voice = Voice(read_weights(paths.mlx, "voice"), sides.engine)
    return voice, OnDevice(load_voice(paths.pt), sides.torch)


def encoder(sides: Sides, paths: Paths, seconds: float) -> tuple[Call, Call]:
    """Features and pitch to the prior's mean and log deviation."""
    voice, theirs = _voices(sides, paths)
    network = voice_network(paths.mlx, voice.config)
    run = stages.text_encoder(network, sides, voice.config)
    given = synthesis_inputs(round(100 * seconds), voice.config.feature_size)
    phone, coarse = given.features[None], quantize_f0(given.f0)[None]
    return (
        lambda: copied(run(phone, coarse.astype(np.int32))),
        lambda: np.concatenate(
            theirs.run(lambda net, *a: net.encode_text(*a), phone, coarse), axis=-1
        ),
    )


def _latent(frames: int, width: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((1, frames, width)).astype("f4")


def flow(sides: Sides, paths: Paths, seconds: float) -> tuple[Call, Call]:
    """Latent of the prior to latent of the vocoder."""
    voice, theirs = _voices(sides, paths)
    run = stages.flow(voice_network(paths.mlx, voice.config), sides, voice.config)
    z = _latent(round(100 * seconds), voice.config.inter_channels)
    g = voice.speakers[:1][None]
    return lambda: copied(run(z, g)), lambda: theirs.run(stages.inverse_flow, z)


def generator(sides: Sides, paths: Paths, seconds: float) -> tuple[Call, Call]:
    """Latent and F0 to audio; a few frames on each side are context only."""
    voice, theirs = _voices(sides, paths)
    frames = round(100 * seconds) + 2 * voice.context
    given = synthesis_inputs(frames, voice.config.feature_size)
    z = _latent(frames, voice.config.inter_channels)
    ours = OurSynthesis(voice, given.noise)
    U = voice.config.samples_per_frame
    kept = slice(ours.margin * U, (frames - ours.margin) * U)
    return lambda: ours.decode(z, given.f0), lambda: decode(theirs, z, given)[kept]


def measure(arguments: argparse.Namespace, sides: Sides) -> None:
    chosen = [arguments.component] if arguments.component else COMPONENTS
    result = f"components-{arguments.seconds:g}s"
    result += f"-{arguments.component}" if arguments.component else ""
    rows, used = [], {}
    for name in chosen:
        default = common.model_file(FILES.get(name, "v2_48k.pth"), arguments.models)
        mine = arguments.component or name not in FILES  # else the files are a voice's
        pt = arguments.pt_model if mine and arguments.pt_model else default
        mlx = arguments.mlx_model if mine and arguments.mlx_model else pt
        ours, theirs = globals()[name](sides, Paths(mlx, pt), arguments.seconds)
        times = common.time_calls([ours, theirs], arguments.runs)
        rows.append(
            {
                "component": name,
                "ours": times[0].as_dict(),
                "torch": times[1].as_dict(),
                "speedup": times[1].median / times[0].median,
                **common.difference(np.asarray(ours()), np.asarray(theirs())),
            }
        )
        used |= {f"{name} ours": mlx, f"{name} PyTorch": pt}
        save(arguments, sides, result, used, seconds=arguments.seconds, rows=rows)
    numbers = ("speedup", "max_abs", "mean_abs", "scale", "correlation")
    cells = [
        [r["component"], r["ours"]["median_s"], r["torch"]["median_s"]]
        + [r[name] for name in numbers]
        for r in rows
    ]
    print(f"{arguments.seconds:g} s of audio")
    print(common.table(HEADER, cells))


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--component", choices=COMPONENTS, help="default: all")
    parser.add_argument("--pt-model", type=Path, metavar="P", help="PyTorch's file")
    parser.add_argument("--mlx-model", type=Path, metavar="M", help="our file")
    parser.add_argument(
        "--seconds", type=common.seconds, default=5.0, help="default: 5"
    )
    return main_for_each(parser, measure)


if __name__ == "__main__":
    raise SystemExit(main())
