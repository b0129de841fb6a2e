"""The VITS half of the synthesizer: text encoder, flow, posterior encoder.

Source: Kim et al. 2021 (VITS); attention with relative positions: Shaw et al. 2018.
All sequences are ``[B, T, C]`` at 100 frames per second; ``mask`` is ``[B, T, 1]``, 1 on
real frames, and may be left out when every frame is real.
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn

from rvc_mlx.models.layers import LayerNorm, gated, leaky_relu

PRIOR_NOISE_SCALE = 0.66666  # temperature of the prior sample at inference
RELATIVE_WINDOW = 10  # frames of relative position on each side

_MASKED = 1e4  # taken off the scores of padding


def _masked(x: mx.array, mask: mx.array | None) -> mx.array:
    return x if mask is None else x * mask


class RelativeAttention(nn.Module):
    """Self-attention whose scores and values know the offset up to 10 frames."""

    def __init__(self, channels: int, num_heads: int):
        super().__init__()
        self.conv_q = nn.Conv1d(channels, channels, 1)
        self.conv_k = nn.Conv1d(channels, channels, 1)
        self.conv_v = nn.Conv1d(channels, channels, 1)
        self.conv_o = nn.Conv1d(channels, channels, 1)
        offsets = 2 * RELATIVE_WINDOW + 1
        self.emb_rel_k = mx.zeros((1, offsets, channels // num_heads))
        self.emb_rel_v = mx.zeros((1, offsets, channels // num_heads))
        self._num_heads = num_heads

    def __call__(self, x: mx.array, mask: mx.array | None = None) -> mx.array:
        """``[B, T, C]`` to ``[B, T, C]``.

        Keys and values get ``w`` frames of padding on both sides, so that the offsets
        -w..w of query ``i`` are the columns ``i .. i + 2 w``, for every query alike.
        """
        B, T, C = x.shape
        w = RELATIVE_WINDOW
        near = (mx.arange(T)[:, None] + mx.arange(2 * w + 1))[None, None]
        query = self._heads(self.conv_q(x)) * (self._num_heads / C) ** 0.5
        pads = [(0, 0), (0, 0), (w, w), (0, 0)]
        key, value = (
            mx.pad(self._heads(y), pads) for y in (self.conv_k(x), self.conv_v(x))
        )
        real = mx.ones((B, T, 1), x.dtype) if mask is None else mask
        lower = (mx.pad(real[:, None], pads) - 1) * _MASKED  # [B, 1, T + 2 w, 1]
        scores = query @ key.swapaxes(-1, -2) + lower.swapaxes(-1, -2)
        offsets = mx.take_along_axis(scores, near, axis=-1)
        offsets = offsets + query @ self.emb_rel_k[0].T
        weights = mx.softmax(mx.put_along_axis(scores, near, offsets, axis=-1), axis=-1)
        nearby = mx.take_along_axis(weights, near, axis=-1)
        y = weights @ value + nearby @ self.emb_rel_v[0]
        return self.conv_o(y.swapaxes(1, 2).reshape(B, T, C))

    def _heads(self, y: mx.array) -> mx.array:
        """``[B, T, C]`` to ``[B, H, T, C / H]``."""
        return y.reshape(*y.shape[:2], self._num_heads, -1).swapaxes(1, 2)


class FFN(nn.Module):
    """Two convolutions with a ReLU between them."""

    def __init__(self, channels: int, filter_channels: int, kernel_size: int):
        super().__init__()
        pad = kernel_size // 2
        self.conv_1 = nn.Conv1d(channels, filter_channels, kernel_size, padding=pad)
        self.conv_2 = nn.Conv1d(filter_channels, channels, kernel_size, padding=pad)

    def __call__(self, x: mx.array, mask: mx.array | None = None) -> mx.array:
        """``[B, T, C]`` to ``[B, T, C]``."""
        x = nn.relu(self.conv_1(_masked(x, mask)))
        return _masked(self.conv_2(_masked(x, mask)), mask)


class Encoder(nn.Module):
    """Post-LN transformer with relative attention and convolutional feed-forward."""

    def __init__(
        self,
        channels: int,
        filter_channels: int,
        num_heads: int,
        num_layers: int,
        kernel_size: int,
    ):
        super().__init__()
        layers = range(num_layers)
        self.attn_layers: list[nn.Module] = [
            RelativeAttention(channels, num_heads) for _ in layers
        ]
        self.norm_layers_1 = [LayerNorm(channels) for _ in layers]
        self.ffn_layers: list[nn.Module] = [
            FFN(channels, filter_channels, kernel_size) for _ in layers
        ]
        self.norm_layers_2 = [LayerNorm(channels) for _ in layers]

    def __call__(self, x: mx.array, mask: mx.array | None = None) -> mx.array:
        """``[B, T, C]`` to ``[B, T, C]``."""
        x = _masked(x, mask)
        for attend, norm_1, feed, norm_2 in zip(
            self.attn_layers,
            self.norm_layers_1,
            self.ffn_layers,
            self.norm_layers_2,
            strict=True,
        ):
            x = norm_1(x + attend(x, mask))
            x = norm_2(x + feed(x, mask))
        return _masked(x, mask)


class TextEncoder(nn.Module):
    """Content features and coarse pitch to the prior's mean and log deviation."""

    def __init__(
        self,
        feature_size: int,
        out_channels: int,
        hidden_channels: int,
        filter_channels: int,
        num_heads: int,
        num_layers: int,
        kernel_size: int,
        f0: bool,
    ):
        super().__init__()
        self.emb_phone = nn.Linear(feature_size, hidden_channels)
        if f0:
            self.emb_pitch = nn.Embedding(256, hidden_channels)
        self.encoder: nn.Module = Encoder(
            hidden_channels, filter_channels, num_heads, num_layers, kernel_size
        )
        self.proj = nn.Conv1d(hidden_channels, 2 * out_channels, 1)
        self._scale = math.sqrt(hidden_channels)

    def __call__(
        self,
        features: mx.array,
        pitch: mx.array | None = None,
        mask: mx.array | None = None,
    ) -> tuple[mx.array, mx.array]:
        """Encode.

        Args:
            features: ``[B, T, feature_size]`` float.
            pitch: coarse pitch ``[B, T]`` int32 in 1..255; left out without F0.
            mask: ``[B, T, 1]`` or None.

        Returns:
            Mean and log deviation, each ``[B, T, out_channels]``.
        """
        x = self.emb_phone(features)
        if pitch is not None:
            x = x + self.emb_pitch(pitch)
        x = leaky_relu(x * self._scale)
        stats = _masked(self.proj(self.encoder(x, mask)), mask)
        mean, log_std = mx.split(stats, 2, axis=-1)
        return mean, log_std


