"""Judge conversions: pitch, speaker, words, phones, sound; figures, tables, pictures.

    python benchmarks/evaluate_conversion.py CLIPS [--transcripts FILE]
        --voices A.pth B.pth [--index A.index B.index] [--references A/ B/]
        [--pitch auto] [--encoder E --rmvpe R --device D] [--judges f0,speaker]

Judges whose tools are not installed are named, never left out. ``--converted FOLDER``
judges recordings that were converted before. See docs/EVALUATION.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import common
from evaluation_inputs import Target, collect_sources, collect_targets, parse_options
from evaluation_outputs import Output, convert_one, pitch_shift
from evaluation_page import draw_page, panels_of
from evaluation_report import missed_goals, write_report
from judge_pitch import PITCH
from judges import JUDGES, Heard, chosen_judges, observe_all, require_tools
from judging import Case, Judge, Recording

from rvc_mlx.audio_io import AudioReader
from rvc_mlx.checkpoint import hash_file
from rvc_mlx.machine import processors


def _add_targets(made: argparse.ArgumentParser) -> None:
    group = made.add_argument_group(
        "targets; lists hold one value each, or one for all"
    )
    group.add_argument(
        "--voices", nargs="+", metavar="VOICE",
        help="to convert to: files, or names of bundled ones",
    )  # fmt: skip
    group.add_argument(
        "--converted", nargs="+", metavar="DIR", help="conversions made before"
    )
    group.add_argument(
        "--names", nargs="+", help="for the tables (default: of the files)"
    )
    group.add_argument(
        "--index", nargs="+", metavar="FILE", help="of the voices, or none"
    )
    group.add_argument(
        "--references", nargs="+", metavar="PATH",
        help="recordings of the target speakers: a file, a folder, or none",
    )  # fmt: skip
    group.add_argument(
        "--references-limit", type=int, default=20, help="of each target (default: 20)"
    )
    group.add_argument(
        "--pitch", nargs="+", default=["0"], metavar="SEMITONES",
        help="shift, or auto: from the median of a clip to that of the references",
    )  # fmt: skip


def _add_conversion(made: argparse.ArgumentParser) -> None:
    group = made.add_argument_group("conversion")
    group.add_argument(
        "--encoder", help="content encoder (default: the downloaded one)"
    )
    group.add_argument("--rmvpe", help="pitch network (default: the downloaded one)")
    group.add_argument(
        "--device", default="auto", choices=("auto", "gpu", "cpu", "mlx-cpu")
    )
    group.add_argument(
        "--precision", default="auto", choices=("auto", "f32", "bf16", "f16")
    )
    group.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE",
        help="of the conversion, as index_rate=0; can be repeated",
    )  # fmt: skip
    group.add_argument(
        "--seeds", type=int, default=1, metavar="N",
        help="convert each clip N times, each with another seed of the noise; figures "
        "are over all of them (default: 1)",
    )  # fmt: skip


def _add_judging(made: argparse.ArgumentParser) -> None:
    group = made.add_argument_group("judging and results")
    group.add_argument(
        "--judges", default="all", help=f"all, or some of {','.join(JUDGES)}"
    )
    group.add_argument("--workers", type=int, default=processors(), help="processes")
    group.add_argument("--label", default="conversion", help="name of the results")
    group.add_argument(
        "--output", type=Path, default=common.RESULTS / "evaluation", metavar="DIR"
    )
    group.add_argument("--audio", type=Path, metavar="DIR", help="keep the conversions")
    group.add_argument("--pictured", type=int, default=4, help="clips on the page")
    group.add_argument(
        "--check", action="store_true", help="fail where a goal is missed"
    )


def build_parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    made.add_argument("sources", nargs="+", type=Path, help="sound files or folders")
    made.add_argument("--transcripts", type=Path, help="lines 'name|text'")
    made.add_argument(
        "--limit", type=int, default=0, help="clips at most (default: all)"
    )
    _add_targets(made)
    _add_conversion(made)
    _add_judging(made)
    return made


def judge_clip(
    judges: Sequence[Judge],
    source: Recording,
    target: Target,
    output: Output,
    heard: Heard,
) -> dict[str, Any]:
    """Every judge's figures of one conversion, for the results."""
    judged = {}
    for judge in judges:
        references = target.references if judge.references else ()
        case = Case(
            heard[judge.name, source],
            heard[judge.name, output.recording],
            [heard[judge.name, recording] for recording in references],
            output.semitones,
            source.text,
            output.joins,
        )
        try:
            judged[judge.name] = judge.verdict(case)
        except ValueError as error:
            clip = f"{target.name}, {source.path.name}"
            raise ValueError(f"{clip}: {error}") from error
    return {
        "source": source.path.stem,
        "seed": output.seed,
        "semitones": output.semitones,
        "conversion_s": output.seconds,
        "judged": judged,
    }


