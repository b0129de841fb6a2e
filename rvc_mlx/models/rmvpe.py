"""RMVPE: pitch salience from a log-mel spectrogram (deep U-Net, then a recurrent layer).

Source: Wei et al. 2023, "RMVPE: A Robust Model for Vocal Pitch Estimation".
The image is ``[B, T, n_mels, C]``: height is time, width is the mel axis.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np


@dataclass(frozen=True)
class RMVPEConfig:
    """Sizes of an RMVPE network; the defaults are the public one.

    Attributes:
        base_channels: channels of the first encoder level, doubled at each level.
        levels: poolings, each halving time and mel; frames are padded to ``2**levels``.
        blocks: residual blocks per level.
        inter_layers: levels at the bottom, without pooling.
        n_mels: mel bands.
        gru_size: units of the recurrent layer in each direction.
        bins: pitch classes of 20 cents.
    """

    base_channels: int = 16
    levels: int = 5
    blocks: int = 4
    inter_layers: int = 4
    n_mels: int = 128
    gru_size: int = 256
    bins: int = 360

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray]) -> RMVPEConfig:
        """Read the sizes off a state dict in torch layout."""

        def count(pattern: str) -> int:
            return len({m[1] for name in tensors if (m := re.match(pattern, name))})

        channels = tensors["cnn.weight"].shape
        return cls(
            base_channels=channels[1],
            levels=count(r"unet\.encoder\.layers\.(\d+)\."),
            blocks=count(r"unet\.encoder\.layers\.0\.conv\.(\d+)\."),
            inter_layers=count(r"unet\.intermediate\.layers\.(\d+)\."),
            n_mels=tensors["fc.0.gru.weight_ih_l0"].shape[1] // channels[0],
            gru_size=tensors["fc.0.gru.weight_hh_l0"].shape[1],
            bins=tensors["fc.1.weight"].shape[0],
        )


class ConvBlockRes(nn.Module):
    """Two 3x3 convolutions with batch norm and ReLU, and a shortcut; no ReLU after it."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv = [
            nn.Conv2d(c_in, c_out, 3, padding=1, bias=False),
            nn.BatchNorm(c_out),
            nn.ReLU(),
            nn.Conv2d(c_out, c_out, 3, padding=1, bias=False),
            nn.BatchNorm(c_out),
            nn.ReLU(),
        ]
        if c_in != c_out:
            self.shortcut = nn.Conv2d(c_in, c_out, 1)

    def __call__(self, x: mx.array) -> mx.array:
        """``[B, T, M, C_in]`` to ``[B, T, M, C_out]``."""
        y = x
        for layer in self.conv:
            y = layer(y)
        return y + (self.shortcut(x) if "shortcut" in self else x)


class ResEncoderBlock(nn.Module):
    """A run of residual blocks at one resolution."""

    def __init__(self, c_in: int, c_out: int, blocks: int):
        super().__init__()
        self.conv: list[nn.Module] = [
            ConvBlockRes(c_in if i == 0 else c_out, c_out) for i in range(blocks)
        ]

    def __call__(self, x: mx.array) -> mx.array:
        """``[B, T, M, C_in]`` to ``[B, T, M, C_out]``."""
        for block in self.conv:
            x = block(x)
        return x


class Encoder(nn.Module):
    """Contracting path; the skip of each level is taken before its pooling."""

    def __init__(self, config: RMVPEConfig):
        super().__init__()
        self.bn: nn.Module = nn.BatchNorm(1)
        widths = [1, *(config.base_channels << i for i in range(config.levels))]
        self.layers = [
            ResEncoderBlock(a, b, config.blocks) for a, b in itertools.pairwise(widths)
        ]
        self._pool: Callable[[mx.array], mx.array] = nn.AvgPool2d(2, stride=2)

    def __call__(self, x: mx.array) -> tuple[mx.array, list[mx.array]]:
        """``[B, T, M, 1]`` to the bottom image and the skips, top level first."""
        x = self.bn(x)
        skips = []
        for layer in self.layers:
            x = layer(x)
            skips.append(x)
            x = self._pool(x)
        return x, skips


class Intermediate(nn.Module):
    """The levels at the bottom, without pooling."""

    def __init__(self, config: RMVPEConfig):
        super().__init__()
        c_in = config.base_channels << (config.levels - 1)
        self.layers = [
            ResEncoderBlock(c_in if i == 0 else 2 * c_in, 2 * c_in, config.blocks)
            for i in range(config.inter_layers)
        ]

    def __call__(self, x: mx.array) -> mx.array:
        """``[B, T', M', C]`` to ``[B, T', M', 2 C]``."""
        for layer in self.layers:
            x = layer(x)
        return x


class ResDecoderBlock(nn.Module):
    """Double the resolution, join the skip, refine."""

    def __init__(self, c_in: int, c_out: int, blocks: int):
        super().__init__()
        self.conv1: list[nn.Module] = [
            # output_padding computes one more row and column; they are not zeros.
            nn.ConvTranspose2d(
                c_in, c_out, 3, stride=2, padding=1, output_padding=1, bias=False
            ),
            nn.BatchNorm(c_out),
            nn.ReLU(),
        ]
        self.conv2: list[nn.Module] = [
            ConvBlockRes(2 * c_out if i == 0 else c_out, c_out) for i in range(blocks)
        ]

    def __call__(self, x: mx.array, skip: mx.array) -> mx.array:
        """``[B, T, M, C_in]`` and ``[B, 2 T, 2 M, C_out]`` to ``[B, 2 T, 2 M, C_out]``."""
        for layer in self.conv1:
            x = layer(x)
        x = mx.concatenate([x, skip], axis=-1)
        for block in self.conv2:
            x = block(x)
        return x


