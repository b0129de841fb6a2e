"""English spoken by voices of other languages: each phone becomes the nearest of theirs.

The durations are those of the voice kal. Heavily accented, but another speaker with
exact labels of English phones.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from recipes.corpus import Clip, make_clip
from recipes.engines import festival_segments, run_scheme
from recipes.phones import arpabet_class

_PLAIN = {
    p: p for p in ("b", "d", "f", "g", "k", "l", "m", "n", "p", "s", "t", "v", "z")
}

# Phones of each language's voices for the phones of kal; "" leaves a phone out.
_LANGUAGES = {
    "czech": {
        **_PLAIN,
        "aa": "a",
        "ae": "e",
        "ah": "a",
        "ao": "o:",
        "aw": "a u",
        "ax": "e",
        "ay": "a j",
        "ch": "c~",
        "dh": "d",
        "eh": "e",
        "er": "e r",
        "ey": "e j",
        "hh": "h",
        "ih": "i",
        "iy": "i:",
        "jh": "dz~",
        "ng": "n*",
        "ow": "o u",
        "oy": "o j",
        "r": "r",
        "sh": "s~",
        "th": "t",
        "uh": "u",
        "uw": "u:",
        "w": "u",
        "y": "j",
        "zh": "z~",
        "pau": "#",
    },
    "italian": {
        **_PLAIN,
        "aa": "a1",
        "ae": "E1",
        "ah": "a",
        "ao": "O1",
        "aw": "a1 u",
        "ax": "e",
        "ay": "a1 i",
        "ch": "tS",
        "dh": "d",
        "eh": "E",
        "er": "E r",
        "ey": "e1 i",
        "hh": "",
        "ih": "i",
        "iy": "i1",
        "jh": "dZ",
        "ng": "ng",
        "ow": "o1 u",
        "oy": "O1 i",
        "r": "r",
        "sh": "S",
        "th": "t",
        "uh": "u",
        "uw": "u1",
        "w": "w",
        "y": "j",
        "zh": "Z",
        "pau": "#",
    },
    "finnish": {
        **_PLAIN,
        "aa": "a",
        "ae": "&",
        "ah": "a",
        "ao": "o",
        "aw": "a u",
        "ax": "@",
        "ay": "a i",
        "ch": "t S",
        "dh": "d",
        "eh": "e",
        "er": "@ r",
        "ey": "e i",
        "hh": "h",
        "ih": "i",
        "iy": "i",
        "jh": "d S",
        "ng": "N",
        "ow": "o u",
        "oy": "o i",
        "r": "r",
        "sh": "S",
        "th": "T",
        "uh": "u",
        "uw": "u",
        "w": "u",
        "y": "j",
        "z": "s",
        "zh": "S",
        "pau": "#",
    },
    "hindi": {
        **_PLAIN,
        "aa": "aa",
        "ae": "eh",
        "ah": "a",
        "ao": "oo",
        "aw": "aa uh",
        "ax": "a",
        "ay": "aa ih",
        "ch": "ch",
        "d": "D",
        "dh": "dh",
        "eh": "eh",
        "er": "a r",
        "ey": "ee",
        "hh": "h",
        "ih": "ih",
        "iy": "iy",
        "jh": "j",
        "ng": "n",
        "ow": "oh",
        "oy": "oo ih",
        "r": "r",
        "sh": "sh",
        "t": "T",
        "th": "th",
        "uh": "uh",
        "uw": "uw",
        "w": "v",
        "y": "y",
        "z": "s",
        "zh": "sh",
        "pau": "pau",
    },
}
_ALIKE = {
    "dx": "d",
    "axr": "er",
    "el": "l",
    "em": "m",
    "en": "n",
    "hv": "hh",
    "nx": "n",
}
_ALIKE |= {"h#": "pau", "brth": "pau"}
_OF_VOICE = {"czech": "czech", "lp": "italian", "pc": "italian", "hindi": "hindi"}

Segment = tuple[str, float]  # phone of kal and its end in seconds


def mapped_clips(
    sentences: Sequence[str], voice: str, f0: float, rng: np.random.Generator
) -> list[Clip]:
    """English sentences in a voice of another language, sentences that fail left out.

    Args:
        sentences: what.
        voice: Festival's name.
        f0: mean in Hz.
        rng: varies tempo and F0 of each sentence.
    """
    table = _LANGUAGES[_OF_VOICE.get(voice.split("_")[0], "finnish")]
    phrases, labels = [], []
    for segments in _durations(sentences):
        pitch = f0 * 2 ** rng.uniform(-0.15, 0.2)
        phrase, runs = _map(segments, table, pitch, rng.uniform(0.95, 1.25))
        phrases.append(phrase)
        labels.append(runs)
    audio = festival_segments(phrases, voice)
    return [
        make_clip(samples, runs)
        for samples, runs in zip(audio, labels, strict=True)
        if len(samples)
    ]


def _durations(sentences: Sequence[str]) -> list[list[Segment]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = [s.replace('"', "") for s in sentences]
        inputs = [f'(utt.synth (Utterance Text "{text}"))' for text in texts]
        run_scheme(folder, inputs, "kal_diphone", "", "utf-8")
        rows = [
            [line.split() for line in path.read_text("latin-1").splitlines()]
            for path in sorted(folder.glob("*.lab"))
        ]
    return [[(r[2], float(r[0])) for r in row if len(r) == 3] for row in rows]


def _map(
    segments: Sequence[Segment], table: dict[str, str], f0: float, stretch: float
) -> tuple[list[tuple[str, float, float]], list[tuple[int, float]]]:
    phrase: list[tuple[str, float, float]] = []
    runs: list[tuple[int, float]] = []
    start = time = 0.0
    total = segments[-1][1]
    for phone, end in segments:
        length, start = (end - start) * stretch, end
        targets = table[_ALIKE.get(phone, phone)].split()
        if not targets:
            continue
        pitch = f0 * (1.12 - 0.3 * start / total)
        phrase += [(target, length / len(targets), pitch) for target in targets]
        time += length
        runs.append((arpabet_class(phone), time))
    return phrase, runs
