"""Synthesise the speech corpus with phone labels: ``python -m recipes.make_content_corpus``.

Each speaker gets one shard in every part, so any number of parts is a fair sample.
Shards that exist are kept: the command continues where it was stopped.
"""

from __future__ import annotations

import argparse
import logging
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from recipes import engines, kokoro, text
from recipes.corpus import Clip, make_clip, write_shard
from recipes.engines import Utterance, flite, hts_engine, slt_labels
from recipes.espeak import espeak_ng
from recipes.exporting import write_provenance
from recipes.mapped import mapped_clips
from recipes.phones import russian_class
from recipes.speakers import ENGLISH, OTHER_LANGUAGES, TEST, TRAINING, Speaker
from rvc_mlx.audio import SAMPLE_RATE

log = logging.getLogger("recipes")

_BLOCK = 40  # sentences said with one setting by the engines that start slowly
_SHORTEST = 0.5  # seconds


def speak(speaker: Speaker, rng: np.random.Generator) -> Iterator[Clip]:
    """Clips of a speaker without end, with varied tempo and F0.

    Raises:
        FileNotFoundError: the engine or the dictionary is not installed.
    """
    dictionary = text.dictionary_words()
    while True:
        yield from _BLOCKS[speaker.engine](speaker, rng, dictionary)


def _clip(said: Utterance) -> Clip:
    if said.f0 is None:
        return make_clip(said.at_16k(), said.runs)
    voiced = said.f0 > 0
    if not voiced.any():
        return make_clip(said.at_16k(), said.runs)
    index = np.arange(len(said.f0))
    log_f0 = np.interp(index, index[voiced], np.log(said.f0[voiced]))
    frames = len(said.samples) * SAMPLE_RATE // said.rate // 80 + 1
    short = max(frames - len(voiced), 0)
    return make_clip(
        said.at_16k(),
        said.runs,
        np.pad(np.exp(log_f0), (0, short), mode="edge"),
        np.pad(voiced, (0, short)),
    )


def _festival(speaker: Speaker, rng: np.random.Generator, words) -> Iterator[Clip]:
    mean = speaker.f0 * 2 ** rng.uniform(-0.5, 0.7)
    setup = (
        f"(Parameter.set 'Duration_Stretch {rng.uniform(0.75, 1.35):.3f})"
        f"(set! int_lr_params '((target_f0_mean {mean:.1f}) (target_f0_std "
        f"{mean * rng.uniform(0.06, 0.22):.1f}) (model_f0_mean 170) (model_f0_std 34)))"
    )
    sentences = text.sentences(_BLOCK, rng, words)
    yield from map(_clip, engines.festival(sentences, speaker.voice, setup))


def _russian(speaker: Speaker, rng: np.random.Generator, _) -> Iterator[Clip]:
    sentences = text.invented_sentences(_BLOCK, rng, cyrillic=True)
    said = engines.festival(sentences, speaker.voice, "", russian_class)
    yield from map(_clip, said)


def _flite(speaker: Speaker, rng: np.random.Generator, words) -> Iterator[Clip]:
    f0 = speaker.f0 * 2 ** rng.uniform(-0.35, 0.35)
    sentence = text.sentences(1, rng, words)[0]
    yield _clip(flite(sentence, speaker.voice, rng.uniform(0.8, 1.3), f0))


def _hts(speaker: Speaker, rng: np.random.Generator, words) -> Iterator[Clip]:
    warp = float(speaker.voice)
    for label in slt_labels(text.sentences(_BLOCK, rng, words)):
        yield _clip(
            hts_engine(
                label,
                rate=rng.uniform(0.8, 1.3),
                semitones=rng.uniform(-5, 4),
                all_pass=warp and warp + rng.uniform(-0.03, 0.03),
            )
        )


