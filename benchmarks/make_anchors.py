"""What the judges say of known damage, and of a known melody: anchors for their figures.

    python benchmarks/make_anchors.py CLIPS FOLDER
    python benchmarks/evaluate_conversion.py CLIPS --transcripts CLIPS/transcripts.txt
        --converted FOLDER/* --references A/ --label anchors --pictured 0

White noise at 20, 10 and 0 dB below the clip, both measured over all of it, and noise alone.

    python benchmarks/make_anchors.py CLIPS FOLDER --melody rmvpe.safetensors
    python benchmarks/evaluate_conversion.py CLIPS --converted FOLDER/* --judges f0
        --label melody --pictured 0

A buzz as loud as the clip, on the F0 that the pitch network finds in it, and on the judge's:
what is missing to 100 % there is no voice's fault.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import judge_pitch
import numpy as np
from evaluation_inputs import sound_files
from judging import Recording
from our_side import find_f0

from rvc_mlx.audio import SAMPLE_RATE
from rvc_mlx.audio_io import save_audio
from rvc_mlx.engine import choose_engine
from rvc_mlx.loading import PitchNet, read_weights
from rvc_mlx.pitch import FRAME_LENGTH

LOUDEST = 0.99
_HARMONICS, _HIGHEST = 60, 7600.0  # Hz
_EDGE = 160  # samples in which the buzz begins and ends
_LOUDNESS = 400  # samples over which it is as loud as the clip


def damaged(samples: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """A clip ``[n]`` float32 as every anchor has it, by its name, ``[n]`` float32."""
    noise = np.random.default_rng(seed).standard_normal(len(samples))
    noise *= np.sqrt(np.square(samples, dtype=np.float64).mean()) / noise.std()
    made = {"0 source itself": samples, "4 noise alone": noise}
    for number, snr in enumerate((20, 10, 0), 1):
        made[f"{number} noise {snr} dB"] = samples + noise * 10 ** (-snr / 20)
    peaks = {name: max(1.0, np.abs(x).max() / LOUDEST) for name, x in made.items()}
    return {name: (x / peaks[name]).astype(np.float32) for name, x in made.items()}


def buzz(samples: np.ndarray, f0: np.ndarray, hop: float, seed: int) -> np.ndarray:
    """Harmonics on an F0, as loud as a clip, and noise where there is none.

    Args:
        samples: the clip ``[n]`` at 16 kHz.
        f0: ``[T]`` in Hz, 0 where unvoiced.
        hop: samples from one frame to the next.
        seed: of the noise.

    Returns:
        ``[n]`` float32.
    """
    made = np.random.default_rng(seed).standard_normal(len(samples))
    place = np.arange(len(samples)) / hop
    voiced = np.flatnonzero(f0)
    if len(voiced):
        there = f0[np.minimum(place.round().astype(int), len(f0) - 1)] > 0
        share = np.convolve(there, _window(_EDGE), "same")
        curve = np.exp(np.interp(place, voiced, np.log(f0[voiced])))
        phase = 2 * np.pi * np.cumsum(curve) / SAMPLE_RATE
        tone = np.zeros(len(samples))
        for h in range(1, _HARMONICS + 1):
            tone += np.where(h * curve < _HIGHEST, np.cos(h * phase) / h, 0.0)
        made = share * tone / _loudness(tone) + (1 - share) * made
    made *= _loudness(samples)
    return (made / max(1.0, np.abs(made).max() / LOUDEST)).astype(np.float32)


def _window(length: int) -> np.ndarray:
    return np.hanning(length + 1) / np.hanning(length + 1).sum()


def _loudness(x: np.ndarray) -> np.ndarray:
    flat = np.full(_LOUDNESS, 1 / _LOUDNESS)
    return np.sqrt(np.convolve(np.square(x, dtype=np.float64), flat, "same") + 1e-10)


def melodies(heard: np.ndarray, net: PitchNet, seed: int) -> dict[str, np.ndarray]:
    """Buzzes for a clip ``[n]`` at 16 kHz, by the name of the anchor."""
    curve = judge_pitch.track(heard)
    judged = np.where(curve.voiced, curve.f0, 0.0)
    hop = judge_pitch.FRAME * SAMPLE_RATE
    return {
        "1 F0 of the network": buzz(heard, find_f0(net, heard), FRAME_LENGTH, seed),
        "2 F0 of the judge": buzz(heard, judged, hop, seed),
    }


def anchors(
    recording: Recording, net: PitchNet | None
) -> Iterator[tuple[str, np.ndarray, int]]:
    """Each anchor of a clip: its name, samples and their rate."""
    sound, seed = recording.load(), zlib.crc32(recording.path.stem.encode())
    if net is None:
        for name, samples in damaged(sound.full, seed).items():
            yield name, samples, sound.rate
    else:
        for name, samples in melodies(sound.heard, net, seed).items():
            yield name, samples, SAMPLE_RATE


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("clips", type=Path, help="folder of sound files")
    parser.add_argument("folder", type=Path, help="gets a folder for every anchor")
    parser.add_argument(
        "--melody", type=Path, metavar="RMVPE", help="make buzzes, with this network"
    )
    given = parser.parse_args(arguments)
    net = None
    if given.melody:
        weights = read_weights(given.melody, "rmvpe")
        net = PitchNet(weights, choose_engine("cpu", "f32"))
    for path in sound_files(given.clips):
        for name, samples, rate in anchors(Recording(path), net):
            (given.folder / name).mkdir(parents=True, exist_ok=True)
            target = given.folder / name / f"{path.stem}.wav"
            save_audio(target, samples, rate, "FLOAT")


if __name__ == "__main__":
    main()
