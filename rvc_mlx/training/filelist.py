"""The list of what is trained on, one line per clip, and mute entries for silence.

``filelist.txt`` holds ``wave|features|coarse pitch|pitch in Hz|speaker`` in each line, or
``wave|features|speaker`` without pitch; paths are relative to its folder, or absolute as
other trainers write them.

Features of a clip from elsewhere, such as of somebody else who says the same at the same
time, may lie beside its own: ``extracted/0_12_3.ANYTHING.npy`` is an item more.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from rvc_mlx.training.data_report import REPORT_JSON
from rvc_mlx.training.features import (
    F0,
    F0_COARSE,
    FEATURES,
    MUTE,
    from_elsewhere,
    left_out,
)
from rvc_mlx.training.files import read_json, write_text
from rvc_mlx.training.preprocess import CLIPS, FILELIST, clip_names

MUTES_PER_SPEAKER = 2


@dataclass(frozen=True)
class Entry:
    """Files of one clip.

    Attributes:
        wave: sound at the voice's rate.
        features: ``[F, C]`` at 50 per second.
        f0_coarse: ``[T]`` in 1..255 at 100 per second; None without F0.
        f0: ``[T]`` in Hz; None without F0.
        speaker: row of the speaker table.
    """

    wave: Path
    features: Path
    f0_coarse: Path | None
    f0: Path | None
    speaker: int

    @property
    def recording(self) -> str:
        """What the clip was cut from; ``"mute"`` for silence."""
        if self.wave.stem.startswith("mute"):
            return "mute"
        return self.wave.stem.rpartition("_")[0] or self.wave.stem

    @property
    def files(self) -> list[Path]:
        """All its files, in the line's order."""
        found = (self.wave, self.features, self.f0_coarse, self.f0)
        return [path for path in found if path is not None]


def write_filelist(
    folder: str | Path, seed: int = 0, mutes: int = MUTES_PER_SPEAKER, f0: bool = True
) -> list[Entry]:
    """List all clips of a folder, shuffled, and silence for every speaker.

    Args:
        folder: where ``extract_features`` finished.
        seed: of the shuffle.
        mutes: lines of silence per speaker.
        f0: list pitch.

    Returns:
        What the file lists, in its order, with absolute paths.

    Raises:
        FileNotFoundError: features or pitch of a clip are missing.
        OSError: the file cannot be written.
    """
    folder = Path(folder).absolute()
    excluded = left_out(folder)
    names = [name for name in clip_names(folder) if name not in excluded]
    others: dict[str, list[Path]] = {}
    for path in sorted(filter(from_elsewhere, (folder / FEATURES).glob("*.npy"))):
        others.setdefault(path.name.split(".")[0], []).append(path)
    entries = []
    for name in names:
        own = _entry(folder, folder / CLIPS / f"{name}.wav", name, f0)
        more = others.get(name, [])
        entries += [own, *(replace(own, features=path) for path in more)]
    silence = folder / MUTE
    rate = read_json(folder / REPORT_JSON)["sample_rate"]
    for speaker in sorted({entry.speaker for entry in entries}):
        mute = _entry(silence, silence / f"mute{rate}.wav", "mute", f0, speaker)
        entries += [mute] * mutes
    missing = [path for entry in entries for path in entry.files if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{missing[0]}: this file and {len(missing) - 1} others are missing; run the "
            "extraction again, it goes on where it stopped"
        )
    order = np.random.default_rng(seed).permutation(len(entries))
    entries = [entries[place] for place in order]
    lines = (
        "|".join(
            [
                *(path.relative_to(folder).as_posix() for path in entry.files),
                str(entry.speaker),
            ]
        )
        for entry in entries
    )
    write_text(folder / FILELIST, "".join(f"{line}\n" for line in lines))
    return entries


def _entry(
    folder: Path, wave: Path, name: str, f0: bool, speaker: int | None = None
) -> Entry:
    if speaker is None:
        speaker = int(name.split("_")[0])
    return Entry(
        wave,
        folder / FEATURES / f"{name}.npy",
        folder / F0_COARSE / f"{name}.wav.npy" if f0 else None,
        folder / F0 / f"{name}.wav.npy" if f0 else None,
        speaker,
    )


def read_filelist(path: str | Path) -> list[Entry]:
    """What a filelist lists, in its order.

    Raises:
        OSError: it cannot be read.
        ValueError: a line is not one of the two kinds, or there is none.
    """
    path = Path(path).absolute()
    entries = []
    text = os.fsdecode(path.read_bytes())
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        *paths, speaker = line.split("|")
        if len(paths) not in (2, 4) or not speaker.strip().isdecimal():
            raise ValueError(
                f"{path}, line {number}: expected wave|features|coarse pitch|pitch|"
                f"speaker or wave|features|speaker, not {line[:80]!r}"
            )
        wave, features, *pitch = (path.parent / item for item in paths)
        coarse, hertz = pitch if pitch else (None, None)
        entries.append(Entry(wave, features, coarse, hertz, int(speaker)))
    if not entries:
        raise ValueError(f"{path}: an empty list; there is nothing to train on")
    return entries


def hold_out(
    entries: Sequence[Entry], share: float = 0.02, seed: int = 0
) -> tuple[list[Entry], list[Entry]]:
    """Keep some recordings aside for validation.

    Whole recordings, because clips of one recording overlap. Recordings are drawn until
    ``share`` of the clips is reached; at least one, unless it is the only one of all.
    With a single recording the clips at its end are kept aside, less the one before
    them, which they overlap. Silence is always trained on.

    Args:
        entries: from ``read_filelist``.
        share: of the clips, 0..0.5.
        seed: of the draw.

    Returns:
        What is trained on and what is kept aside, each in the order given.
    """
    if not 0 <= share <= 0.5:
        raise ValueError(f"share is {share}; expected 0 to 0.5")
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.recording, []).append(entry)
    groups.pop("mute", None)
    count = sum(map(len, groups.values()))
    if share == 0 or count < 2:
        return list(entries), []
    if len(groups) == 1:
        [clips] = groups.values()
        return _hold_out_end(entries, sorted(clips, key=_number), share)
    kept: set[str] = set()
    wanted = max(1, round(share * count))
    order = np.random.default_rng(seed).permutation(len(groups))
    names = sorted(groups)
    for place in order[:-1]:
        if sum(len(groups[name]) for name in kept) >= wanted:
            break
        kept.add(names[place])
    aside = [entry for entry in entries if entry.recording in kept]
    return [entry for entry in entries if entry.recording not in kept], aside


def _hold_out_end(
    entries: Sequence[Entry], clips: list[Entry], share: float
) -> tuple[list[Entry], list[Entry]]:
    waves = list(dict.fromkeys(entry.wave for entry in clips))
    wanted = max(1, round(share * len(waves)))
    aside, between = set(waves[-wanted:]), set(waves[-wanted - 1 : -wanted])
    train = [entry for entry in entries if entry.wave not in aside | between]
    if not any(entry.recording != "mute" for entry in train):
        return list(entries), []
    return train, [entry for entry in entries if entry.wave in aside]


def _number(entry: Entry) -> int:
    last = entry.wave.stem.rpartition("_")[2]
    return int(last) if last.isdecimal() else 0
