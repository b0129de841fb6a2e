"""The pitch network's training: RMVPE's shape, smaller, on exactly known F0.

The target of a voiced frame is a Gaussian over the 360 classes; a frame just beside a
voiced run keeps a low one, since public RMVPE hears onsets and decays too.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from recipes.augment import FIRST_SAMPLE, augment, log_mel, source_length
from recipes.corpus import F0_HOP, Shard
from recipes.draws import PITCH, Strength, draw
from recipes.optimisation import Batch, HostBatch, Losses
from recipes.running import on_device, random_key
from rvc_mlx.models.rmvpe import GRU, RMVPE, RMVPEConfig
from rvc_mlx.pitch import CENTS_PER_BIN, FIRST_BIN_CENTS
from rvc_mlx.spectral import HOP_LENGTH, N_FFT

# 5.2 million parameters; the recurrent layer keeps the size of the CUDA kernel.
CONFIG = RMVPEConfig(
    base_channels=16, levels=4, blocks=2, inter_layers=1, n_mels=128, gru_size=256
)

TARGET_CENTS = 25.0  # standard deviation of the target
BESIDE = (0.4, 0.15)  # height of the target 1 and 2 frames beside a voiced run


class PitchTrainer(nn.Module):
    """The network under the name that its weights have in the checkpoint."""

    def __init__(self, config: RMVPEConfig):
        super().__init__()
        self.rmvpe = RMVPE(config)
        initialise_gru(self.rmvpe.fc[0].gru)
        # Nearly every class of nearly every frame is 0.
        self.rmvpe.fc[1].bias = mx.full(self.rmvpe.fc[1].bias.shape, -5.0)

    def logits(self, mel: mx.array) -> mx.array:
        """Log-mel ``[B, T, n_mels]`` to ``[B, T, bins]`` before the sigmoid."""
        net = self.rmvpe
        states = both_directions(net.fc[0].gru, net.image_features(mel))
        return net.fc[1](states)


def initialise_gru(gru: GRU) -> None:
    """Uniform weights in ``+-1 / sqrt(hidden)``, as torch's; the class starts with zeros."""
    limit = gru.hidden_size**-0.5
    for name, value in gru.parameters().items():
        gru[name] = mx.random.uniform(-limit, limit, value.shape)


def both_directions(gru: GRU, x: mx.array) -> mx.array:
    """What ``gru(x)`` gives, both directions in one sequence of products.

    Args:
        gru: the layer.
        x: ``[B, T, C]``.

    Returns:
        ``[B, T, 2 * hidden]``.
    """
    H, T = gru.hidden_size, x.shape[1]
    ways = ("", "_reverse")
    w_ih, b_ih, w_hh, b_hh = (
        mx.stack([gru[f"{name}_l0{way}"] for way in ways])
        for name in ("weight_ih", "bias_ih", "weight_hh", "bias_hh")
    )
    inputs = mx.stack([x, x[:, ::-1]]).transpose(2, 0, 1, 3)  # [T, 2, B, C]
    projected = inputs @ w_ih.transpose(0, 2, 1) + b_ih[:, None]
    recurrent, offset = w_hh.transpose(0, 2, 1), b_hh[:, None]
    h = mx.zeros((2, x.shape[0], H), x.dtype)
    states = []
    for t in range(T):
        gates = h @ recurrent + offset
        rz = mx.sigmoid(projected[t, ..., : 2 * H] + gates[..., : 2 * H])
        r, z = rz[..., :H], rz[..., H:]
        n = mx.tanh(projected[t, ..., 2 * H :] + r * gates[..., 2 * H :])
        h = n + z * (h - n)
        states.append(h)
    out = mx.stack(states, axis=2)  # [2, B, T, H]
    return mx.concatenate([out[0], out[1][:, ::-1]], axis=-1)


