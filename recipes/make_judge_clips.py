"""Clips to convert and to judge: ``python -m recipes.make_judge_clips FOLDER``.

Forty sentences by two neural voices in turn, whom no training has heard and a recogniser
understands. With ``--voices mapped`` the test speakers of the corpus speak them, English by
the phones of other languages; ``--voices awb rms`` are voices of Flite. ``--voices`` takes
any of these names. ``FOLDER/transcripts.txt`` says what is spoken.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import numpy as np
import soundfile as sf

from recipes import neural
from recipes.corpus import make_clip
from recipes.engines import flite
from recipes.exporting import write_provenance
from recipes.mapped import mapped_clips
from recipes.speakers import TEST
from rvc_mlx.audio import SAMPLE_RATE

log = logging.getLogger("recipes")

SENTENCES = Path(__file__).with_name("sentences.txt")
MAPPED = {s.name: s for s in TEST if s.engine == "mapped"}
FLITE = ("awb", "rms", "slt", "kal16")
VOICES = (*neural.NEURAL, *MAPPED, *FLITE)
_ALL_MAPPED = "mapped"


def say(sentence: str, voice: str, rng: np.random.Generator) -> np.ndarray:
    """One sentence at the corpus level: ``[n]`` float32 at 16 kHz.

    Args:
        sentence: what.
        voice: one of ``VOICES``.
        rng: varies the tempo and F0 of the mapped voices.

    Raises:
        FileNotFoundError: the voice's engine is not installed.
    """
    if voice in MAPPED:
        speaker = MAPPED[voice]
        [clip] = mapped_clips([sentence], speaker.voice, speaker.f0, rng)
        return clip.samples
    if voice in neural.NEURAL:
        return make_clip(neural.speak(sentence, voice)).samples
    return make_clip(flite(sentence, voice).at_16k()).samples


def main(arguments: list[str] | None = None) -> None:
    """Speak, and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--voices",
        nargs="+",
        choices=(*VOICES, _ALL_MAPPED),
        default=list(neural.NEURAL),
        metavar="NAME",
        help=f"of {', '.join(VOICES)}; or {_ALL_MAPPED} (default: the neural ones)",
    )
    parser.add_argument("--count", type=int, help="sentences (default: all)")
    parser.add_argument("--seed", type=int, default=5)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    sentences = SENTENCES.read_text("utf-8").splitlines()
    if options.count is not None and not 0 < options.count <= len(sentences):
        parser.error(f"--count {options.count}: expected 1 to {len(sentences)}")
    voices = list(MAPPED) if _ALL_MAPPED in options.voices else options.voices
    rng = np.random.default_rng(options.seed)
    write_provenance(options.folder, options.seed, neural.neural_versions())
    lines = []
    for number, sentence in enumerate(sentences[: options.count]):
        voice = voices[number % len(voices)]
        name = f"{number:02d}-{voice}.flac"
        sf.write(options.folder / name, say(sentence, voice, rng), SAMPLE_RATE)
        lines.append(f"{name}|{sentence}\n")
    (options.folder / "transcripts.txt").write_text("".join(lines), "utf-8")
    log.info(f"{options.folder}: {len(lines)} clips")


if __name__ == "__main__":
    main()
