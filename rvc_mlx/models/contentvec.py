"""ContentVec / HuBERT base: what is said, 50 frames per second, little of who says it.

Source: Hsu et al. 2021 (HuBERT), Qian et al. 2022 (ContentVec); layout of
``transformers`` ``HubertModel`` (feature extractor with a group norm, post-LN layers).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

HOP_LENGTH = 320  # samples of 16 kHz audio per frame
RECEPTIVE_FIELD = 400  # samples seen by one frame of the convolutional front end

# Stride and kernel of the seven convolutions; the product of the strides is the hop.
_CONV_LAYERS = ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2))
FIRST_STRIDE = _CONV_LAYERS[0][1]  # the first layer's output is the largest


@dataclass(frozen=True)
class ContentVecConfig:
    """Sizes of a ContentVec network; the defaults are HuBERT base.

    Attributes:
        conv_dim: channels of the convolutional front end.
        hidden_size: width of the transformer, and of the features of its layers.
        num_layers: transformer layers.
        num_heads: attention heads.
        intermediate_size: width inside the feed-forward blocks.
        pos_conv_kernel: taps of the positional convolution (even).
        pos_conv_groups: its groups.
        final_proj_size: width of ``final_proj``, 0 when the file has none.
        bottleneck_size: width of v2 features when a narrow layer follows the last
            layer, 0 in public encoders, which have none.
        centred: whether narrow features lose their mean over time: what lasts for a
            whole utterance is the speaker (van Niekerk et al. 2021). A file says so by
            a ``bottleneck`` without bias, which would have no effect.
    """

    conv_dim: int = 512
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    pos_conv_kernel: int = 128
    pos_conv_groups: int = 16
    final_proj_size: int = 256
    bottleneck_size: int = 0
    centred: bool = False

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, object]
    ) -> ContentVecConfig:
        """Read the sizes off sanitized tensors (torch layout).

        Args:
            tensors: tensors under transformers names, weight norm folded.
            metadata: ``num_heads`` is taken from here when present, else 64 wide.
        """
        hidden, group_width, kernel = tensors[
            "encoder.pos_conv_embed.conv.weight"
        ].shape
        layers = {
            m[1] for n in tensors if (m := re.match(r"encoder\.layers\.(\d+)", n))
        }
        dense = tensors["encoder.layers.0.feed_forward.intermediate_dense.weight"]
        projection = tensors.get("final_proj.weight")
        bottleneck = tensors.get("bottleneck.weight")
        return cls(
            conv_dim=tensors["feature_extractor.conv_layers.0.conv.weight"].shape[0],
            hidden_size=hidden,
            num_layers=len(layers),
            num_heads=int(str(metadata.get("num_heads", hidden // 64))),
            intermediate_size=dense.shape[0],
            pos_conv_kernel=kernel,
            pos_conv_groups=hidden // group_width,
            final_proj_size=0 if projection is None else projection.shape[0],
            bottleneck_size=0 if bottleneck is None else bottleneck.shape[0],
            centred=bottleneck is not None and "bottleneck.bias" not in tensors,
        )

    def feature_size(self, version: str) -> int:
        """Width of the features for a voice of ``version``, 0 if there are none."""
        if version == "v1":
            return self.final_proj_size
        return self.bottleneck_size or self.hidden_size


class TimeNorm(nn.Module):
    """Group norm with one channel per group: statistics of each channel over time."""

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.weight = mx.ones((channels,))
        self.bias = mx.zeros((channels,))
        self._eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        """``[B, L, C]`` to ``[B, L, C]``."""
        exact = x.astype(mx.float32)  # sums over 10^5 samples
        centred = exact - exact.mean(axis=1, keepdims=True)
        variance = mx.square(centred).mean(axis=1, keepdims=True)
        normal = (centred * mx.rsqrt(variance + self._eps)).astype(x.dtype)
        return normal * self.weight + self.bias


class ConvLayer(nn.Module):
    """One layer of the front end: convolution, optional norm over time, GELU."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, norm: bool):
        super().__init__()
        self.conv = nn.Conv1d(c_in, c_out, kernel, stride=stride, bias=False)
        if norm:
            self.layer_norm = TimeNorm(c_out)

    def __call__(self, x: mx.array) -> mx.array:
        """``[B, L, C_in]`` to ``[B, L', C_out]``."""
        x = self.conv(x)
        if "layer_norm" in self:
            x = self.layer_norm(x)
        return nn.gelu(x)


