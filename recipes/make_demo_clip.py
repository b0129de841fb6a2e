"""The clip that the demo converts: ``python -m recipes.make_demo_clip OUT.flac``.

Two sentences by a neural voice that no training hears and a recogniser understands. The
file's tags say what is spoken, by whom and under which licence.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import soundfile as sf

from recipes.corpus import make_clip
from recipes.neural import NEURAL, neural_versions, speak
from rvc_mlx.audio import SAMPLE_RATE

SENTENCES = (
    "There is nothing better than warm bread with butter.",
    "The soldiers marched past the church without a sound.",
)
VOICE, LICENCE = "heart", "Apache-2.0"
_PAUSE = 0.25  # seconds


def write_clip(path: Path, samples: np.ndarray, tags: dict[str, str]) -> None:
    """Write 16 bits and tags as FLAC.

    Args:
        path: target, replaced if it is there.
        samples: ``[n]`` float32 at 16 kHz.
        tags: of ``soundfile``: title, artist, license, comment.
    """
    with sf.SoundFile(path, "w", SAMPLE_RATE, 1, "PCM_16", format="FLAC") as file:
        for name, text in tags.items():
            setattr(file, name, text)
        file.write(samples)


def main(arguments: list[str] | None = None) -> None:
    """Speak, and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path)
    options = parser.parse_args(arguments)
    spoken = [make_clip(speak(sentence, VOICE)).samples for sentence in SENTENCES]
    pause = np.zeros(round(_PAUSE * SAMPLE_RATE), np.float32)
    samples = np.concatenate([spoken[0], pause, spoken[1]])
    _, package = NEURAL[VOICE]
    tags = {
        "title": " ".join(SENTENCES),
        "artist": f"{VOICE} (neural voice of {package})",
        "license": LICENCE,
        "comment": f"{package}={neural_versions()[package]}",
    }
    write_clip(options.output, samples, tags)


if __name__ == "__main__":
    main()
