"""Judge a content encoder: ``python -m recipes.evaluate_content ENCODER CORPUS``.

Phones: share of right frames per speaker, by the classifier that was trained with the
encoder. Speaker: how often a linear classifier names who speaks from the mean of an
utterance's features, and from their mean and spread, beside the same on log-mel. Where
features are freed of their mean over time, only the second number says something.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recipes.content_training import frame_centres
from recipes.corpus import Shard, find_shards, read_shards, speaker_of
from recipes.dub import read_head
from recipes.goals import Goal, describe
from recipes.phones import UNKNOWN, frame_labels
from recipes.speakers import SPEAKERS
from rvc_mlx.engine import choose_engine
from rvc_mlx.loading import Encoder, read_weights
from rvc_mlx.machine import cache_folder
from rvc_mlx.spectral import log_mel

log = logging.getLogger("recipes")

HEARD = Goal("frames right on a held-out English voice, %", ">=", 75)
# By the probe of ``speaker_report``.
UNHEARD = {
    "features": Goal("speaker named from the mean of the features, %", "<=", 40),
    "features_mean_and_spread": Goal("the same from mean and spread, %", "<=", 40),
}
_ENGLISH = ("festival", "flite", "hts", "kokoro")  # engines of voices without an accent
_SHORTEST, _LONGEST = 16000, 8 * 16000  # samples of a clip
Features = Callable[[np.ndarray], np.ndarray]  # [n] at 16 kHz to [F, C]
Summary = Callable[[np.ndarray], np.ndarray]  # [F, C] to what the probe sees of it


@dataclass(frozen=True)
class Clips:
    """Some clips of one speaker: audio, and the classes of the encoder's frames."""

    speaker: str
    audio: list[np.ndarray]
    labels: list[np.ndarray]


class Listener:
    """An encoder, public or trained here, with the phone classifier beside it.

    Args:
        path: of the encoder; computes on the GPU if MLX has one, else through OpenVINO.

    Attributes:
        trained_on: speakers that its training heard, as its file tells.
    """

    def __init__(self, path: Path):
        engine = choose_engine("auto", "f32", cache_folder() / "compiled")
        weights = read_weights(path, "contentvec")
        self.trained_on = set(str(weights.metadata.get("speakers", "")).split())
        self._encoder = Encoder(weights, engine)
        self._phones = read_head(path.with_suffix(".head.safetensors"))
        self._heard: dict[int, np.ndarray] = {}

    def features(self, audio: np.ndarray) -> np.ndarray:
        """``[n]`` to ``[F, C]``; of each array once."""
        if id(audio) not in self._heard:
            self._heard[id(audio)] = self._encoder.encode(audio, "v2")
        return self._heard[id(audio)]

    def classify(self, audio: np.ndarray) -> np.ndarray:
        """``[n]`` to classes ``[F]``."""
        logits = self._phones(self.features(audio))
        return logits.argmax(axis=-1)


def some_clips(shards: Sequence[Shard], count: int) -> Clips:
    """The first ``count`` clips of one speaker's shards that are long enough."""
    audio, labels = [], []
    for shard in shards:
        start = 0
        for end in map(int, shard.clips):
            stop = min(end, start + _LONGEST)
            if stop - start >= _SHORTEST and len(audio) < count:
                x = shard.samples[start:stop].astype(np.float32) / 32768
                frames = (len(x) - 400) // 320 + 1
                times = start + frame_centres(frames)
                audio.append(x)
                labels.append(frame_labels(shard.classes, shard.ends, times))
            start = end
    return Clips(shards[0].speaker, audio, labels)


def frame_accuracy(
    classify: Callable[[np.ndarray], np.ndarray], clips: Clips
) -> tuple[float, float]:
    """Share of right frames of known class: all, and those that are not silence.

    Args:
        classify: audio ``[n]`` to classes ``[F]``.
        clips: of one speaker.
    """
    found = np.concatenate([classify(x) for x in clips.audio])
    truth = np.concatenate(clips.labels)
    right, known = found == truth, truth != UNKNOWN
    speech = known & (truth != 0)
    return float(right[known].mean()), float(right[speech].mean())


def mean_over_time(features: np.ndarray) -> np.ndarray:
    """``[F, C]`` to ``[C]``."""
    return features.mean(axis=0)


def mean_and_spread(features: np.ndarray) -> np.ndarray:
    """``[F, C]`` to ``[2 C]``: mean, then standard deviation over time."""
    return np.concatenate([features.mean(axis=0), features.std(axis=0)])


SUMMARIES: dict[str, Summary] = {
    "": mean_over_time,
    "_mean_and_spread": mean_and_spread,
}


