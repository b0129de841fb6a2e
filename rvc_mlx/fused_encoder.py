"""ContentVec's slow parts as an NVIDIA GPU computes them best, to the precision of TF32.

Three of them are worth it, for a recording of 30 seconds:

* The norm behind the first convolution reads and writes its largest array several times.
  A convolution is linear, so mean and variance over time of its output follow from mean
  and covariance of the ten samples it sees: the norm goes into the weights.
* Attention of float32 arrays has no quick kernel. float16 has TF32's ten bits of fraction,
  so what a layer makes on its way is float16; what the layers add up to, norms, sums and
  softmax stay float32. One product makes q, k and v: its launch is what it costs.
* The positional convolution of 128 taps in 16 groups becomes one product a group, of
  windows that start every 8 frames.

cuDNN plans anew for each length. So the other convolutions are products, too, and attention
is a kernel of our own on Hopper. Elsewhere it meets few lengths: it is told which frames are
not there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from rvc_mlx import attention_kernel
from rvc_mlx.arrays import steady_length, zeros_behind
from rvc_mlx.cuda_kernel import Constant, CudaKernel
from rvc_mlx.elementwise import (
    EACH_PACK,
    GELU_OF_V,
    PACK,
    gelu,
    on_cuda,
    pack_grid,
)
from rvc_mlx.fused_norm import added_norm, cut_norm
from rvc_mlx.models.contentvec import (
    FIRST_STRIDE,
    HOP_LENGTH,
    RECEPTIVE_FIELD,
    ContentVec,
)
from rvc_mlx.normed_conv import normed_convolution
from rvc_mlx.steady import Rows, own_rows, told_kernel, within
from rvc_mlx.windows import linear, windows

_LARGEST_STEP = 1 << 11  # frames between lengths that attention meets
_STEP = 8  # frames from one window of the positional convolution to the next
# A thread takes eight channels of a group at one place of a window.
_SEEN = CudaKernel(
    "grouped_windows",
    ("x", "own"),
    ("y",),
    EACH_PACK
    + r"""
const int channel = i % each, place = i % width / each, window = i / width;
const int group = window / (B * count), b = window / count % B;
const int frame = window % count * STEP + place - padding;
const int last = limited ? own[0] : F;
Pack out;
#pragma unroll
for (int k = 0; k < PACK; k++) out.v[k] = T(0.f);
if (frame >= 0 && frame < last)
    out = ((const Pack*)x)[(size_t)(b * F + frame) * all + group * each + channel];
((Pack*)y)[i] = out;
""",
    (
        *(("packs", "int"), ("B", "int"), ("F", "int"), ("count", "int")),
        *(("width", "int"), ("all", "int"), ("each", "int"), ("padding", "int")),
        ("limited", "int"),
    ),
)
_TOGETHER = CudaKernel(
    "groups_together",
    ("x", "bias"),
    ("y",),
    EACH_PACK
    + r"""
const int channel = i % all, row = i / all, frame = row % F, b = row / F;
const int group = channel / each, window = (group * B + b) * count + frame / STEP;
const Pack in = ((const Pack*)x)[((size_t)window * STEP + frame % STEP) * each +
                                 channel % each];
