"""Recordings of the two target voices: ``python -m recipes.make_recordings FOLDER``.

``FOLDER/slt`` is the HTS voice at 32 kHz, transposed and stretched; ``FOLDER/rms`` is
Flite's voice at 16 kHz, which cannot be told a pitch, so half of its sentences are
transposed by harmonic resynthesis. Feed either folder to ``rvc-mlx train``. What was said
is in ``FOLDER/slt.txt`` and ``FOLDER/rms.txt``, one line for each recording.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile as sf

from recipes import text
from recipes.contours import random_contour
from recipes.corpus import F0_HOP, levelling
from recipes.engines import flite, hts_engine, slt_labels
from recipes.exporting import write_provenance
from recipes.harmonics import analyse, resynthesise
from rvc_mlx.audio import SAMPLE_RATE

log = logging.getLogger("recipes")

PEAK = 0.95  # of a recording
SPEAKERS_OF = {"slt": "slt_hts", "rms": "rms"}  # of recipes.speakers, by folder
_BLOCK = 40  # sentences


Recording = tuple[str, np.ndarray, int]  # text, samples, rate


def slt_recordings(rng: np.random.Generator) -> Iterator[Recording]:
    """Recordings without end: 32 kHz, tempo .87 to 1.11, -3 to +4 semitones."""
    dictionary = text.dictionary_words()
    while True:
        sentences = text.sentences(_BLOCK, rng, dictionary)
        for sentence, label in zip(sentences, slt_labels(sentences), strict=True):
            said = hts_engine(
                label, rate=rng.uniform(0.87, 1.11), semitones=rng.uniform(-3, 4)
            )
            yield sentence, said.samples, said.rate


def rms_recordings(rng: np.random.Generator, sung: float = 0.5) -> Iterator[Recording]:
    """Recordings without end: 16 kHz, duration .9 to 1.15.

    Args:
        rng: source of randomness.
        sung: share of the sentences whose own intonation is transposed, -4 to +7
            semitones, or widened.
    """
    dictionary = text.dictionary_words()
    while True:
        sentence = text.sentences(1, rng, dictionary)[0]
        samples = flite(sentence, "rms", rng.uniform(0.9, 1.15)).at_16k()
        samples = samples[: len(samples) // F0_HOP * F0_HOP]
        if rng.random() < sung:
            samples = transposed(samples, rng)
        yield sentence, samples, SAMPLE_RATE


def transposed(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The recording with its own intonation widened and moved by -4 to +7 semitones.

    Args:
        samples: ``[n]`` at 16 kHz; returned as it is when nothing in it is voiced.
        rng: source of randomness.
    """
    analysis = analyse(samples)
    if not analysis.voiced.any():
        return samples
    own = random_contour(analysis, rng, "stretched")
    centre = np.exp(np.log(own[analysis.voiced]).mean())
    natural = np.median(analysis.f0[analysis.voiced])
    wanted = natural * 2 ** (rng.uniform(-4, 7) / 12)
    return resynthesise(analysis, own * wanted / centre, rng)


_VOICES = {"slt": slt_recordings, "rms": rms_recordings}


def record(
    voice: str, folder: Path, minutes: float, seed: int, suffix: str = "wav"
) -> float:
    """Write ``minutes`` of a voice as ``folder/voice/0000.wav`` and on.

    Args:
        voice: ``"slt"`` or ``"rms"``.
        folder: parent of the voice's folder.
        minutes: audio wanted.
        seed: of text and variation.
        suffix: ``"wav"`` or ``"flac"``; both hold the same 16 bits.

    Returns:
        Seconds written.
    """
    rng = np.random.default_rng([seed, len(voice), ord(voice[0])])
    target = folder / voice
    target.mkdir(parents=True, exist_ok=True)
    seconds, texts = 0.0, []
    for number, (sentence, samples, rate) in enumerate(_VOICES[voice](rng)):
        path = target / f"{number:04d}.{suffix}"
        sf.write(path, samples * levelling(samples, PEAK), rate, subtype="PCM_16")
        seconds += len(samples) / rate
        texts.append(f"{sentence}\n")
        if seconds >= 60 * minutes:
            (folder / f"{voice}.txt").write_text("".join(texts), "utf-8")
            return seconds
    raise AssertionError("the voices speak without end")


def main(arguments: list[str] | None = None) -> None:
    """Make the recordings."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=30.0, help="per voice")
    parser.add_argument("--voices", nargs="*", choices=_VOICES, default=list(_VOICES))
    parser.add_argument("--format", choices=("wav", "flac"), default="wav")
    parser.add_argument("--seed", type=int, default=2)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    write_provenance(options.folder, options.seed)
    for voice in options.voices:
        seconds = record(
            voice, options.folder, options.minutes, options.seed, options.format
        )
        log.info(f"{options.folder / voice}: {seconds:.0f} s")


if __name__ == "__main__":
    main()