class WN(nn.Module):
    """WaveNet-like stack of gated convolutions, conditioned on the speaker."""

    def __init__(
        self, channels: int, kernel_size: int, num_layers: int, gin_channels: int
    ):
        super().__init__()
        pad = kernel_size // 2
        self.cond_layer = nn.Conv1d(gin_channels, 2 * channels * num_layers, 1)
        self.in_layers = [
            nn.Conv1d(channels, 2 * channels, kernel_size, padding=pad)
            for _ in range(num_layers)
        ]
        self._gate = gated
        # The last layer feeds the output only.
        self.res_skip_layers = [
            nn.Conv1d(channels, channels * (2 if i < num_layers - 1 else 1), 1)
            for i in range(num_layers)
        ]

    def __call__(
        self, x: mx.array, g: mx.array, mask: mx.array | None = None
    ) -> mx.array:
        """``[B, T, C]`` and speaker ``[B, 1, gin]`` to ``[B, T, C]``."""
        last = len(self.in_layers) - 1
        conditions = mx.split(self.cond_layer(g), last + 1, axis=-1)
        output = mx.zeros_like(x)
        for i, (convolve, res_skip) in enumerate(
            zip(self.in_layers, self.res_skip_layers, strict=True)
        ):
            skip = res_skip(self._gate(convolve(x) + conditions[i]))
            if i < last:
                residual, skip = mx.split(skip, 2, axis=-1)
                x = _masked(x + residual, mask)
            output = output + skip
        return _masked(output, mask)


