"""What the judges say of known damage: copies of clips, in noise, and noise alone.

    python benchmarks/make_anchors.py CLIPS FOLDER
    python benchmarks/evaluate_conversion.py CLIPS --transcripts CLIPS/transcripts.txt
        --converted FOLDER/* --references A/ --label anchors --pictured 0

White noise at 20, 10 and 0 dB below the clip, both measured over all of it.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from evaluation_inputs import sound_files
from judging import Recording

from rvc_mlx.audio_io import save_audio

LOUDEST = 0.99


def damaged(samples: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """A clip ``[n]`` float32 as every anchor has it, by its name, ``[n]`` float32."""
    noise = np.random.default_rng(seed).standard_normal(len(samples))
    noise *= np.sqrt(np.square(samples, dtype=np.float64).mean()) / noise.std()
    made = {"0 source itself": samples, "4 noise alone": noise}
    for number, snr in enumerate((20, 10, 0), 1):
        made[f"{number} noise {snr} dB"] = samples + noise * 10 ** (-snr / 20)
    peaks = {name: max(1.0, np.abs(x).max() / LOUDEST) for name, x in made.items()}
    return {name: (x / peaks[name]).astype(np.float32) for name, x in made.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("clips", type=Path, help="folder of sound files")
    parser.add_argument("folder", type=Path, help="gets a folder for every anchor")
    given = parser.parse_args(arguments)
    for path in sound_files(given.clips):
        sound = Recording(path).load()
        seed = zlib.crc32(path.stem.encode())
        for name, samples in damaged(sound.full, seed).items():
            (given.folder / name).mkdir(parents=True, exist_ok=True)
            target = given.folder / name / f"{path.stem}.wav"
            save_audio(target, samples, sound.rate, "FLOAT")


if __name__ == "__main__":
    main()
