"""Convolutions along time as matrix products: what each frame's taps see, and the product."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from rvc_mlx.cuda_kernel import CudaKernel
from rvc_mlx.elementwise import EACH_PACK, PACK, on_cuda, pack_grid
from rvc_mlx.steady import OwnRows, told_kernel, within

_KERNEL = CudaKernel(
    "windows",
    ("x", "own"),
    ("y",),
    EACH_PACK
    + r"""
const int channel = i % width, tap = i / width % taps, row = i / width / taps;
const int from = row % frames * stride + tap - before;
const int last = limited ? own[0] : L;
Pack out;
#pragma unroll
for (int n = 0; n < PACK; n++) out.v[n] = T(0.f);
if (from >= 0 && from < last) {
    out = ((const Pack*)x)[((size_t)(row / frames) * L + from) * width + channel];
    if (slope != 1.f) {
        #pragma unroll
        for (int n = 0; n < PACK; n++) {
            const float v = float(out.v[n]);
            out.v[n] = T(fmaxf(v, slope == 0.f ? 0.f : v * slope));
        }
    }
}
((Pack*)y)[i] = out;
""",
    (
        *(("packs", "int"), ("width", "int"), ("L", "int"), ("frames", "int")),
        *(("taps", "int"), ("stride", "int"), ("before", "int")),
        *(("limited", "int"), ("slope", "float")),
    ),
)


def windows(
    x: mx.array,
    taps: int,
    *,
    stride: int = 1,
    before: int | None = None,
    frames: int | None = None,
    own: OwnRows | None = None,
    slope: float = 1.0,
    recordings: int | None = None,
) -> mx.array:
    """``[B, L, C]`` to what each frame sees, ``[B, frames, taps * C]``; zeros outside.

    Args:
        x: positions.
        taps: positions that a frame sees.
        stride: from one frame to the next.
        before: positions in front of ``x`` that the first frame sees; by default half of
            the taps.
        frames: by default one for each position.
        own: positions of ``x`` behind these count as outside.
        slope: of a leaky rectifier for negative values, 0 for a plain one, 1 for none.
        recordings: ``B``, if ``x`` is rows ``[B * L, C]``; so is the result then.
    """
    if recordings is None:
        B, L, C = x.shape
    else:
        B, L, C = recordings, len(x) // recordings, x.shape[1]
    before = taps // 2 if before is None else before
    frames = L if frames is None else frames
    shape = (B, frames, taps * C) if recordings is None else (B * frames, taps * C)
    limited = own is not None
    if not limited and (stride, before, slope) == (taps, 0, 1) and frames * taps <= L:
        return x.reshape(B, L, C)[:, : frames * taps].reshape(shape)
    packs = B * frames * taps * C // PACK
    if C % PACK or not 0 < packs < 1 << 30 or not on_cuda():
        x = x.reshape(B, L, C)
        x = x if own is None else within(x, own.count)
        return _plain(x, taps, stride, before, frames, slope).reshape(shape)
    (y,) = _KERNEL(
        [x, told_kernel(own)],
        [(shape, x.dtype)],
        pack_grid(packs),
        scalars=[packs, C // PACK, L, frames, taps, stride, before, limited, slope],
        constants={"T": x.dtype, "PACK": PACK},
    )
    return y


def linear(rows: mx.array, layer: Sequence[mx.array]) -> mx.array:
    """``[rows, C_in]`` to ``[rows, C_out]``; layer: weight ``[C_in, C_out]`` and bias.

    With the weight as a layer holds it, or with three axes, the host would have twice as
    many operations to queue as there are launches.
    """
    weight, bias = layer
    return mx.addmm(bias, rows, weight)


def _plain(
    x: mx.array, taps: int, stride: int, before: int, frames: int, slope: float
) -> mx.array:
    if slope != 1:
        x = mx.maximum(x, slope * x if slope else 0)
    behind = (frames - 1) * stride + taps - before - x.shape[1]
    if before or behind > 0:
        x = mx.pad(x, [(0, 0), (before, max(behind, 0)), (0, 0)])
    B, L, C = x.shape
    x = mx.contiguous(x)
    return mx.as_strided(x, (B, frames, taps * C), (L * C, stride * C, 1))
