"""Sentences without meaning, assembled by program: every phone in many neighbourhoods.

Three sources of words: the list beside this file, words of the pronouncing dictionary
that Debian installs for Festival, and words built from syllables.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

WORDS = Path(__file__).with_name("words.txt")
DICTIONARY = Path("/usr/share/festival/dicts/cmu/cmudict-0.4.out")

_FUNCTION_WORDS = 60  # the first words of the list are the frequent ones
_ENDINGS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "ng", "sh")
_ONSETS = (
    *("b", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p", "r", "s", "t", "v", "w"),
    *("z", "sh", "ch", "th", "st", "tr", "pl", "kr", "gl", "sp", "br", "dr", "fl"),
)
_NUCLEI = ("a", "e", "i", "o", "u", "a", "e", "i", "o", "u", "ai", "ou", "ei", "oi")
_CYRILLIC = (
    "бвгджзклмнпрстфхцчш",
    "аеиоуыэюя",
    "клмнрст",
)


@cache
def own_words() -> tuple[str, ...]:
    """The bundled list, the frequent words first, each once."""
    return tuple(dict.fromkeys(WORDS.read_text("utf-8").lower().split()))


@cache
def dictionary_words(path: Path = DICTIONARY) -> tuple[str, ...]:
    """Words of 3 to 11 letters of Festival's dictionary.

    Raises:
        FileNotFoundError: the package ``festlex-cmu`` is not installed.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no pronouncing dictionary; install the package festlex-cmu"
        )
    words = (
        line.split('"', 2)[1]
        for line in path.read_text("latin-1").splitlines()
        if line.startswith('("')
    )
    return tuple(
        dict.fromkeys(
            w for w in words if w.isascii() and w.isalpha() and 3 <= len(w) <= 11
        )
    )


def sentences(
    count: int, rng: np.random.Generator, dictionary: Sequence[str] = ()
) -> list[str]:
    """English word salad.

    Args:
        count: sentences.
        rng: source of randomness.
        dictionary: words that a third of the content words are taken from; without it
            they are built from syllables.

    Returns:
        Sentences of 5 to 11 words, with a comma in some, ending in a full stop or a
        question mark.
    """
    return [_sentence(rng, dictionary) for _ in range(count)]


def _sentence(rng: np.random.Generator, dictionary: Sequence[str]) -> str:
    own = own_words()
    words = []
    for _ in range(rng.integers(5, 12)):
        kind = rng.random()
        if kind < 0.25:
            words.append(own[rng.integers(_FUNCTION_WORDS)])
        elif kind < 0.65:
            words.append(own[rng.integers(len(own))])
        elif dictionary and kind < 0.95:
            words.append(dictionary[rng.integers(len(dictionary))])
        else:
            words.append(invented_word(rng))
    return _punctuated(words, rng)


def _punctuated(words: list[str], rng: np.random.Generator) -> str:
    if len(words) > 6 and rng.random() < 0.4:
        words[len(words) // 2] += ","
    text = " ".join(words)
    return text[0].upper() + text[1:] + (".", ".", ".", "?")[rng.integers(4)]


def invented_word(rng: np.random.Generator) -> str:
    """A word of one to three syllables in Latin letters."""
    parts = []
    for _ in range(rng.integers(1, 4)):
        parts.append(_ONSETS[rng.integers(len(_ONSETS))])
        parts.append(_NUCLEI[rng.integers(len(_NUCLEI))])
    if rng.random() < 0.6:
        parts.append(_ENDINGS[rng.integers(len(_ENDINGS))])
    return "".join(parts)


def invented_sentences(
    count: int, rng: np.random.Generator, cyrillic: bool = False
) -> list[str]:
    """Sentences of invented words only, for voices of any language.

    Args:
        count: sentences.
        rng: source of randomness.
        cyrillic: in Russian letters.
    """
    word = _cyrillic_word if cyrillic else invented_word
    return [
        _punctuated([word(rng) for _ in range(rng.integers(4, 9))], rng)
        for _ in range(count)
    ]


def _cyrillic_word(rng: np.random.Generator) -> str:
    onsets, nuclei, endings = _CYRILLIC
    word = "".join(
        onsets[rng.integers(len(onsets))] + nuclei[rng.integers(len(nuclei))]
        for _ in range(rng.integers(1, 4))
    )
    return word + (endings[rng.integers(len(endings))] if rng.random() < 0.5 else "")
