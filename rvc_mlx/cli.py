"""The command line: ``rvc-mlx convert|info|convert-model|download|doctor|bench|demo``.

``train``, ``index`` and ``extract`` come from `rvc_mlx.training.commands`. Heavy modules
are imported by the command that needs them, so ``--help`` is quick.
Exit codes: 0 done, 1 failed (also when one file of many did), 2 misuse, 130 interrupted.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rvc_mlx.bundled_models import (
    DEMO_VOICE,
    SPEECH,
    VOICES,
    bundled_voice,
    word_errors,
)
from rvc_mlx.options import ConversionOptions
from rvc_mlx.training.commands import add_commands
from rvc_mlx.version import __version__

if TYPE_CHECKING:
    from rvc_mlx.batch import Manifest, Task
    from rvc_mlx.pipeline import VoiceConverter

FORMATS = ("wav", "flac", "mp3", "ogg")
SUBTYPES = {"16": "PCM_16", "24": "PCM_24", "float": "FLOAT"}


class _MisuseError(ValueError):
    """The command line asks for something that cannot be."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may be of any bytes
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = build_parser().parse_args(_normalized(argv))
    stopped = _watch_signals()
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        return _interrupted()
    except BrokenPipeError:
        return 1
    except (
        ValueError,
        OSError,
        ImportError,
        RuntimeError,  # of OpenVINO or MLX, and what is not implemented
        MemoryError,
    ) as error:
        if stopped:  # a library has turned the interrupt into an error of its own
            return _interrupted()
        print(f"rvc-mlx: {_one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, _MisuseError) else 1


def _watch_signals() -> list[int]:
    """Raise KeyboardInterrupt on Ctrl-C and SIGTERM; the list tells which came."""
    stopped: list[int] = []

    def interrupt(number: int, frame: Any) -> NoReturn:  # noqa: ARG001
        stopped.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    return stopped


def _interrupted() -> int:
    print("rvc-mlx: interrupted; nothing half-written was left", file=sys.stderr)
    return 130


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _normalized(argv: Sequence[str] | None) -> list[str]:
    """Commands and options may be written with underscores, as in older programs."""
    words = list(sys.argv[1:] if argv is None else argv)
    result: list[str] = []
    for word in words:
        name, equals, value = word.partition("=")
        if name.startswith("--") or not result:
            name = name.replace("_", "-")
        result.append(name + equals + value)
    return result


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="rvc-mlx",
        description="RVC voice conversion in MLX: Apple GPU, NVIDIA GPU, any CPU.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_convert(commands)
    _add_info(commands)
    _add_convert_model(commands)
    _add_download(commands)
    _add_doctor(commands)
    _add_bench(commands)
    _add_demo(commands)
    add_commands(commands)
    return parser


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        default="auto",
        choices=("auto", "gpu", "cpu", "mlx-cpu"),
        help="what computes (default: auto: the GPU if MLX has one, else the CPU)",
    )
    parser.add_argument(
        "--precision",
        default="auto",
        choices=("auto", "f32", "bf16", "f16"),
        help="of the networks (default: auto: bf16 on CPUs that have it, else f32)",
    )


