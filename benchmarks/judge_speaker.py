"""Speaker: Resemblyzer's embedding, near for one speaker and far for two."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from judging import Case, Judge, Missing, NoReadingError, Recording, Row, foreign_code

SHORTEST = 0.5  # seconds of speech that an embedding needs to mean anything


@cache
def _encoder() -> Any:
    with foreign_code():
        from resemblyzer import VoiceEncoder

        return VoiceEncoder("cpu", verbose=False)


def embed(samples: np.ndarray) -> np.ndarray:
    """The speaker of ``[n]`` float32 at 16 kHz: ``[256]`` float32 of length 1.

    Raises:
        NoReadingError: less than half a second of it is speech.
    """
    with foreign_code():
        from resemblyzer import preprocess_wav

        speech = preprocess_wav(samples) if np.any(samples) else samples[:0]
        if len(speech) < SHORTEST * 16000:
            raise NoReadingError(
                f"{len(speech) / 16000:.1f} s of speech, too little to tell a speaker"
            )
        return _encoder().embed_utterance(speech)


def _observe(recording: Recording) -> np.ndarray:
    return embed(recording.load().heard)


def mean_speaker(embeddings: Sequence[np.ndarray | Missing]) -> np.ndarray | None:
    """The mean of several recordings of one speaker, of length 1; None for none."""
    found = [one for one in embeddings if not isinstance(one, Missing)]
    if not found:
        return None
    mean = np.mean(found, axis=0)
    return mean / np.linalg.norm(mean)


def _compare(case: Case) -> Row:
    values: Row = {"similarity_source": float(case.output @ case.source)}
    target = mean_speaker(case.references)
    if target is None:
        return values | {"note": "no recordings of the target (--references)"}
    return values | {
        "similarity_target": float(case.output @ target),
        "source_to_target": float(case.source @ target),
        "nearer_target": bool(case.output @ target > case.output @ case.source),
    }


SPEAKER = Judge(
    "speaker",
    _observe,
    _compare,
    {
        "resemblyzer": "resemblyzer",
        "librosa": "librosa",
        "webrtcvad": "webrtcvad-wheels",
        "torch": "torch",
    },
    references=True,
    nothing={"similarity_target": 0.0, "nearer_target": False},
)
