"""One clip as arrays: features doubled to 100 frames per second, pitch, spectrogram, sound.

Lengths differ by a few frames (features end early, pitch has one frame more); all are cut
to the shortest. Spectrograms are computed, not kept in files, which a change of their
settings would make wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import scipy.fft
import soundfile

from rvc_mlx.training.filelist import Entry

if TYPE_CHECKING:
    from rvc_mlx.training.presets import TrainingConfig

COARSE_RANGE = (1, 255)


@dataclass(frozen=True)
class Sound:
    """What is in a recorded clip of T frames; its pitch may have some more or fewer.

    Attributes:
        pitch: ``[T]`` int32 in 1..255; None without F0.
        pitchf: ``[T]`` float32 in Hz; None without F0.
        spec: ``[T, bins]`` float32 magnitudes.
        wave: float32, ``T * hop`` samples or a part of a frame more.
    """

    pitch: np.ndarray | None
    pitchf: np.ndarray | None
    spec: np.ndarray
    wave: np.ndarray

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return sum(array.nbytes for array in vars(self).values() if array is not None)


@dataclass(frozen=True)
class ClipArrays(Sound):
    """A clip, or a part of it, of T frames each, with content features.

    Attributes:
        phone: ``[T, C]`` float32, content features.
    """

    phone: np.ndarray


def cut_clip(
    sound: Sound, phone: np.ndarray, first: int, frames: int, hop: int
) -> ClipArrays:
    """Frames of a clip that both its sound and its features have.

    Args:
        sound: of `load_sound`.
        phone: of `load_features`.
        first: frame.
        frames: T, ``first + frames`` at most `count_frames`.
        hop: samples per frame.

    Raises:
        ValueError: there are fewer frames.
    """
    last = first + frames
    arrays = (phone, sound.spec, sound.pitch, sound.pitchf)
    shortest = min(len(array) for array in arrays if array is not None)
    if shortest < last:
        raise ValueError(f"{shortest} frames left; {last} expected")
    pitch, pitchf = (
        None if values is None else values[first:last]
        for values in (sound.pitch, sound.pitchf)
    )
    wave = sound.wave[first * hop : last * hop]
    return ClipArrays(pitch, pitchf, sound.spec[first:last], wave, phone[first:last])


def linear_spectrogram(
    wave: np.ndarray, n_fft: int, hop: int, win: int, epsilon: float = 1e-6
) -> np.ndarray:
    """Magnitudes of windows whose centres lie half a hop into each frame.

    Args:
        wave: ``[L]`` float32, L > (n_fft - hop) / 2; both ends are reflected.
        n_fft: samples transformed.
        hop: samples per frame.
        win: samples of the Hann window, at most ``n_fft``.
        epsilon: added to the power before the root.

    Returns:
        ``[L // hop, n_fft // 2 + 1]`` float32 magnitudes.

    Source: RVC ``mel_processing.spectrogram_torch`` (classic and Applio).
    """
    pad = (n_fft - hop) // 2
    padded = np.pad(wave.astype(np.float32, copy=False), pad, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, n_fft)[::hop]
    spectrum = scipy.fft.rfft(windows * _window(n_fft, win), axis=-1)
    power = spectrum.real**2 + spectrum.imag**2
    return np.sqrt(power + np.float32(epsilon))


@cache
def _window(n_fft: int, win: int) -> np.ndarray:
    """Periodic Hann window in the middle of ``n_fft`` samples, float32."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(win) / win)
    left = (n_fft - win) // 2
    return np.pad(window, (left, n_fft - win - left)).astype(np.float32)


def count_frames(entry: Entry, config: TrainingConfig) -> int:
    """Frames of a clip, from the headers of its files, which are checked.

    Raises:
        ValueError: a file does not fit the configuration.
        OSError: a file is missing or cannot be read.
    """
    features = _header(entry.features)
    width = config.model.feature_size
    if len(features) != 2 or features[1] != width:
        raise ValueError(
            f"{entry.features}: features of shape {features}; this configuration takes "
            f"[F, {width}]; extract them with its encoder and version"
        )
    samples, rate = _sound_header(entry.wave)
    if rate != config.model.sample_rate:
        raise ValueError(
            f"{entry.wave}: {rate} Hz, but the voice has {config.model.sample_rate} Hz; "
            "run preprocess for this rate"
        )
    if entry.speaker >= config.model.spk_embed_dim:
        raise ValueError(
            f"{entry.wave}: speaker {entry.speaker}, but the voice has "
            f"{config.model.spk_embed_dim} speakers; number them from 0"
        )
    lengths = [2 * features[0], samples // config.hop]
    if config.model.f0:
        lengths += [_header(path)[0] for path in _pitch_files(entry)]
    return min(lengths)


def load_sound(entry: Entry, config: TrainingConfig) -> Sound:
    """Read a clip without its features and compute its spectrogram.

    Raises:
        ValueError: a file does not fit the configuration or holds NaN.
        OSError: a file is missing or cannot be read.
    """
    _sound_header(entry.wave)
    try:
        wave, _ = soundfile.read(entry.wave, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{entry.wave}: damaged ({error}); run preprocess") from error
    wave = wave.mean(axis=1) if wave.shape[1] > 1 else wave[:, 0]
    sizes = (config.n_fft, config.hop, config.win)
    spec = linear_spectrogram(wave, *sizes, config.spectrum_epsilon)
    coarse = hertz = None
    if config.model.f0:
        values = [_array(path) for path in _pitch_files(entry)]
        coarse, hertz = values[0].astype(np.int32), values[1].astype(np.float32)
        low, high = COARSE_RANGE
        if len(coarse) and not low <= coarse.min() <= coarse.max() <= high:
            raise ValueError(
                f"{entry.f0_coarse}: coarse pitch {coarse.min()}..{coarse.max()}; "
                f"expected {low}..{high}; extract it again"
            )
    if not np.isfinite(spec).all():
        raise ValueError(f"{entry.wave}: samples that are not finite; run preprocess")
    return Sound(coarse, hertz, spec, wave)


def load_features(entry: Entry) -> np.ndarray:
    """Content features of a clip, ``[T, C]`` float32 at 100 frames per second.

    Raises:
        ValueError: the file cannot be read or holds NaN.
        OSError: it is missing.
    """
    return np.repeat(_array(entry.features), 2, axis=0).astype(np.float32)


def _pitch_files(entry: Entry) -> tuple[Path, Path]:
    if entry.f0_coarse is None or entry.f0 is None:
        raise ValueError(
            f"{entry.wave}: listed without pitch, but this configuration has F0; "
            "extract pitch and write the filelist again"
        )
    return entry.f0_coarse, entry.f0


def _array(path: Path) -> np.ndarray:
    """A ``.npy`` file; nothing in it is run."""
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: not a readable .npy file ({error})") from error
    if not np.isfinite(array).all():
        raise ValueError(f"{path}: holds numbers that are not finite; extract it again")
    return array


def _header(path: Path) -> tuple[int, ...]:
    """Shape of a ``.npy`` file."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False).shape
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: not a readable .npy file ({error})") from error


def _sound_header(path: Path) -> tuple[int, int]:
    """Samples and rate of a sound file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; run preprocess again")
    try:
        info = soundfile.info(path)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path}: not a readable sound file ({error})") from error
    return info.frames, info.samplerate
