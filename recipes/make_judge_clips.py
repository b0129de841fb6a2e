"""Clips to convert and to judge: ``python -m recipes.make_judge_clips FOLDER``.

Forty sentences by the test speakers in turn, whom no training has heard; English by the
phones of other languages. ``FOLDER/transcripts.txt`` says what is spoken. With ``--voices
awb rms`` other voices of Flite speak them.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile as sf

from recipes.engines import flite
from recipes.exporting import write_provenance
from recipes.mapped import mapped_clips
from recipes.speakers import TEST
from rvc_mlx.audio import SAMPLE_RATE

log = logging.getLogger("recipes")

SENTENCES = Path(__file__).with_name("sentences.txt")


def by_test_speakers(
    sentences: list[str], rng: np.random.Generator
) -> Iterator[tuple[str, np.ndarray]]:
    """Name and samples at 16 kHz of each sentence, its speaker's turn."""
    for number, sentence in enumerate(sentences):
        speaker = TEST[number % len(TEST)]
        [clip] = mapped_clips([sentence], speaker.voice, speaker.f0, rng)
        yield speaker.name, clip.samples


def by_flite(
    sentences: list[str], voices: list[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """Likewise, by voices of Flite."""
    for number, sentence in enumerate(sentences):
        voice = voices[number % len(voices)]
        yield voice, flite(sentence, voice).at_16k()


def main(arguments: list[str] | None = None) -> None:
    """Speak, and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--voices", nargs="*", help="of Flite (default: test speakers)")
    parser.add_argument("--seed", type=int, default=5)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    sentences = SENTENCES.read_text("utf-8").splitlines()
    rng = np.random.default_rng(options.seed)
    spoken = (
        by_flite(sentences, options.voices)
        if options.voices
        else by_test_speakers(sentences, rng)
    )
    write_provenance(options.folder, options.seed)
    lines = []
    for number, (speaker, samples) in enumerate(spoken):
        name = f"{number:02d}-{speaker}.flac"
        sf.write(options.folder / name, samples, SAMPLE_RATE)
        lines.append(f"{name}|{sentences[number]}\n")
    (options.folder / "transcripts.txt").write_text("".join(lines), "utf-8")
    log.info(f"{options.folder}: {len(lines)} clips")


if __name__ == "__main__":
    main()
