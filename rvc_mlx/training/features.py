"""What the networks hear in each clip: content features and pitch, beside the clips.

Of clip ``0_12_3`` (see ``preprocess``)::

    extracted/0_12_3.npy        features [F, C] float32 at 50 per second, as they are
    f0/0_12_3.wav.npy           coarse pitch [T] int32 in 1..255, 100 per second
    f0_voiced/0_12_3.wav.npy    pitch [T] float64 in Hz, 0 where unvoiced
    mute/                       the same, and the sound, of three seconds of silence
    features.json               what made them, and clips that are left out

A file that is there is finished. When the encoder, the version or the pitch net changes,
what they made is made again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rvc_mlx import pitch
from rvc_mlx.audio import SAMPLE_RATE
from rvc_mlx.audio_io import load_audio
from rvc_mlx.checkpoint import hash_file
from rvc_mlx.training.data_report import REPORT_JSON, Problem
from rvc_mlx.training.files import (
    Progress,
    locked,
    make_folders,
    read_json,
    remove_parts,
    write_array,
    write_json,
    write_wave,
)
from rvc_mlx.training.preprocess import CLIPS_16K, clip_names

if TYPE_CHECKING:
    from rvc_mlx.loading import Encoder, PitchNet

FEATURES, F0_COARSE, F0, MUTE = "extracted", "f0", "f0_voiced", "mute"
SETTINGS = "features.json"
MUTE_SECONDS = 3
MUTE_FRAMES = 301  # of its pitch

Compute = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class FeatureReport:
    """What ``extract_features`` came to.

    Attributes:
        clips: clips with features (and pitch).
        problems: clips that are left out, by name.
    """

    clips: int
    problems: list[Problem]


def extract_features(
    folder: str | Path,
    encoder: Encoder,
    pitch_net: PitchNet | None,
    version: str,
    threshold: float = pitch.VOICING_THRESHOLD,
    progress: Progress | None = None,
) -> FeatureReport:
    """Compute features and pitch of all clips that lack them.

    Args:
        folder: where ``preprocess`` finished.
        encoder: content encoder.
        pitch_net: pitch network; None for a voice without F0.
        version: ``"v1"`` or ``"v2"``.
        threshold: see ``pitch.decode_salience``.
        progress: called with clips done and clips in all.

    Raises:
        OSError: the folder is not prepared or cannot be written, or another run works
            in it.
        ValueError: no clip gives usable features.
    """
    folder = Path(folder).absolute()
    names = clip_names(folder)
    make_folders(folder, (FEATURES, F0_COARSE, F0, MUTE))
    with locked(folder):
        remove_parts(folder)
        settings = _settings(encoder, pitch_net, version, threshold)
        _clear(folder, settings)

        def encode(audio: np.ndarray) -> np.ndarray:
            return encoder.encode(audio, version)

        def hear(audio: np.ndarray) -> np.ndarray:
            assert pitch_net is not None
            return estimate_clip_f0(pitch_net, audio, threshold)

        _mute(folder, encode, pitch_net is not None)
        problems = []
        for done, name in enumerate(names, 1):
            problems += _extract(folder, name, encode, hear if pitch_net else None)
            if progress:
                progress(done, len(names))
        found = [asdict(problem) for problem in problems]
        write_json(folder / SETTINGS, {**settings, "problems": found})
    if len(problems) == len(names):
        raise ValueError(f"{folder}: no clip gives finite features; check the encoder")
    return FeatureReport(len(names) - len(problems), problems)


def from_elsewhere(path: Path) -> bool:
    """Whether features are not the clip's own but lie beside them, see ``filelist``."""
    return "." in path.stem


def made_features(folder: Path, encoder: Encoder) -> bool | None:
    """Whether it was this encoder; None where the folder does not tell."""
    path = folder / SETTINGS
    settings = read_json(path) if path.is_file() else {}
    made_by = settings.get("features")
    if made_by is None:
        return None
    told: bool = made_by["encoder_sha256"] == hash_file(encoder.path)
    return told