class ResidualCouplingLayer(nn.Module):
    """Mean-only coupling: one half of the channels shifts the other."""

    def __init__(
        self,
        channels: int,
        hidden_channels: int,
        kernel_size: int,
        num_layers: int,
        gin_channels: int,
    ):
        super().__init__()
        self.pre = nn.Conv1d(channels // 2, hidden_channels, 1)
        self.enc = WN(hidden_channels, kernel_size, num_layers, gin_channels)
        self.post = nn.Conv1d(hidden_channels, channels // 2, 1)

    def __call__(
        self,
        x: mx.array,
        g: mx.array,
        mask: mx.array | None = None,
        reverse: bool = False,
    ) -> mx.array:
        """``[B, T, C]`` to ``[B, T, C]``."""
        x0, x1 = mx.split(x, 2, axis=-1)
        h = self.enc(_masked(self.pre(x0), mask), g, mask)
        shift = _masked(self.post(h), mask)
        x1 = _masked(x1 - shift, mask) if reverse else shift + _masked(x1, mask)
        return mx.concatenate([x0, x1], axis=-1)


class Flip(nn.Module):
    """Reverse the channels, so that the next coupling shifts the other half."""

    def __call__(
        self,
        x: mx.array,
        g: mx.array,  # noqa: ARG002 - one signature for all flows
        mask: mx.array | None = None,  # noqa: ARG002
        reverse: bool = False,  # noqa: ARG002
    ) -> mx.array:
        """``[B, T, C]`` to ``[B, T, C]``."""
        return x[..., ::-1]


class ResidualCouplingFlow(nn.Module):
    """Four couplings with flips between; inverted at inference.

    Inverted, a frame of the result depends on ``receptive_field`` frames to each side.
    """

    KERNEL_SIZE = 5
    NUM_LAYERS = 3
    NUM_FLOWS = 4

    def __init__(self, channels: int, hidden_channels: int, gin_channels: int):
        super().__init__()
        self.flows: list[nn.Module] = []
        for _ in range(self.NUM_FLOWS):
            self.flows += [
                ResidualCouplingLayer(
                    channels,
                    hidden_channels,
                    self.KERNEL_SIZE,
                    self.NUM_LAYERS,
                    gin_channels,
                ),
                Flip(),
            ]

    @property
    def receptive_field(self) -> int:
        """Frames of context on each side (24)."""
        return self.NUM_FLOWS * self.NUM_LAYERS * (self.KERNEL_SIZE // 2)

    def __call__(
        self,
        x: mx.array,
        g: mx.array,
        mask: mx.array | None = None,
        reverse: bool = False,
    ) -> mx.array:
        """``[B, T, C]`` and speaker ``[B, 1, gin]`` to ``[B, T, C]``."""
        for flow in reversed(self.flows) if reverse else self.flows:
            x = flow(x, g, mask, reverse)
        return x


class PosteriorEncoder(nn.Module):
    """Linear spectrogram to the posterior's mean and log deviation (training only)."""

    def __init__(
        self,
        spec_channels: int,
        out_channels: int,
        hidden_channels: int,
        gin_channels: int,
    ):
        super().__init__()
        self.pre = nn.Conv1d(spec_channels, hidden_channels, 1)
        self.enc = WN(hidden_channels, 5, 16, gin_channels)
        self.proj = nn.Conv1d(hidden_channels, 2 * out_channels, 1)

    def __call__(
        self,
        spec: mx.array,
        g: mx.array,
        noise: mx.array,
        mask: mx.array | None = None,
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Encode and sample.

        Args:
            spec: magnitudes ``[B, T, spec_channels]``.
            g: speaker ``[B, 1, gin]``.
            noise: standard normal ``[B, T, out_channels]``.
            mask: ``[B, T, 1]`` or None.

        Returns:
            Sample, mean and log deviation, each ``[B, T, out_channels]``.
        """
        x = self.enc(_masked(self.pre(spec), mask), g, mask)
        mean, log_std = mx.split(_masked(self.proj(x), mask), 2, axis=-1)
        return _masked(mean + noise * mx.exp(log_std), mask), mean, log_std
