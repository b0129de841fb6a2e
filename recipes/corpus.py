"""The corpus on disk: shards of compressed audio with exact labels beside them.

A corpus is a folder of parts, ``part-0``, ``part-1`` and so on, each of a size that
can be carried alone, each holding some of every speaker. A shard is two files::

    part-0/kal-00.ogg   clips of one speaker behind one another, 16 kHz Ogg Vorbis
    part-0/kal-00.npz   clips  [N] int32   sample after the last one of each clip
                        classes, ends      runs of phones (see ``phones``), optional
                        f0, voiced         every 5 ms (see ``harmonics``), optional

Vorbis keeps time to the sample and F0 as it is, at a tenth of the size of FLAC.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile as sf

from rvc_mlx.audio import SAMPLE_RATE
from rvc_mlx.output_format import part_path

LEVEL = 0.08  # root mean square of every clip
F0_HOP = 80  # samples between F0 labels: 5 ms
_BLOCK = 8000  # samples per write; libsndfile overruns its stack on one long write
_COMPRESSION = 0.92  # about 13 MB per hour


@dataclass(frozen=True)
class Clip:
    """One utterance and its labels.

    Attributes:
        samples: ``[n]`` float32 at 16 kHz.
        classes: class of each run of phones, uint8; empty when not known.
        ends: sample after the last one of each run, int32.
        f0: Hz every ``F0_HOP`` samples, float32, also where unvoiced (interpolated);
            empty when not known.
        voiced: where F0 is heard, bool, as long as ``f0``.
    """

    samples: np.ndarray
    classes: np.ndarray
    ends: np.ndarray
    f0: np.ndarray
    voiced: np.ndarray


@dataclass(frozen=True)
class Shard:
    """Clips of one speaker, decoded.

    Attributes:
        speaker: name.
        samples: ``[n]`` int16 at 16 kHz, all clips behind one another.
        clips: sample after the last one of each clip.
        classes, ends: runs of phones over the whole shard, or empty.
        f0, voiced: every ``F0_HOP`` samples of the whole shard, or empty.
    """

    speaker: str
    samples: np.ndarray
    clips: np.ndarray
    classes: np.ndarray
    ends: np.ndarray
    f0: np.ndarray
    voiced: np.ndarray


def levelling(samples: np.ndarray, peak: float) -> float:
    """The gain that brings samples to the corpus level, but no sample above ``peak``."""
    level = np.sqrt(np.square(samples, dtype=np.float64).mean() + 1e-12)
    return float(min(LEVEL / level, peak / (np.abs(samples).max() + 1e-9)))


def make_clip(
    samples: np.ndarray,
    runs: Sequence[tuple[int, float]] = (),
    f0: np.ndarray | None = None,
    voiced: np.ndarray | None = None,
) -> Clip:
    """A clip at the corpus level, its length a multiple of ``F0_HOP``.

    Args:
        samples: float at 16 kHz.
        runs: class and end in seconds of each phone.
        f0: Hz every ``F0_HOP`` samples.
        voiced: as long as ``f0``.
    """
    samples = samples[: len(samples) // F0_HOP * F0_HOP].astype(np.float32)
    gain = levelling(samples, 0.99)
    ends = [min(round(end * SAMPLE_RATE), len(samples)) for _, end in runs]
    frames = len(samples) // F0_HOP
    if f0 is not None and len(f0) < frames:
        raise ValueError(f"{len(f0)} F0 labels; {frames} expected for {len(samples)}")
    empty = np.zeros(0)
    return Clip(
        samples * np.float32(gain),
        np.array([phone for phone, _ in runs], np.uint8),
        np.array(ends, np.int32),
        (empty if f0 is None else f0[:frames]).astype(np.float32),
        (empty if voiced is None else voiced[:frames]).astype(bool),
    )


def write_shard(stem: Path, clips: Sequence[Clip]) -> float:
    """Write ``stem.ogg`` and ``stem.npz``.

    Returns:
        Seconds of audio.

    Raises:
        ValueError: there is no clip.
    """
    if not clips:
        raise ValueError(f"{stem}: no clips to write")
    stem.parent.mkdir(parents=True, exist_ok=True)
    bounds = np.cumsum([len(clip.samples) for clip in clips])
    starts = bounds - [len(clip.samples) for clip in clips]
    audio = np.concatenate([clip.samples for clip in clips])
    write_vorbis(stem.with_suffix(".ogg"), audio, SAMPLE_RATE)
    ends = [clip.ends + start for clip, start in zip(clips, starts, strict=True)]
    np.savez_compressed(
        stem.with_suffix(".npz"),
        clips=bounds.astype(np.int32),
        classes=np.concatenate([clip.classes for clip in clips]),
        ends=np.concatenate(ends).astype(np.int32),
        f0=np.concatenate([clip.f0 for clip in clips]),
        voiced=np.concatenate([clip.voiced for clip in clips]),
    )
    return len(audio) / SAMPLE_RATE


def write_vorbis(
    path: Path, samples: np.ndarray, rate: int, compression: float = _COMPRESSION
) -> None:
    """Write ``[n]`` float32 as Ogg Vorbis, whole or not at all.

    Args:
        path: of the file.
        samples: in -1..1.
        rate: Hz.
        compression: 0 (best) to 1 (smallest).
    """
    part = part_path(path)
    try:
        with sf.SoundFile(
            part,
            "w",
            rate,
            1,
            format="OGG",
            subtype="VORBIS",
            compression_level=compression,
        ) as file:
            for first in range(0, len(samples), _BLOCK):
                file.write(samples[first : first + _BLOCK])
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_shard(path: Path) -> Shard:
    """Read a shard by the path of its ``.npz``.

    Raises:
        ValueError: audio and labels disagree on the length.
    """
    with np.load(path) as file:
        labels = {name: file[name] for name in file.files}
    # Some files do not say how long they are; the labels do.
    wanted = int(labels["clips"][-1])
    samples, rate = sf.read(path.with_suffix(".ogg"), frames=wanted, dtype="int16")
    if rate != SAMPLE_RATE or len(samples) < wanted:
        raise ValueError(
            f"{path}: {len(samples)} samples at {rate} Hz beside labels for "
            f"{wanted} at {SAMPLE_RATE} Hz; make the shard again"
        )
    return Shard(speaker_of(path), samples, **labels)


def speaker_of(path: Path) -> str:
    """Speaker of a shard's file: its name without the number."""
    return path.stem.rsplit("-", 1)[0]


def find_shards(folders: Sequence[Path]) -> list[Path]:
    """Paths of the labels of all shards below ``folders``, sorted by name.

    Raises:
        FileNotFoundError: there are none.
    """
    found = sorted(
        (path for folder in folders for path in folder.rglob("*-[0-9]*.npz")),
        key=lambda path: (path.name, path),
    )
    if not found:
        listed = ", ".join(map(str, folders))
        raise FileNotFoundError(f"{listed}: no shards; make a corpus first")
    return found


def read_shards(paths: Sequence[Path], workers: int = 16) -> list[Shard]:
    """Decode shards with threads; libsndfile works outside the interpreter's lock."""
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(read_shard, paths))
