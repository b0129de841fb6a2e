"""Teach a voice how others sound to the encoder: ``python -m recipes.strangers``.

A voice hears only its own speaker in training; of a stranger the encoder makes other
features, and the words blur. Here strangers say the same sentences (``make_strangers``) and
the target's engine repeats them in their time (``dub``). What the encoder makes of a
stranger lies beside the features of the dubbed clip, so ``rvc-mlx train`` trains on both.

    python -m recipes.strangers DUBBED/slt RUNS/slt STRANGERS/slt... --encoder E --rmvpe R
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from scipy.signal import correlate

from recipes.dub import VERSION, Phones, read_head
from recipes.exporting import PROVENANCE
from rvc_mlx.audio_io import load_audio
from rvc_mlx.engine import choose_engine
from rvc_mlx.loading import Encoder, PitchNet, read_weights
from rvc_mlx.training.features import FEATURES, extract_features, left_out
from rvc_mlx.training.files import read_json, write_array, write_json
from rvc_mlx.training.preprocess import CLIPS_16K, clip_names, preprocess
from rvc_mlx.training.recordings import PLAN

log = logging.getLogger("recipes")

STRANGERS = "strangers.json"  # in a run's folder: what they were made with
LEAST = 0.5  # share of frames with the same phone; with fewer the dubbing failed


def place_of(clip: np.ndarray, recording: np.ndarray) -> int:
    """The sample of a recording where a clip of it begins.

    Args:
        clip: ``[n]``, filtered and of another loudness, perhaps.
        recording: ``[m]`` at the same rate.
    """
    space = np.pad(recording, (0, max(len(clip) - len(recording), 0)))
    return int(correlate(space, clip, mode="valid", method="fft").argmax())


def add_strangers(
    folder: Path, strangers: Sequence[Path], encoder: Encoder, phones: Phones
) -> int:
    """Write features of strangers beside those of a run's dubbed clips.

    Args:
        folder: of the run, its features extracted.
        strangers: folders, in the order in which the recordings were dubbed; what they
            were made with stands beside each.
        encoder: that made the features.
        phones: features ``[F, C]`` to logits.

    Returns:
        How many clips have a stranger who is heard to say the same.

    Raises:
        FileNotFoundError: no recording is dubbed, a stranger's is missing, or what he
            was made with is not told.
        ValueError: there are dubbed recordings of more strangers than were given.
    """
    made_with = [read_json(one.parent / PROVENANCE) for one in strangers]
    told = read_json(folder / PLAN)["recordings"]
    sources = {recording["name"]: Path(recording["source"]) for recording in told}
    others = {source: stranger_of(source, strangers) for source in sources.values()}
    if not any(others.values()):
        raise FileNotFoundError(
            f"{folder}: no dubbed recordings; recipes.dub makes them"
        )
    (folder / STRANGERS).unlink(missing_ok=True)  # of an earlier call

    @lru_cache(maxsize=1)  # a recording's clips follow one another
    def heard(source: Path, stranger: Path) -> tuple[np.ndarray, np.ndarray]:
        return load_audio(source), load_audio(stranger)

    found, dubbed, excluded = 0, 0, left_out(folder)
    for name in clip_names(folder):
        target = folder / FEATURES / f"{name}.stranger.npy"
        target.unlink(missing_ok=True)  # likewise
        source = sources[name.rpartition("_")[0]]
        other = others[source]
        if name in excluded or other is None:
            continue
        recording, stranger = heard(source, other)
        clip = load_audio(folder / CLIPS_16K / f"{name}.wav")
        first = place_of(clip, recording)
        part = stranger[first : first + len(clip)]
        part = np.pad(part, (0, len(clip) - len(part)))
        features = encoder.encode(part, VERSION)
        own = np.load(folder / FEATURES / f"{name}.npy")
        heard_alike = phones(features).argmax(axis=1) == phones(own).argmax(axis=1)
        dubbed += 1
        if heard_alike.mean() >= LEAST:
            write_array(target, features)
            found += 1
    write_json(folder / STRANGERS, {"made_with": made_with, "clips": found})
    log.info(f"{folder}: strangers' features of {found} of {dubbed} dubbed clips")
    return found


def stranger_of(recording: Path, strangers: Sequence[Path]) -> Path | None:
    """What a dubbed recording was put in time with; None for one as it was made."""
    said, _, number = recording.stem.rpartition("-")
    if not (said.isdigit() and number.isdigit()):
        return None
    if int(number) >= len(strangers):
        raise ValueError(
            f"{recording.name} is in the time of stranger {number}, counted from 0, of "
            f"{len(strangers)}; give the folders that recipes.dub was given"
        )
    path = strangers[int(number)] / f"{said}.ogg"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: not there, but {recording.name} is in its time"
        )
    return path


def main(arguments: list[str] | None = None) -> None:
    """Prepare a run and add strangers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recordings", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("strangers", type=Path, nargs="+")
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
    extract_features(options.run, encoder, pitch_net, VERSION)
    phones = read_head(options.encoder.with_suffix(".head.safetensors"))
    add_strangers(options.run, options.strangers, encoder, phones)


if __name__ == "__main__":
    main()