def _espeak(speaker: Speaker, rng: np.random.Generator, words) -> Iterator[Clip]:
    if rng.random() < 0.75:
        language = ENGLISH[rng.integers(len(ENGLISH))]
        sentence = text.sentences(1, rng, words)[0]
    else:
        language = OTHER_LANGUAGES[rng.integers(len(OTHER_LANGUAGES))]
        sentence = text.invented_sentences(1, rng)[0]
    yield _clip(
        espeak_ng().say(
            sentence,
            f"{language}+{speaker.voice}",
            rate=rng.integers(110, 210),
            pitch=rng.integers(15, 85),
            range=rng.integers(20, 80),
        )
    )


def _kokoro(speaker: Speaker, rng: np.random.Generator, words) -> Iterator[Clip]:
    voice, engine = speaker.voice, kokoro.kokoro()
    own = kokoro.LANGUAGES.get(voice[0])
    if own and rng.random() < 0.3:
        accent, sentence = own, text.invented_sentences(1, rng)[0]
    else:
        accent = kokoro.english(voice)
        sentence = text.sentences(1, rng, words)[0]
    share = 0.0 if speaker.test else 0.6
    style = kokoro.mixed_style(voice, rng, engine.trained, share)
    spoken = kokoro.clauses(sentence, accent)
    yield _clip(engine.say(spoken, style, rng.uniform(0.75, 1.3), accent))


def _mapped(speaker: Speaker, rng: np.random.Generator, words) -> Iterator[Clip]:
    sentences = text.sentences(_BLOCK, rng, words)
    yield from mapped_clips(sentences, speaker.voice, speaker.f0, rng)


_BLOCKS = {
    "festival": _festival,
    "russian": _russian,
    "flite": _flite,
    "hts": _hts,
    "espeak": _espeak,
    "mapped": _mapped,
    "kokoro": _kokoro,
}


def make_shard(
    speaker: Speaker, stem: Path, minutes: float, seed: int, deadline: float
) -> str:
    """Write one shard unless it exists or the time is over.

    Args:
        speaker: who.
        stem: path without suffix.
        minutes: audio wanted.
        seed: of the whole corpus.
        deadline: ``time.time()`` after which nothing is started.

    Returns:
        One line for the log.
    """
    if stem.with_suffix(".npz").is_file() and stem.with_suffix(".ogg").is_file():
        return f"{stem.name}: there already"
    if time.time() > deadline:
        return f"{stem.name}: not made, time is over"
    began = time.time()
    rng = np.random.default_rng([seed, zlib.crc32(stem.name.encode())])
    clips, seconds = [], 0.0
    for clip in speak(speaker, rng):
        if len(clip.samples) >= _SHORTEST * SAMPLE_RATE:
            clips.append(clip)
            seconds += len(clip.samples) / SAMPLE_RATE
        if seconds >= 60 * minutes:
            break
    write_shard(stem, clips)
    took = time.time() - began
    return f"{stem.name}: {len(clips)} clips, {seconds:.0f} s in {took:.0f} s"


def main(arguments: list[str] | None = None) -> None:
    """Make the corpus."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parts", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="times the minutes")
    parser.add_argument("--speakers", nargs="*", help="only these")
    parser.add_argument("--test", action="store_true", help="the test speakers instead")
    parser.add_argument("--minutes", type=float, default=1e6, help="then start no more")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    deadline = time.time() + 60 * options.minutes
    parts = 1 if options.test else options.parts
    chosen = TEST if options.test else TRAINING
    if options.speakers:
        chosen = tuple(s for s in chosen if s.name in options.speakers)
    neural = any(speaker.engine == "kokoro" for speaker in chosen)
    others = kokoro.versions() if neural else {}
    write_provenance(options.folder, options.seed, others)
    with ProcessPoolExecutor(options.workers) as pool:
        jobs = [
            pool.submit(
                make_shard,
                speaker,
                options.folder / f"part-{part}" / f"{speaker.name}-{part:02d}",
                speaker.minutes * options.scale / parts,
                options.seed,
                deadline,
            )
            for part in range(parts)
            for speaker in chosen
        ]
        for job in jobs:
            log.info(job.result())


if __name__ == "__main__":
    main()
