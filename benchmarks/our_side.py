"""Our side, piece by piece: single layers on an engine, and the steps of a voice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from rvc_mlx import pitch
from rvc_mlx.arrays import Array, copy_to, one_ahead
from rvc_mlx.decoding import Piece, Plan, plan_of, sample_latents, start_windows
from rvc_mlx.engine import Run, Seam, Step, fingerprint
from rvc_mlx.loading import Engine, PitchNet, Voice, read_weights
from rvc_mlx.models.layers import load_strictly
from rvc_mlx.models.synthesizer import Synthesizer, sanitize
from rvc_mlx.models.voice_config import SynthesizerConfig
from rvc_mlx.noise import Noise
from rvc_mlx.report import Report
from rvc_mlx.segments import Segment

FRAME_LENGTHS = (50, 51, 70)  # at which seams of any length are traced

Shapes = Sequence[tuple[tuple[int, ...], mx.Dtype]]


def copied(x: np.ndarray) -> np.ndarray:
    """``x`` in the host's own memory.

    What an engine gives may lie where a GPU has it, and only be seen from the host.
    """
    target = np.empty_like(x)
    copy_to(target, x)
    return target


def find_f0(net: PitchNet, audio: np.ndarray) -> np.ndarray:
    """F0 ``[n // 160 + 1]`` of 16 kHz audio ``[n]``, as a conversion finds it."""
    return pitch.estimate_one(
        net.salience.start, lambda a, b: audio[a:b], len(audio), net.settings()
    )


@dataclass(frozen=True)
class Network:
    """A network of ours of which single layers are to be bound.

    Attributes:
        path: its file.
        make: makes it, without weights.
        tensors: its weights.
    """

    path: Path
    make: Callable[[], nn.Module]
    tensors: Mapping[str, np.ndarray]

    def bind(
        self,
        engine: Engine,
        name: str,
        steps: Callable[[Any], Sequence[Step]],
        inputs: Callable[[int], Shapes],
        lengths: tuple[int, ...],
    ) -> Run:
        """A callable for some of its layers, as ``loading`` makes them for whole seams."""

        def build(dtype: mx.Dtype) -> Sequence[Step]:
            network = self.make()
            load_strictly(network, self.tensors)
            network.set_dtype(dtype)
            mx.eval(network.parameters())
            return steps(network)

        identity = fingerprint(self.path, name)
        return engine.bind(Seam(name, identity, build, inputs, lengths))


def require_f0(config: SynthesizerConfig, path: Path) -> None:
    """Raise ValueError for a voice without F0, which these comparisons feed."""
    if not config.f0:
        raise ValueError(f"{path.name}: this voice has no F0; compare one that has")


def voice_network(path: Path, config: SynthesizerConfig) -> Network:
    """The voice of a file."""
    require_f0(config, path)
    tensors = sanitize(read_weights(path, "voice").tensors)
    return Network(path, partial(Synthesizer, config), tensors)


class KeptNoise(Noise):
    """Noise whose numbers are drawn once: a timed call is not to wait for numpy's."""

    def __init__(self, seed: int = 0):
        super().__init__(seed)
        self._kept: dict[tuple[Any, ...], Any] = {}

    def normal(self, *asked: Any) -> Array:
        """As of ``Noise``."""
        if asked not in self._kept:
            self._kept[asked] = super().normal(*asked)
        kept: Array = self._kept[asked]
        return kept

    def uniform(self, *asked: Any) -> np.ndarray:
        """As of ``Noise``, for the caller to change."""
        if asked not in self._kept:
            self._kept[asked] = super().uniform(*asked)
        kept: np.ndarray = self._kept[asked].copy()
        return kept


class SynthesisInputs(NamedTuple):
    """What a voice is fed with.

    Attributes:
        features: ``[T, C]`` float32, slowly moving, unit scale.
        f0: ``[T]`` float64 in Hz, with unvoiced stretches.
        noise: all randomness.
    """

    features: np.ndarray
    f0: np.ndarray
    noise: Noise


def synthesis_inputs(frames: int, width: int, seed: int = 0) -> SynthesisInputs:
    """Random inputs of a voice."""
    slow = np.random.default_rng(seed).standard_normal((frames // 2 + 2, width))
    features = ((slow[:-1] + slow[1:]) * 2**-0.5).repeat(2, axis=0)[:frames]
    t = np.arange(frames)
    f0 = 180 * 2 ** (0.5 * np.sin(t / 15)) * (t % 40 > 9)
    return SynthesisInputs(features.astype(np.float32), f0, KeptNoise(seed))


class OurSynthesis:
    """The steps of a voice as a conversion runs them, on arrays in memory.

    Attributes:
        margin: frames on each side that serve the vocoder as context only.
    """

    def __init__(self, voice: Voice, noise: Noise, speaker: int = 0):
        require_f0(voice.config, voice.path)
        self._voice, self._noise = voice, noise
        self._speaker = voice.speakers[speaker][None, None]
        self.margin = voice.context

    def latent(self, features: np.ndarray, f0: np.ndarray) -> np.ndarray:
        """Text encoder, prior sample and inverse flow: ``[1, T, inter]``."""
        T, width = len(features), self._voice.config.inter_channels
        noise = self._noise.normal("prior", 0, 0, T, 1, width)
        coarse = pitch.quantize_f0(f0)[None]
        return self._voice.prior(features[None], noise[None], self._speaker, coarse)

    def synthesize(self, features: np.ndarray, f0: np.ndarray) -> np.ndarray:
        """Audio of all frames but the margins; the latent stays where it was made."""
        pieces = [self._piece(f0)]
        plan = plan_of(self._voice, pieces)

        def latents() -> Array:
            return sample_latents(self._voice, features[None], pieces, plan)

        return self._decoded(latents, pieces, plan)

    def decode(self, z: Array, f0: np.ndarray) -> np.ndarray:
        """Source and vocoder: audio of all frames but the margins."""
        pieces = [self._piece(f0)]
        return self._decoded(lambda: z, pieces, plan_of(self._voice, pieces))

    def _decoded(
        self, latents: Callable[[], Array], pieces: list[Piece], plan: Plan
    ) -> np.ndarray:
        report = Report()
        begun = start_windows(self._voice, latents, pieces, plan, report)
        return np.concatenate(
            [audio for windows in one_ahead(begun) for _, audio in windows.read(report)]
        )

    def _piece(self, f0: np.ndarray) -> Piece:
        kept = Segment(0, 0, 0, self.margin, len(f0) - self.margin)
        return Piece(kept, f0, self._speaker, self._noise)
