"""The generator's way through one batch, and the random numbers it takes.

Source: RVC ``SynthesizerTrnMs768NSFsid.forward``.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from rvc_mlx.arrays import Array
from rvc_mlx.models.nsf_hifigan import MRFGenerator, NSFGenerator
from rvc_mlx.models.synthesizer import Synthesizer
from rvc_mlx.models.vits import PRIOR_NOISE_SCALE, WN, PosteriorEncoder
from rvc_mlx.training.blocks import quicken_blocks
from rvc_mlx.training.convolutions import reformulate
from rvc_mlx.training.fused import gate
from rvc_mlx.training.presets import TrainingConfig

if TYPE_CHECKING:
    from rvc_mlx.training.dataset import Batch


def training_network(
    config: TrainingConfig, convolutions: str = "native"
) -> Synthesizer:
    """The voice with its posterior encoder ``enc_q``; weights are bound at each step.

    Args:
        config: sizes.
        convolutions: ``Convolutions.generator``.
    """
    model = config.model
    network = Synthesizer(model)
    network.enc_q = PosteriorEncoder(
        model.spec_channels,
        model.inter_channels,
        model.hidden_channels,
        model.gin_channels,
    )
    reformulate(network, convolutions, grouped="native")  # it has none with groups
    quicken_blocks(network.dec)
    for module in network.modules():
        if isinstance(module, WN):
            module._gate = gate
    return network


def bind(network: nn.Module, weights: Mapping[str, mx.array]) -> None:
    """Put plain weights (see ``parametrization.folded``) into a network."""
    network.update(tree_unflatten(list(weights.items())))


@dataclass(frozen=True)
class Draws:
    """All randomness of one step.

    Attributes:
        posterior: standard normal ``[B, T, inter_channels]`` float32.
        starts: first frame of each item's segment, ``[B]`` int32.
        source: standard normal ``[B, segment_samples, harmonics]`` float32, or None
            without F0.
        phase: starting phase of each harmonic, ``[B, 1, harmonics]`` float32 in cycles,
            0 for the fundamental, or None without F0.
    """

    posterior: Array
    starts: Array
    source: Array | None
    phase: Array | None


def draw(
    config: TrainingConfig, batch: Batch, seed: int, step: int, first: int = 0
) -> Draws:
    """Draw for one step, item by item, so that a batch can be split over devices.

    Args:
        config: sizes.
        batch: its ``lengths`` and T are read.
        seed: of the run.
        step: counted from the run's start.
        first: place of the batch's first item in the joint batch of all devices.

    Raises:
        ValueError: T is less than a segment.
    """
    lengths = np.array(batch.lengths)
    B, T = len(lengths), batch.phone.shape[1]
    if config.segment_frames > T:
        raise ValueError(
            f"the batch has {T} frames; expected at least the segment's "
            f"{config.segment_frames}: leave out shorter clips"
        )

    def rng(name: str, item: int) -> np.random.Generator:
        key = (seed, step, first + item, zlib.crc32(name.encode()))
        return np.random.Generator(np.random.SFC64(np.random.SeedSequence(key)))

    def normal(name: str, shape: tuple[int, ...]) -> np.ndarray:
        rows = [rng(name, i).standard_normal(shape, np.float32) for i in range(B)]
        return np.stack(rows)

    choices = np.maximum(lengths - config.segment_frames + 1, 1)
    uniform = np.array([rng("start", i).random() for i in range(B)])
    posterior = normal("posterior", (T, config.model.inter_channels))
    starts = (uniform * choices).astype(np.int32)
    if not config.model.f0:
        return Draws(posterior, starts, None, None)
    mrf = config.model.vocoder == "MRF HiFi-GAN"
    harmonics = MRFGenerator.HARMONICS if mrf else NSFGenerator.HARMONICS
    phase = np.stack(
        [rng("phase", i).random((1, harmonics), np.float32) for i in range(B)]
    )
    phase[..., 0] = 0
    source = normal("source", (config.segment_samples, harmonics))
    return Draws(posterior, starts, source, phase)


def step_inputs(batch: Batch, draws: Draws) -> dict[str, mx.array]:
    """Batch and draws as one flat dict of arrays; what is None is left out."""
    fields = {**vars(batch), **vars(draws)}
    return {
        name: value if isinstance(value, mx.array) else mx.array(value)
        for name, value in fields.items()
        if isinstance(value, np.ndarray | mx.array)
    }


@dataclass(frozen=True)
class Pass:
    """What the losses need of the generator's way through a batch.

    Attributes:
        audio: generated segment ``[B, segment_samples]`` float32.
        z_p: posterior's sample through the flow, ``[B, T, C]``.
        logs_q: log deviation of the posterior, ``[B, T, C]``.
        m_p: mean of the prior, ``[B, T, C]``.
        logs_p: log deviation of the prior, ``[B, T, C]``.
        mask: 1 on real frames, ``[B, T, 1]`` float32.
    """

    audio: mx.array
    z_p: mx.array
    logs_q: mx.array
    m_p: mx.array
    logs_p: mx.array
    mask: mx.array


def segments(x: mx.array, starts: mx.array, frames: int) -> mx.array:
    """Cut the same number of frames out of each item.

    Args:
        x: ``[B, T, ...]``.
        starts: first frame of each item, ``[B]`` int32.
        frames: how many.

    Returns:
        ``[B, frames, ...]``.
    """
    places = starts[:, None] + mx.arange(frames)
    places = places.reshape(*places.shape, *[1] * (x.ndim - 2))
    return mx.take_along_axis(x, places, axis=1)


def oscillator(
    f0: mx.array, samples_per_frame: int, sample_rate: int
) -> tuple[mx.array, mx.array]:
    """Voicing and phase of a short segment, F0 held within each frame.

    Float32 is enough for a segment: its few dozen frames sum to an error of 1e-5 cycles.

    Args:
        f0: ``[B, T]`` float32 in Hz, 0 where unvoiced.
        samples_per_frame: U.
        sample_rate: in Hz.

    Returns:
        Voiced 0 or 1 and phase in cycles within -0.5..0.5, each ``[B, T, U]`` float32.
    """
    advance = _wrapped(f0 * (samples_per_frame / sample_rate))
    start = mx.cumsum(advance, axis=1) - advance
    ramp = mx.arange(1, samples_per_frame + 1) * (1 / sample_rate) * f0[..., None]
    phase = _wrapped(start[..., None] + ramp)
    voiced = mx.broadcast_to((f0 > 0).astype(mx.float32)[..., None], phase.shape)
    return voiced, phase


def _wrapped(cycles: mx.array) -> mx.array:
    return cycles - mx.round(cycles)


def spoken_items(share: float, items: int, first: int = 0) -> list[int]:
    """Items of a batch that are spoken from the prior: evenly spread, one at least.

    Args:
        share: of the joint batch, 0 to 1.
        items: in the batch of this device.
        first: place of its first item in the joint batch of all devices.
    """

    def until(item: int) -> int:
        return math.ceil(share * (first + item))

    return [item for item in range(items) if until(item + 1) > until(item)]


def generate(
    network: Synthesizer,
    x: Mapping[str, mx.array],
    config: TrainingConfig,
    dtype: mx.Dtype,
    from_prior: Sequence[int] = (),
) -> Pass:
    """Posterior, prior and audio of one segment of each item.

    Args:
        network: of `training_network`, with weights of ``dtype`` bound, except
            ``dec.m_source``, which stays float32.
        x: of `step_inputs`.
        config: sizes.
        dtype: of the layers; the posterior's sample and the harmonic source are float32.
        from_prior: these items are spoken as a conversion speaks, from a sample of the
            prior through the inverse flow; the losses then reach the text encoder by way
            of the audio too. RVC has none.
    """
    T = x["phone"].shape[1]
    mask = (mx.arange(T) < x["lengths"][:, None]).astype(mx.float32)[..., None]
    small = mask.astype(dtype)
    g = network.emb_g(x["sid"])[:, None]
    pitch = x["pitch"] if config.model.f0 else None
    m_p, logs_p = network.enc_p(x["phone"].astype(dtype), pitch, small)
    z, _, logs_q = network.enc_q(x["spec"].astype(dtype), g, x["posterior"], small)
    z_p = network.flow(z.astype(dtype), g, small)
    # The vocoder decodes z, not z_p, and sees no mask.
    heard = z.astype(dtype)
    if from_prior:
        some = mx.array(list(from_prior))
        noise = x["posterior"][some] * PRIOR_NOISE_SCALE
        sample = m_p[some] + mx.exp(logs_p[some]) * noise.astype(dtype)
        spoken = network.flow(sample * small[some], g[some], small[some], reverse=True)
        heard[some] = spoken
    latent = segments(heard, x["starts"], config.segment_frames)
    source = None
    if config.model.f0:
        f0 = segments(x["pitchf"], x["starts"], config.segment_frames)
        voiced, phase = oscillator(f0, config.hop, config.model.sample_rate)
        source = network.dec.m_source(voiced, phase, x["phase"], x["source"])
        source = source.astype(dtype)
    audio = network.dec(latent, g, source).astype(mx.float32)
    return Pass(audio, z_p, logs_q, m_p, logs_p, mask)
