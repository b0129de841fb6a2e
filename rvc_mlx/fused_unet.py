"""The pitch net's convolutions on CUDA, what follows each of them in one launch.

A block is ``relu(conv2(relu(conv1(x)))) + shortcut(x)``. As MLX has it, every bias, rectifier
and sum reads and writes an image of its own::

    conv1 +bias relu conv2 +bias relu shortcut +bias +      nine launches
    conv1 [+bias relu] conv2 shortcut [+bias relu + +bias]  five

The pooling between blocks has a kernel of its own, too: MLX sums columns for it, slowly.

Images come in few lengths, because cuDNN plans each convolution anew for each. What is
behind an image's own rows stays zero from layer to layer, as what a convolution pads with.

On Hopper, where products may be short of float32, a block is two launches of ``image_conv``
or three. Then nothing is left to cuDNN, and images are as long as they are, or as ``steady``
makes them: then a convolution reads zeros behind their own rows.
"""

from __future__ import annotations

import threading
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from rvc_mlx import conv_kernel, plane_kernel
from rvc_mlx import image_conv as warp_kernel
from rvc_mlx.arrays import steady_length, zeros_behind
from rvc_mlx.cuda_kernel import CudaKernel
from rvc_mlx.elementwise import EACH_PACK, PACK, pack_grid
from rvc_mlx.image_conv import PackedImageWeight
from rvc_mlx.models.rmvpe import (
    RMVPE,
    ConvBlockRes,
    Encoder,
    ResDecoderBlock,
    ResEncoderBlock,
)
from rvc_mlx.steady import Rows, own_rows, within

