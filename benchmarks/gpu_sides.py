"""What the GPU benchmark times, on our side and on PyTorch's, by the same names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import common
import numpy as np
import torch
from our_side import KeptNoise, OurSynthesis, SynthesisInputs, copied, find_f0
from torch_side import OnDevice, Place, TorchPipeline, synthesize
from twins import Sides, converter

from rvc_mlx.options import ConversionOptions

INDEX_RATE = 0.75


class Side(Protocol):
    """One program in one precision; every result is on the host when a call returns."""

    def warmed(self, seconds: float, /) -> Side | None:
        """Another such, ready for any length up to this; None if it has no such thing."""

    def hubert(self, audio: np.ndarray) -> np.ndarray:
        """Samples ``[n]`` at 16 kHz to features ``[F, C]``."""

    def rmvpe(self, audio: np.ndarray) -> np.ndarray:
        """Samples to F0 ``[n // 160 + 1]`` in Hz: mel, network and decoding."""

    def synthesizer(self, inputs: SynthesisInputs) -> np.ndarray:
        """Features and F0 to audio: text encoder, flow and vocoder."""

    def convert(self, audio: np.ndarray) -> np.ndarray:
        """The whole conversion, array to array."""

    def convert_many(self, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The whole conversion of several recordings."""


class Ours:
    """This program."""

    def __init__(self, files: common.Models, sides: Sides):
        self._files, self._sides = files, sides
        self._converter = converter(files, sides)
        self._noise = sides.engine.noise(0)
        rate = INDEX_RATE if files.index else 0.0
        self._options = ConversionOptions(index_rate=rate)

    def warmed(self, seconds: float, /) -> Side:
        """As of ``Side``."""
        other = Ours(self._files, self._sides)
        other._converter.warm_up(seconds, other._options)
        return other

    def hubert(self, audio: np.ndarray) -> np.ndarray:
        """As of ``Side``."""
        voice = self._converter.voice
        return copied(self._converter.encoder.encode(audio, voice.config.version))

    def rmvpe(self, audio: np.ndarray) -> np.ndarray:
        """As of ``Side``."""
        net = self._converter.pitch_net
        assert net is not None
        return find_f0(net, audio)

    def synthesizer(self, inputs: SynthesisInputs) -> np.ndarray:
        """As of ``Side``."""
        ours = OurSynthesis(self._converter.voice, self._noise)
        return ours.synthesize(inputs.features, inputs.f0)

    def convert(self, audio: np.ndarray) -> np.ndarray:
        """As of ``Side``."""
        return self._converter.convert(audio, common.SAMPLE_RATE, self._options).audio

    def convert_many(self, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        """As of ``Side``."""
        converted = self._converter.convert_many(
            clips, common.SAMPLE_RATE, self._options
        )
        return [conversion.audio for conversion in converted]


class Theirs:
    """The reference on PyTorch; each call sets whether it may use TF32.

    Args:
        files: the models.
        place: where and how it computes.
        compiled: through ``torch.compile``.
    """

    def __init__(self, files: common.Models, place: Place, compiled: bool = False):
        self._place = place
        self._pipeline = TorchPipeline(files, place)
        self._noise = KeptNoise()
        self._rate = INDEX_RATE if files.index else 0.0
        if compiled:
            voice, encoder = self._pipeline.synthesizer, self._pipeline.contentvec
            _compile(voice, "infer")
            _compile(encoder, "extract")
            if self._pipeline.pitch:
                _compile(self._pipeline.pitch.net, "forward")

    def warmed(self, _: float, /) -> None:
        """As of ``Side``."""

    def hubert(self, audio: np.ndarray) -> np.ndarray:
        """As of ``Side``."""
        self._place.set_tf32()
        version = self._pipeline.synthesizer.version
        wave = torch.from_numpy(audio)[None]
        return self._pipeline.contentvec.extract(wave, version)[0].numpy()

    def rmvpe(self, audio: np.ndarray) -> np.ndarray:
        """As of ``Side``."""
        self._place.set_tf32()
        return self._pipeline.pitch.estimate_f0(audio)

    def synthesizer(self, inputs: SynthesisInputs) -> np.ndarray:
        """As of ``Side``."""
        self._place.set_tf32()
        return synthesize(self._pipeline.synthesizer, inputs)

    def convert(self, audio: np.ndarray) -> np.ndarray:
        """As of ``Side``."""
        self._place.set_tf32()
        return self._pipeline.convert(audio, noise=self._noise, index_rate=self._rate)

    def convert_many(self, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        """As of ``Side``; one after the other, as the original does."""
        return [self.convert(clip) for clip in clips]


def _compile(net: OnDevice, method: str) -> None:
    setattr(net.network, method, torch.compile(getattr(net.network, method)))


def our_sides(files: common.Models, sides: Sequence[Sides]) -> dict[str, Side]:
    """Our side in each precision, by name."""
    return {f"ours {one.precision}": Ours(files, one) for one in sides}


def torch_sides(files: common.Models, place: Place) -> dict[str, Side]:
    """PyTorch's, by name: eager, and on a GPU in half precision too."""
    half = [] if place.device.type == "cpu" else [place._replace(precision="f16")]
    return {f"PyTorch {at.precision}": Theirs(files, at) for at in [place, *half]}


def default_side(files: common.Models, place: Place) -> dict[str, Side]:
    """PyTorch's in float32 as it comes, by name; none where that is plain float32."""
    if place.device.type != "cuda":
        return {}
    return {"PyTorch default": Theirs(files, place._replace(precision="default"))}


def compiled_side(files: common.Models, place: Place) -> dict[str, Side]:
    """PyTorch's through ``torch.compile``, by name."""
    name = f"PyTorch {place.precision}, compiled"
    return {name: Theirs(files, place, compiled=True)}
