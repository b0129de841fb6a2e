"""The clip that the demo converts: ``python -m recipes.make_demo_clip OUT.flac``.

A sentence by a test speaker, whom no training has heard: English by the phones of
another language. The file's tags say what is spoken, by whom and under which licence.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import soundfile as sf

from recipes.exporting import corpus_facts, write_provenance
from recipes.mapped import mapped_clips
from recipes.speakers import ENGINE_PACKAGES, SPEAKERS, TEST
from rvc_mlx.audio import SAMPLE_RATE

SENTENCE = "He never told anyone where he had hidden the key."
SPEAKER = "mv"


def write_clip(path: Path, samples: np.ndarray, tags: dict[str, str]) -> None:
    """Write 16 bits and tags as FLAC.

    Args:
        path: target, replaced if it is there.
        samples: ``[n]`` float32 at 16 kHz.
        tags: of ``soundfile``: title, artist, license, software, comment.
    """
    with sf.SoundFile(path, "w", SAMPLE_RATE, 1, "PCM_16", format="FLAC") as file:
        for name, text in tags.items():
            setattr(file, name, text)
        file.write(samples)


def main(arguments: list[str] | None = None) -> None:
    """Speak, and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--speaker", choices=[s.name for s in TEST], default=SPEAKER)
    parser.add_argument("--sentence", default=SENTENCE)
    parser.add_argument("--seed", type=int, default=5)
    options = parser.parse_args(arguments)
    speaker = SPEAKERS[options.speaker]
    rng = np.random.default_rng(options.seed)
    [clip] = mapped_clips([options.sentence], speaker.voice, speaker.f0, rng)
    with tempfile.TemporaryDirectory() as folder:
        write_provenance(Path(folder), options.seed)
        versions = corpus_facts([Path(folder)], [speaker.name])["packages"].split()
    used = {*ENGINE_PACKAGES[speaker.engine], speaker.package}
    tags = {
        "title": options.sentence,
        "artist": f"{speaker.name} ({speaker.voice} of Festival)",
        "license": f"voice: {speaker.licence}",
        "comment": " ".join(v for v in versions if v.split("=")[0] in used),
    }
    write_clip(options.output, clip.samples, tags)


if __name__ == "__main__":
    main()