class PitchBatches:
    """Batches of random clips with F0, a pure function of the step's number.

    Args:
        shards: those that have F0.
        batch_size: clips.
        frames: of each clip, 100 per second, a multiple of the network's.
        seed: of everything.
        strength: of the augmentation.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        batch_size: int,
        frames: int,
        seed: int,
        strength: Strength = PITCH,
    ):
        self._shards = [shard for shard in shards if len(shard.f0)]
        if not self._shards:
            raise ValueError("no shard with F0; make the pitch corpus first")
        lengths = np.array([len(shard.samples) for shard in self._shards], np.float64)
        self._odds = lengths / lengths.sum()
        self._size, self._frames, self._seed = batch_size, frames, seed
        self.length = (frames - 1) * HOP_LENGTH + N_FFT
        self._strength = strength

    def __call__(self, step: int) -> HostBatch:
        """The batch of a step: audio, its draws, ``f0`` and ``height`` ``[B, frames]``."""
        rng = np.random.default_rng([self._seed, step])
        B, span = self._size, source_length(self.length)
        draws = draw(rng, B, self.length, self._strength)
        source = np.zeros((B, span), np.int16)
        f0 = np.ones((B, self._frames), np.float32)
        height = np.zeros((B, self._frames), np.float32)
        for b, i in enumerate(rng.choice(len(self._shards), B, p=self._odds)):
            shard = self._shards[i]
            start = int(rng.integers(0, max(len(shard.samples) - span, 1)))
            part = shard.samples[start : start + span]
            source[b, : len(part)] = part
            centres = HOP_LENGTH * np.arange(self._frames) + N_FFT // 2
            times = start + FIRST_SAMPLE + draws.rate[b] * centres
            f0[b], voiced = f0_at(shard, times)
            f0[b] *= draws.rate[b]
            muted = (centres > draws.mute_from[b]) & (centres < draws.mute_to[b])
            height[b] = widened(voiced & ~muted) * ~muted
        batch = {f"draw.{name}": value for name, value in draws.arrays().items()}
        return batch | {
            "source": source,
            "f0": f0,
            "height": height,
            "key": random_key(rng),
        }


def f0_at(shard: Shard, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """F0 in Hz (also where unvoiced) and voicing at samples ``times`` of a shard."""
    place = np.clip(times / F0_HOP, 0, len(shard.f0) - 1)
    left = np.floor(place).astype(int)
    right = np.minimum(left + 1, len(shard.f0) - 1)
    part = place - left
    log_f0 = np.log(shard.f0[left]) * (1 - part) + np.log(shard.f0[right]) * part
    nearest = np.where(part < 0.5, left, right)
    return np.exp(log_f0).astype(np.float32), shard.voiced[nearest]


def widened(voiced: np.ndarray) -> np.ndarray:
    """Height of the target: 1 in voiced frames, ``BESIDE`` next to them, else 0."""
    height = voiced.astype(np.float32)
    for distance in range(len(BESIDE), 0, -1):
        near = np.zeros_like(voiced)
        near[distance:] |= voiced[:-distance]
        near[:-distance] |= voiced[distance:]
        height = np.where(near & ~voiced, BESIDE[distance - 1], height)
    return height


def prepare(host: HostBatch, length: int, n_mels: int) -> Batch:
    """What the compiled step takes: log-mel in place of the source and its draws."""
    batch = on_device(host)
    draws = {k[5:]: v for k, v in batch.items() if k.startswith("draw.")}
    source = batch["source"].astype(mx.float32) / 32768
    audio = augment(source, draws, length, batch["key"])
    return {
        "mel": log_mel(audio, n_mels),
        "f0": batch["f0"],
        "height": batch["height"],
    }


def targets(f0: mx.array, height: mx.array, bins: int) -> mx.array:
    """Gaussians ``[B, T, bins]`` round F0 ``[B, T]`` in Hz, ``height`` high."""
    cents = 1200 * mx.log2(f0 / 10)
    centres = FIRST_BIN_CENTS + CENTS_PER_BIN * mx.arange(bins)
    distance = (centres - cents[..., None]) / TARGET_CENTS
    return height[..., None] * mx.exp(-0.5 * mx.square(distance))


def pitch_loss(net: nn.Module, batch: Batch, progress: mx.array) -> Losses:
    """Binary cross entropy summed over the classes, and the share of right frames."""
    del progress
    logits = net.logits(batch["mel"]).astype(mx.float32)
    wanted = targets(batch["f0"], batch["height"], logits.shape[-1])
    # A logarithm of the sigmoid that does not overflow.
    entropy = (
        mx.maximum(logits, 0) - logits * wanted + mx.log1p(mx.exp(-mx.abs(logits)))
    )
    total = entropy.sum(axis=-1).mean()
    voiced = batch["height"] == 1
    near = mx.abs(logits.argmax(axis=-1) - wanted.argmax(axis=-1)) <= 2
    heard = mx.sigmoid(logits.max(axis=-1)) > 0.3
    return {
        "total": total,
        "right": (near & voiced).sum() / mx.maximum(voiced.sum(), 1),
        "voicing": (heard == (batch["height"] > 0.3)).mean(),
    }