def _add_convert(commands: Any) -> None:
    parser = commands.add_parser(
        "convert",
        aliases=["infer", "batch-infer"],  # the names of Applio's commands
        help="convert recordings into a voice",
        description="Convert sound files, or folders of them, into a voice.",
    )
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="files or folders")
    parser.add_argument(
        "--input-path", "--input-folder", dest="more", action="append", default=[],
        metavar="INPUT",
        help="another way to name an input",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", "--output-path", "--output-folder", "--opt-path",
        required=True, metavar="OUT",
        help="file for one input, folder for several; the suffix says the format",
    )  # fmt: skip
    parser.add_argument(
        "-v", "--voice", "--pth-path", "--model", "--model-name", required=True,
        metavar="VOICE",
        help="the voice: .pth, .safetensors or .npz, or the name of a bundled one: "
        + ", ".join(VOICES),
    )  # fmt: skip
    parser.add_argument(
        "-i", "--index", "--index-path", metavar="FILE",
        help="the voice's .index file, or the name of a bundled one (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--encoder", "--embedder-model-custom", metavar="FILE",
        help="content encoder (default: the bundled or downloaded one that the voice "
        "was trained with)",
    )  # fmt: skip
    parser.add_argument(
        "--embedder-model", default="contentvec", choices=("contentvec",),
        help="name of the encoder, where it is not given as a file",
    )  # fmt: skip
    parser.add_argument(
        "--rmvpe", metavar="FILE",
        help="pitch network (default: the bundled or downloaded one, likewise)",
    )  # fmt: skip
    _add_options(parser)
    _add_device(parser)
    parser.add_argument(
        "--format", "--export-format", default=None, type=str.lower, choices=FORMATS,
        help="format of files in an output folder (default: wav)",
    )  # fmt: skip
    parser.add_argument(
        "--bits", choices=tuple(SUBTYPES), help="16, 24 or float (wav; flac: 16 or 24)"
    )
    parser.add_argument("--force", action="store_true", help="overwrite existing files")
    parser.set_defaults(run=_convert)


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _add_options(parser: argparse.ArgumentParser) -> None:
    """One argument per field of ``ConversionOptions``."""
    group = parser.add_argument_group("conversion")
    for item in fields(ConversionOptions):
        names = [item.name, *item.metadata["aliases"]]
        flags = dict.fromkeys("--" + name.replace("_", "-") for name in names)
        keywords: dict[str, Any] = {"dest": item.name, "default": item.default}
        if isinstance(item.default, bool):
            keywords |= {"type": _boolean, "nargs": "?", "const": True}
            keywords["metavar"] = "BOOL"
        elif item.metadata["choices"]:
            keywords["choices"] = item.metadata["choices"]
        elif not isinstance(item.default, str):
            keywords["type"] = int if isinstance(item.default, int) else _number
            keywords["metavar"] = "N"
        shown = "" if item.default in ("", False) else f" (default: {item.default})"
        group.add_argument(*flags, help=item.metadata["help"] + shown, **keywords)


def _options(arguments: argparse.Namespace) -> ConversionOptions:
    values = {f.name: getattr(arguments, f.name) for f in fields(ConversionOptions)}
    try:
        return ConversionOptions(**values)
    except ValueError as error:
        raise _MisuseError(str(error)) from error


def _load(arguments: argparse.Namespace) -> VoiceConverter:
    from rvc_mlx.pipeline import load

    return load(
        arguments.voice,
        arguments.index,  # Applio's scripts pass "" for none
        encoder=arguments.encoder,
        rmvpe=arguments.rmvpe,
        device=arguments.device,
        precision=arguments.precision,
    )


def _convert(arguments: argparse.Namespace) -> int:
    from rvc_mlx.batch import Manifest, plan_tasks, settings_key

    inputs = arguments.inputs + arguments.more
    if not inputs:
        raise _MisuseError("no input was given; name a file or a folder")
    options = _options(arguments)
    suffix = f".{arguments.format or 'wav'}"
    tasks = plan_tasks(inputs, arguments.output, suffix)
    many = len(tasks) > 1 or tasks[0].target != Path(arguments.output)
    if not many and arguments.format and tasks[0].target.suffix.lower() != suffix:
        raise _MisuseError(
            f"--format {arguments.format} does not fit {arguments.output}; the suffix "
            "says the format of a single file"
        )
    _refuse_overwrite(tasks, many, arguments.force)
    converter = _load(arguments)
    print(
        f"voice {converter.voice.path.name} ({converter.voice.config.version}, "
        f"{converter.sample_rate} Hz) on {converter.device}, {converter.precision}",
        flush=True,
    )
    manifest = None
    if many:
        _make_folder(Path(arguments.output))
        net, index = converter.pitch_net, converter.index
        files = (net.path if net else None, index.path if index else None)
        key = settings_key(
            options, converter.voice.path, converter.encoder.path, *map(_path, files)
        )
        manifest = Manifest(Path(arguments.output), key + (arguments.bits or ""))
    failed = _convert_all(converter, tasks, options, arguments, manifest)
    return 1 if failed else 0


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"{folder}: this folder cannot be made ({error.strerror}); give another "
            "output"
        ) from error


