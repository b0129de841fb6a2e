"""Pitch trackers that are judged: the network, and harvest, swift-f0 and torchcrepe."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

from recipes.harmonics import world
from rvc_mlx.arrays import to_host
from rvc_mlx.audio import SAMPLE_RATE
from rvc_mlx.engine import choose_engine
from rvc_mlx.loading import PitchNet, read_weights
from rvc_mlx.machine import cache_folder
from rvc_mlx.pitch import FRAME_LENGTH, VOICING_THRESHOLD, estimate_f0

# [n] at 16 kHz to [n // 160 + 1] Hz. As in mir_eval, a tracker's guess where it hears no
# voice is negative, and 0 where it has none.
Tracker = Callable[[np.ndarray], np.ndarray]


def network_tracker(path: Path) -> Tracker:
    """An RMVPE network of any size, with RVC's threshold and decoding.

    It computes as in a conversion, in float32: on the GPU if MLX has one, else through
    OpenVINO.
    """
    net = PitchNet(
        read_weights(path, "rmvpe"),
        choose_engine("auto", "f32", cache_folder() / "compiled"),
    )

    def track(audio: np.ndarray) -> np.ndarray:
        seen: dict[bytes, np.ndarray] = {}

        def salience(mel: np.ndarray) -> np.ndarray:
            key = mel.tobytes()
            if key not in seen:
                seen[key] = to_host(net.salience.start(mel))
            return seen[key]

        heard, guess = (
            estimate_f0(
                salience,
                lambda start, stop: audio[start:stop],
                len(audio),
                net.config.n_mels,
                threshold,
                net.frames_multiple,
            )
            for threshold in (VOICING_THRESHOLD, 0.0)
        )
        return np.where(heard > 0, heard, -guess)

    return track


def harvest_tracker() -> Tracker:
    """WORLD's harvest, 50 to 1100 Hz."""
    pyworld = world()

    def track(audio: np.ndarray) -> np.ndarray:
        x = audio.astype(np.float64)
        return pyworld.harvest(x, SAMPLE_RATE, 50.0, 1100.0, frame_period=10.0)[0]

    return track


def swift_tracker() -> Tracker:
    """swift-f0, voiced from the confidence .5 on, put on frames of 10 ms."""
    from swift_f0 import SwiftF0

    detector = SwiftF0(threads=1, spin=False)

    def track(audio: np.ndarray) -> np.ndarray:
        result = detector.detect(audio, SAMPLE_RATE)
        times = np.arange(len(audio) // FRAME_LENGTH + 1) * FRAME_LENGTH / SAMPLE_RATE
        own = np.asarray(result.timestamps)
        voiced = np.asarray(result.confidence) >= 0.5
        if voiced.sum() < 2:
            return np.zeros(len(times))
        log_f0 = np.log(np.asarray(result.pitch_hz)[voiced])
        nearest = np.abs(times[:, None] - own).argmin(axis=1)
        sign = np.where(voiced[nearest], 1, -1)
        return sign * np.exp(np.interp(times, own[voiced], log_f0))

    return track


def crepe_tracker() -> Tracker:
    """Torchcrepe's tiny network with Viterbi decoding, voiced above .21."""
    if importlib.util.find_spec("torchaudio") is None:
        # It is imported for loading files and for resampling, which is not done here.
        sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    import torch  # noqa: TID251
    import torchcrepe

    def track(audio: np.ndarray) -> np.ndarray:
        f0, sure = torchcrepe.predict(
            torch.from_numpy(audio)[None],
            SAMPLE_RATE,
            FRAME_LENGTH,
            50.0,
            1100.0,
            model="tiny",
            return_periodicity=True,
        )
        return np.where(sure[0].numpy() > 0.21, 1, -1) * f0[0].numpy()

    return track


# Name to the module that it needs, and its maker.
OTHERS: dict[str, tuple[str, Callable[[], Tracker]]] = {
    "harvest": ("pyworld", harvest_tracker),
    "swift-f0": ("swift_f0", swift_tracker),
    "torchcrepe tiny": ("torchcrepe", crepe_tracker),
}


@cache
def tracker(name: str, network: Path | None = None) -> Tracker:
    """A tracker of ``OTHERS``, or the network of a file; made once per process.

    Args:
        name: of the tracker.
        network: the file, for one that ``OTHERS`` does not name.
    """
    if network is not None:
        return network_tracker(network)
    return OTHERS[name][1]()
