"""What lies between the stages of a HiFi-GAN vocoder on CUDA, in passes as few as can be.

A stage's input is ``upsample(leaky_relu(x)) + source_conv(source)``. As MLX has it, the
rectifier is two passes over memory, each bias one and the sum another; here the rectifier
is one, or none where ``product_convs`` gathers what it is to see, and sum and biases are one.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from rvc_mlx.cuda_kernel import CudaKernel
from rvc_mlx.elementwise import EACH_PACK, PACK, pack_grid
from rvc_mlx.models.layers import LRELU_SLOPE
from rvc_mlx.models.nsf_hifigan import HiFiGAN
from rvc_mlx.product_convs import ProductUp

_KERNEL = CudaKernel(
    "joined",
    ("x", "beside", "bias"),
    ("y",),
    EACH_PACK
    + r"""const int channel = i % width * PACK;
const Pack in = ((const Pack*)x)[i];
Pack added, out;
if (has_beside) added = ((const Pack*)beside)[i];
#pragma unroll
for (int n = 0; n < PACK; n++) {
    float v = float(in.v[n]);
    if (has_beside) v += float(added.v[n]);
    if (has_bias) v += bias[channel + n];
    out.v[n] = T(fmaxf(v, v * slope));
}
((Pack*)y)[i] = out;
""",
    (
        *(("packs", "int"), ("width", "int")),
        *(("has_beside", "int"), ("has_bias", "int"), ("slope", "float")),
    ),
)


def joined(
    x: mx.array,
    beside: mx.array | None = None,
    bias: mx.array | None = None,
    slope: float = 1.0,
) -> mx.array:
    """``leaky_relu(x + beside + bias)``, rounded once.

    Args:
        x: ``[B, L, C]``, C a multiple of 8, fewer than 2**34 values.
        beside: as ``x``, or None.
        bias: ``[C]`` float32, or None.
        slope: of the rectifier for negative values; 1 for none.
    """
    packs = x.size // PACK
    (y,) = _KERNEL(
        [x, x if beside is None else beside, mx.zeros((1,)) if bias is None else bias],
        [(x.shape, x.dtype)],
        pack_grid(packs),
        scalars=[
            *(packs, x.shape[-1] // PACK),
            *(beside is not None, bias is not None, slope),
        ],
        constants={"T": x.dtype, "PACK": PACK},
    )
    return y


class Joints:
    """``upsampled`` for the stages of one vocoder, whose biases it takes over."""

    def __init__(self, vocoder: HiFiGAN):
        self._biases = {
            id(upsample): _taken_bias(upsample) + _taken_bias(source_conv)
            for upsample, source_conv, _ in vocoder.stages()
        }

    def __call__(
        self,
        x: mx.array,
        upsample: nn.Module,
        source_conv: nn.Module | None,
        source: mx.array | None,
    ) -> mx.array:
        """See ``upsampled``."""
        if isinstance(upsample, ProductUp):  # which rectifies what it gathers
            up = upsample(x, LRELU_SLOPE)
        else:
            up = upsample(joined(x, slope=LRELU_SLOPE))
        beside = None if source_conv is None else source_conv(source)
        return joined(up, beside, self._biases[id(upsample)])


def _taken_bias(layer: nn.Module | None) -> mx.array:
    if layer is None or "bias" not in layer:
        return mx.zeros((1,))
    bias: mx.array = layer.pop("bias").astype(mx.float32)
    return bias


def quicken_joints(vocoder: HiFiGAN) -> None:
    """Let a loaded vocoder compute this way from now on, if its widths allow it."""
    if isinstance(vocoder._upsampled, Joints):
        return
    if all(len(upsample.bias) % PACK == 0 for upsample, _, _ in vocoder.stages()):
        vocoder._upsampled = Joints(vocoder)