const Pack offset = ((const Pack*)bias)[channel];
Pack out;
#pragma unroll
for (int k = 0; k < PACK; k++) {
    const float v = float(in.v[k]) + float(offset.v[k]);
    out.v[k] = """
    + GELU_OF_V
    + r""";
}
((Pack*)y)[i] = out;
""",
    (
        *(("packs", "int"), ("B", "int"), ("F", "int"), ("count", "int")),
        *(("all", "int"), ("each", "int")),
    ),
)


def quicken(encoder: ContentVec) -> None:
    """Let a loaded encoder compute this way from now on."""
    encoder.feature_extractor = ProductExtractor(encoder.feature_extractor)
    encoder.encoder = SteadyEncoder(encoder.encoder)


def rows_of_features(encoder: ContentVec) -> Rows | None:
    """How ``ContentVec`` takes longer inputs; None if it computes in another way."""
    layers = encoder.encoder
    if not (isinstance(layers, SteadyEncoder) and layers.any_length):
        return None
    if encoder.config.centred:  # a mean over all frames
        return None

    def own(audio: mx.array) -> tuple[int, ...]:
        samples = audio.shape[1]
        frames = (samples - RECEPTIVE_FIELD) // HOP_LENGTH + 1
        return frames, samples // FIRST_STRIDE - 1  # and of the first convolution

    def lengthened(arrays: Sequence[mx.array], rows: int) -> list[mx.array]:
        # Samples behind the last frame's are not seen.
        samples = rows * HOP_LENGTH + RECEPTIVE_FIELD - FIRST_STRIDE
        return [zeros_behind(arrays[0][:, :samples], samples)]

    return Rows(own, lengthened)


class ShortAttention(nn.Module):
    """``Attention`` with one product for q, k and v, its weights cut to its factors' type."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        weight = mx.concatenate([part.weight for part in parts])
        bias = mx.concatenate([part.bias for part in parts])
        self.qkv = _cut(weight, bias)
        self.out = _cut(attention.out_proj.weight, attention.out_proj.bias)
        self._num_heads = attention._num_heads

    @property
    def width(self) -> int:
        """Channels of a head."""
        return self.out[0].shape[0] // self._num_heads

    def __call__(self, x: mx.array, mask: mx.array | None, recordings: int) -> mx.array:
        """``[B * F, C]`` to ``[B * F, C]``.

        Args:
            x: frames, of the type of the factors.
            mask: ``[1, 1, 1, F]`` of that type, added to the scores of each frame's
                attention; None for the kernel of our own, which needs none.
            recordings: ``B``.
        """
        qkv, heads = linear(x, self.qkv), self._num_heads
        if mask is None:
            y = attention_kernel.self_attention(qkv, heads, own_rows(), recordings)
            return linear(y, self.out)
        qkv = qkv.reshape(recordings, -1, 3, heads, self.width)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)  # [B, heads, F, C / heads]
        scale = q.shape[-1] ** -0.5
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
        return linear(y.transpose(0, 2, 1, 3).reshape(x.shape), self.out)


