"""The pitch net's convolutions on CUDA, what follows each of them in one launch.

A block is ``relu(conv2(relu(conv1(x)))) + shortcut(x)``. As MLX has it, every bias, rectifier
and sum reads and writes an image of its own::

    conv1 +bias relu conv2 +bias relu shortcut +bias +      nine launches
    conv1 [+bias relu] conv2 shortcut [+bias relu + +bias]  five

The pooling between blocks has a kernel of its own, too: MLX sums columns for it, slowly.

Images come in few lengths, because cuDNN plans each convolution anew for each. What is
behind an image's own rows stays zero from layer to layer, as what a convolution pads with.
"""

from __future__ import annotations

import threading

import mlx.core as mx
import mlx.nn as nn

from rvc_mlx.arrays import steady_length, zeros_behind
from rvc_mlx.cuda_kernel import CudaKernel, Grid
from rvc_mlx.models.rmvpe import (
    RMVPE,
    ConvBlockRes,
    Encoder,
    ResDecoderBlock,
    ResEncoderBlock,
)

_PACK = 8  # channels of a thread
_LARGEST_STEP = 256  # rows between lengths: a long recording's chunks waste 1 %
_THREADS = 256
_KERNEL = CudaKernel(
    "rectified",
    ("x", "bias", "shortcut", "offset"),
    ("y",),
    r"""
struct alignas(PACK * sizeof(T)) Pack { T v[PACK]; };
const int i = blockIdx.x * blockDim.x + threadIdx.x;
if (i >= packs) return;
const int channel = i % (channels / PACK) * PACK;
const Pack in = ((const Pack*)x)[i];
Pack added, out;
if (has_shortcut) added = ((const Pack*)shortcut)[i];
const bool beyond = i / row % rows >= own;
#pragma unroll
for (int k = 0; k < PACK; k++) {
    float v = fmaxf(float(in.v[k]) + bias[channel + k], 0.f);
    if (has_shortcut) v += float(added.v[k]) + offset[channel + k];
    out.v[k] = T(beyond ? 0.f : v);
}
((Pack*)y)[i] = out;
""",
    (
        ("packs", "int"),
        ("channels", "int"),
        ("has_shortcut", "int"),
        ("row", "int"),
        ("rows", "int"),
        ("own", "int"),
    ),
)

_POOL = CudaKernel(
    "pooled",
    ("x",),
    ("y",),
    r"""
struct alignas(PACK * sizeof(T)) Pack { T v[PACK]; };
const int i = blockIdx.x * blockDim.x + threadIdx.x;
if (i >= packs) return;
const int column = i / width % columns, row = i / width / columns;
const Pack* first = (const Pack*)x + (size_t)(4 * row * columns + 2 * column) * width;
const Pack* second = first + (size_t)2 * columns * width;
const int channel = i % width;
const Pack a = first[channel], b = first[width + channel];
const Pack c = second[channel], d = second[width + channel];
Pack out;
#pragma unroll
for (int k = 0; k < PACK; k++)
    out.v[k] = T(0.25f * (float(a.v[k]) + float(b.v[k]) + float(c.v[k]) + float(d.v[k])));
((Pack*)y)[i] = out;
""",
    (("packs", "int"), ("width", "int"), ("columns", "int")),
)


class Extent(threading.local):
    """How many of an image's rows are its own, at every level alike.

    Attributes:
        own: rows of the image that the network was given; each thread's own.
        steady: rows that it computes.
    """

    own = steady = 1

    def of(self, rows: int) -> int:
        """How many of a level's ``rows`` are the image's own."""
        return rows * self.own // self.steady


def quicken(network: RMVPE) -> None:
    """Let a loaded network, its batch norms folded, compute this way from now on."""
    if "_extent" in vars(network):
        return
    network._extent = extent = Extent()
    for module in network.modules():
        if isinstance(module, Encoder) and not network.config.base_channels % _PACK:
            module._pool = pooled
        if isinstance(module, ResEncoderBlock):
            module.conv = [_quick(block, extent) for block in module.conv]
        elif isinstance(module, ResDecoderBlock):
            module.conv2 = [_quick(block, extent) for block in module.conv2]
            up = module.conv1[0]
            if len(module.conv1) > 1 and _folded(module.conv1[1:2]) and _fits(up):
                module.conv1 = [Rectified(up, extent)]
    blocks = [m for m in network.unet.modules() if isinstance(m, ConvBlockRes)]
    joins = [layer.conv1[0] for layer in network.unet.decoder.layers]
    if not blocks and all(isinstance(join, Rectified) for join in joins):
        encoder = network.unet.encoder
        encoder.bn = Lengthened(encoder.bn, extent, 1 << network.config.levels)
        network.cnn = Shortened(network.cnn, extent)


