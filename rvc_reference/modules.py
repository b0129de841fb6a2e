"""The parts of the synthesizer before the vocoder: text encoder, flow, posterior.

Source: Kim et al. 2021 (VITS), with the key names of RVC voices. All lengths of a
batch are full: there are no masks. Inside, tensors are channels-first ``[B, C, T]``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rvc_reference.weight_norm import WNConv1d

WINDOW = 10  # reach of the relative positions, in frames
PITCH_ROWS = 256


class LayerNorm(nn.Module):
    """Layer norm over the channels of ``[B, C, T]``; parameters gamma and beta."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each frame."""
        y = F.layer_norm(
            x.transpose(1, 2), self.gamma.shape, self.gamma, self.beta, 1e-5
        )
        return y.transpose(1, 2)


def band_to_square(band: Tensor) -> Tensor:
    """Write ``[..., T, 2w+1]`` into ``[..., T, T]``: out[i, i + r - w] = band[i, r].

    A row that is one longer than the row it is read back with moves each next row
    one step to the right.
    """
    T, width = band.shape[-2:]
    reach = width // 2
    flat = F.pad(band, (0, T)).flatten(-2)[..., : T * (T + 2 * reach)]
    skewed = flat.unflatten(-1, (T, T + 2 * reach))
    return skewed[..., reach : reach + T]


def square_to_band(square: Tensor, reach: int) -> Tensor:
    """Read ``[..., T, 2w+1]`` out of ``[..., T, T]``: out[i, r] = square[i, i + r - w]."""
    T = square.shape[-1]
    flat = F.pad(F.pad(square, (reach, reach)).flatten(-2), (0, T))
    return flat.unflatten(-1, (T, T + 2 * reach + 1))[..., : 2 * reach + 1]


class RelativeAttention(nn.Module):
    """Self-attention with relative positions shared by the heads."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        width = channels // heads
        table = (1, 2 * WINDOW + 1, width)
        self.emb_rel_k = nn.Parameter(torch.randn(table) * width**-0.5)
        self.emb_rel_v = nn.Parameter(torch.randn(table) * width**-0.5)
        self.conv_q = nn.Conv1d(channels, channels, 1)
        self.conv_k = nn.Conv1d(channels, channels, 1)
        self.conv_v = nn.Conv1d(channels, channels, 1)
        self.conv_o = nn.Conv1d(channels, channels, 1)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.heads, -1)).transpose(2, 3)  # [B, H, T, D]

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, T]`` to ``[B, C, T]``."""
        q, k, v = (
            self._split(conv(x)) for conv in (self.conv_q, self.conv_k, self.conv_v)
        )
        q = q * q.shape[-1] ** -0.5
        scores = q @ k.transpose(2, 3) + band_to_square(q @ self.emb_rel_k[0].T)
        weights = torch.softmax(scores, dim=-1)
        y = weights @ v + square_to_band(weights, WINDOW) @ self.emb_rel_v[0]
        return self.conv_o(y.transpose(2, 3).flatten(1, 2))