def speaker_probe(
    features: Features, speakers: Sequence[Clips], summary: Summary = mean_over_time
) -> float:
    """How often a linear classifier of whole utterances names the speaker.

    Every second clip trains it, the others count.

    Args:
        features: what is probed.
        speakers: their clips.
        summary: what the classifier sees of an utterance's features.

    Raises:
        ValueError: a speaker has fewer than two clips.
    """
    for clips in speakers:
        if len(clips.audio) < 2:
            raise ValueError(
                f"{clips.speaker}: {len(clips.audio)} clips of 1 s or more; the speaker "
                "probe needs 2, leave the speaker out with --speakers"
            )
    seen = [
        np.stack([summary(features(x)) for x in clips.audio]).astype(np.float64)
        for clips in speakers
    ]
    owner = np.concatenate([np.full(len(s), i) for i, s in enumerate(seen)])
    second = np.concatenate([np.arange(len(s)) % 2 == 1 for s in seen])
    x = np.concatenate(seen)
    x = (x - x[~second].mean(axis=0)) / (x[~second].std(axis=0) + 1e-9)
    weights = logistic_regression(x[~second], owner[~second], len(speakers))
    named = np.argmax(_with_one(x[second]) @ weights, axis=1)
    return float((named == owner[second]).mean())


def speaker_report(listener: Listener, speakers: Sequence[Clips]) -> dict[str, float]:
    """The probe on features and on log-mel, by each summary, beside guessing."""
    probed: dict[str, Features] = {
        "features": listener.features,
        "log_mel": lambda x: log_mel(x, 80),
    }
    report = {
        name + suffix: speaker_probe(features, speakers, summary)
        for name, features in probed.items()
        for suffix, summary in SUMMARIES.items()
    }
    return report | {"chance": 1 / len(speakers)}


def logistic_regression(
    x: np.ndarray, classes: np.ndarray, count: int, decay: float = 1e-3
) -> np.ndarray:
    """Multinomial logistic regression by Adam on the whole set.

    Args:
        x: ``[N, C]``, standardised.
        classes: ``[N]`` below ``count``.
        count: classes.
        decay: of the squared weights.

    Returns:
        ``[C + 1, count]``, the last row is the bias.
    """
    x = _with_one(x)
    wanted = np.eye(count)[classes]
    weights = np.zeros((x.shape[1], count))
    first, second = np.zeros_like(weights), np.zeros_like(weights)
    for step in range(1, 801):
        logits = x @ weights
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        odds /= odds.sum(axis=1, keepdims=True)
        slope = x.T @ (odds - wanted) / len(x) + decay * weights
        first = 0.9 * first + 0.1 * slope
        second = 0.99 * second + 0.01 * slope**2
        size = 0.05 / (1 - 0.9**step)
        weights -= size * first / (np.sqrt(second / (1 - 0.99**step)) + 1e-8)
    return weights


def _with_one(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x, np.ones((len(x), 1))], axis=1)


def reached(
    phones: Mapping[str, Mapping[str, Any]], named: Mapping[str, float], clips: int
) -> list[dict[str, Any]]:
    """A row per goal: the held-out English voice that is heard worst, then the probes.

    Args:
        phones: per speaker the accuracy, ``"all"``, and whether it is ``"held_out"``.
        named: of ``speaker_report``.
        clips: per speaker.
    """
    english = {
        name: row["all"]
        for name, row in phones.items()
        if row["held_out"] and name in SPEAKERS and SPEAKERS[name].engine in _ENGLISH
    }
    worst = 100 * min(english.values()) if english else None
    rows = [HEARD.row(worst, clips * len(english))]
    rows[0]["speakers"] = sorted(english)
    everyone = clips * len(phones)
    return rows + [g.row(100 * named[k], everyone) for k, g in UNHEARD.items()]


def main(arguments: list[str] | None = None) -> None:
    """Print a JSON report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("encoder", type=Path, help=".safetensors with its .head beside")
    parser.add_argument("corpus", nargs="+", type=Path)
    parser.add_argument("--speakers", nargs="*", help="only these")
    parser.add_argument("--clips", type=int, default=40, help="per speaker")
    parser.add_argument("--report", type=Path, help="write the JSON here too")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    paths = [
        path
        for path in find_shards(options.corpus)
        if not options.speakers or speaker_of(path) in options.speakers
    ]
    by_speaker: dict[str, list[Shard]] = {}
    for shard in read_shards(paths):
        by_speaker.setdefault(shard.speaker, []).append(shard)
    speakers = [some_clips(shards, options.clips) for shards in by_speaker.values()]
    listener = Listener(options.encoder)
    phones: dict[str, dict[str, Any]] = {}
    for clips in speakers:
        everything, speech = frame_accuracy(listener.classify, clips)
        held_out = clips.speaker not in listener.trained_on
        phones[clips.speaker] = {
            "all": everything, "speech": speech, "held_out": held_out
        }  # fmt: skip
    named = speaker_report(listener, speakers)
    report = {
        "benchmark": "content",
        **describe(options.encoder, options.corpus),
        "clips_per_speaker": options.clips,
        "frame_accuracy": phones,
        "speaker_named": named,
        "goals": reached(phones, named, options.clips),
    }
    text = json.dumps(report, indent=1)
    log.info(text)
    if options.report:
        options.report.parent.mkdir(parents=True, exist_ok=True)
        options.report.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