def rectified(
    x: mx.array,
    bias: mx.array,
    shortcut: mx.array | None = None,
    offset: mx.array | None = None,
    own: int | None = None,
) -> mx.array:
    """``relu(x + bias) + shortcut + offset``, rounded once.

    Args:
        x: ``[B, T, M, C]``, C a multiple of 8, fewer than 2**34 values.
        bias: ``[C]`` float32.
        shortcut: as ``x``, or None.
        offset: ``[C]`` float32, beside a shortcut.
        own: rows, of ``T``, behind which everything is 0; None for all.
    """
    packs, (_, T, M, C) = x.size // _PACK, x.shape
    (y,) = _KERNEL(
        [
            x,
            bias,
            x if shortcut is None else shortcut,
            bias if offset is None else offset,
        ],
        [(x.shape, x.dtype)],
        Grid(-(-packs // _THREADS), _THREADS),
        scalars=[
            packs,
            C,
            shortcut is not None,
            M * C // _PACK,
            T,
            T if own is None else own,
        ],
        constants={"T": x.dtype, "PACK": _PACK},
    )
    return y


def pooled(x: mx.array) -> mx.array:
    """Mean of every 2 by 2 places: ``[B, 2 T, 2 M, C]`` to ``[B, T, M, C]``.

    C is a multiple of 8, and there are fewer than 2**34 values.
    """
    B, T, M, C = x.shape
    shape = (B, T // 2, M // 2, C)
    packs = x.size // 4 // _PACK
    (y,) = _POOL(
        [x],
        [(shape, x.dtype)],
        Grid(-(-packs // _THREADS), _THREADS),
        scalars=[packs, C // _PACK, M // 2],
        constants={"T": x.dtype, "PACK": _PACK},
    )
    return y


class _Bare(nn.Module):
    """A convolution without its bias."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        weight = layer.weight
        self.offset = mx.zeros((weight.shape[0],))
        if "bias" in layer:
            self.offset = layer.pop("bias").astype(mx.float32)

    def __call__(self, x: mx.array) -> mx.array:
        y: mx.array = self.layer(x)
        return y


class Rectified(_Bare):
    """A convolution, its bias and a rectifier."""

    def __init__(self, layer: nn.Module, extent: Extent):
        super().__init__(layer)
        self._extent = extent

    def __call__(self, x: mx.array) -> mx.array:
        """``[B, T, M, C_in]`` to ``[B, T', M', C_out]``."""
        y = self.layer(x)
        return rectified(y, self.offset, own=self._extent.of(y.shape[1]))


class FusedBlock(nn.Module):
    """``ConvBlockRes``."""

    def __init__(self, block: ConvBlockRes, extent: Extent):
        super().__init__()
        self._extent = extent
        self.first = Rectified(block.conv[0], extent)
        self.second = _Bare(block.conv[3])
        self.shortcut = _Bare(block.shortcut) if "shortcut" in block else None
        self._nothing = mx.zeros_like(self.second.offset)

    def __call__(self, x: mx.array) -> mx.array:
        """``[B, T, M, C_in]`` to ``[B, T, M, C_out]``."""
        y = self.second(self.first(x))
        bias, own = self.second.offset, self._extent.of(y.shape[1])
        if self.shortcut is None:
            return rectified(y, bias, x, self._nothing, own)
        return rectified(y, bias, self.shortcut(x), self.shortcut.offset, own)


class Lengthened(nn.Module):
    """The norm of an image, and zeros behind it."""

    def __init__(self, norm: nn.Module, extent: Extent, multiple: int):
        super().__init__()
        self.norm, self._extent, self._multiple = norm, extent, multiple

    def __call__(self, x: mx.array) -> mx.array:
        """``[B, T, M, 1]`` to ``[B, T', M, 1]``, T' a multiple of ``multiple`` as T is."""
        T = x.shape[1]
        steady = steady_length(T, self._multiple, max(_LARGEST_STEP, self._multiple))
        self._extent.own, self._extent.steady = T, steady
        return zeros_behind(self.norm(x), steady)


class Shortened(nn.Module):
    """A layer whose result has the image's own rows."""

    def __init__(self, layer: nn.Module, extent: Extent):
        super().__init__()
        self.layer, self._extent = layer, extent

    def __call__(self, x: mx.array) -> mx.array:
        """``[B, T', M, C_in]`` to ``[B, T, M, C_out]``."""
        return self.layer(x)[:, : self._extent.of(x.shape[1])]


def _quick(block: nn.Module, extent: Extent) -> nn.Module:
    if not isinstance(block, ConvBlockRes) or not _fits(block.conv[0]):
        return block
    return FusedBlock(block, extent) if _folded(block.conv[1::3]) else block


def _folded(norms: list[nn.Module]) -> bool:
    return all(isinstance(norm, nn.Identity) for norm in norms)


def _fits(layer: nn.Module) -> bool:
    return bool(layer.weight.shape[0] % _PACK == 0)
