"""ContentVec (HuBERT base) in the key layout of transformers' ``HubertModel``.

Source: Hsu et al. 2021 (HuBERT) and Qian et al. 2022 (ContentVec); post-layer-norm
variant with a group-normed first convolution.
Longer than 300 lines because network and key spellings are read as one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rvc_reference.weight_norm import WNConv1d, fuse_weight_norm

V1_LAYER = 9  # v1 voices were trained on the projected output of the ninth layer
REQUIRED = {
    "feat_extract_norm": "group",
    "do_stable_layer_norm": False,
    "conv_bias": False,
}


@dataclass(frozen=True)
class ContentVecConfig:
    """Sizes, with the field names of transformers' ``config.json``.

    ``classifier_proj_size`` is the width of ``final_proj``, or None when the file
    has no such tensor (then only v2 features can be taken).
    """

    conv_dim: tuple[int, ...] = (512,) * 7
    conv_kernel: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_stride: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    num_conv_pos_embeddings: int = 128
    num_conv_pos_embedding_groups: int = 16
    classifier_proj_size: int | None = 256
    layer_norm_eps: float = 1e-5

    @classmethod
    def from_dict(cls, values: Mapping) -> ContentVecConfig:
        """Read a ``config.json``; fields of other purposes are ignored.

        Raises:
            ValueError: when the file describes another HuBERT variant.
        """
        for key, expected in REQUIRED.items():
            if values.get(key, expected) != expected:
                raise ValueError(
                    f"{key} is {values[key]!r}; HuBERT base has {expected!r}"
                )
        known = {field.name for field in fields(cls)} & set(values)
        return cls(
            **{
                k: tuple(values[k]) if isinstance(values[k], list) else values[k]
                for k in known
            }
        )


class ConvLayer(nn.Module):
    """One layer of the waveform encoder: convolution, group norm if asked, GELU."""

    def __init__(
        self, cin: int, cout: int, kernel: int, stride: int, norm: bool
    ) -> None:
        super().__init__()
        self.conv = nn.Conv1d(cin, cout, kernel, stride, bias=False)
        if norm:  # one group per channel: a normalisation over time
            self.layer_norm = nn.GroupNorm(cout, cout)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, cin, L]`` to ``[B, cout, L']``."""
        x = self.conv(x)
        if hasattr(self, "layer_norm"):
            x = self.layer_norm(x)
        return F.gelu(x)


class FeatureExtractor(nn.Module):
    """Waveform ``[B, N]`` to ``[B, C, F]`` at 50 Hz."""

    def __init__(self, config: ContentVecConfig) -> None:
        super().__init__()
        widths = (1, *config.conv_dim)
        sizes = zip(
            widths, widths[1:], config.conv_kernel, config.conv_stride, strict=False
        )
        self.conv_layers = nn.ModuleList(
            ConvLayer(*size, norm=index == 0) for index, size in enumerate(sizes)
        )

    def forward(self, audio: Tensor) -> Tensor:
        """Run the convolutions."""
        x = audio[:, None]
        for layer in self.conv_layers:
            x = layer(x)
        return x


class FeatureProjection(nn.Module):
    """Layer norm and projection to the transformer's width."""

    def __init__(self, config: ContentVecConfig) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(config.conv_dim[-1], config.layer_norm_eps)
        self.projection = nn.Linear(config.conv_dim[-1], config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, F, C]`` to ``[B, F, hidden]``."""
        return self.projection(self.layer_norm(x))


class PositionalConv(nn.Module):
    """Grouped convolution over time whose result is added to its input."""

    def __init__(self, config: ContentVecConfig) -> None:
        super().__init__()
        kernel = config.num_conv_pos_embeddings
        self.extra = 1 - kernel % 2  # an even kernel gives one frame too many
        self.conv = WNConv1d(
            config.hidden_size,
            config.hidden_size,
            kernel,
            norm_dim=2,
            padding=kernel // 2,
            groups=config.num_conv_pos_embedding_groups,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, F, C]`` to the positional term ``[B, F, C]``."""
        y = self.conv(x.transpose(1, 2))
        return F.gelu(y[..., : y.shape[-1] - self.extra]).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention without a mask."""

    def __init__(self, config: ContentVecConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, F, C]`` to ``[B, F, C]``."""
        B, T, C = x.shape
        q, k, v = (
            proj(x).view(B, T, self.heads, -1).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(y.transpose(1, 2).reshape(B, T, C))


class FeedForward(nn.Module):
    """Two linear layers with the exact (erf) GELU between them."""

    def __init__(self, config: ContentVecConfig) -> None:
        super().__init__()
        self.intermediate_dense = nn.Linear(
            config.hidden_size, config.intermediate_size
        )
        self.output_dense = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, F, C]`` to ``[B, F, C]``."""
        return self.output_dense(F.gelu(self.intermediate_dense(x)))


class EncoderLayer(nn.Module):
    """Transformer layer with the norms after the additions."""

    def __init__(self, config: ContentVecConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.feed_forward = FeedForward(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, F, C]`` to ``[B, F, C]``."""
        x = self.layer_norm(x + self.attention(x))
        return self.final_layer_norm(x + self.feed_forward(x))


