"""Words and phones: PocketSphinx, a recogniser trained on real English speech."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from judging import Case, Judge, NoReadingError, Recording, Row, mean_values

SILENCE = "SIL"
_PADDINGS = (0.0, 0.1, 0.25)  # seconds, tried in turn to align
_BEAM = 1e-80  # with wbeam and pbeam widened, too, the second pass fails
_TOOLS = {"pocketsphinx": "pocketsphinx", "jiwer": "jiwer"}


def plain_text(text: str) -> str:
    """Words in small letters, without punctuation; apostrophes stay."""
    return " ".join(
        re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower().replace("\u2019", "'"))
    )


def _pcm(samples: np.ndarray) -> bytes:
    return (np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes()


def _decode(decoder: Any, samples: np.ndarray) -> None:
    """Run a decoder over ``[n]`` at 16 kHz."""
    decoder.start_utt()
    decoder.process_raw(_pcm(samples), full_utt=True)
    decoder.end_utt()


def _decode_afresh(decoder: Any, samples: np.ndarray) -> None:
    """The same, whatever the decoder heard before: its noise estimate outlives that."""
    decoder.reinit_feat()
    _decode(decoder, samples)


@cache
def _recogniser() -> Any:
    from pocketsphinx import Decoder

    return Decoder(samprate=16000, loglevel="FATAL")


def recognise(samples: np.ndarray) -> str:
    """The words heard in ``[n]`` float32 at 16 kHz; "" for none."""
    _decode_afresh(_recogniser(), samples)
    heard = _recogniser().hyp()
    return plain_text(heard.hypstr) if heard else ""


def _errors(kind: str, given: str, heard: str) -> tuple[int, int]:
    """Edits from ``given`` to ``heard``, and the length of ``given``."""
    import jiwer

    process = jiwer.process_words if kind == "word" else jiwer.process_characters
    found = process(given, heard)
    edits = found.substitutions + found.deletions + found.insertions
    return edits, found.hits + found.substitutions + found.deletions


def _compare_words(case: Case) -> Row:
    values: Row = {"heard_source": case.source, "heard_output": case.output}
    for kind in ("word", "character"):
        if case.source:
            edits, length = _errors(kind, case.source, case.output)
            values[f"{kind}_drift"] = 100 * edits / length
        if case.text:
            for side in ("source", "output"):
                edits, length = _errors(kind, case.text, getattr(case, side))
                values |= {f"{kind}_edits_{side}": edits, f"{kind}s": length}
                values[f"{kind}_error_{side}"] = 100 * edits / length
            gap = values[f"{kind}_error_output"] - values[f"{kind}_error_source"]
            values[f"{kind}_gap"] = gap
    if not case.text:
        values["note"] = "no transcript: errors are not known, only the drift"
    return values


def _summarize_words(rows: Sequence[Row]) -> Row:
    """Errors pooled over all words; the mean over clips would favour short ones."""
    summary = mean_values([{k: v for k, v in r.items() if "drift" in k} for r in rows])
    known = [row for row in rows if "words" in row]
    for kind in ("word", "character") if known else ():
        length = sum(row[f"{kind}s"] for row in known)
        for side in ("source", "output"):
            edits = sum(row[f"{kind}_edits_{side}"] for row in known)
            summary[f"{kind}_error_{side}"] = 100 * edits / length
        gap = summary[f"{kind}_error_output"] - summary[f"{kind}_error_source"]
        summary |= {f"{kind}_gap": gap, f"{kind}s": length}
    return summary


class Phones(NamedTuple):
    """Phones of a recording, a label every 10 ms, ``SIL`` for none.

    Attributes:
        heard: labels without knowledge of the words.
        aligned: labels of the known words, or None.
        note: why there are none of these.
    """

    heard: list[str]
    aligned: list[str] | None
    note: str


def _labels(segments: Iterable[tuple[str, int, int]], frames: int) -> list[str]:
    """Phone, first frame, number of frames, to one label a frame."""
    labels = [SILENCE] * frames
    for name, start, length in segments:
        if name.isalpha():  # fillers are +SPN+, <sil> and the like
            stop = min(start + length, frames)
            labels[max(start, 0) : stop] = [name] * (stop - max(start, 0))
    return labels


@cache
def _phone_recogniser() -> Any:
    from pocketsphinx import Decoder, get_model_path

    return Decoder(
        lm=None,
        dict=None,
        hmm=get_model_path("en-us/en-us"),
        allphone=get_model_path("en-us/en-us-phone.lm.bin"),
        lw=2.0,
        beam=1e-20,
        pbeam=1e-20,
        loglevel="FATAL",
    )


def hear_phones(samples: np.ndarray) -> list[str]:
    """A phone every 10 ms of ``[n]`` float32 at 16 kHz, by sound alone."""
    decoder = _phone_recogniser()
    _decode_afresh(decoder, samples)
    found = [
        (s.word, s.start_frame, s.end_frame - s.start_frame + 1) for s in decoder.seg()
    ]
    return _labels(found, len(samples) // 160)


def align_phones(samples: np.ndarray, text: str) -> list[str]:
    """A phone every 10 ms of ``[n]`` float32 at 16 kHz, of known words.

    Raises:
        NoReadingError: a word is not in the dictionary, or the words do not fit.
    """
    from pocketsphinx import Decoder

    unknown = [w for w in text.split() if _recogniser().lookup_word(w) is None]
    if unknown:
        raise NoReadingError(f"not in the aligner's dictionary: {', '.join(unknown)}")
    for seconds in _PADDINGS:
        pad = round(seconds * 100) * 160
        padded = np.pad(samples, pad)
        decoder = Decoder(lm=None, beam=_BEAM, loglevel="FATAL")
        decoder.set_align_text(text)
        try:
            _decode(decoder, padded)
            decoder.set_alignment()
            _decode(decoder, padded)
        except RuntimeError:  # did not fit; this decoder is of no more use
            continue
        # Entries die when their iterator moves on: read them inside the loop.
        found = [
            (phone.name, phone.start - pad // 160, phone.duration)
            for word in decoder.get_alignment()
            for phone in word
        ]
        return _labels(found, len(samples) // 160)
    raise NoReadingError("the aligner cannot fit the transcript to the source")


def _observe_phones(recording: Recording) -> Phones:
    samples = recording.load().heard
    heard = hear_phones(samples)
    if not recording.text:
        return Phones(heard, None, "no transcript: only the agreement with the source")
    try:
        return Phones(heard, align_phones(samples, recording.text), "")
    except NoReadingError as error:
        return Phones(heard, None, str(error))


def frame_accuracy(truth: Sequence[str], heard: Sequence[str]) -> float:
    """Share, in %, of the frames with a phone in which ``heard`` has the same.

    Raises:
        NoReadingError: there is no such frame.
    """
    pairs = [(a, b) for a, b in zip(truth, heard, strict=False) if a != SILENCE]
    if not pairs:
        raise NoReadingError("no phones in the source")
    return 100 * sum(a == b for a, b in pairs) / len(pairs)


def sequence(labels: Sequence[str]) -> str:
    """The phones one after the other, without their lengths and without silence."""
    changed = [b for a, b in zip([SILENCE, *labels], labels, strict=False) if a != b]
    return " ".join(phone for phone in changed if phone != SILENCE)


def _compare_phones(case: Case) -> Row:
    values: Row = {"agreement": frame_accuracy(case.source.heard, case.output.heard)}
    truth = case.source.aligned
    if truth is None:
        return values | {"note": case.source.note}
    for side in ("source", "output"):
        heard = getattr(case, side).heard
        values[f"accuracy_{side}"] = frame_accuracy(truth, heard)
        edits, length = _errors("word", sequence(truth), sequence(heard))
        values[f"error_{side}"] = 100 * edits / length
    values["accuracy_lost"] = values["accuracy_source"] - values["accuracy_output"]
    return values


def _observe_words(recording: Recording) -> str:
    return recognise(recording.load().heard)


WORDS = Judge("words", _observe_words, _compare_words, _TOOLS, _summarize_words)
PHONES = Judge("phones", _observe_phones, _compare_phones, _TOOLS)