class FeatureExtractor(nn.Module):
    """Seven strided convolutions, 16 kHz samples to 50 frames per second."""

    def __init__(self, config: ContentVecConfig):
        super().__init__()
        self.conv_layers: list[nn.Module] = [
            ConvLayer(1 if i == 0 else config.conv_dim, config.conv_dim, k, s, i == 0)
            for i, (k, s) in enumerate(_CONV_LAYERS)
        ]

    def __call__(self, audio: mx.array) -> mx.array:
        """Audio ``[B, L]`` to ``[B, F, conv_dim]``."""
        x = audio[:, :, None]
        for layer in self.conv_layers:
            x = layer(x)
        return x


class FeatureProjection(nn.Module):
    """Layer norm and a linear map to the transformer's width."""

    def __init__(self, config: ContentVecConfig):
        super().__init__()
        self.layer_norm = nn.LayerNorm(config.conv_dim)
        self.projection = nn.Linear(config.conv_dim, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        """``[B, F, conv_dim]`` to ``[B, F, hidden_size]``."""
        return self.projection(self.layer_norm(x))


class PositionalConvEmbedding(nn.Module):
    """Relative position by a long grouped convolution; the even kernel's extra frame goes."""

    def __init__(self, config: ContentVecConfig):
        super().__init__()
        self.conv = nn.Conv1d(
            config.hidden_size,
            config.hidden_size,
            config.pos_conv_kernel,
            padding=config.pos_conv_kernel // 2,
            groups=config.pos_conv_groups,
        )

    def __call__(self, x: mx.array) -> mx.array:
        """``[B, F, C]`` to ``[B, F, C]``."""
        return nn.gelu(self.conv(x)[:, :-1])


class Attention(nn.Module):
    """Multi-head self-attention over all frames, no mask."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)
        self._num_heads = num_heads

    def __call__(self, x: mx.array) -> mx.array:
        """``[B, F, C]`` to ``[B, F, C]``."""
        q, k, v = (
            mx.unflatten(project(x), -1, (self._num_heads, -1)).transpose(0, 2, 1, 3)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )  # [B, heads, F, C / heads]
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5)
        return self.out_proj(y.transpose(0, 2, 1, 3).flatten(-2))


class FeedForward(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, config: ContentVecConfig):
        super().__init__()
        self.intermediate_dense = nn.Linear(
            config.hidden_size, config.intermediate_size
        )
        self.output_dense = nn.Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        """``[B, F, C]`` to ``[B, F, C]``."""
        return self.output_dense(nn.gelu(self.intermediate_dense(x)))


class EncoderLayer(nn.Module):
    """Post-LN transformer layer."""

    def __init__(self, config: ContentVecConfig):
        super().__init__()
        self.attention: nn.Module = Attention(config.hidden_size, config.num_heads)
        self.layer_norm = nn.LayerNorm(config.hidden_size)
        self.feed_forward = FeedForward(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        """``[B, F, C]`` to ``[B, F, C]``."""
        x = self.layer_norm(x + self.attention(x))
        return self.final_layer_norm(x + self.feed_forward(x))


class Encoder(nn.Module):
    """Positional convolution, layer norm, transformer layers."""

    def __init__(self, config: ContentVecConfig):
        super().__init__()
        self.pos_conv_embed: nn.Module = PositionalConvEmbedding(config)
        self.layer_norm = nn.LayerNorm(config.hidden_size)
        self.layers = [EncoderLayer(config) for _ in range(config.num_layers)]

    def __call__(self, x: mx.array, num_layers: int) -> mx.array:
        """``[B, F, C]`` to the output of layer ``num_layers`` (1-based), same shape."""
        x = self.layer_norm(x + self.pos_conv_embed(x))
        for layer in self.layers[:num_layers]:
            x = layer(x)
        return x


class ContentVec(nn.Module):
    """Content features of 16 kHz speech, one frame per 320 samples.

    RVC v1 voices take layer 9 through ``final_proj`` (256 wide), v2 voices the last
    layer as it is (768 wide). Shorter networks take v1 features at three quarters of
    their depth.
    """

    def __init__(self, config: ContentVecConfig):
        super().__init__()
        self.config = config
        self.feature_extractor: nn.Module = FeatureExtractor(config)
        self.feature_projection = FeatureProjection(config)
        self.encoder: nn.Module = Encoder(config)
        if config.final_proj_size:
            self.final_proj = nn.Linear(config.hidden_size, config.final_proj_size)
        if config.bottleneck_size:
            self.bottleneck = nn.Linear(
                config.hidden_size, config.bottleneck_size, bias=not config.centred
            )

    def hidden_state(self, audio: mx.array, num_layers: int) -> mx.array:
        """Audio ``[B, L]`` float32 to the output ``[B, F, C]`` of a layer (0 = input)."""
        x = self.feature_projection(self.feature_extractor(audio))
        return self.encoder(x, num_layers)

    def __call__(self, audio: mx.array, version: str = "v2") -> mx.array:
        """Features for a voice.

        Args:
            audio: ``[B, L]`` float32 at 16 kHz, -1..1, not normalised, L >= 400.
            version: ``"v1"`` or ``"v2"``.

        Returns:
            ``[B, F, feature_size(version)]``, ``F = (L - 400) // 320 + 1``.
        """
        if version == "v1":
            depth = self.config.num_layers * 3 // 4
            return self.final_proj(self.hidden_state(audio, depth))
        x = self.hidden_state(audio, self.config.num_layers)
        if not self.config.bottleneck_size:
            return x
        x = self.bottleneck(x)
        if not self.config.centred:
            return x
        mean = x.astype(mx.float32).mean(axis=1, keepdims=True)
        return x - mean.astype(x.dtype)


# fairseq's names to transformers', in the order in which they are tried.
_FAIRSEQ_NAMES = (
    (
        r"^feature_extractor\.conv_layers\.(\d+)\.0\.",
        r"feature_extractor.conv_layers.\1.conv.",
    ),
    (
        r"^feature_extractor\.conv_layers\.0\.2\.",
        "feature_extractor.conv_layers.0.layer_norm.",
    ),
    (r"^layer_norm\.", "feature_projection.layer_norm."),
    (r"^post_extract_proj\.", "feature_projection.projection."),
    (r"^encoder\.pos_conv\.0\.", "encoder.pos_conv_embed.conv."),
    (r"\.self_attn\.", ".attention."),
    (r"\.self_attn_layer_norm\.", ".layer_norm."),
    (r"\.fc1\.", ".feed_forward.intermediate_dense."),
    (r"\.fc2\.", ".feed_forward.output_dense."),
)
_UNUSED = {"masked_spec_embed", "mask_emb", "label_embs_concat"}


def sanitize(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Bring a fairseq or transformers state dict to this module's names.

    Args:
        tensors: state dict in torch layout, with or without a ``hubert.`` prefix.

    Returns:
        Tensors under transformers names, torch layout; training-only ones dropped.

    Source: fairseq ``hubert.py``, transformers ``modeling_hubert.py``.
    """
    plain = {name.removeprefix("hubert."): value for name, value in tensors.items()}
    if "post_extract_proj.weight" in plain:
        renamed = {}
        for name, value in plain.items():
            for pattern, replacement in _FAIRSEQ_NAMES:
                name = re.sub(pattern, replacement, name)
            renamed[name] = value
        plain = renamed
    return {name: value for name, value in plain.items() if name not in _UNUSED}


def is_contentvec(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether a state dict is a HuBERT / ContentVec encoder, in either layout."""
    return any(
        name.endswith("feature_extractor.conv_layers.1.conv.weight") for name in tensors
    ) or ("post_extract_proj.weight" in tensors)
