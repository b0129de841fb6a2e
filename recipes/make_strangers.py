"""Others who say what the target voices say: ``python -m recipes.make_strangers RECORDINGS OUT``.

``OUT/slt/0012.ogg`` is the sentence of ``RECORDINGS/slt/0012`` in some voice of Kokoro that
is not kept for tests, at 16 kHz; ``0012.phones`` is what he says. ``recipes.dub`` lets the
target say the same in that time, and ``recipes.strangers`` makes features of it.
"""

from __future__ import annotations

import argparse
import logging
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from recipes import kokoro
from recipes.corpus import write_vorbis
from recipes.exporting import PROVENANCE, write_provenance
from recipes.repeating import written
from rvc_mlx.audio import SAMPLE_RATE
from rvc_mlx.training.files import read_json, write_text

log = logging.getLogger("recipes")


def phones_of(recording: Path) -> Path:
    """The file that says what a stranger says in a recording, see `repeating`."""
    return recording.with_suffix(".phones")


def say(sentence: str, path: Path, seed: int, beyond: float) -> float:
    """Write one sentence and its phones unless they are there; its seconds."""
    phones = phones_of(path)
    if path.is_file() and phones.is_file():
        return 0.0
    rng = np.random.default_rng([seed, zlib.crc32(path.name.encode())])
    engine = kokoro.kokoro()
    voice = engine.trained[rng.integers(len(engine.trained))]
    accent = kokoro.english(voice)
    style = kokoro.mixed_style(voice, rng, engine.trained, beyond=beyond)
    spoken = kokoro.clauses(sentence, accent)
    words = written(kokoro.words_of(engine.text_of(spoken, accent)))
    write_text(phones, f"{words}\n")
    speed = rng.uniform(0.8, 1.2)
    if path.is_file():
        return 0.0
    said = engine.say(spoken, style, speed, accent)
    samples = said.at_16k()
    level = np.float32(0.9 / max(0.9, float(np.abs(samples).max())))
    write_vorbis(path, level * samples.astype(np.float32), SAMPLE_RATE)
    return len(samples) / SAMPLE_RATE


def main(arguments: list[str] | None = None) -> None:
    """Speak all sentences."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recordings", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=6)
    parser.add_argument(
        "--beyond", type=float, default=0.0, help="voices unlike any, up to .5"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    texts = sorted(options.recordings.glob("*.txt"))
    if not texts:
        raise FileNotFoundError(
            f"{options.recordings}: no VOICE.txt; recipes.make_recordings writes it"
        )
    if not 0 <= options.beyond <= 0.5:
        raise ValueError(f"--beyond {options.beyond}; expected 0 to 0.5")
    settings = {"seed": options.seed, "beyond": options.beyond}
    path = options.folder / PROVENANCE
    if path.is_file():
        told = {"beyond": 0.0, **read_json(path)}
        before = {name: told[name] for name in settings}
        if before != settings:
            raise ValueError(
                f"{options.folder}: made with {before}, not {settings}; give another "
                "folder"
            )
    write_provenance(options.folder, others=kokoro.versions(), **settings)
    with ProcessPoolExecutor(options.workers) as pool:
        for file in texts:
            target = options.folder / file.stem
            target.mkdir(parents=True, exist_ok=True)
            jobs = [
                pool.submit(
                    say,
                    line,
                    target / f"{number:04d}.ogg",
                    options.seed,
                    options.beyond,
                )
                for number, line in enumerate(file.read_text("utf-8").splitlines())
            ]
            seconds = sum(job.result() for job in jobs)
            log.info(f"{target}: {len(jobs)} sentences, {seconds:.0f} s")


if __name__ == "__main__":
    main()
