"""The 48 Hz high pass on NVIDIA GPUs: ``audio.high_pass_spool`` as a kernel.

A recursive filter goes from sample to sample, but it forgets where it started. So each
thread makes a run of samples, and begins long before it from the steady state of the
sample there::

    thread 0    |run|
    thread 1    |...|run|                          . settles
    ...
    thread 99       |...............settles|run|

A kernel writes its result from the end to the start: launched on that, it goes backwards,
and the order is the first again. It computes in float64, which MLX has not on a GPU: what
goes in and out are two float32 arrays, the nearest number and the rest.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from threading import Lock

import mlx.core as mx
import numpy as np

from rvc_mlx.arrays import Array, begin, reflected, to_host
from rvc_mlx.audio import (
    HIGH_PASS_ORDER,
    SETTLED,
    edge_samples,
    high_pass_design,
    odd_extended,
)
from rvc_mlx.cuda_kernel import CudaKernel, Grid
from rvc_mlx.spool import Spool

# Samples of a thread. Most of its time it settles, however short the run; a warp keeps
# the float64 units of a quarter of a processor busy, and an H200 has 528 of these. So
# thirty seconds are 30 warps and the largest block is 257, all of them at work at once.
_RUN = 512
_BATCH = 16  # samples that are read ahead: a read takes as long as so many steps
_THREADS = 32  # of a block, so that the blocks spread over all processors

_HEADER = r"""
struct alignas(16) Pack { float v[4]; };

struct Batch {
    Pack high[BATCH / 4], low[BATCH / 4];

    __device__ __forceinline__ void read(const float* all, const float* rest, int n) {
        #pragma unroll
        for (int k = 0; k < BATCH / 4; k++) {
            high[k] = ((const Pack*)(all + n))[k];
            low[k] = ((const Pack*)(rest + n))[k];
        }
    }
    __device__ __forceinline__ double at(int k) const {
        return (double)high[k / 4].v[k % 4] + (double)low[k / 4].v[k % 4];
    }
};

struct Filter {  // direct form II, transposed
    double z[ORDER];

    __device__ __forceinline__ double next(double x) {
        const double y = fma(B[0], x, z[0]);
        #pragma unroll
        for (int k = 1; k < ORDER; k++) z[k - 1] = fma(-A[k], y, fma(B[k], x, z[k]));
        z[ORDER - 1] = fma(-A[ORDER], y, B[ORDER] * x);
        return y;
    }
};
"""
_SOURCE = r"""
const int first = (blockIdx.x * blockDim.x + threadIdx.x) * RUN;
if (first >= length) return;
const double factor = (double)gain + (double)gain_rest;
int n = first > SETTLED ? first - SETTLED : 0;
Batch now, ahead;
ahead.read(x, x_rest, n);
Filter filter;
#pragma unroll
for (int k = 0; k < ORDER; k++) filter.z[k] = STEADY[k] * ahead.at(0);