class Decoder(nn.Module):
    """Expanding path."""

    def __init__(self, config: RMVPEConfig):
        super().__init__()
        widths = [config.base_channels << i for i in range(config.levels, -1, -1)]
        self.layers = [
            ResDecoderBlock(a, b, config.blocks) for a, b in itertools.pairwise(widths)
        ]

    def __call__(self, x: mx.array, skips: list[mx.array]) -> mx.array:
        """Bottom image and skips to ``[B, T, M, base_channels]``."""
        for layer, skip in zip(self.layers, reversed(skips), strict=True):
            x = layer(x, skip)
        return x


class DeepUNet(nn.Module):
    """Encoder, bottom, decoder."""

    def __init__(self, config: RMVPEConfig):
        super().__init__()
        self.encoder = Encoder(config)
        self.intermediate = Intermediate(config)
        self.decoder = Decoder(config)

    def __call__(self, x: mx.array) -> mx.array:
        """``[B, T, M, 1]`` to ``[B, T, M, base_channels]``, T a multiple of 2**levels."""
        x, skips = self.encoder(x)
        return self.decoder(self.intermediate(x), skips)


_DIRECTIONS = ("", "_reverse")  # suffixes of the weights


class GRU(nn.Module):
    """One bidirectional recurrent layer, weights named as in ``torch.nn.GRU``.

    Gates are stacked r, z, n; the candidate is
    ``tanh(W_in x + b_in + r * (W_hn h + b_hn))``.
    """

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        for suffix in _DIRECTIONS:
            self[f"weight_ih_l0{suffix}"] = mx.zeros((3 * hidden_size, input_size))
            self[f"weight_hh_l0{suffix}"] = mx.zeros((3 * hidden_size, hidden_size))
            self[f"bias_ih_l0{suffix}"] = mx.zeros((3 * hidden_size,))
            self[f"bias_hh_l0{suffix}"] = mx.zeros((3 * hidden_size,))

    @property
    def hidden_size(self) -> int:
        """Units in each direction."""
        return self["weight_hh_l0"].shape[1]

    def stacked(self) -> list[np.ndarray]:
        """Weights as float32 numpy, both directions stacked on a new first axis."""
        return [
            np.stack(
                [
                    np.array(self[f"{name}_l0{suffix}"].astype(mx.float32))
                    for suffix in _DIRECTIONS
                ]
            )
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        ]

    def _direction(self, x: mx.array, suffix: str) -> list[mx.array]:
        w_hh, b_hh = self[f"weight_hh_l0{suffix}"], self[f"bias_hh_l0{suffix}"]
        projected = mx.addmm(
            self[f"bias_ih_l0{suffix}"], x, self[f"weight_ih_l0{suffix}"].T
        )
        B, T, _ = x.shape
        size = w_hh.shape[1]
        h = mx.zeros((B, size), x.dtype)
        states: list[mx.array] = [h] * T
        for t in reversed(range(T)) if suffix else range(T):
            gates = mx.addmm(b_hh, h, w_hh.T)
            x_t = projected[:, t]
            rz = mx.sigmoid(x_t[:, : 2 * size] + gates[:, : 2 * size])
            r, z = rz[:, :size], rz[:, size:]
            n = mx.tanh(x_t[:, 2 * size :] + r * gates[:, 2 * size :])
            h = (1 - z) * n + z * h
            states[t] = h
        return states

    def __call__(self, x: mx.array) -> mx.array:
        """``[B, T, input_size]`` to ``[B, T, 2 * hidden_size]``, forward half first."""
        return mx.concatenate(
            [mx.stack(self._direction(x, suffix), axis=1) for suffix in _DIRECTIONS],
            axis=-1,
        )


class BiGRU(nn.Module):
    """Holder of the recurrent layer, as in the checkpoint (``fc.0.gru``)."""

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        self.gru = GRU(input_size, hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        """``[B, T, input_size]`` to ``[B, T, 2 * hidden_size]``."""
        return self.gru(x)


class RMVPE(nn.Module):
    """Salience of 360 pitch classes per 10 ms frame.

    The three steps are separate because the recurrent one has its own implementation
    on each back end: ``image_features``, ``fc[0]``, ``classify``.
    """

    def __init__(self, config: RMVPEConfig):
        super().__init__()
        self.config = config
        self.unet = DeepUNet(config)
        self.cnn: nn.Module = nn.Conv2d(config.base_channels, 3, 3, padding=1)
        self.fc = [
            BiGRU(3 * config.n_mels, config.gru_size),
            nn.Linear(2 * config.gru_size, config.bins),
        ]

    def image_features(self, mel: mx.array) -> mx.array:
        """Log-mel ``[B, T, n_mels]`` to ``[B, T, 3 * n_mels]``, channel slowest."""
        x = self.cnn(self.unet(mel[..., None]))
        return x.transpose(0, 1, 3, 2).flatten(-2)

    def classify(self, states: mx.array) -> mx.array:
        """Recurrent states ``[B, T, 2 * gru_size]`` to salience ``[B, T, bins]``, 0..1."""
        return mx.sigmoid(self.fc[1](states))

    def __call__(self, mel: mx.array) -> mx.array:
        """Log-mel ``[B, T, n_mels]``, T a multiple of 2**levels, to ``[B, T, bins]``."""
        return self.classify(self.fc[0](self.image_features(mel)))


def sanitize(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Drop the batch norms' step counters; names and layouts stay the checkpoint's."""
    return {
        name: value
        for name, value in tensors.items()
        if not name.endswith("num_batches_tracked")
    }


def is_rmvpe(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether a state dict is an RMVPE network."""
    return "unet.encoder.bn.weight" in tensors and "fc.0.gru.weight_ih_l0" in tensors