def _path(value: Any) -> Path | None:
    return Path(value) if value else None


def _refuse_overwrite(tasks: Sequence[Task], many: bool, force: bool) -> None:
    target = tasks[0].target
    if not many and target.exists() and not target.is_dir() and not force:
        raise FileExistsError(f"{target} exists; pass --force to overwrite it")
    for task in tasks:
        if task.target.exists() and task.target.resolve() == task.source.resolve():
            raise ValueError(f"{task.source}: the output would replace the input")


def _convert_all(
    converter: VoiceConverter,
    tasks: Sequence[Task],
    options: ConversionOptions,
    arguments: argparse.Namespace,
    manifest: Manifest | None,
) -> int:
    """Convert every task; returns how many failed."""
    if manifest is None:
        for task in tasks:
            _convert_one(converter, task, options, arguments)
        return 0
    pending, refused = _pending(tasks, None if arguments.force else manifest)
    failed = len(refused) + _convert_many(
        converter, pending, options, arguments, manifest
    )
    if failed:
        print(f"rvc-mlx: {failed} of {len(tasks)} failed", file=sys.stderr)
    return failed


def _pending(
    tasks: Sequence[Task], manifest: Manifest | None
) -> tuple[list[Task], list[Task]]:
    """Tasks to do, and tasks refused because they would overwrite a file."""
    if manifest is None:
        return list(tasks), []
    left = [task for task in tasks if not manifest.is_done(task)]
    if len(left) < len(tasks):
        print(f"{len(tasks) - len(left)} of {len(tasks)} were done before", flush=True)
    refused = {task: None for task in left if task.target.exists()}
    for task in refused:
        print(
            f"rvc-mlx: {task.target} exists and is not from this run; pass --force to "
            "overwrite it",
            file=sys.stderr,
        )
    return [task for task in left if task not in refused], list(refused)


def _convert_one(
    converter: VoiceConverter,
    task: Task,
    options: ConversionOptions,
    arguments: argparse.Namespace,
) -> None:
    _make_folder(task.target.parent)
    start = time.perf_counter()
    with _Progress(task.source.name) as progress:
        report = converter.convert_file(
            task.source,
            task.target,
            options,
            subtype=SUBTYPES.get(arguments.bits or ""),
            progress=progress.update,
        )
    spent = time.perf_counter() - start
    print(
        f"{task.source} -> {task.target}: {report.seconds:.1f} s of audio in "
        f"{spent:.1f} s, {report.seconds / spent:.1f} x realtime",
        flush=True,
    )


def _convert_many(
    converter: VoiceConverter,
    tasks: Sequence[Task],
    options: ConversionOptions,
    arguments: argparse.Namespace,
    manifest: Manifest,
) -> int:
    """Convert files and note what became of each; returns how many failed."""
    failed, seconds, start = 0, 0.0, time.perf_counter()

    def fail(task: Task, error: Exception) -> None:
        nonlocal failed
        failed += 1
        message = _one_line(error)
        print(f"rvc-mlx: {message}", file=sys.stderr, flush=True)
        manifest.record(task, status="failed", error=message)

    placed = []
    for task in tasks:
        try:
            _make_folder(task.target.parent)
        except OSError as error:
            fail(task, error)
        else:
            placed.append(task)
    with _Bars([task.source.name for task in placed]) as bars:
        for number, result in converter.convert_files(
            [(task.source, task.target) for task in placed],
            options,
            subtype=SUBTYPES.get(arguments.bits or ""),
            progress=bars.update,
        ):
            bars.stop()
            task = placed[number]
            if isinstance(result, Exception):
                fail(task, result)
                continue
            seconds += result.seconds
            told = f"{task.source} -> {task.target}: {result.seconds:.1f} s of audio"
            print(told, flush=True)
            manifest.record(task, status="done", seconds=result.seconds)
    if done := len(tasks) - failed:
        spent = time.perf_counter() - start
        print(
            f"{done} done: {seconds:.1f} s of audio in {spent:.1f} s, "
            f"{seconds / spent:.1f} x realtime",
            flush=True,
        )
    return failed