class Encoder(nn.Module):
    """Positional term, layer norm, layers."""

    def __init__(self, config: ContentVecConfig) -> None:
        super().__init__()
        self.pos_conv_embed = PositionalConv(config)
        self.layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.layers = nn.ModuleList(
            EncoderLayer(config) for _ in range(config.num_hidden_layers)
        )

    def forward(self, x: Tensor, depth: int) -> list[Tensor]:
        """Give the hidden states 0..``depth``, each ``[B, F, C]``."""
        states = [self.layer_norm(x + self.pos_conv_embed(x))]
        for layer in self.layers[:depth]:
            states.append(layer(states[-1]))
        return states


class ContentVec(nn.Module):
    """The content encoder.

    Args:
        config: a ``ContentVecConfig``, or a mapping with the fields of
            transformers' ``config.json``; missing fields are those of HuBERT base.
    """

    def __init__(self, config: ContentVecConfig | Mapping | None = None) -> None:
        super().__init__()
        if not isinstance(config, ContentVecConfig):
            config = ContentVecConfig.from_dict(config or {})
        self.config = config
        self.masked_spec_embed = nn.Parameter(
            torch.zeros(config.hidden_size)
        )  # training only
        self.feature_extractor = FeatureExtractor(config)
        self.feature_projection = FeatureProjection(config)
        self.encoder = Encoder(config)
        if config.classifier_proj_size is not None:
            self.final_proj = nn.Linear(config.hidden_size, config.classifier_proj_size)

    def fuse(self) -> None:
        """Compute the positional convolution's weight once."""
        fuse_weight_norm(self)

    def load_state_dict(
        self, state_dict: Mapping, strict: bool = True, assign: bool = False
    ):
        """Load tensors in any of the public spellings (see ``to_reference_keys``)."""
        return super().load_state_dict(to_reference_keys(state_dict), strict, assign)

    def _hidden_states(self, audio: Tensor, depth: int) -> list[Tensor]:
        x = self.feature_extractor(audio).transpose(1, 2)
        return self.encoder(self.feature_projection(x), depth)

    def forward(self, audio: Tensor) -> list[Tensor]:
        """Give all hidden states of ``audio`` ``[B, N]`` float32 at 16 kHz.

        Returns:
            ``num_hidden_layers + 1`` tensors ``[B, F, hidden]``,
            ``F = (N - 400) // 320 + 1``; entry 0 is the input of the first layer.
        """
        return self._hidden_states(audio, self.config.num_hidden_layers)

    def extract(self, audio: Tensor, version: str) -> Tensor:
        """Give the features that a voice of ``version`` was trained on.

        Args:
            audio: ``[B, N]`` float32 at 16 kHz, ``N >= 400``, not normalised.
            version: "v1" (layer 9, then ``final_proj``) or "v2" (last layer).

        Returns:
            ``[B, F, classifier_proj_size]`` (v1) or ``[B, F, hidden]`` (v2).

        Raises:
            ValueError: for another version, or v1 of an encoder without layer 9 or
                without ``final_proj``.
        """
        layers = self.config.num_hidden_layers
        if version == "v2":
            return self._hidden_states(audio, layers)[-1]
        if version != "v1":
            raise ValueError(f"version is {version!r}; expected 'v1' or 'v2'")
        if layers < V1_LAYER or self.config.classifier_proj_size is None:
            raise ValueError("v1 features need at least 9 layers and final_proj")
        return self.final_proj(self._hidden_states(audio, V1_LAYER)[-1])


FAIRSEQ_RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^mask_emb$", "masked_spec_embed"),
        (r"^(feature_extractor\.conv_layers\.\d+)\.0\.", r"\1.conv."),
        (r"^(feature_extractor\.conv_layers\.\d+)\.2\.", r"\1.layer_norm."),
        (r"^layer_norm\.", "feature_projection.layer_norm."),
        (r"^post_extract_proj\.", "feature_projection.projection."),
        (r"^encoder\.pos_conv\.0\.", "encoder.pos_conv_embed.conv."),
        (r"\.self_attn\.", ".attention."),
        (r"\.self_attn_layer_norm\.", ".layer_norm."),
        (r"\.fc1\.", ".feed_forward.intermediate_dense."),
        (r"\.fc2\.", ".feed_forward.output_dense."),
    )
)


def fairseq_to_hf(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename fairseq's HuBERT keys to transformers'; ``label_embs_concat`` is dropped."""
    renamed = {}
    for key, tensor in state_dict.items():
        if key == "label_embs_concat":
            continue
        for pattern, replacement in FAIRSEQ_RULES:
            key = pattern.sub(replacement, key)
        renamed[key] = tensor
    return renamed


def to_reference_keys(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give ``state_dict`` in the spelling of ``ContentVec``.

    Accepted: fairseq names, an optional ``hubert.`` prefix, and both spellings of
    weight norm.
    """
    if "post_extract_proj.weight" in state_dict:
        state_dict = fairseq_to_hf(state_dict)
    return {
        key.removeprefix("hubert.")
        .replace(".parametrizations.weight.original0", ".weight_g")
        .replace(".parametrizations.weight.original1", ".weight_v"): tensor
        for key, tensor in state_dict.items()
    }
