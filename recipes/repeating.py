"""The target voices' engines say again what somebody else said, phone by phone.

Two engines rarely agree on how a word is said, least of all a made-up one. Here each word
gets a name of its own and an entry in the engine's dictionary: what it is to sound like.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from recipes.engines import Utterance, flite, hts_engine, slt_labels

Word = list[str]  # phones; 1 behind a vowel that is stressed and 0 behind others
PAUSE: Word = ["sil"]
VOWELS = frozenset(
    [
        "aa",
        "ae",
        "ah",
        "ao",
        "aw",
        "ay",
        "eh",
        "er",
        "ey",
        "ih",
        "iy",
        "ow",
        "oy",
        "uh",
        "uw",
    ]
)

_CONSONANTS = "bdfgklmnprstvz"
_SYLLABLES = [c + v for v in "aeiou" for c in _CONSONANTS]
_SCHWA = {"ah0": "ax0"}  # the engines' name for it


def written(words: Sequence[Word]) -> str:
    """Words as a line of text, ``hh ah0 l ow1 / sil / w er1 l d``."""
    return " / ".join(" ".join(word) for word in words)


def read(line: str) -> list[Word]:
    """The words of a line of ``written``."""
    return [part.split() for part in line.split("/") if part.split()]


def spelled(words: Sequence[Word], first: int = 0) -> tuple[str, dict[str, Word]]:
    """A sentence of made-up names, and the dictionary that tells how they sound.

    Args:
        words: and pauses.
        first: number of the first name; one dictionary may serve several sentences.

    Raises:
        ValueError: there are more words than names.
    """
    text, dictionary = "", {}
    for word in words:
        if word == PAUSE:
            text = f"{text.rstrip(' ,')}, "
            continue
        number = first + len(dictionary)
        if number >= len(_SYLLABLES) ** 2:
            raise ValueError(
                f"more than {number} words at a time; give fewer sentences"
            )
        # Flite spells out what it cannot pronounce, so a name has vowels.
        high, low = divmod(number, len(_SYLLABLES))
        name = "zo" + _SYLLABLES[low] + _SYLLABLES[high]
        dictionary[name] = [_SCHWA.get(phone, phone) for phone in word]
        text += f"{name} "
    return text.strip(" ,") + ".", dictionary


def rms_repeats(sentences: Sequence[Sequence[Word]]) -> list[Utterance]:
    """Flite's voice rms."""
    return [flite(text, "rms", words=words) for text, words in map(spelled, sentences)]


def slt_repeats(sentences: Sequence[Sequence[Word]]) -> list[Utterance]:
    """The HTS voice slt."""
    texts: list[str] = []
    dictionary: dict[str, Word] = {}
    for sentence in sentences:
        text, words = spelled(sentence, len(dictionary))
        texts.append(text)
        dictionary |= words
    return [hts_engine(label) for label in slt_labels(texts, dictionary)]


# Of each target voice, by the name of its folder; one utterance per sentence.
ENGINES: dict[str, Callable[[Sequence[Sequence[Word]]], list[Utterance]]] = {
    "slt": slt_repeats,
    "rms": rms_repeats,
}
