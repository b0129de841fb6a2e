"""Phone classes, what each engine calls them, and labels at any frame rate.

A label is a run: a class and the sample at which it ends. Frames are read off the runs
at the time of each frame's centre, so a warp of time moves labels exactly.
"""

# ruff: noqa: RUF001 - letters of the phonetic alphabet

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np

PHONES = (
    "sil",
    *("aa", "ae", "ah", "ao", "aw", "ay", "b", "ch", "d", "dh", "eh", "er", "ey"),
    *("f", "g", "hh", "ih", "iy", "jh", "k", "l", "m", "n", "ng", "ow", "oy", "p"),
    *("r", "s", "sh", "t", "th", "uh", "uw", "v", "w", "y", "z", "zh"),
)
UNKNOWN = 255  # a sound of no class; it counts for no score and no cross entropy
_ID = {phone: i for i, phone in enumerate(PHONES)}

# Festival's and Flite's names beyond the classes themselves.
_ARPABET = {
    **dict.fromkeys(("pau", "h#", "brth", "#", "ssil", "SIL"), "sil"),
    "ax": "ah",
    "axr": "er",
    "dx": "t",
    "el": "l",
    "em": "m",
    "en": "n",
    "hv": "hh",
    "nx": "n",
    "ix": "ih",
    "ux": "uw",
    "hw": "w",
}

# Russian of the voice nsh: soft consonants join their hard class.
_RUSSIAN = {
    "pau": "sil",
    "ii": "iy",
    "i": "iy",
    "uu": "uw",
    "u": "uw",
    "ur": "uw",
    "ee": "eh",
    "e": "eh",
    "oo": "ao",
    "aa": "aa",
    "a": "ah",
    "ae": "ah",
    "ay": "ah",
    "j": "y",
    "ch": "ch",
    "sch": "sh",
    "sh": "sh",
    "zh": "zh",
    **{
        c: c
        for c in ["p", "b", "t", "d", "k", "g", "f", "v", "s", "z", "m", "n", "l", "r"]
    },
    **{
        c + c: c
        for c in ["p", "b", "t", "d", "k", "g", "f", "v", "s", "z", "m", "n", "l", "r"]
    },
}

_IPA = {
    "ɑ": "aa",
    "ɒ": "aa",
    "æ": "ae",
    "a": "ae",
    "ʌ": "ah",
    "ə": "ah",
    "ɐ": "ah",
    "ɔ": "ao",
    "o": "ow",
    "aʊ": "aw",
    "aɪ": "ay",
    "b": "b",
    "tʃ": "ch",
    "d": "d",
    "ð": "dh",
    "ɛ": "eh",
    "e": "ey",
    "ɚ": "er",
    "ɜ": "er",
    "ɜɹ": "er",
    "eɪ": "ey",
    "f": "f",
    "ɡ": "g",
    "g": "g",
    "h": "hh",
    "ɪ": "ih",
    "i": "iy",
    "dʒ": "jh",
    "k": "k",
    "l": "l",
    "ɫ": "l",
    "m": "m",
    "n": "n",
    "ŋ": "ng",
    "oʊ": "ow",
    "əʊ": "ow",
    "ɔɪ": "oy",
    "p": "p",
    "ɹ": "r",
    "r": "r",
    "s": "s",
    "ʃ": "sh",
    "t": "t",
    "θ": "th",
    "ʊ": "uh",
    "u": "uw",
    "ʉ": "uw",
    "v": "v",
    "w": "w",
    "j": "y",
    "z": "z",
    "ʒ": "zh",
    "ɾ": "t",
    "iə": "iy",
    "": "sil",
    # Not here: a vowel and the r or l after it in one event ("ɔːɹ", "əl"). When the
    # second begins is not known.
}
# Outside English these letters mean other sounds than in the English voices.
_IPA_ELSEWHERE = {"a": "aa", "o": "ao", "e": "eh", "ɾ": None, "ɐ": "ah", "ɒ": "aa"}


def arpabet_class(name: str) -> int:
    """Class of a phone of Festival's English voices or Flite.

    Raises:
        KeyError: the name is not known.
    """
    return _ID[_ARPABET.get(name, name)]


def russian_class(name: str) -> int:
    """Class of a phone of the Russian voice, ``UNKNOWN`` where English has none."""
    phone = _RUSSIAN.get(name)
    return UNKNOWN if phone is None else _ID[phone]


def ipa_class(symbol: str, english: bool) -> int:
    """Class of an IPA symbol, ``UNKNOWN`` where there is none.

    Args:
        symbol: as an engine gives it, with or without length and stress marks.
        english: whether an English voice says it.
    """
    marks = "ːˈˌ:ʲ̩̃ʰ̪'"
    plain = "".join(
        c for c in unicodedata.normalize("NFD", symbol.strip()) if c not in marks
    )
    if symbol and not plain:
        return UNKNOWN
    if "̃" in unicodedata.normalize("NFD", symbol):
        return UNKNOWN
    table = _IPA if english else _IPA | _IPA_ELSEWHERE
    phone = table.get(plain)
    return UNKNOWN if phone is None else _ID[phone]


def frame_labels(
    classes: Sequence[int] | np.ndarray,
    ends: Sequence[int] | np.ndarray,
    times: np.ndarray,
) -> np.ndarray:
    """Class at each time.

    Args:
        classes: class of each run, ``[N]``.
        ends: sample after the last one of each run, ``[N]``, rising.
        times: samples, any shape, real or whole.

    Returns:
        uint8 in the shape of ``times``; ``sil`` before the first sample and after the
        last run.
    """
    padded = np.append(np.asarray(classes, np.uint8), np.uint8(0))
    # Whole samples: comparing integers with reals would copy all of ``ends``.
    whole = np.floor(times).astype(np.int32)
    found = np.searchsorted(np.asarray(ends, np.int32), whole, side="right")
    return np.where(np.asarray(times) < 0, np.uint8(0), padded[found])
