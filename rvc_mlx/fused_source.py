"""The harmonic source of a vocoder on CUDA in one launch; as MLX has it, it is fifteen.

Where the pitch glides within a frame, MLX adds up its cycles first, which is one more.
"""

from __future__ import annotations

import mlx.core as mx

from rvc_mlx.cuda_kernel import CudaKernel
from rvc_mlx.elementwise import pack_grid
from rvc_mlx.models.nsf_hifigan import (
    SINE_AMPLITUDE,
    UNVOICED_NOISE,
    VOICED_NOISE,
    SineSource,
)

_MOST = 1 << 30  # samples; their count is an int32, and so is MLX's of threads
# A phase is rounded at each step, as MLX rounds it: a fused product would give another one.
_KERNEL = CudaKernel(
    "harmonic_source",
    ("cycles", "advances", "start", "offset", "noise", "weight", "bias"),
    ("y",),
    r"""
const int i = blockIdx.x * blockDim.x + threadIdx.x;
if (i >= samples) return;
const int frame = i / U, clip = frame / T, at = glides ? i : frame;
const float cycle = cycles[at];
const float advance = glides ? advances[i] : __fmul_rn(cycle, i % U + 1);
const float reached = __fadd_rn(start[frame], advance);
const float phase = reached - floorf(reached);
const float amplitude = cycle > 0.f ? sine_amplitude : 0.f;
const float deviation = cycle > 0.f ? voiced_noise : unvoiced_noise;
const float* offsets = offset + (size_t)clip * harmonics;
const float* noises = noise + (size_t)i * harmonics;
float sum = has_bias ? bias[0] : 0.f;
for (int h = 0; h < harmonics; h++) {
    const float turns = __fadd_rn(__fmul_rn(phase, h + 1), offsets[h]);
    const float sine = sinf(6.283185307f * turns);
    sum += weight[h] * (amplitude * sine + deviation * noises[h]);
}
y[i] = tanhf(sum);
""",
    (
        *(("samples", "int"), ("T", "int"), ("U", "int"), ("harmonics", "int")),
        *(("glides", "int"), ("has_bias", "int"), ("sine_amplitude", "float")),
        *(("voiced_noise", "float"), ("unvoiced_noise", "float")),
    ),
)


def from_frames(
    source: SineSource,
    cycles: mx.array,
    start: mx.array,
    offset: mx.array,
    noise: mx.array,
) -> mx.array:
    """``source.from_frames``, to rounding of float32, whose phases it has exactly.

    Shapes that want broadcasting, no samples, or 2**30 and more are left to MLX.

    Args:
        source: whose layer merges the harmonics, in float32.
        cycles: ``[B, T, 1]`` or ``[B, T, U]`` float32, per sample.
        start: ``[B, T, 1]`` float32 in cycles.
        offset: ``[B, 1, harmonics]`` float32 in cycles.
        noise: ``[B, T * U, harmonics]`` float32.

    Returns:
        ``[B, T * U, 1]`` float32 in -1..1.

    Raises:
        ValueError: the shapes do not go together.
    """
    if not _fits(source, cycles, start, offset, noise):
        return source.from_frames(cycles, start, offset, noise)
    B, T, held = cycles.shape
    _, L, harmonics = noise.shape
    layer, glides = source.merge_layer, held > 1
    has_bias = "bias" in layer
    (y,) = _KERNEL(
        [
            *(cycles, mx.cumsum(cycles, axis=-1) if glides else cycles),
            *(start, offset, noise, layer.weight),
            layer.bias if has_bias else layer.weight,
        ],
        [((B, L, 1), mx.float32)],
        pack_grid(B * L),
        scalars=[
            *(B * L, T, L // T, harmonics, glides, has_bias),
            *(SINE_AMPLITUDE, VOICED_NOISE, UNVOICED_NOISE),
        ],
    )
    return y


def _fits(
    source: SineSource,
    cycles: mx.array,
    start: mx.array,
    offset: mx.array,
    noise: mx.array,
) -> bool:
    """Whether the kernel finds every number where it looks for it."""
    B, T, held = cycles.shape
    _, L, harmonics = noise.shape
    return (
        0 < B * L < _MOST
        and noise.shape == (B, L // T * T, harmonics)
        and held in (1, L // T)
        and start.shape == (B, T, 1)
        and offset.shape == (B, 1, harmonics)
        and source.merge_layer.weight.shape == (1, harmonics)
    )
