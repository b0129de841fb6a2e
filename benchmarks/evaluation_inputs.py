"""What is evaluated: sources with their words, and targets with their recordings."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from judge_words import plain_text
from judging import Recording

from rvc_mlx.batch import AUDIO_SUFFIXES
from rvc_mlx.bundled_models import choose_voice
from rvc_mlx.options import ConversionOptions

NONE = "none"


@dataclass(frozen=True)
class Target:
    """A voice, or a folder of conversions that were made before.

    Attributes:
        name: for tables.
        voice: its file; None where ``converted`` is given.
        converted: folder with a file of every source's name, or None.
        index: its index, or None.
        references: recordings of the speaker it was trained on.
        pitch: semitones; None fits each source to the references.
    """

    name: str
    voice: Path | None
    converted: Path | None
    index: Path | None
    references: tuple[Recording, ...]
    pitch: float | None


def sound_files(path: Path, limit: int = 0) -> list[Path]:
    """A sound file, or those in a folder and below, in order.

    Args:
        path: file or folder.
        limit: how many at most, evenly spread over the folder; 0 for all.

    Raises:
        FileNotFoundError: there is none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder; check the path")
    found = sorted(f for f in path.rglob("*") if f.suffix.lower() in AUDIO_SUFFIXES)
    if not found:
        raise FileNotFoundError(f"{path}: no sound files in this folder")
    step = len(found) / limit if 0 < limit < len(found) else 1
    return [found[int(i * step)] for i in range(round(len(found) / step))]


def read_transcripts(path: Path) -> dict[str, str]:
    """Words by name, from lines ``name|text`` or ``name<tab>text``.

    The name is a sound file's, with or without its suffix.

    Raises:
        ValueError: a line has neither sign, or a name comes twice.
    """
    texts: dict[str, str] = {}
    for number, line in enumerate(path.read_text("utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        name, sign, text = line.partition("|" if "|" in line else "\t")
        name = name.strip()
        if not sign or not plain_text(text):
            raise ValueError(
                f"{path}, line {number}: expected 'name|text', got {line!r}"
            )
        if name in texts:
            raise ValueError(f"{path}, line {number}: {name} comes a second time")
        texts[name] = plain_text(text)
    return texts


def collect_sources(
    paths: Sequence[Path], transcripts: Path | None, limit: int
) -> list[Recording]:
    """The recordings to convert, with their words where these are known.

    Args:
        paths: files and folders.
        transcripts: see ``read_transcripts``; None for none.
        limit: how many at most, evenly spread; 0 for all.

    Raises:
        FileNotFoundError: a path holds no sound.
        ValueError: no transcript belongs to any of them, or two have one name.
    """
    texts = read_transcripts(transcripts) if transcripts else {}
    files = list(dict.fromkeys(f for path in paths for f in sound_files(path)))
    step = len(files) / limit if 0 < limit < len(files) else 1
    files = [files[int(i * step)] for i in range(round(len(files) / step))]
    stems = [file.stem for file in files]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise ValueError(f"several sources are called {twice[0]}; rename them")
    made = [Recording(f, texts.get(f.name, texts.get(f.stem))) for f in files]
    if texts and not any(recording.text for recording in made):
        raise ValueError(
            f"{transcripts}: names none of the sources, as {files[0].stem}; "
            "expected lines 'name|text' with the names of the sound files"
        )
    return made


def _spread(option: str, given: Sequence[str] | None, count: int) -> list[str]:
    """One value per target, from one per target, one for all, or none.

    Raises:
        ValueError: neither.
    """
    values = list(given or [NONE])
    if len(values) == 1:
        return values * count
    if len(values) != count:
        raise ValueError(
            f"{option} has {len(values)} values for {count} targets; give one for all, "
            f"or one for each (--voices first, then --converted; '{NONE}' for none)"
        )
    return values


def _pitch(text: str, references: bool, name: str) -> float | None:
    if text == "auto":
        if not references:
            raise ValueError(
                f"--pitch auto needs recordings of {name}'s speaker: --references"
            )
        return None
    try:
        return 0.0 if text == NONE else float(text)
    except ValueError:
        raise ValueError(f"--pitch {text}: expected semitones, or auto") from None


def _places(
    arguments: argparse.Namespace,
) -> dict[str, tuple[Path | None, Path | None]]:
    """Voice file or folder of conversions of every target, by its name."""
    voices = [Path(path) for path in arguments.voices or []]
    made = [Path(path) for path in arguments.converted or []]
    places = [*((v, None) for v in voices), *((None, c) for c in made)]
    if not places:
        raise ValueError("nothing to evaluate; give --voices, --converted or both")
    names = arguments.names or [path.stem for path in (*voices, *made)]
    if len(names) != len(places) or len(set(names)) != len(places):
        raise ValueError(
            f"{len(places)} targets are called {', '.join(names)}; "
            "give each its own name: --names"
        )
    return dict(zip(names, places, strict=True))


def collect_targets(arguments: argparse.Namespace) -> list[Target]:
    """The targets that the command line names.

    Raises:
        ValueError: none, or lists of unequal length.
        FileNotFoundError: a voice, an index or recordings of a speaker are not there.
    """
    places = _places(arguments)
    lists = [
        _spread(option, getattr(arguments, option[2:]), len(places))
        for option in ("--index", "--references", "--pitch")
    ]
    targets = []
    for (name, place), index, spoken, pitch in zip(places.items(), *lists, strict=True):
        found = []
        if spoken != NONE:
            found = sound_files(Path(spoken), arguments.references_limit)
        shift = _pitch(pitch, bool(found), name)
        voice, converted = place
        its_index = None if index == NONE else Path(index)
        if voice is not None:
            voice, its_index = choose_voice(voice, its_index)
        if its_index is not None and not its_index.is_file():
            raise FileNotFoundError(
                f"{its_index}: no such index; give a file, or '{NONE}' for none"
            )
        targets.append(
            Target(
                name,
                voice,
                converted,
                index=its_index,
                references=tuple(Recording(file) for file in found),
                pitch=shift,
            )
        )
    return targets


def parse_options(given: Sequence[str]) -> dict[str, Any]:
    """Fields of ``ConversionOptions`` from words ``name=value``.

    Raises:
        ValueError: a name is unknown, or a value out of range.
    """
    known = {item.name: item.default for item in fields(ConversionOptions)}
    values: dict[str, Any] = {}
    for word in given:
        name, _, text = word.partition("=")
        if name not in known or name == "pitch":
            allowed = ", ".join(n for n in known if n != "pitch")
            raise ValueError(
                f"--option {word}: expected name=value, name one of {allowed}"
            )
        kind = type(known[name])
        if kind is bool and text not in ("true", "false"):
            raise ValueError(f"--option {word}: expected {name}=true or {name}=false")
        values[name] = text == "true" if kind is bool else kind(text)
    ConversionOptions(**values)
    return values


def converted_file(folder: Path, source: Recording) -> Path:
    """The conversion of a source that was made before.

    Raises:
        FileNotFoundError: the folder has no sound file of that name.
    """
    stem = source.path.stem
    found = sorted(
        file for file in folder.glob("*") if file.suffix.lower() in AUDIO_SUFFIXES
        and file.stem == stem
    )  # fmt: skip
    if not found:
        raise FileNotFoundError(
            f"{folder}: no sound file {stem}.*, the conversion of {source.path.name}"
        )
    return found[0]
