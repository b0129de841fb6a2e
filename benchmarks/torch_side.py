"""PyTorch's side: the reference's networks on any device, with its own pipeline.

Imports nothing of ours, so that a process of PyTorch's side alone is just that.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rvc_reference import rmvpe
from rvc_reference.loading import load_contentvec, load_rmvpe, load_voice
from rvc_reference.pipeline import (
    ReferenceOptions,
    ReferencePipeline,
    quantize_f0,
)
from rvc_reference.vocoders import VocoderNoise

if TYPE_CHECKING:
    from common import Models
    from our_side import SynthesisInputs

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


class Place(NamedTuple):
    """Where and how PyTorch computes.

    ``precision`` is f32, tf32, bf16, f16, or "default": float32 as PyTorch comes, that
    takes TF32 for convolutions and not for products.
    """

    device: torch.device
    precision: str

    @property
    def dtype(self) -> torch.dtype:
        """Of the networks."""
        return DTYPES.get(self.precision, torch.float32)

    def set_tf32(self) -> None:
        """Let CUDA use TF32 for float32 products and convolutions, or not."""
        if self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = self.precision == "tf32"
            torch.backends.cudnn.allow_tf32 = self.precision in ("tf32", "default")


class Exact(NamedTuple):
    """An input that stays float32 whatever the network's precision."""

    value: Any


class OnDevice:
    """A reference network on a device, that takes and gives what the CPU holds.

    Results are copied back, so a call returns when they are computed. Attributes are
    the network's.
    """

    def __init__(self, network: nn.Module, place: Place):
        self.network = network.eval().to(place.device, place.dtype)
        self._device, self._dtype = place.device, place.dtype
        source = getattr(getattr(network, "dec", None), "m_source", None)
        if source is not None:
            _keep_exact(source, self._device, self._dtype)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)

    def eval(self) -> OnDevice:
        """As of a module."""
        return self

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """``function(network, *arguments)``, with arrays moved there and back."""
        with torch.inference_mode():
            result = function(self.network, *map(self._placed, arguments))
            if isinstance(result, tuple):
                return tuple(r.float().cpu() for r in result)
            return result.float().cpu()

    def _placed(self, value: Any) -> Any:
        if isinstance(value, Exact):
            return (
                None if value.value is None else _tensor(value.value).to(self._device)
            )
        if isinstance(value, VocoderNoise):
            adain = {k: self._placed(v) for k, v in value.adain.items()}
            moved = {k: self._placed(Exact(getattr(value, k))) for k in _NOISES}
            return replace(value, adain=adain, **moved)
        if not isinstance(value, np.ndarray | Tensor):
            return value
        value = _tensor(value)
        dtype = self._dtype if value.is_floating_point() else value.dtype
        return value.to(self._device, dtype)

    def extract(self, audio: Tensor, version: str) -> Tensor:
        """Features, as of ``ContentVec``."""
        return self.run(lambda net, x: net.extract(x, version), audio)

    def infer(
        self,
        phone: Tensor,
        pitch: Tensor | None,
        f0: Tensor | None,
        sid: int,
        prior: Tensor,
        noise: VocoderNoise,
    ) -> Tensor:
        """Audio, as of ``Synthesizer``."""
        arguments = (phone, pitch, Exact(f0), sid, prior, noise)
        return self.run(lambda net, *a: net.infer(*a), *arguments)


_NOISES = ("source", "phase")