for (; n < first; n += BATCH) {
    now = ahead;
    ahead.read(x, x_rest, n + BATCH);
    #pragma unroll
    for (int k = 0; k < BATCH; k++) filter.next(now.at(k));
}
for (; n < first + RUN; n += BATCH) {
    now = ahead;
    ahead.read(x, x_rest, n + BATCH);
    #pragma unroll
    for (int k = 0; k < BATCH; k++) {
        const double out = factor * filter.next(now.at(k));
        const int place = length - 1 - n - k;
        if (place >= 0) {
            y[place] = (float)out;
            y_rest[place] = (float)(out - (double)(float)out);
        }
    }
}
"""


class DeviceSpool(Spool):
    """A recording that lies on a GPU; the host fetches it when it first reads.

    Args:
        samples: ``[n]`` float32; may still be computing.
    """

    def __init__(self, samples: mx.array):
        super().__init__(memory=np.iinfo(np.int64).max)
        self._samples, self._length = samples, len(samples)
        self._fetching = Lock()

    def read(self, start: int, stop: int) -> np.ndarray:
        """See ``Spool.read``."""
        self._fetch()
        return super().read(start, stop)

    def take(self) -> np.ndarray:
        """See ``Spool.take``."""
        self._fetch()
        return super().take()

    def _fetch(self) -> None:
        with self._fetching:
            if len(self._buffer) < self._length:
                # A copy: reading would move the array, which queued networks still read.
                self._buffer = to_host(self._samples + 0)

    def part(self, start: int, stop: int) -> Array:
        """See ``Spool.part``; may still be computing."""
        low, high = max(start, 0), min(stop, len(self))
        before, after = low - start, stop - high
        if low >= high or max(before, after) >= high - low:
            return mx.array(self.read_reflected(start, stop))
        return reflected(self._samples[low:high], before, after)

    def close(self) -> None:
        """See ``Spool.close``."""
        super().close()
        self._samples = mx.zeros(0)


def device_high_pass(
    source: Spool, block: int = 1 << 22, *, gain: float = 1.0
) -> Spool:
    """As ``audio.high_pass_spool``, on MLX's CUDA device.

    A block is filtered together with its surroundings, as there.

    Args:
        source: float32 recording at 16 kHz, at least one sample.
        block: samples of the result made at once; the GPU holds six arrays of them.
        gain: factor applied to the recording.

    Returns:
        A float32 spool of the same length; the arithmetic before is float64. One block
        stays on the device, a longer one is kept as the source is.

    Raises:
        ValueError: if the spool is empty.
        RuntimeError: there is no CUDA GPU or no NVRTC.
    """
    count = len(source)
    edge = edge_samples(count)

    def filtered(start: int, stop: int) -> mx.array:
        low = max(start - SETTLED, -edge)
        high = min(stop + SETTLED, count + edge)
        forwards = _filtered(*_operands(source, low, high), high - low, gain)
        backwards, _ = _filtered(*forwards, high - low)
        return backwards[start - low : stop - low]

    if count <= block:
        samples = filtered(0, count)
        begin(samples)
        return DeviceSpool(samples)
    result = source.like(np.float32, count)
    try:
        for start in range(0, count, block):
            result.append(to_host(filtered(start, min(start + block, count))))
    except BaseException:
        result.close()
        raise
    return result


def _operands(source: Spool, start: int, stop: int) -> tuple[mx.array, mx.array]:
    """Samples of the extended recording as two float32 arrays, with room to read on."""
    before, inside, after = odd_extended(source, start, stop)
    after = np.concatenate([after, np.zeros(-(stop - start) % _RUN + _BATCH)])
    x = np.concatenate([before, inside, after], dtype=np.float32)
    # Of the recording itself there is no rest; nothing is sent for it.
    rests = [
        mx.array((end - end.astype(np.float32)).astype(np.float32))
        for end in (before, after)
    ]
    rest = mx.concatenate([rests[0], mx.zeros(len(inside)), rests[1]])
    return mx.array(x), rest


def _filtered(
    x: mx.array, rest: mx.array, length: int, gain: float = 1.0
) -> tuple[mx.array, mx.array]:
    """Filter ``length`` samples forwards, from the steady state of the first.

    Args:
        x: float32, as ``_operands`` gives it.
        rest: what ``x`` lacks of float64.
        length: samples in it.
        gain: factor.

    Returns:
        The result from its last sample to its first, in the form of ``x`` and ``rest``;
        beyond ``length`` there is anything.
    """
    found = _kernel()(
        [x, rest],
        [(x.shape, mx.float32)] * 2,
        Grid(-(-length // (_RUN * _THREADS)), _THREADS),
        scalars=[length, gain, gain - float(np.float32(gain))],
    )
    return found[0], found[1]


@cache
def _kernel() -> CudaKernel:
    """The kernel with the filter's numbers, of which every bit counts, in its source."""
    b, a, steady, _ = high_pass_design()
    sizes = {
        "ORDER": HIGH_PASS_ORDER,
        "SETTLED": SETTLED,
        "RUN": _RUN,
        "BATCH": _BATCH,
    }
    lines = [f"constexpr int {name} = {size};" for name, size in sizes.items()]
    lines += [_table("B", b), _table("A", a), _table("STEADY", steady)]
    return CudaKernel(
        "high_pass",
        ("x", "x_rest"),
        ("y", "y_rest"),
        _SOURCE,
        (("length", "int"), ("gain", "float"), ("gain_rest", "float")),
        "\n".join(lines) + _HEADER,
        f"__launch_bounds__({_THREADS})",
    )


def _table(name: str, values: Iterable[float]) -> str:
    numbers = ", ".join(float(value).hex() for value in values)
    return f"__device__ constexpr double {name}[] = {{{numbers}}};"