class ShortFeedForward(nn.Module):
    """``FeedForward`` with its GELU in one pass, its weights cut as those of attention."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        inner, outer = layer.intermediate_dense, layer.output_dense
        self.inner = _cut(inner.weight, inner.bias)
        self.outer = _cut(outer.weight, outer.bias)

    def __call__(self, x: mx.array) -> mx.array:
        """``[rows, C]`` to ``[rows, C]``, both of the type of the factors."""
        return linear(gelu(linear(x, self.inner)), self.outer)


def _cut(weight: mx.array, bias: mx.array) -> tuple[mx.array, mx.array]:
    """A layer for ``linear``, of the type of its factors."""
    dtype = _factors(weight.dtype)
    return weight.T.astype(dtype), bias.astype(dtype)


def _factors(dtype: mx.Dtype) -> mx.Dtype:
    """The type in which a layer multiplies numbers of this type."""
    return mx.float16 if dtype == mx.float32 else dtype


class SteadyEncoder(nn.Module):
    """``Encoder``, behind the embedding with frames up to a steady length.

    Attention of our own takes any length, so there they are as many as they were.

    Attributes:
        any_length: whether that is so.
    """

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.pos_conv_embed = WindowedEmbedding(encoder.pos_conv_embed)
        self.layer_norm, self.layers = encoder.layer_norm, encoder.layers
        for layer in self.layers:
            layer.attention = ShortAttention(layer.attention)
            layer.feed_forward = ShortFeedForward(layer.feed_forward)
        widths = [layer.attention.width for layer in self.layers]
        self.any_length = all(map(attention_kernel.supports, widths))

    def __call__(self, x: mx.array, num_layers: int) -> mx.array:
        """See ``Encoder``."""
        norm = self.layer_norm
        x = added_norm(x, self.pos_conv_embed(x), norm.weight, norm.bias, norm.eps)
        if self.any_length:
            return self._through(x, None, num_layers)
        frames = x.shape[1]
        x = zeros_behind(x, steady_length(frames, 8, _LARGEST_STEP))
        mask = mx.where(mx.arange(x.shape[1]) < frames, 0.0, -mx.inf)
        mask = mask.astype(_factors(x.dtype))[None, None, None]  # once for all layers
        return self._through(x, mask, num_layers)[:, :frames]

    def _through(self, x: mx.array, mask: mx.array | None, num_layers: int) -> mx.array:
        rows = x.flatten(0, 1)
        cut = rows.astype(_factors(x.dtype))
        for layer in self.layers[:num_layers]:
            made = layer.attention(cut, mask, len(x))
            rows, cut = _ended(rows, made, layer.layer_norm)
            rows, cut = _ended(rows, layer.feed_forward(cut), layer.final_layer_norm)
        return rows.reshape(x.shape)


def _ended(
    x: mx.array, made: mx.array, norm: nn.LayerNorm
) -> tuple[mx.array, mx.array]:
    return cut_norm(x, made, norm.weight, norm.bias, norm.eps)


class ProductExtractor(nn.Module):
    """``FeatureExtractor``, its first layer through ``normed_convolution``.

    The others are products over windows of frames: only a convolution needs a plan.
    """

    def __init__(self, extractor: nn.Module):
        super().__init__()
        self.conv_layers = extractor.conv_layers
        others = [layer.conv for layer in self.conv_layers[1:]]
        self._strides = [(conv.weight.shape[1], conv.stride) for conv in others]
        self._factors = [conv.weight.flatten(1).T for conv in others]

    def __call__(self, audio: mx.array) -> mx.array:
        """``[B, L]`` to ``[B, F, C]``."""
        first, B = self.conv_layers[0], len(audio)
        stride = first.conv.stride
        whole = audio.shape[1] // stride * stride
        x = normed_convolution(audio[:, :whole, None], first.conv, first.layer_norm)
        frames, x = x.shape[1], x.flatten(0, 1)
        for (taps, stride), factors in zip(self._strides, self._factors, strict=True):
            frames = (frames - taps) // stride + 1
            x = windows(
                gelu(x), taps, stride=stride, before=0, frames=frames, recordings=B
            )
            x = x @ factors
        return gelu(x).reshape(B, frames, -1)


class WindowedEmbedding(nn.Module):
    """``PositionalConvEmbedding`` as one matrix product for each group.

    A window gives the outputs of ``_STEP`` frames, from the inputs that any of them sees;
    its weights are the kernel once for each of these frames, moved along by one::

        frame 0   w w w w w . .
        frame 1   . w w w w w .
        frame 2   . . w w w w w
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        weight, groups = layer.conv.weight, layer.conv.groups
        outputs, K, c = weight.shape
        self._padding, self._groups = layer.conv.padding, groups
        self._blocks = -(-(K + _STEP - 1) // _STEP)
        # [G, K, c, outputs of a group]
        kernel = weight.reshape(groups, outputs // groups, K, c).transpose(0, 2, 3, 1)
        spare, none = self._blocks * _STEP - K, (0, 0)
        moved = [
            mx.pad(kernel, [none, (frame, spare - frame), none, none])
            for frame in range(_STEP)
        ]
        rows = mx.stack(moved, axis=3)
        self.weight = rows.reshape(groups, -1, _STEP * outputs // groups)
        self.bias = layer.conv.bias

    def __call__(self, x: mx.array) -> mx.array:
        """``[B, F, C]`` to ``[B, F, C]``; frames behind the own rows are not seen."""
        B, F, C = x.shape
        G, own = self._groups, own_rows()
        count = -(-F // _STEP)
        shape = (G, B * count, self._blocks * _STEP * C // G)
        packs = math.prod(shape) // PACK  # the result has no more
        alike = self.weight.dtype == self.bias.dtype == x.dtype
        if not (on_cuda() and alike) or C // G % PACK or packs >= 1 << 30:
            x = x if own is None else within(x, own.count)
            return self._put_together(self._seen(x, shape) @ self.weight, B, F)
        sizes: dict[str, Constant] = {"T": x.dtype, "PACK": PACK, "STEP": _STEP}
        (seen,) = _SEEN(
            [x, told_kernel(own)],
            [(shape, x.dtype)],
            pack_grid(packs),
            scalars=[
                *(packs, B, F, count, shape[2] // PACK),
                *(C // PACK, C // G // PACK, self._padding, own is not None),
            ],
            constants=sizes,
        )
        (y,) = _TOGETHER(
            [seen @ self.weight, self.bias],
            [(x.shape, x.dtype)],
            pack_grid(x.size // PACK),
            scalars=[x.size // PACK, B, F, count, C // PACK, C // G // PACK],
            constants=sizes,
        )
        return y

    def _seen(self, x: mx.array, shape: tuple[int, int, int]) -> mx.array:
        """Windows of each group, one behind another."""
        B, F, C = x.shape
        G, S = self._groups, _STEP * C // self._groups
        count = -(-F // _STEP)
        rows = count + self._blocks - 1
        behind = rows * _STEP - F - self._padding
        x = mx.pad(x, [(0, 0), (self._padding, behind), (0, 0)])
        x = x.reshape(B, rows, _STEP, G, C // G).transpose(3, 0, 1, 2, 4)
        x = mx.contiguous(x)
        steps = (B * rows * S, rows * S, S, 1)
        return mx.as_strided(x, (G, B, count, shape[2]), steps).reshape(shape)

    def _put_together(self, y: mx.array, B: int, F: int) -> mx.array:
        """What the groups make, side by side."""
        y = y.reshape(self._groups, B, -(-F // _STEP), _STEP, -1)
        y = y.transpose(1, 2, 3, 0, 4).flatten(-2).flatten(1, 2)[:, :F]
        return gelu(y + self.bias)