def judge_target(
    judges: Sequence[Judge],
    target: Target,
    outputs: Mapping[Recording, Sequence[Output]],
    heard: Heard,
) -> dict[str, Any]:
    """Figures of one target: its files, its summary, and its clips with every seed."""
    clips = [
        judge_clip(judges, source, target, output, heard)
        for source, made in outputs.items()
        for output in made
    ]
    return {
        "name": target.name,
        "files": common.describe_files({"voice": target.voice, "index": target.index}),
        "references": _describe(target.references),
        "pitch": "auto" if target.pitch is None else target.pitch,
        "summary": {
            judge.name: judge.summarize([clip["judged"][judge.name] for clip in clips])
            for judge in judges
        },
        "clips": clips,
    }


def _describe(recordings: Sequence[Recording]) -> list[dict[str, Any]]:
    """Name, length and hash of recordings, for the record."""
    facts = []
    for recording in recordings:
        with AudioReader(recording.path) as reader:
            seconds = round(reader.frames / reader.sample_rate, 3)
        entry = {"file": recording.path.name, "seconds": seconds}
        entry["sha256"] = hash_file(recording.path)
        facts.append(entry | ({"text": recording.text} if recording.text else {}))
    return facts


def _environment(judges: Sequence[Judge]) -> dict[str, Any]:
    facts = common.environment()
    for package in sorted({tool for judge in judges for tool in judge.tools.values()}):
        facts["versions"][package] = importlib.metadata.version(package)
    return facts


def _wanted(
    judges: Sequence[Judge], recordings: Sequence[Recording], targets: Sequence[Target]
) -> dict[str, list[Recording]]:
    spoken = [recording for target in targets for recording in target.references]
    return {
        judge.name: [*recordings, *(spoken if judge.references else [])]
        for judge in judges
    }


def _draw_page(
    path: Path,
    sources: Sequence[Recording],
    outputs: Mapping[str, Mapping[Recording, Sequence[Output]]],
) -> str:
    """Draw the page, of the first seed; returns its name, or "" if there is nothing."""
    if not sources:
        return ""
    measured = not PITCH.missing_tools()
    rows = []
    for source in sources:
        made = {name: found[source][0] for name, found in outputs.items()}
        shown = {name: (one.recording, one.semitones) for name, one in made.items()}
        rows.append(panels_of(source, shown, measured))
    draw_page(path, rows)
    print(f"wrote {path.name}")
    return path.name


def _inputs(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, for the record; names only, no folders."""
    models = {"encoder": arguments.encoder, "rmvpe": arguments.rmvpe}
    return {
        "options": parse_options(arguments.option),
        "seeds": arguments.seeds,
        "device_asked": arguments.device,
        "precision_asked": arguments.precision,
        "models": {kind: Path(file).name for kind, file in models.items() if file},
    }


def evaluate(
    arguments: argparse.Namespace, judges: Sequence[Judge], audio: Path
) -> int:
    """Convert, judge, write; 1 where ``--check`` finds a goal missed."""
    sources = collect_sources(arguments.sources, arguments.transcripts, arguments.limit)
    targets = collect_targets(arguments)
    heard: Heard = {}
    if fitted := [target for target in targets if target.pitch is None]:
        heard = observe_all(_wanted([PITCH], sources, fitted), arguments.workers)
    outputs: dict[str, dict[Recording, list[Output]]] = {}
    devices = {}
    for target in targets:
        shifts = {source: pitch_shift(target, source, heard) for source in sources}
        outputs[target.name], devices[target.name] = convert_one(
            target, sources, shifts, audio, arguments
        )
    results = [
        one.recording
        for found in outputs.values()
        for made in found.values()
        for one in made
    ]
    print(f"judging {len(results)} conversions by {len(judges)} judges", flush=True)
    wanted = _wanted(judges, [*sources, *results], targets)
    heard = observe_all(wanted, arguments.workers, heard)
    facts: dict[str, Any] = {
        "benchmark": "evaluation",
        "label": arguments.label,
        "computed_by": devices,
        "environment": _environment(judges),
        "judges": [judge.name for judge in judges],
        **_inputs(arguments),
        "sources": _describe(sources),
        "voices": [judge_target(judges, t, outputs[t.name], heard) for t in targets],
    }
    common.write_json(arguments.output, arguments.label, facts)
    pictured = sources[: max(0, arguments.pictured)]
    picture = _draw_page(arguments.output / f"{arguments.label}.png", pictured, outputs)
    print(write_report(arguments.output / f"{arguments.label}.md", facts, picture))
    missed = missed_goals(facts["voices"]) if arguments.check else []
    for line in missed:
        print(f"MISSED: {line}")
    return 1 if missed else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    try:
        judges = chosen_judges(arguments.judges)
        first = parse_options(arguments.option).get("seed", 0)
        if arguments.seeds < 1:
            raise ValueError(f"--seeds {arguments.seeds}; expected 1 or more")
        parse_options([f"seed={first + arguments.seeds - 1}"])
        if "auto" in arguments.pitch:
            require_tools([PITCH])
    except ValueError as error:
        parser.error(str(error))
    try:
        if arguments.audio is not None:
            return evaluate(arguments, judges, arguments.audio)
        with tempfile.TemporaryDirectory() as folder:
            return evaluate(arguments, judges, Path(folder))
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