_SEEN = 16  # channels of which nine are the places around one
_LARGEST_STEP = 256  # rows between lengths: a long recording's chunks waste 1 %
_KERNEL = CudaKernel(
    "rectified",
    ("x", "bias", "shortcut", "offset"),
    ("y",),
    EACH_PACK
    + r"""const int channel = i % (channels / PACK) * PACK;
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
    EACH_PACK
    + r"""const int column = i / width % columns, row = i / width / columns;
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


def quicken(network: RMVPE, short: bool = False) -> None:
    """Let a loaded network, its batch norms folded, compute this way from now on.

    Args:
        network: the network.
        short: whether float32 may be multiplied in float16.
    """
    if "_extent" in vars(network):
        return
    network._extent = extent = Extent()
    if short and _serves_images(network):
        _quicken_images(network)
        return
    for module in network.modules():
        if isinstance(module, Encoder) and not network.config.base_channels % PACK:
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


def _serves_images(network: RMVPE) -> bool:
    """Whether ``image_conv`` makes all of a network's convolutions on this machine."""
    if not conv_kernel.supports(16, 3, mx.float16):
        return False
    blocks = [m for m in network.unet.modules() if isinstance(m, ConvBlockRes)]
    ups = [layer.conv1 for layer in network.unet.decoder.layers]
    norms = [norm for block in blocks for norm in block.conv[1::3]]
    norms += [norm for up in ups for norm in up[1:2]]
    sizes = network.config
    narrowest = sizes.n_mels >> sizes.levels
    return _folded(norms) and sizes.base_channels % 16 == 0 and narrowest in (4, 8, 16)


def pack_image_weight(weight: mx.array, dtype: mx.Dtype) -> PackedImageWeight:
    """Weights for the kernel that this machine's GPU is quickest with."""
    kernel = plane_kernel if plane_kernel.supports() else warp_kernel
    return kernel.pack_image_weight(weight, dtype)


def image_conv(
    x: mx.array, weight: PackedImageWeight, bias: mx.array, **options: Any
) -> mx.array:
    """``relu(conv2d(x) + bias) + shortcut`` by the kernel that the weight is packed for."""
    if isinstance(weight, plane_kernel.PackedPlaneWeight):
        return plane_kernel.image_conv(x, weight, bias, **options)
    return warp_kernel.image_conv(x, weight, bias, **options)


def rows_of_salience(network: RMVPE) -> Rows | None:
    """How RMVPE takes longer inputs, its recurrent layer on clusters."""
    if not isinstance(network.cnn, ImageLayer):
        return None
    return Rows(
        lambda mel: (mel.shape[1],),
        lambda arrays, rows: [zeros_behind(arrays[0], rows)],
    )


def _quicken_images(network: RMVPE) -> None:
    for module in network.modules():
        if isinstance(module, Encoder):
            module._pool = pooled
        if isinstance(module, ResEncoderBlock):
            module.conv = [ImageBlock(block) for block in module.conv]
        elif isinstance(module, ResDecoderBlock):
            module.conv1 = [ImageUp(module.conv1[0])]
            module.conv2 = [ImageBlock(block) for block in module.conv2]
    network.cnn = ImageLayer(network.cnn, rectify=False)


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
    packs, (_, T, M, C) = x.size // PACK, x.shape
    (y,) = _KERNEL(
        [
            x,
            bias,
            x if shortcut is None else shortcut,
            bias if offset is None else offset,
        ],
        [(x.shape, x.dtype)],
        pack_grid(packs),
        scalars=[
            packs,
            C,
            shortcut is not None,
            M * C // PACK,
            T,
            T if own is None else own,
        ],
        constants={"T": x.dtype, "PACK": PACK},
    )
    return y


def pooled(x: mx.array) -> mx.array:
    """Mean of every 2 by 2 places: ``[B, 2 T, 2 M, C]`` to ``[B, T, M, C]``.

    C is a multiple of 8, and there are fewer than 2**34 values.
    """
    B, T, M, C = x.shape
    shape = (B, T // 2, M // 2, C)
    packs = x.size // 4 // PACK
    (y,) = _POOL(
        [x],
        [(shape, x.dtype)],
        pack_grid(packs),
        scalars=[packs, C // PACK, M // 2],
        constants={"T": x.dtype, "PACK": PACK},
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

    def __init__(self, block: nn.Module, extent: Extent):
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


class ImageLayer(nn.Module):
    """A convolution, its bias and a rectifier through ``image_conv``.

    Of one input channel it takes ``nine_places``.
    """

    def __init__(self, layer: nn.Module, rectify: bool = True):
        super().__init__()
        self._rectify, weight = rectify, layer.weight
        self._outputs, side, _, inputs = weight.shape
        bias = layer.bias if "bias" in layer else mx.zeros((self._outputs,))
        if inputs == 1:
            around = 1 if side == 1 else 0
            weight = mx.pad(
                weight, [(0, 0), (around, around), (around, around), (0, 0)]
            )
            weight = weight.reshape(self._outputs, 1, 1, -1)
            weight = mx.pad(weight, [(0, 0), (0, 0), (0, 0), (0, _SEEN - 9)])
        missing = -self._outputs % 8
        weight = mx.pad(weight, [(0, missing), *[(0, 0)] * 3])
        self._weight = pack_image_weight(weight, weight.dtype)
        self._bias = mx.pad(bias.astype(mx.float32), (0, missing))

    def __call__(self, x: mx.array, shortcut: mx.array | None = None) -> mx.array:
        """``[B, T, M, C_in]`` to ``[B, T, M, C_out]``, the shortcut added."""
        y = image_conv(
            *(x, self._weight, self._bias),
            shortcut=shortcut,
            rectify=self._rectify,
            own=own_rows(),
        )
        return y[..., : self._outputs] if self._outputs % 8 else y


def nine_places(x: mx.array) -> mx.array:
    """``[B, T, M, 1]`` to what lies around each place, and zeros, ``[B, T, M, 16]``."""
    (B, T, M, _), own = x.shape, own_rows()
    x = x if own is None else within(x, own.count)
    wide = mx.pad(x[..., 0], [(0, 0), (1, 1), (1, 1)])
    pitch = M + 2
    seen = mx.as_strided(
        wide, (B, T, M, 3, 3), ((T + 2) * pitch, pitch, 1, pitch, 1)
    ).reshape(B, T, M, 9)
    return mx.pad(seen, [(0, 0), (0, 0), (0, 0), (0, _SEEN - 9)])


class ImageBlock(nn.Module):
    """``ConvBlockRes`` through ``image_conv``."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.first, self.second = map(ImageLayer, block.conv[::3])
        self.shortcut = None
        if "shortcut" in block:
            self.shortcut = ImageLayer(block.shortcut, rectify=False)

    def __call__(self, x: mx.array) -> mx.array:
        """``[B, T, M, C_in]`` to ``[B, T, M, C_out]``."""
        x = nine_places(x) if x.shape[-1] == 1 else x
        beside = x if self.shortcut is None else self.shortcut(x)
        return self.second(self.first(x), beside)


class ImageUp(nn.Module):
    """A transposed convolution of stride 2, its bias and rectifier, through ``image_conv``.

    Each of the four places that one becomes is a convolution of its own: the first row
    sees its own place through the middle tap, the second row its own through the last and
    the next through the first. So they are four times as many channels.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        weight = layer.weight  # [C_out, 3, 3, C_in]
        C = len(weight)
        taps = mx.zeros((2, 2, C, 2, 2, weight.shape[-1]), weight.dtype)
        # From a tap of the transposed one to row or column, and how far on it sees.
        ways = ((1, 0, 0), (2, 1, 0), (0, 1, 1))
        for i, row, down in ways:
            for j, column, across in ways:
                taps[row, column, :, down, across] = weight[:, i, j]
        self._weight = pack_image_weight(taps.reshape(4 * C, 2, 2, -1), weight.dtype)
        bias = layer.bias if "bias" in layer else mx.zeros((C,))
        self._bias = mx.tile(bias.astype(mx.float32), 4)

    def __call__(self, x: mx.array) -> mx.array:
        """``[B, T, M, C_in]`` to ``[B, 2 T, 2 M, C_out]``."""
        B, T, M, _ = x.shape
        y = image_conv(x, self._weight, self._bias, own=own_rows())
        y = y.reshape(B, T, M, 2, 2, -1)
        return y.transpose(0, 1, 3, 2, 4, 5).reshape(B, 2 * T, 2 * M, -1)


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
    return bool(layer.weight.shape[0] % PACK == 0)
