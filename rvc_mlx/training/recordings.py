"""Which recordings there are, who speaks in them, and the numbers they get.

A recording keeps its number when others are added or removed, so that its clips stay.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rvc_mlx.batch import AUDIO_SUFFIXES
from rvc_mlx.training.data_report import Problem
from rvc_mlx.training.files import read_json, write_json

PLAN = "recordings.json"


@dataclass(frozen=True)
class Recording:
    """One sound file.

    Attributes:
        name: ``speaker_number``, the start of its clips' names.
        speaker: number of who speaks.
        source: absolute path.
        size: bytes.
        mtime_ns: when it was last changed.
    """

    name: str
    speaker: int
    source: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Plan:
    """What there is to prepare.

    Attributes:
        recordings: in the order of speakers and paths.
        speakers: number to name.
        problems: files that are no recordings.
    """

    recordings: list[Recording]
    speakers: dict[int, str]
    problems: list[Problem]


def plan_recordings(inputs: Sequence[Path], folder: Path) -> Plan:
    """Find recordings and number them, keeping the numbers of an earlier plan.

    Args:
        inputs: one folder: its sub-folders ``0``, ``1`` ... hold one speaker each and
            what lies beside them is speaker 0; without such sub-folders all is
            speaker 0. Or several folders or files: one speaker each, in this order.
            Hidden folders are not searched.
        folder: where the results go; what is in it is not searched. The plan is written
            into it.

    Raises:
        FileNotFoundError: an input is missing, or there are no sound files.
        ValueError: numbered and other sub-folders are mixed, an input is given twice, or
            the results would go where the recordings are.
        OSError: the plan cannot be written.
    """
    inside = os.path.realpath(folder)
    paths = [Path(os.path.abspath(path)) for path in inputs]
    sources, speakers = _speakers(paths, inside)
    problems: list[Problem] = []
    found: list[tuple[int, str]] = []
    for speaker, path in sources:
        if os.path.realpath(path) == inside:
            raise ValueError(
                f"{folder}: recordings and results in one folder; give another folder "
                "for the results"
            )
        for file in _files(path, inside, problems) if path.is_dir() else [str(path)]:
            if _is_sound(file):
                found.append((speaker, file))
            else:
                detail = "left alone: its name is not that of a sound file"
                problems.append(Problem(file, "not a sound file", detail))
    if not found:
        raise FileNotFoundError(
            f"{', '.join(map(str, inputs))}: no sound files found; expected wav, flac, "
            "mp3, ogg, m4a or others"
        )
    recordings = list(_numbered(sorted(found), folder / PLAN, problems))
    write_json(
        folder / PLAN,
        {
            "speakers": {str(number): name for number, name in speakers.items()},
            "recordings": [asdict(recording) for recording in recordings],
        },
    )
    return Plan(recordings, speakers, problems)


def _speakers(
    inputs: Sequence[Path], inside: str
) -> tuple[list[tuple[int, Path]], dict[int, str]]:
    """Folders and files with their speaker, and the speakers' names."""
    for path in inputs:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder; check the path")
    if len(set(map(os.path.realpath, inputs))) < len(inputs):
        raise ValueError("an input is given twice; expected one for each speaker")
    numbered = _numbered_folders(inputs[0]) if len(inputs) == 1 else {}
    if not numbered:
        sources = list(enumerate(inputs))
        return sources, {number: _title(path) for number, path in sources}
    beside = [
        path
        for path in sorted(inputs[0].iterdir())
        if path not in numbered.values()
        and os.path.realpath(path) != inside
        and not (path.is_dir() and path.name.startswith("."))
    ]
    other = [path.name for path in beside if path.is_dir()]
    if other:
        raise ValueError(
            f"{inputs[0]}: numbered sub-folders (one per speaker) and others "
            f"({', '.join(other[:5])}) are mixed; number them all, or give each "
            "speaker's folder by itself"
        )
    sources = sorted(numbered.items()) + [(0, path) for path in beside]
    names = {
        number: f"{inputs[0].name}/{path.name}"
        for number, path in sources[: len(numbered)]
    }
    return sources, {0: inputs[0].name, **names} if beside else names


def _numbered_folders(path: Path) -> dict[int, Path]:
    """Sub-folders named by a number."""
    if not path.is_dir():
        return {}
    folders = [
        item
        for item in path.iterdir()
        if item.name.isascii() and item.name.isdigit() and item.is_dir()
    ]
    if len({int(item.name) for item in folders}) < len(folders):
        raise ValueError(f"{path}: two sub-folders stand for one speaker's number")
    return {int(item.name): item for item in folders}


def _files(path: Path, inside: str, problems: list[Problem]) -> list[str]:
    """Files below a folder; a folder that cannot be read becomes a problem."""

    def unreadable(error: OSError) -> None:
        detail = f"the folder cannot be read ({error.strerror})"
        problems.append(Problem(str(error.filename), "unreadable", detail))

    found, seen = [], {os.path.realpath(path)}
    walk = os.walk(path, onerror=unreadable, followlinks=True)
    for parent, folders, names in walk:
        real = {name: os.path.realpath(os.path.join(parent, name)) for name in folders}
        folders[:] = sorted(
            name
            for name in folders
            if real[name] not in seen | {inside} and not name.startswith(".")
        )
        seen |= set(real.values())
        found += [os.path.join(parent, name) for name in sorted(names)]
    return found


def _is_sound(file: str) -> bool:
    name = Path(file).name
    return not name.startswith(".") and Path(name).suffix.lower() in AUDIO_SUFFIXES


def _title(path: Path) -> str:
    return path.name if path.is_dir() else path.stem


def _numbered(
    found: Sequence[tuple[int, str]], path: Path, problems: list[Problem]
) -> Iterator[Recording]:
    """Give every file a name that no other has, the one it had if it had one."""
    earlier: list[dict[str, Any]] = []
    if path.exists():
        earlier = read_json(path)["recordings"]
    known = {(item["speaker"], item["source"]): item["name"] for item in earlier}
    taken = set(known.values())
    counters: dict[int, int] = {}
    for speaker, source in found:
        try:
            status = os.stat(source)
        except OSError as error:
            detail = f"cannot be read ({error.strerror})"
            problems.append(Problem(source, "unreadable", detail))
            continue
        name = known.get((speaker, source))
        while name is None:
            number = counters.get(speaker, 0)
            counters[speaker] = number + 1
            if f"{speaker}_{number}" not in taken:
                name = f"{speaker}_{number}"
        yield Recording(name, speaker, source, status.st_size, status.st_mtime_ns)