def _with_float64(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "mps" else device


def _tensor(value: Any) -> Tensor:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def _keep_exact(source: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Keep the oscillator in float32 and, where a GPU has no float64, on the CPU."""
    place = _with_float64(device)
    source.to(place, torch.float32)

    def move(_: nn.Module, arguments: tuple) -> tuple:
        f0, noise = arguments
        moved = {k: getattr(noise, k) for k in _NOISES}
        moved = {k: v if v is None else v.to(place) for k, v in moved.items()}
        return f0.to(place), replace(noise, **moved)

    source.register_forward_pre_hook(move)
    source.register_forward_hook(lambda *call: call[-1].to(device, dtype))


class TorchPitch:
    """RMVPE with its mel and its decoding."""

    def __init__(self, path: Path, place: Place):
        self.net = OnDevice(load_rmvpe(path), place)
        self._mel_device = _with_float64(place.device)
        self._mel = rmvpe.MelSpectrogram(self.net.config.n_mels).to(self._mel_device)

    def log_mel(self, audio: np.ndarray) -> Tensor:
        """Log-mel ``[1, n_mels, T]`` of ``[N]`` at 16 kHz."""
        samples = torch.from_numpy(np.asarray(audio, np.float32))[None]
        return self._mel(samples.to(self._mel_device))

    def salience(self, mel: np.ndarray) -> np.ndarray:
        """Log-mel ``[1, T, n_mels]`` to salience ``[1, T, 360]``, as our seam."""
        return self.net.run(lambda net, x: net(x.transpose(1, 2)), mel).numpy()

    def estimate_f0(self, audio: np.ndarray, pad_mode: str = "reflect") -> np.ndarray:
        """F0 ``[N // 160 + 1]`` in Hz of ``[N]`` at 16 kHz, the signal in one piece."""
        with torch.inference_mode():
            mel = self.log_mel(audio)
            padded = rmvpe.pad_frames(mel, 2**self.net.config.levels, pad_mode)
            salience = self.net.run(lambda net, x: net(x), padded)
        return rmvpe.decode(salience[0, : mel.shape[-1]].numpy())


class TorchPipeline(ReferencePipeline):
    """The reference's pipeline on any device, with the time that each stage took.

    Attributes:
        pitch: RMVPE; None for a voice without F0.
        stages: seconds per stage since it was last cleared.
    """

    def __init__(self, files: Models, place: Place):
        voice = OnDevice(load_voice(files.voice), place)
        encoder = OnDevice(load_contentvec(files.hubert), place)
        super().__init__(encoder, None, voice, files.index)
        self.pitch = TorchPitch(files.rmvpe, place) if voice.f0 else None
        self.stages: dict[str, float] = defaultdict(float)
        encoder.extract = self._timed("content", encoder.extract)
        voice.infer = self._timed("synthesis", voice.infer)

    def _timed(self, stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            with self._stage(stage):
                return call(*arguments)

        return run

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.stages[name] += time.perf_counter() - start

    def f0_contour(
        self,
        padded: np.ndarray,
        options: ReferenceOptions,
        f0: np.ndarray | None = None,
    ) -> np.ndarray | None:
        """As of the reference, with RMVPE on the device."""
        with self._stage("pitch"):
            if f0 is None and self.pitch:
                f0 = self.pitch.estimate_f0(padded, options.pad_mode)
            return super().f0_contour(padded, options, f0)

    def blend(self, features: np.ndarray, rate: float) -> np.ndarray:
        """As of the reference."""
        with self._stage("index"):
            return super().blend(features, rate)


def synthesize(
    voice: OnDevice, inputs: SynthesisInputs, speaker: int = 0
) -> np.ndarray:
    """Audio ``[T * U]`` of a voice's random inputs; draws the noise as ours does."""
    prior, noise = voice.draw(inputs.noise, 0, len(inputs.f0))
    coarse = torch.from_numpy(quantize_f0(inputs.f0))[None]
    hertz = torch.from_numpy(inputs.f0.astype(np.float32))[None]
    phone = torch.from_numpy(inputs.features)[None]
    return voice.infer(phone, coarse, hertz, speaker, prior, noise)[0].numpy()


def decode(
    voice: OnDevice, z: np.ndarray, inputs: SynthesisInputs, speaker: int = 0
) -> np.ndarray:
    """Audio ``[T * U]`` of a latent ``[1, T, inter]``."""
    _, noise = voice.draw(inputs.noise, 0, len(inputs.f0))
    hertz = inputs.f0.astype(np.float32)[None]
    return voice.run(
        lambda net, z, f0, n: net.decode(
            z, f0, net.speaker(speaker), n.source, n.phase, n.adain
        ),
        *(z, Exact(hertz), noise),
    )[0].numpy()


def reset_peak_memory() -> None:
    """Forget the GPU's peak so far."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def torch_gpu_peak_memory() -> int:
    """Largest GPU memory of PyTorch's tensors since the reset, bytes; 0 without CUDA."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
