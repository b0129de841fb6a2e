"""What preparing recordings came to: what could be used, and everything that could not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rvc_mlx.training.files import write_json, write_text

REPORT_JSON, REPORT_TEXT = "report.json", "report.txt"


@dataclass(frozen=True)
class Problem:
    """Something about a recording that its owner should know.

    Attributes:
        source: the recording's path.
        kind: ``"unreadable"``, ``"too short"``, ``"silent"``, ``"too loud"``,
            ``"clipped"``, ``"padded"``, ``"not a sound file"``, ``"not finite"``.
        detail: what was found, in words.
        second: where in the recording; None for all of it.
        used: whether it is trained on all the same.
    """

    source: str
    kind: str
    detail: str
    second: float | None = None
    used: bool = False


@dataclass(frozen=True)
class Clip:
    """A piece of a recording that is trained on.

    Attributes:
        name: stem of its files.
        samples: at the voice's rate.
        bytes: sizes of its files at the voice's rate and at 16 kHz.
    """

    name: str
    samples: int
    bytes: tuple[int, int]


@dataclass
class SpeakerReport:
    """What one speaker's recordings came to.

    Attributes:
        name: of the folder, or of the recording.
        recordings: found.
        clips: to be trained on.
        seconds: of these clips.
    """

    name: str
    recordings: int = 0
    clips: int = 0
    seconds: float = 0.0


@dataclass
class PreprocessReport:
    """What ``preprocess`` made of the recordings.

    Attributes:
        folder: where the clips are.
        sample_rate: of the clips, Hz.
        speakers: number to what is there of the speaker.
        problems: everything that was left out, padded or looks wrong.
    """

    folder: Path
    sample_rate: int
    speakers: dict[int, SpeakerReport] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    @property
    def recordings(self) -> int:
        """Recordings found."""
        return sum(speaker.recordings for speaker in self.speakers.values())

    @property
    def clips(self) -> int:
        """Clips to be trained on."""
        return sum(speaker.clips for speaker in self.speakers.values())

    @property
    def seconds(self) -> float:
        """Length of all clips."""
        return sum(speaker.seconds for speaker in self.speakers.values())

    def save(self) -> None:
        """Write ``report.json`` and ``report.txt`` into the folder.

        Raises:
            OSError: they cannot be written.
        """
        content: dict[str, Any] = {
            "sample_rate": self.sample_rate,
            "recordings": self.recordings,
            "clips": self.clips,
            "seconds": round(self.seconds, 3),
            "speakers": {
                str(number): dataclasses.asdict(speaker)
                for number, speaker in self.speakers.items()
            },
            "problems": [dataclasses.asdict(problem) for problem in self.problems],
        }
        write_json(self.folder / REPORT_JSON, content)
        write_text(self.folder / REPORT_TEXT, self.table())

    def table(self) -> str:
        """Speakers and problems as text in columns."""
        rows = [("speaker", "name", "recordings", "clips", "minutes")]
        for number, one in self.speakers.items():
            minutes = f"{one.seconds / 60:.1f}"
            rows.append(
                (str(number), one.name, str(one.recordings), str(one.clips), minutes)
            )
        text = _columns(rows)
        if not self.problems:
            return text + "\nno problems\n"
        found = [("problem", "used", "at", "recording", "what was found")]
        for problem in self.problems:
            place = "" if problem.second is None else f"{problem.second:.2f} s"
            used = "yes" if problem.used else "no"
            found.append((problem.kind, used, place, problem.source, problem.detail))
        return f"{text}\n{_columns(found)}"


def _columns(rows: Iterable[tuple[str, ...]]) -> str:
    """Rows in columns, two blanks apart; control characters become question marks."""
    clean = [
        ["".join(c if c.isprintable() else "?" for c in cell) for cell in row]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*clean, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in clean
    )
    return "".join(line.rstrip() + "\n" for line in lines)
