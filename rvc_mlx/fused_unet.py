"""The pitch net's convolutions on CUDA, what follows each of them in one launch.

A block is ``relu(conv2(relu(conv1(x)))) + shortcut(x)``. As MLX has it, every bias, rectifier
and sum reads and writes an image of its own::

    conv1 +bias relu conv2 +bias relu shortcut +bias +      nine launches
    conv1 [+bias relu] conv2 shortcut [+bias relu + +bias]  five

The pooling between blocks has a kernel of its own, too: MLX sums columns for it, slowly.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from rvc_mlx.cuda_kernel import CudaKernel, Grid
from rvc_mlx.models.rmvpe import (
    RMVPE,
    ConvBlockRes,
    Encoder,
    ResDecoderBlock,
    ResEncoderBlock,
)

_PACK = 8  # channels of a thread
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
#pragma unroll
for (int k = 0; k < PACK; k++) {
    float v = fmaxf(float(in.v[k]) + bias[channel + k], 0.f);
    if (has_shortcut) v += float(added.v[k]) + offset[channel + k];
    out.v[k] = T(v);
}
((Pack*)y)[i] = out;
""",
    (("packs", "int"), ("channels", "int"), ("has_shortcut", "int")),
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


def quicken(network: RMVPE) -> None:
    """Let a loaded network, its batch norms folded, compute this way from now on."""
    for module in network.modules():
        if isinstance(module, Encoder) and not network.config.base_channels % _PACK:
            module._pool = pooled
        if isinstance(module, ResEncoderBlock):
            module.conv = [_quick(block) for block in module.conv]
        elif isinstance(module, ResDecoderBlock):
            module.conv2 = [_quick(block) for block in module.conv2]
            up = module.conv1[0]
            if len(module.conv1) > 1 and _folded(module.conv1[1:2]) and _fits(up):
                module.conv1 = [Rectified(up)]


def rectified(
    x: mx.array,
    bias: mx.array,
    shortcut: mx.array | None = None,
    offset: mx.array | None = None,
) -> mx.array:
    """``relu(x + bias) + shortcut + offset``, rounded once.

    Args:
        x: ``[..., C]``, C a multiple of 8, fewer than 2**34 values.
        bias: ``[C]`` float32.
        shortcut: as ``x``, or None.
        offset: ``[C]`` float32, beside a shortcut.
    """
    packs = x.size // _PACK
    (y,) = _KERNEL(
        [
            x,
            bias,
            x if shortcut is None else shortcut,
            bias if offset is None else offset,
        ],
        [(x.shape, x.dtype)],
        Grid(-(-packs // _THREADS), _THREADS),
        scalars=[packs, x.shape[-1], shortcut is not None],
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

    def __call__(self, x: mx.array) -> mx.array:
        """``[B, T, M, C_in]`` to ``[B, T', M', C_out]``."""
        return rectified(self.layer(x), self.offset)


class FusedBlock(nn.Module):
    """``ConvBlockRes``."""

    def __init__(self, block: ConvBlockRes):
        super().__init__()
        self.first = Rectified(block.conv[0])
        self.second = _Bare(block.conv[3])
        self.shortcut = _Bare(block.shortcut) if "shortcut" in block else None
        self._nothing = mx.zeros_like(self.second.offset)

    def __call__(self, x: mx.array) -> mx.array:
        """``[B, T, M, C_in]`` to ``[B, T, M, C_out]``."""
        y = self.second(self.first(x))
        bias = self.second.offset
        if self.shortcut is None:
            return rectified(y, bias, x, self._nothing)
        return rectified(y, bias, self.shortcut(x), self.shortcut.offset)


def _quick(block: nn.Module) -> nn.Module:
    if not isinstance(block, ConvBlockRes) or not _fits(block.conv[0]):
        return block
    return FusedBlock(block) if _folded(block.conv[1::3]) else block


def _folded(norms: list[nn.Module]) -> bool:
    return all(isinstance(norm, nn.Identity) for norm in norms)


def _fits(layer: nn.Module) -> bool:
    return bool(layer.weight.shape[0] % _PACK == 0)