class _Bars:
    """The bar of the file that is written, one file after the other."""

    def __init__(self, names: Sequence[str]):
        self._names = names
        self._shown: tuple[int, _Progress] | None = None

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the bar away."""
        if self._shown:
            self._shown[1].__exit__()
            self._shown = None

    def update(self, number: int, done: float, total: float) -> None:
        """Show seconds done of a file."""
        if self._shown is None or self._shown[0] != number:
            self.stop()
            self._shown = number, _Progress(self._names[number]).__enter__()
        self._shown[1].update(done, total)


class _Progress:
    """A bar on a terminal, nothing elsewhere."""

    def __init__(self, name: str):
        self._name = name
        self._bar: Any = None

    def __enter__(self) -> _Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
            )

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f} s"),
                TextColumn("{task.fields[speed]:.1f} x realtime"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(self._name, total=1, speed=0.0)
            self._start = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, done: float, total: float) -> None:
        """Show seconds of audio done."""
        if self._bar:
            speed = done / max(time.perf_counter() - self._start, 1e-9)
            self._bar.update(self._task, completed=done, total=total, speed=speed)


def _add_info(commands: Any) -> None:
    parser = commands.add_parser("info", help="say what a model or index file is")
    parser.add_argument("file", help="or the name of a bundled voice")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parser.set_defaults(run=_info)


def _info(arguments: argparse.Namespace) -> int:
    from rvc_mlx.inspection import describe_file

    facts = describe_file(arguments.file)
    if arguments.json:
        print(json.dumps(facts, indent=1, default=str))
    else:
        width = max(map(len, facts))
        for name, value in facts.items():
            print(f"{name:<{width}}  {value}")
    return 0


def _add_convert_model(commands: Any) -> None:
    parser = commands.add_parser(
        "convert-model", help="rewrite a checkpoint as .safetensors or .npz"
    )
    parser.add_argument("input", metavar="IN")
    parser.add_argument("output", metavar="OUT", help=".safetensors or .npz")
    parser.add_argument("--half", action="store_true", help="store half precision")
    parser.add_argument("--force", action="store_true", help="overwrite OUT")
    parser.set_defaults(run=_convert_model, expected="")


def _convert_model(arguments: argparse.Namespace) -> int:
    from rvc_mlx.export import convert_model

    target = Path(arguments.output)
    if target.exists() and not arguments.force:
        raise FileExistsError(f"{target} exists; pass --force to overwrite it")
    kind = convert_model(arguments.input, target, arguments.half, arguments.expected)
    print(f"{arguments.input} -> {target} ({kind})")
    return 0


def run_convert_tool(expected: str, description: str) -> int:
    """Entry of ``tools/convert_*.py``: convert a checkpoint of one kind."""
    parser = argparse.ArgumentParser(description=description)
    commands = parser.add_subparsers()
    _add_convert_model(commands)
    arguments = parser.parse_args(["convert-model", *sys.argv[1:]])
    arguments.expected = expected
    try:
        return _convert_model(arguments)
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {_one_line(error)}", file=sys.stderr)
        return 1


def _add_download(commands: Any) -> None:
    parser = commands.add_parser("download", help="fetch public weights, verified")
    parser.add_argument(
        "names", nargs="*", metavar="NAME",
        help="contentvec, rmvpe, hubert, hubert-fairseq (default: contentvec rmvpe)",
    )  # fmt: skip
    parser.add_argument("--from-dir", metavar="DIR", help="take files from a folder")
    parser.set_defaults(run=_download)


def _download(arguments: argparse.Namespace) -> int:
    from rvc_mlx.download import download

    for name in arguments.names or ("contentvec", "rmvpe"):
        print(f"{name}: {download(name, from_dir=arguments.from_dir)}", flush=True)
    return 0


def _add_doctor(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor", help="say what will run where, and test it for a second"
    )
    _add_device(parser)
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parser.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from rvc_mlx.inspection import examine

    facts, healthy = examine(arguments.device, arguments.precision)
    if arguments.json:
        print(json.dumps(facts, indent=1))
    else:
        for section, rows in facts.items():
            print(section)
            for name, value in rows.items():
                print(f"  {name}: {value}")
    return 0 if healthy else 1


def _add_bench(commands: Any) -> None:
    parser = commands.add_parser(
        "bench", help="time a conversion on this machine, with a report"
    )
    parser.add_argument(
        "-v", "--voice", default=DEMO_VOICE, metavar="VOICE",
        help=f"as for convert (default: {DEMO_VOICE}, bundled)",
    )  # fmt: skip
    parser.add_argument("-i", "--index", metavar="FILE", help="the voice's .index file")
    parser.add_argument("--encoder", metavar="FILE", help="content encoder")
    parser.add_argument("--rmvpe", metavar="FILE", help="pitch network")
    parser.add_argument(
        "--seconds", type=_number, default=10.0, help="of audio (default: 10)"
    )
    parser.add_argument("--runs", type=int, default=5, help="warm runs (default: 5)")
    _add_device(parser)
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parser.add_argument("-o", "--output", metavar="FILE", help="write the JSON there")
    parser.add_argument("--force", action="store_true", help="overwrite FILE")
    parser.set_defaults(run=_bench)


def _bench(arguments: argparse.Namespace) -> int:
    from rvc_mlx.bench import BenchFiles, run_benchmark, summary

    given = arguments
    if given.output and Path(given.output).exists() and not given.force:
        raise FileExistsError(f"{given.output} exists; pass --force to overwrite it")
    if given.output and not Path(given.output).parent.is_dir():
        raise FileNotFoundError(
            f"{given.output}: there is no such folder; make it first"
        )
    files = BenchFiles(given.voice, given.index, given.encoder, given.rmvpe)
    report = run_benchmark(
        files, given.seconds, given.runs, given.device, given.precision
    )
    text = json.dumps(report, indent=1)
    if given.output:
        Path(given.output).write_text(text + "\n", "utf-8")
    print(text if given.json else "\n".join(summary(report)))
    return 0


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo", help="convert the bundled clip with the bundled models, offline"
    )
    parser.add_argument("-o", "--output", default="demo.wav", metavar="OUT")
    parser.add_argument("--force", action="store_true", help="overwrite OUT")
    _add_device(parser)
    parser.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    wrong = word_errors(DEMO_VOICE)
    print(
        f"The bundled voice {DEMO_VOICE} is an early one, of small networks that learnt "
        "from synthetic speech alone: it keeps the melody, but a recogniser gets "
        f"{wrong['output']:.0f} % of a stranger's words wrong, and "
        f"{wrong['source']:.0f} % in the recording itself. See the README for real voices.",
        flush=True,
    )
    words = ["convert", str(SPEECH), "-o", arguments.output]
    words += ["--voice", str(bundled_voice(DEMO_VOICE))]
    words += ["--device", arguments.device, "--precision", arguments.precision]
    words += ["--force"] if arguments.force else []
    parsed = build_parser().parse_args(words)
    return parsed.run(parsed)
