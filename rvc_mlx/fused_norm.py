"""Sum and layer norm on CUDA in one pass, as a residual layer ends."""

from __future__ import annotations

import mlx.core as mx

from rvc_mlx.cuda_kernel import CudaKernel, Grid
from rvc_mlx.elementwise import PACK, PACK_TYPE, whole_packs

_WARP = 32
_ROWS = 8  # of a block, a warp each
_WIDEST = 1024  # channels, which a warp keeps in its registers
_KERNEL = CudaKernel(
    "added_norm",
    ("x", "added", "weight", "bias"),
    ("y", "cut"),
    PACK_TYPE
    + r"""struct alignas(PACK * sizeof(S)) Added { S v[PACK]; };
const int row = blockIdx.x * ROWS + threadIdx.x / 32, lane = threadIdx.x % 32;
if (row >= rows) return;
const Pack* first = (const Pack*)x + (size_t)row * WIDTH;
const Added* second = (const Added*)added + (size_t)row * WIDTH;
float values[EACH][PACK];
float sum = 0;
#pragma unroll
for (int n = 0; n < EACH; n++) {
    const int i = lane + 32 * n;
    if (i < WIDTH) {
        const Pack a = first[i];
        const Added b = second[i];
        #pragma unroll
        for (int k = 0; k < PACK; k++) {
            values[n][k] = float(a.v[k]) + float(b.v[k]);
            sum += values[n][k];
        }
    }
}
#pragma unroll
for (int far = 16; far > 0; far /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, far);
const float mean = sum / (WIDTH * PACK);
float squares = 0;
#pragma unroll
for (int n = 0; n < EACH; n++)
    if (lane + 32 * n < WIDTH)
        #pragma unroll
        for (int k = 0; k < PACK; k++) {
            values[n][k] -= mean;
            squares += values[n][k] * values[n][k];
        }
#pragma unroll
for (int far = 16; far > 0; far /= 2)
    squares += __shfl_xor_sync(0xffffffffu, squares, far);
const float scale = rsqrtf(squares / (WIDTH * PACK) + eps);
#pragma unroll
for (int n = 0; n < EACH; n++) {
    const int i = lane + 32 * n;
    if (i < WIDTH) {
        const Pack w = ((const Pack*)weight)[i], b = ((const Pack*)bias)[i];
        Pack out;
        Added short_out;
        #pragma unroll
        for (int k = 0; k < PACK; k++) {
            const float v = values[n][k] * scale * float(w.v[k]) + float(b.v[k]);
            out.v[k] = T(v);
            if (CUT) short_out.v[k] = S(v);
        }
        ((Pack*)y)[(size_t)row * WIDTH + i] = out;
        if (CUT) ((Added*)cut)[(size_t)row * WIDTH + i] = short_out;
    }
}
""",
    (("rows", "int"), ("eps", "float")),
    attributes=f"__launch_bounds__({_WARP * _ROWS})",
)


def added_norm(
    x: mx.array, added: mx.array, weight: mx.array, bias: mx.array, eps: float
) -> mx.array:
    """``layer_norm(x + added)``; on CUDA in float32 with one rounding at the end.

    Args:
        x: ``[..., C]``.
        added: as ``x``; its dtype may be another.
        weight: ``[C]`` of the dtype of ``x``.
        bias: likewise.
        eps: added to the variance.
    """
    return _normed(x, added, weight, bias, eps, cut=False)[0]


def cut_norm(
    x: mx.array, added: mx.array, weight: mx.array, bias: mx.array, eps: float
) -> tuple[mx.array, mx.array]:
    """``added_norm``, and the same in the dtype of ``added``."""
    y, *cut = _normed(x, added, weight, bias, eps, cut=added.dtype != x.dtype)
    return y, cut[0] if cut else y


def _normed(
    x: mx.array,
    added: mx.array,
    weight: mx.array,
    bias: mx.array,
    eps: float,
    *,
    cut: bool,
) -> list[mx.array]:
    C = x.shape[-1]
    fits = whole_packs(x) and C % PACK == 0 and C <= _WIDEST
    if not fits or not x.dtype == weight.dtype == bias.dtype:
        y = mx.fast.layer_norm(x + added, weight, bias, eps).astype(x.dtype)
        return [y, y.astype(added.dtype)] if cut else [y]
    rows, width = x.size // C, C // PACK
    made = _KERNEL(
        [x, added, weight, bias],
        [(x.shape, x.dtype), (x.shape if cut else (1,), added.dtype)],
        Grid(-(-rows // _ROWS), _WARP * _ROWS),
        scalars=[rows, eps],
        constants={
            "T": x.dtype,
            "S": added.dtype,
            "PACK": PACK,
            "ROWS": _ROWS,
            "WIDTH": width,
            "EACH": -(-width // _WARP),
            "CUT": cut,
        },
    )
    return made if cut else made[:1]
