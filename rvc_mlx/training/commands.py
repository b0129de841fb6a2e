"""The commands ``rvc-mlx train``, ``rvc-mlx index`` and ``rvc-mlx extract``.

Only their options are here; what they do is imported when they are run. Options carry
the names that Applio and the WebUI use as aliases.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

PRESETS = ("32k", "40k", "48k", "small")
_RATES = {"32000": "32k", "40000": "40k", "48000": "48k"}


def add_commands(commands: Any) -> None:
    """Add the training commands to the parser of ``rvc-mlx``."""
    _add_train(commands)
    _add_index(commands)
    _add_extract(commands)


def _preset_name(text: str) -> str:
    name = _RATES.get(text, text)
    if name not in PRESETS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(PRESETS)}")
    return name


def _truth(text: str) -> bool:
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def _at_least(least: float, kind: type = int) -> Any:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not value >= least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return value

    return parse


def _add_truth(group: Any, *names: str, default: bool, text: str) -> None:
    group.add_argument(
        *names, type=_truth, nargs="?", const=True, default=default, metavar="BOOL",
        help=f"{text} (default: {'yes' if default else 'no'})",
    )  # fmt: skip


def _add_train(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="train a voice from recordings",
        description="Train a voice from folders of recordings, one per speaker: "
        "prepare the data, train, choose the best epoch, build the index. Every part "
        "goes on where it was stopped.",
    )
    parser.add_argument(
        "inputs", nargs="*", metavar="INPUT",
        help="folders of recordings, one per speaker; none: the folder's prepared data",
    )  # fmt: skip
    parser.add_argument(
        "--dataset-path", "--trainset-dir", dest="more", action="append", default=[],
        metavar="INPUT", help="another way to name an input",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", "--model-name", "--exp-dir", "--experiment-dir", "-e",
        required=True, metavar="FOLDER", help="the run's folder; takes all it makes",
    )  # fmt: skip
    parser.add_argument(
        "--name", metavar="NAME", help="of the voice (default: the folder's name)"
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument(
        "--resume", action="store_true", help="continue the run in FOLDER, bit by bit"
    )
    again.add_argument(
        "--force", action="store_true", help="start anew, replacing the run in FOLDER"
    )
    _add_networks(parser.add_argument_group("the voice"))
    _add_run(parser.add_argument_group("the run"))
    _add_data(parser.add_argument_group("the data"))
    parser.set_defaults(run=_train)


def _add_networks(group: Any) -> None:
    group.add_argument(
        "--preset", "--sample-rate", "-sr", type=_preset_name, default="40k",
        metavar="|".join(PRESETS), help="sizes and sample rate (default: 40k)",
    )  # fmt: skip
    group.add_argument(
        "--version", "-v", choices=("v1", "v2"), default="v2",
        help="of RVC: features of 256 (v1) or 768 numbers (default: v2)",
    )  # fmt: skip
    _add_truth(
        group, "--f0", "--if-f0", "-f0", "--pitch-guidance", default=True,
        text="a voice with pitch",
    )  # fmt: skip
    group.add_argument(
        "--vocoder", choices=("HiFi-GAN", "MRF HiFi-GAN"), default="HiFi-GAN",
        help="default: HiFi-GAN, the one that every program can play",
    )  # fmt: skip
    group.add_argument(
        "--speakers", type=_at_least(1), metavar="N",
        help="rows of speaker embeddings (default: as many as the data or the "
        "pretrained file has)",
    )  # fmt: skip
    group.add_argument(
        "--config", metavar="FILE",
        help="sizes of your own: JSON as in config.json of a run's folder",
    )  # fmt: skip
    group.add_argument(
        "--pretrained-g", "--g-pretrained-path", "--pretrain-g", "-pg", metavar="FILE",
        help="generator to start from: f0G40k.pth and the like, a G_*.pth, or a finished "
        "voice, whose posterior encoder then starts random",
    )  # fmt: skip
    group.add_argument(
        "--pretrained-d", "--d-pretrained-path", "--pretrain-d", "-pd", metavar="FILE",
        help="discriminator to start from",
    )  # fmt: skip
    group.add_argument("--author", "--model-author", help="who made it")


def _add_run(group: Any) -> None:
    # None unless given: a continued run keeps what it was started with.
    def number(*names: str, default: float, least: float, text: str) -> None:
        group.add_argument(
            *names, type=_at_least(least, type(default)), metavar="N",
            help=f"{text} (default: {default:g})",
        )  # fmt: skip

    number("--epochs", "--total-epoch", "-te", default=200, least=1,
           text="passes over the data")  # fmt: skip
    number("--batch-size", "-bs", default=4, least=1, text="clips per step and device")
    number("--save-every", "--save-every-epoch", "-se", default=10, least=1,
           text="epochs between kept checkpoints and voices")  # fmt: skip
    _add_truth(group, "--save-only-latest", "--if-latest", "-l", default=False,
               text="keep nothing of single epochs but the best")  # fmt: skip
    number("--save-steps", default=0, least=0,
           text="steps between saves of the state, 0 for by the clock only")  # fmt: skip
    number("--save-minutes", default=5.0, least=0.0,
           text="minutes between saves of the state")  # fmt: skip
    number("--learning-rate", "-lr", default=1e-4, least=0.0, text="of the first epoch")
    number("--decay", "--lr-decay", default=0.999875, least=0.0,
           text="factor of the learning rate from epoch to epoch")  # fmt: skip
    number("--adversarial-from", default=0, least=0,
           text="train without the discriminator for N steps, which take about half "
           "the time, for a voice that is far from its goal")  # fmt: skip
    number("--prior-share", default=0.0, least=0.0,
           text="share of each batch, 0 to 1, that is spoken as a conversion speaks, "
           "so that the losses reach the text encoder; RVC has none")  # fmt: skip
    group.add_argument(
        "--multiscale-mel", type=_truth, nargs="?", const=True, metavar="BOOL",
        help="compare the sound in spectrograms of Applio's seven windows, from 1 to "
        "64 ms at 32 kHz, where RVC has one long window (default: no)",
    )  # fmt: skip
    number("--content-weight", default=0.0, least=0.0,
           text="weight of what the encoder hears in the voice's sound against the "
           "recording's, so that words stay clear; RVC has none, with some 1000 its "
           "slope is as steep as the mel loss's")  # fmt: skip
    number("--patience", default=0, least=0,
           text="stop after N validations without a better score, 0 for never")  # fmt: skip
    number("--validate-every", default=1, least=1,
           text="epochs between validations")  # fmt: skip
    number("--hold-out", default=0.02, least=0.0,
           text="share of the recordings kept for validation")  # fmt: skip
    number("--validation-clips", default=8, least=0,
           text="clips spoken at each validation")  # fmt: skip
    number("--log-steps", default=10, least=1, text="steps between rows of the log")
    number("--seed", default=1234, least=0, text="of everything random")
    group.add_argument(
        "--precision", choices=("f32", "bf16", "f16"),
        help="of the networks; weights and losses stay f32 (default: f32)",
    )  # fmt: skip
    group.add_argument(
        "--device", choices=("auto", "gpu", "cpu"), default="auto",
        help="what computes (default: auto: the GPU if MLX has one)",
    )  # fmt: skip
    group.add_argument(
        "--tensorboard", type=_truth, nargs="?", const=True, metavar="BOOL",
        help="write TensorBoard files (default: where tensorboardX is installed)",
    )  # fmt: skip
    group.add_argument(
        "--compile", choices=("traced", "fused", "no"),
        help="the step: build its graph once, fuse its kernels too (minutes on a new "
        "machine), or neither (default: traced on a GPU, no on the CPU)",
    )  # fmt: skip
    _add_truth(group, "--similarity", default=True,
               text="score the speaker where resemblyzer is installed")  # fmt: skip
    _add_truth(group, "--index", default=True, text="build the index at the end")
    group.add_argument(
        "--index-algorithm", type=str.lower, choices=("auto", "faiss", "kmeans"),
        default="auto", help="see rvc-mlx index",
    )  # fmt: skip


def _add_data(group: Any) -> None:
    group.add_argument(
        "--encoder", "--embedder-model-custom", metavar="FILE",
        help="content encoder (default: the downloaded ContentVec)",
    )  # fmt: skip
    group.add_argument(
        "--embedder-model", dest="embedder", metavar="NAME",
        help="what the voice's file calls its encoder (default: contentvec)",
    )  # fmt: skip
    group.add_argument(
        "--rmvpe", metavar="FILE", help="pitch network (default: the downloaded RMVPE)"
    )
    group.add_argument(
        "--cpu-cores", "-n", type=_at_least(1), metavar="N",
        help="processes that prepare the data (default: one per core)",
    )  # fmt: skip
    group.add_argument(
        "--include-mutes", type=_at_least(0), default=2, metavar="N",
        help="clips of silence per speaker (default: 2)",
    )  # fmt: skip


def _train(arguments: argparse.Namespace) -> int:
    from rvc_mlx.training.assembly import train

    return train(arguments)


def _add_index(commands: Any) -> None:
    parser = commands.add_parser(
        "index",
        help="build the retrieval index of a voice",
        description="Build the .index of a run's features (needs faiss: extra train).",
    )
    parser.add_argument(
        "folder", metavar="FOLDER", help="a run's folder, or a folder of .npy features"
    )
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="default: FOLDER/<its name>.index"
    )
    parser.add_argument("--version", "-v", choices=("v1", "v2"), default="v2")
    parser.add_argument(
        "--index-algorithm", type=str.lower, choices=("auto", "faiss", "kmeans"),
        default="auto", help="kmeans: 10,000 centres; auto: those of large data only",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="overwrite FILE")
    parser.set_defaults(run=_index)


def _index(arguments: argparse.Namespace) -> int:
    from rvc_mlx.training.assembly import index_folder

    return index_folder(arguments)


def _add_extract(commands: Any) -> None:
    parser = commands.add_parser(
        "extract",
        help="turn a training checkpoint G_*.pth or a run's state into a voice",
        description="Turn a generator's training checkpoint, of this program or of "
        "Applio or the WebUI, or the state of a run, into a voice that all of them load.",
    )
    parser.add_argument("checkpoint", metavar="G_N.pth|state.safetensors")
    parser.add_argument(
        "-o", "--output", "--save-name", required=True, action="append", metavar="FILE",
        help=".pth (public layout) or .safetensors; may be given twice",
    )  # fmt: skip
    parser.add_argument("--name", "--model-name", help="default: the first FILE's name")
    parser.add_argument("--author", "--model-author", default="", help="who made it")
    parser.add_argument("--info", default="", help="free text (default: <N>epoch)")
    parser.add_argument("--force", action="store_true", help="overwrite FILE")
    parser.set_defaults(run=_extract)


def _extract(arguments: argparse.Namespace) -> int:
    from rvc_mlx.training.voice_export import VoiceFacts, extract_voice

    targets = [Path(name) for name in arguments.output]
    refuse_overwrite(targets, arguments.force)
    name = arguments.name or targets[0].stem
    facts = VoiceFacts(name, author=arguments.author, info=arguments.info)
    config = extract_voice(arguments.checkpoint, targets, facts)
    names = " and ".join(map(str, targets))
    say(
        f"{arguments.checkpoint} -> {names} ({config.version}, {config.sample_rate} Hz)"
    )
    return 0


def refuse_overwrite(targets: list[Path], force: bool) -> None:
    """Raise FileExistsError for a file that is there, unless it may be replaced."""
    for target in targets:
        if target.exists() and not force:
            raise FileExistsError(f"{target} exists; pass --force to overwrite it")


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)  # noqa: T201 (a part of the command line)
