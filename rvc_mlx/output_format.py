"""What can be written where: checked before the work starts, not after it."""

import os
import secrets
from pathlib import Path

_MP3_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
# Suffix: libsndfile's format, its subtypes (the first is the default).
_FORMATS = {
    ".wav": ("WAV", ("PCM_16", "PCM_24", "FLOAT")),
    ".flac": ("FLAC", ("PCM_16", "PCM_24")),
    ".mp3": ("MP3", ("MPEG_LAYER_III",)),
    ".ogg": ("OGG", ("VORBIS",)),
}
_SAMPLE_BYTES = {"PCM_16": 2, "PCM_24": 3, "FLOAT": 4}
_WAV_LIMIT = (1 << 32) - 4096  # bytes of sound that a wav file can count


def check_output(
    path: str | os.PathLike[str],
    sample_rate: int,
    subtype: str | None = None,
    frames: int = 0,
) -> None:
    """Raise now if ``AudioWriter`` could not write this file later.

    Args:
        path: where to; the suffix says the format: wav, flac, mp3 or ogg.
        sample_rate: Hz.
        subtype: "PCM_16" (default), "PCM_24" (wav, flac) or "FLOAT" (wav).
        frames: samples that will be written, where known.

    Raises:
        ValueError: if the format is unknown or cannot hold this rate or length.
        OSError: if the folder is missing or cannot be written.
    """
    path = Path(path)
    file_format, subtype = output_format(path, subtype)
    _check_rate(path, file_format, sample_rate)
    check_length(path, file_format, subtype, frames)
    target = Path(os.path.realpath(path))  # behind a link the file is replaced
    if target.is_dir():
        raise IsADirectoryError(f"{path}: a folder was given; give a file name")
    if target.exists() and not target.is_file():
        raise OSError(f"{path}: not an ordinary file; give another name")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {target.parent}; make it")
    part = part_path(target)
    try:
        part.touch(exist_ok=False)
        part.unlink()
    except OSError as error:
        raise OSError(
            f"{path}: the folder cannot be written ({error.strerror}); change its "
            "permissions or give another folder"
        ) from error


def output_format(path: Path, subtype: str | None) -> tuple[str, str]:
    """Return libsndfile's names of the format and the subtype."""
    suffix = path.suffix.lower()
    if suffix not in _FORMATS:
        known = ", ".join(name[1:] for name in _FORMATS)
        raise ValueError(
            f"{path}: cannot write the format {suffix or '(no suffix)'}; end the name "
            f"with one of {known}"
        )
    file_format, subtypes = _FORMATS[suffix]
    if subtype is not None and subtype not in subtypes:
        raise ValueError(
            f"{path}: {suffix[1:]} cannot hold {subtype}; use {' or '.join(subtypes)}"
        )
    return file_format, subtype or subtypes[0]


def _check_rate(path: Path, file_format: str, rate: int) -> None:
    """Raise if the format cannot hold the rate (libsndfile may crash on some)."""
    fits, expected = {
        "WAV": (1000 <= rate <= 768000, "1000 to 768000"),
        "FLAC": (
            1000 <= rate <= 655350 and (rate <= 65535 or rate % 10 == 0),
            "1000 to 655350, in tens above 65535",
        ),
        "MP3": (rate in _MP3_RATES, ", ".join(map(str, _MP3_RATES))),
        "OGG": (8000 <= rate <= 192000, "8000 to 192000"),
    }[file_format]
    if not fits:
        raise ValueError(
            f"{path}: {file_format.lower()} cannot hold {rate} Hz; expected {expected} "
            "Hz; choose another output rate or write wav"
        )


def check_length(path: Path, file_format: str, subtype: str, frames: int) -> None:
    """Raise if a wav file could not count that many samples."""
    if file_format == "WAV" and frames * _SAMPLE_BYTES[subtype] > _WAV_LIMIT:
        raise ValueError(
            f"{path}: {frames} samples are more than a wav file can hold (4 GiB); "
            "write flac or split the recording"
        )


def part_path(path: Path) -> Path:
    """Return a new name beside the destination, where a rename is atomic."""
    return path.parent / f".rvc-mlx-{secrets.token_hex(6)}.part"