def left_out(folder: Path) -> set[str]:
    """Names of clips without usable features, which no filelist lists.

    Raises:
        FileNotFoundError: ``extract_features`` was not run there.
    """
    path = folder / SETTINGS
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: no features in this folder; run the extraction first"
        )
    return {problem["source"] for problem in read_json(path)["problems"]}


def estimate_clip_f0(net: PitchNet, audio: np.ndarray, threshold: float) -> np.ndarray:
    """F0 ``[n // 160 + 1]`` float64 in Hz of 16 kHz audio ``[n]``, n > 512."""
    return pitch.estimate_f0(
        net.salience,
        lambda start, stop: audio[start:stop],
        len(audio),
        net.config.n_mels,
        threshold,
        net.frames_multiple,
    )


def _settings(
    encoder: Encoder, pitch_net: PitchNet | None, version: str, threshold: float
) -> dict[str, Any]:
    """What features and pitch depend on."""
    made_by: dict[str, Any] = {
        "features": {"encoder_sha256": hash_file(encoder.path), "version": version},
        "pitch": None,
    }
    if pitch_net is not None:
        digest = hash_file(pitch_net.path)
        made_by["pitch"] = {"rmvpe_sha256": digest, "threshold": threshold}
    return made_by


def _clear(folder: Path, settings: dict[str, Any]) -> None:
    """Remove what other networks made; pitch stays while a voice without F0 is made."""
    path = folder / SETTINGS
    before = read_json(path) if path.is_file() else {}
    made = {"features": (FEATURES,), "pitch": (F0_COARSE, F0)}
    stale = [
        name
        for key, names in made.items()
        if settings[key] != before.get(key) and settings[key] is not None
        for name in names
    ]
    if not before or stale:
        path.unlink(missing_ok=True)
    for name in stale:
        shutil.rmtree(folder / name)
        shutil.rmtree(folder / MUTE / name, ignore_errors=True)
        (folder / name).mkdir()
    if settings["pitch"] is None:
        settings["pitch"] = before.get("pitch")
    write_json(path, {**settings, "problems": before.get("problems", [])})


def _extract(
    folder: Path, name: str, encode: Compute, hear: Compute | None
) -> list[Problem]:
    """Write what is missing of a clip; a problem where it is not finite."""
    features = folder / FEATURES / f"{name}.npy"
    coarse, hertz = (folder / part / f"{name}.wav.npy" for part in (F0_COARSE, F0))
    needs_pitch = hear is not None and not (coarse.exists() and hertz.exists())
    if features.exists() and not needs_pitch:
        return []
    audio = load_audio(folder / CLIPS_16K / f"{name}.wav")
    if not features.exists():
        values = encode(audio)
        if not np.isfinite(values).all():
            return [Problem(name, "not finite", "the features of this clip hold NaN")]
        write_array(features, values.astype(np.float32, copy=False))
    if hear is not None and needs_pitch:
        f0 = hear(audio)
        if not np.isfinite(f0).all():
            return [Problem(name, "not finite", "the pitch of this clip holds NaN")]
        write_array(coarse, pitch.quantize_f0(f0))
        write_array(hertz, f0)
    return []


def _mute(folder: Path, encode: Compute, f0: bool) -> None:
    """Write three seconds of silence, and what the encoder hears in them."""
    mute = folder / MUTE
    make_folders(mute, (FEATURES, F0_COARSE, F0))
    rate = read_json(folder / REPORT_JSON)["sample_rate"]
    wave, features = mute / f"mute{rate}.wav", mute / FEATURES / "mute.npy"
    if not wave.exists():
        write_wave(wave, np.zeros(MUTE_SECONDS * rate), rate)
    if not features.exists():
        heard = encode(np.zeros(MUTE_SECONDS * SAMPLE_RATE, np.float32))
        write_array(features, heard.astype(np.float32, copy=False))
    coarse, hertz = (mute / part / "mute.wav.npy" for part in (F0_COARSE, F0))
    if f0 and not (coarse.exists() and hertz.exists()):
        unvoiced = np.zeros(MUTE_FRAMES)
        write_array(coarse, pitch.quantize_f0(unvoiced))
        write_array(hertz, unvoiced)
