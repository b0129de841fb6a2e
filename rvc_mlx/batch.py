"""Many files in one run: which ones, where to, and a manifest that lets a run go on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rvc_mlx.options import ConversionOptions

MANIFEST = "manifest.json"
AUDIO_SUFFIXES = frozenset(
    [
        ".wav",
        ".flac",
        ".mp3",
        ".ogg",
        ".opus",
        ".aiff",
        ".aif",
        ".au",
        ".caf",
        ".w64",
        ".rf64",
        ".m4a",
        ".mp4",
        ".webm",
        ".mka",
        ".mkv",
        ".aac",
        ".wma",
    ]
)


@dataclass(frozen=True)
class Task:
    """One file to convert."""

    source: Path
    target: Path


def plan_tasks(inputs: Sequence[str], output: str, suffix: str) -> list[Task]:
    """Pair every input with its output.

    Args:
        inputs: files, and folders that are searched for sound files.
        output: a file for a single input file, otherwise a folder.
        suffix: format of files in a folder, with its dot.

    Raises:
        FileNotFoundError: an input is not there, or a folder holds no sound files.
        ValueError: two inputs would give one output, or the output of several inputs
            is named like a sound file.
    """
    paths = [Path(item) for item in inputs]
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file; check the path")
    single = len(paths) == 1 and paths[0].is_file() and not _is_folder(output)
    if single:
        return [Task(paths[0], Path(output))]
    tasks = []
    for path in paths:
        found = sorted(_sound_files(path, Path(output))) if path.is_dir() else [path]
        if not found:
            raise FileNotFoundError(f"{path}: no sound files in this folder")
        root = path if path.is_dir() else path.parent
        for file in found:
            target = (Path(output) / file.relative_to(root)).with_suffix(suffix)
            tasks.append(Task(file, target))
    if Path(output).suffix.lower() in AUDIO_SUFFIXES and not _is_folder(output):
        raise ValueError(
            f"{output}: the name of a file, but a folder or several files are to be "
            "converted; give a folder"
        )
    targets: dict[Path, Path] = {}
    for task in tasks:
        if task.target in targets:
            raise ValueError(
                f"{task.source} and {targets[task.target]} would both become "
                f"{task.target}; convert them into different folders"
            )
        targets[task.target] = task.source
    return tasks


def _is_folder(output: str) -> bool:
    path = Path(output)
    return path.is_dir() or output.endswith(("/", os.sep)) or not path.suffix


def _sound_files(folder: Path, output: Path) -> Iterator[Path]:
    inside = output.resolve()
    for file in folder.rglob("*"):
        if file.suffix.lower() in AUDIO_SUFFIXES and file.is_file():
            if inside != folder.resolve() and inside in file.resolve().parents:
                continue  # results of an earlier run
            yield file


def settings_key(options: ConversionOptions, *files: Path | None) -> str:
    """Changes when options or any of the weight files change."""
    parts: list[Any] = [dataclasses.asdict(options)]
    for file in files:
        status = file.stat() if file else None
        parts.append(
            [str(file), status.st_size, status.st_mtime_ns] if status else None
        )
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


class Manifest:
    """What was done to each file of an output folder, kept after every file.

    Args:
        folder: the output folder; the manifest is ``manifest.json`` in it.
        settings: from ``settings_key``.

    Raises:
        ValueError: there is a manifest that cannot be read.
    """

    def __init__(self, folder: Path, settings: str):
        self.path = folder / MANIFEST
        self._settings = settings
        self._files: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            try:
                files = json.loads(self.path.read_text("utf-8"))["files"]
                self._files = {name: dict(entry) for name, entry in files.items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{self.path}: not a manifest of rvc-mlx; move it away"
                ) from error

    def is_done(self, task: Task) -> bool:
        """Whether this file was converted with these settings and is unchanged."""
        entry = self._files.get(str(task.target.relative_to(self.path.parent)))
        return (
            entry is not None
            and entry.get("status") == "done"
            and entry.get("settings") == self._settings
            and entry.get("source_state") == _state(task.source)
            and task.target.is_file()
        )

    def record(self, task: Task, **result: Any) -> None:
        """Note a result and write the manifest, whole or not at all."""
        name = str(task.target.relative_to(self.path.parent))
        state = _state(task.source)
        self._files[name] = {
            "source": str(task.source),
            "source_state": state,
            "settings": self._settings,
            **result,
        }
        temporary = self.path.with_suffix(".part")
        text = json.dumps({"version": 1, "files": self._files}, indent=1)
        try:
            temporary.write_text(text + "\n", "utf-8")
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)


def _state(path: Path) -> list[int] | None:
    """Changes when the file does; None where it is gone."""
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]
