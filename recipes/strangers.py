"""Teach a voice how others sound to the encoder: ``python -m recipes.strangers``.

A voice hears only its own speaker in training; of a stranger the encoder makes other
features, and the words blur. Here a stranger says the same sentences (``make_strangers``),
and what the encoder makes of that is put in time with the recordings. It lies beside the
clips' own features, so ``rvc-mlx train`` trains on both.

    python -m recipes.strangers RECORDINGS/slt RUNS/slt STRANGERS/slt --encoder E --rmvpe R
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np
from scipy.special import softmax

from recipes.exporting import PROVENANCE
from rvc_mlx.audio_io import load_audio
from rvc_mlx.engine import choose_engine
from rvc_mlx.loading import Encoder, PitchNet, read_weights
from rvc_mlx.training.features import FEATURES, extract_features, left_out
from rvc_mlx.training.files import read_json, write_array, write_json
from rvc_mlx.training.preprocess import clip_names, preprocess
from rvc_mlx.training.recordings import PLAN

log = logging.getLogger("recipes")

Phones = Callable[[np.ndarray], np.ndarray]

# Frames that the stranger moves on by during one of the clip, each with its cost.
_STEPS = ((0, 0.05), (1, 0.0), (2, 0.05), (3, 0.15))
STRANGERS = "strangers.json"  # in a run's folder: what they were made with
_VERSION = "v2"  # of the bundled voices
_LEAST = 1e-3  # likelihood of two frames of different phones
WORST = 0.3  # mean disagreement of a pair that is not taken: they say something else


def disagreement(own: np.ndarray, other: np.ndarray) -> np.ndarray:
    """``[F, G]`` in 0..1: how unlikely frames of two recordings are the same phone.

    Args:
        own: ``[F, P]`` logits of the phones.
        other: ``[G, P]`` of another recording.
    """
    same = softmax(own, axis=1) @ softmax(other, axis=1).T
    costs: np.ndarray = np.log(same + _LEAST) / np.log(_LEAST)
    return np.clip(costs, 0, 1)


def aligned(costs: np.ndarray) -> tuple[np.ndarray, float]:
    """Where in another recording each frame of a clip is said.

    The clip may be any stretch of what the other says.

    Args:
        costs: ``[F, G]`` of each frame of the clip at each of the other's.

    Returns:
        The other's frames ``[F]``, never going back, and their mean cost.
    """
    F, G = costs.shape
    total = costs[0]
    came = np.zeros((F, G), np.int8)
    for frame in range(1, F):
        ways = np.full((len(_STEPS), G), np.inf)
        for row, (step, extra) in zip(ways, _STEPS, strict=True):
            row[step:] = total[: G - step] + extra
        came[frame] = ways.argmin(axis=0)
        total = ways.min(axis=0) + costs[frame]
    path = np.empty(F, int)
    path[-1] = int(total.argmin())
    for frame in range(F - 1, 0, -1):
        path[frame - 1] = path[frame] - _STEPS[came[frame, path[frame]]][0]
    return path, float(costs[np.arange(F), path].mean())


def add_strangers(
    folder: Path, strangers: Path, encoder: Encoder, phones: Phones
) -> int:
    """Write features of strangers beside those of a run's clips.

    Args:
        folder: of the run, its features extracted.
        strangers: a file per recording, of its name, ``.ogg``; what they were made with
            stands beside this folder.
        encoder: that made the features.
        phones: features ``[F, C]`` to logits.

    Returns:
        How many clips have some.

    Raises:
        FileNotFoundError: no recording has a stranger, or what they were made with is
            not told.
    """
    made_with = read_json(strangers.parent / PROVENANCE)
    told = read_json(folder / PLAN)["recordings"]
    stems = {recording["name"]: Path(recording["source"]).stem for recording in told}

    @cache
    def heard(path: Path) -> np.ndarray:
        return encoder.encode(load_audio(path), _VERSION)

    found, differences, excluded = 0, [], left_out(folder)
    for name in clip_names(folder):
        target = folder / FEATURES / f"{name}.stranger.npy"
        target.unlink(missing_ok=True)  # of an earlier call
        path = strangers / f"{stems[name.rpartition('_')[0]]}.ogg"
        if name in excluded or not path.is_file():
            continue
        own = phones(np.load(folder / FEATURES / f"{name}.npy"))
        other = heard(path)
        places, difference = aligned(disagreement(own, phones(other)))
        differences.append(difference)
        if difference < WORST:
            write_array(target, other[places])
            found += 1
    if not differences:
        raise FileNotFoundError(
            f"{strangers}: none of the recordings is there as .ogg; recipes.make_strangers "
            "makes them"
        )
    write_json(folder / STRANGERS, {**made_with, "clips": found})
    log.info(
        f"{folder}: {found} of {len(differences)} clips, disagreement "
        f"{np.median(differences):.2f} (median), {max(differences):.2f} at most"
    )
    return found


def read_head(path: Path) -> Phones:
    """The phone classifier that ``train_content`` writes beside the encoder."""
    head = mx.load(str(path))
    weight, bias = (
        np.array(head[name].astype(mx.float32)) for name in ("weight", "bias")
    )
    return lambda features: features @ weight.T + bias


def main(arguments: list[str] | None = None) -> None:
    """Prepare a run and add strangers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recordings", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("strangers", type=Path)
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument("--rmvpe", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=Path("recipes/voice.json"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--cpu-cores", type=int)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    rate = read_json(options.config)["model"]["sample_rate"]
    engine = choose_engine(options.device, "f32", None)
    encoder = Encoder(read_weights(options.encoder, "contentvec"), engine)
    pitch_net = PitchNet(read_weights(options.rmvpe, "rmvpe"), engine)
    preprocess([options.recordings], options.run, rate, workers=options.cpu_cores)
    extract_features(options.run, encoder, pitch_net, _VERSION)
    phones = read_head(options.encoder.with_suffix(".head.safetensors"))
    add_strangers(options.run, options.strangers, encoder, phones)


if __name__ == "__main__":
    main()