class FeedForward(nn.Module):
    """Two convolutions with a ReLU between them."""

    def __init__(self, channels: int, inner: int, kernel: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.conv_1 = nn.Conv1d(channels, inner, kernel)
        self.conv_2 = nn.Conv1d(inner, channels, kernel)

    def _pad(self, x: Tensor) -> Tensor:
        return F.pad(x, ((self.kernel - 1) // 2, self.kernel // 2))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, T]`` to ``[B, C, T]``."""
        return self.conv_2(self._pad(torch.relu(self.conv_1(self._pad(x)))))


class AttentionStack(nn.Module):
    """Transformer layers with the norms after the additions."""

    def __init__(
        self, channels: int, inner: int, heads: int, layers: int, kernel: int
    ) -> None:
        super().__init__()
        each = range(layers)
        self.attn_layers = nn.ModuleList(
            RelativeAttention(channels, heads) for _ in each
        )
        self.norm_layers_1 = nn.ModuleList(LayerNorm(channels) for _ in each)
        self.ffn_layers = nn.ModuleList(
            FeedForward(channels, inner, kernel) for _ in each
        )
        self.norm_layers_2 = nn.ModuleList(LayerNorm(channels) for _ in each)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, T]`` to ``[B, C, T]``."""
        for attend, norm_1, feed, norm_2 in zip(
            self.attn_layers,
            self.norm_layers_1,
            self.ffn_layers,
            self.norm_layers_2,
            strict=True,
        ):
            x = norm_1(x + attend(x))
            x = norm_2(x + feed(x))
        return x


class TextEncoder(nn.Module):
    """Content features and coarse pitch to the prior's mean and log deviation.

    Args:
        features: 256 (v1) or 768 (v2).
        out: channels of the latent.
        hidden, inner, heads, layers, kernel: sizes of the transformer.
        f0: whether there is a pitch embedding.
    """

    def __init__(
        self,
        features: int,
        out: int,
        *,
        hidden: int,
        inner: int,
        heads: int,
        layers: int,
        kernel: int,
        f0: bool,
    ) -> None:
        super().__init__()
        self.scale = hidden**0.5
        self.emb_phone = nn.Linear(features, hidden)
        if f0:
            self.emb_pitch = nn.Embedding(PITCH_ROWS, hidden)
        self.encoder = AttentionStack(hidden, inner, heads, layers, kernel)
        self.proj = nn.Conv1d(hidden, 2 * out, 1)

    def forward(self, phone: Tensor, pitch: Tensor | None) -> tuple[Tensor, Tensor]:
        """Map ``[B, T, features]`` and ``[B, T]`` int to m, logs, each ``[B, out, T]``."""
        x = self.emb_phone(phone)
        if pitch is not None:
            x = x + self.emb_pitch(pitch)
        x = F.leaky_relu(x * self.scale, 0.1).transpose(1, 2)
        m, logs = self.proj(self.encoder(x)).chunk(2, dim=1)
        return m, logs


class WN(nn.Module):
    """Gated convolutions with a global condition (WaveNet style)."""

    def __init__(self, hidden: int, kernel: int, layers: int, gin: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.in_layers = nn.ModuleList(
            WNConv1d(hidden, 2 * hidden, kernel, padding=kernel // 2)
            for _ in range(layers)
        )
        widths = [2 * hidden] * (layers - 1) + [hidden]
        self.res_skip_layers = nn.ModuleList(
            WNConv1d(hidden, width, 1) for width in widths
        )
        self.cond_layer = WNConv1d(gin, 2 * hidden * layers, 1)

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        """Map ``[B, hidden, T]`` with g ``[B, gin, 1]`` to ``[B, hidden, T]``."""
        total = 0
        conditions = self.cond_layer(g).chunk(len(self.in_layers), dim=1)
        for layer, mix, condition in zip(
            self.in_layers, self.res_skip_layers, conditions, strict=True
        ):
            gate, filt = (layer(x) + condition).chunk(2, dim=1)
            y = mix(torch.tanh(gate) * torch.sigmoid(filt))
            if mix is self.res_skip_layers[-1]:
                return total + y
            x = x + y[:, : self.hidden]
            total = total + y[:, self.hidden :]
        raise ValueError("WN needs at least one layer")


class CouplingLayer(nn.Module):
    """Mean-only affine coupling: the second half moves by a function of the first."""

    def __init__(
        self, channels: int, hidden: int, kernel: int, layers: int, gin: int
    ) -> None:
        super().__init__()
        self.pre = nn.Conv1d(channels // 2, hidden, 1)
        self.enc = WN(hidden, kernel, layers, gin)
        self.post = nn.Conv1d(hidden, channels // 2, 1)

    def forward(self, x: Tensor, g: Tensor, sign: int) -> Tensor:
        """Add (``sign`` 1) or take away (-1) the mean of ``[B, C, T]``."""
        a, b = x.chunk(2, dim=1)
        return torch.cat([a, b + sign * self.post(self.enc(self.pre(a), g))], dim=1)


class Flip(nn.Module):
    """Reverse the channels."""

    def forward(self, x: Tensor) -> Tensor:
        """Give ``[B, C, T]`` with C reversed."""
        return x.flip(1)


class Flow(nn.Module):
    """Four couplings at the even places, four flips at the odd ones."""

    def __init__(self, channels: int, hidden: int, gin: int) -> None:
        super().__init__()
        pairs = ((CouplingLayer(channels, hidden, 5, 3, gin), Flip()) for _ in range(4))
        self.flows = nn.ModuleList(module for pair in pairs for module in pair)

    def forward(self, z: Tensor, g: Tensor) -> Tensor:
        """Training direction: z ``[B, C, T]`` to the prior's space."""
        for module in self.flows:
            z = module(z) if isinstance(module, Flip) else module(z, g, 1)
        return z

    def inverse(self, z: Tensor, g: Tensor) -> Tensor:
        """Inference direction: from the prior's space to z, flips first."""
        for module in reversed(self.flows):
            z = module(z) if isinstance(module, Flip) else module(z, g, -1)
        return z


class PosteriorEncoder(nn.Module):
    """Linear magnitude spectrogram to the posterior (training only)."""

    def __init__(self, bins: int, out: int, hidden: int, gin: int) -> None:
        super().__init__()
        self.pre = nn.Conv1d(bins, hidden, 1)
        self.enc = WN(hidden, 5, 16, gin)
        self.proj = nn.Conv1d(hidden, 2 * out, 1)

    def forward(
        self, spec: Tensor, g: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Map ``[B, bins, T]`` and noise ``[B, out, T]`` to z, m, logs ``[B, out, T]``."""
        m, logs = self.proj(self.enc(self.pre(spec), g)).chunk(2, dim=1)
        return m + noise * torch.exp(logs), m, logs
