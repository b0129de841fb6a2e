"""The 48 Hz high pass on NVIDIA GPUs: ``audio.high_pass_spool`` as a kernel.

A recursive filter goes from sample to sample, but what it carries from one run of samples
to the next only fades. So the threads of a block make a run each from nothing, hand on
what is left of it at its end, and make it again from what came before::

    run          |.......|.......|.......|.......|
    from nothing  -> end  -> end  -> end  -> end
    handed on          +------->+------->+          in log2 of the runs
    again         -> out  -> out  -> out  -> out

A block begins long before its results, from the steady state of the sample there. Five
numbers pass from run to run; in the filter's usual form they are so unlike that sums of
them lose all digits, so each is the state of one pole here (a pair of them is complex).

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
    odd_extended,
)
from rvc_mlx.cuda_kernel import CudaKernel, Grid
from rvc_mlx.spool import Spool

_RUN = 64  # samples of a thread
_THREADS = 256  # of a block
_RESULTS = _RUN * _THREADS - SETTLED  # samples of a block; before them it settles
_LEVELS = _THREADS.bit_length() - 1
_BATCH = 16  # samples that are read ahead: a read takes as long as so many steps
_SHARED_MEMORY = 2 * 8 * HIGH_PASS_ORDER * _THREADS

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

struct State {  // of one real pole, then of pairs: real and imaginary part
    double z[ORDER];

    __device__ __forceinline__ void times(const double* poles) {
        z[0] *= poles[0];
        #pragma unroll
        for (int k = 1; k < ORDER; k += 2) {
            const double re = z[k], im = z[k + 1];
            z[k] = fma(poles[k], re, -poles[k + 1] * im);
            z[k + 1] = fma(poles[k], im, poles[k + 1] * re);
        }
    }
    __device__ __forceinline__ double next(double x) {
        times(POLES);
        z[0] += x;
        double y = fma(RESIDUES[0], z[0], DIRECT[0] * x);
        #pragma unroll
        for (int k = 1; k < ORDER; k += 2) {
            z[k] += x;
            y = fma(RESIDUES[k], z[k], fma(-RESIDUES[k + 1], z[k + 1], y));
        }
        return y;
    }
};
"""
_SOURCE = r"""
extern __shared__ __align__(16) unsigned char shared[];
double* ends = (double*)shared;  // [2][ORDER][THREADS]
const int t = threadIdx.x, wanted = blockIdx.x * RESULTS;
const int begin = wanted > SETTLED ? wanted - SETTLED : 0;
const int first = begin + t * RUN;
Batch now, ahead;
State start, state;
#pragma unroll
for (int k = 0; k < ORDER; k++) start.z[k] = 0;
if (t == 0) {
    const double x0 = (double)x[begin] + (double)x_rest[begin];
    #pragma unroll
    for (int k = 0; k < ORDER; k++) start.z[k] = STEADY[k] * x0;
}
state = start;
if (first < length) {
    ahead.read(x, x_rest, first);
    for (int n = first; n < first + RUN; n += BATCH) {
        now = ahead;
        ahead.read(x, x_rest, n + BATCH);
        #pragma unroll
        for (int k = 0; k < BATCH; k++) state.next(now.at(k));
    }
}

for (int level = 0; level < LEVELS; level++) {
    double* handed = ends + (level % 2) * ORDER * THREADS;
    const int before = t - (1 << level);
    #pragma unroll
    for (int k = 0; k < ORDER; k++) handed[k * THREADS + t] = state.z[k];
    __syncthreads();
    if (before >= 0) {
        State from;
        #pragma unroll
        for (int k = 0; k < ORDER; k++) from.z[k] = handed[k * THREADS + before];
        from.times(HANDED + level * ORDER);
        #pragma unroll
        for (int k = 0; k < ORDER; k++) state.z[k] += from.z[k];
    }
}
double* handed = ends + (LEVELS % 2) * ORDER * THREADS;
#pragma unroll
for (int k = 0; k < ORDER; k++) handed[k * THREADS + t] = state.z[k];
__syncthreads();
if (first < wanted || first >= wanted + RESULTS || first >= length) return;

if (t > 0)
    #pragma unroll
    for (int k = 0; k < ORDER; k++) start.z[k] = handed[k * THREADS + t - 1];
const double factor = (double)gain + (double)gain_rest;
ahead.read(x, x_rest, first);
for (int n = first; n < first + RUN; n += BATCH) {
    now = ahead;
    ahead.read(x, x_rest, n + BATCH);
    #pragma unroll
    for (int k = 0; k < BATCH; k++) {
        const double out = factor * start.next(now.at(k));
        const int place = length - 1 - n - k;
        if (place >= 0) {
            y[place] = (float)out;
            y_rest[place] = (float)(out - (double)(float)out);
        }
    }
}
"""


# ``audio.high_pass_design`` in partial fractions, ``y = DIRECT * x + sum(RESIDUES * z)``
# with ``z = POLES * z + x`` for each pole, found with 60 digits: float64 is too short to
# find them. Of two complex poles one is there, with twice its residue, of which the real
# part counts: numbers of the real pole, then real and imaginary parts.
_DIRECT = (1.0309696635273913,)
_POLES = (
    0.9813258660302886,
    0.9848053534211462, 0.010912449079336256,
    0.9940326231478913, 0.017822121077635818,
)  # fmt: skip
_RESIDUES = (
    -0.03571338750074912,
    -0.03050448861396546, -0.041978282211789696,
    0.005208857771168056, -0.016033969905342928,
)  # fmt: skip
# What the design's steady state is in these; it is 1e-7 off the filter's own.
_STEADY = (
    53.54999690511493,
    43.418391397291295, 31.18209904476345,
    16.893376449405853, 50.45362901561512,
)  # fmt: skip


def _handed() -> np.ndarray:
    """Poles to the power of one run's samples, of two, of four ...: ``[levels, 5]``."""
    poles = np.array([_POLES[0], complex(*_POLES[1:3]), complex(*_POLES[3:])])
    powers = [poles ** (_RUN << level) for level in range(_LEVELS)]
    return np.array([[p[0].real, *p[1:].view(float)] for p in powers])


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
        Grid(-(-length // _RESULTS), _THREADS, shared_memory=_SHARED_MEMORY),
        scalars=[length, gain, gain - float(np.float32(gain))],
    )
    return found[0], found[1]


@cache
def _kernel() -> CudaKernel:
    """The kernel with the filter's numbers, of which every bit counts, in its source."""
    sizes = {
        "ORDER": HIGH_PASS_ORDER,
        "SETTLED": SETTLED,
        "RUN": _RUN,
        "THREADS": _THREADS,
        "RESULTS": _RESULTS,
        "LEVELS": _LEVELS,
        "BATCH": _BATCH,
    }
    lines = [f"constexpr int {name} = {size};" for name, size in sizes.items()]
    tables = {
        "DIRECT": _DIRECT,
        "POLES": _POLES,
        "RESIDUES": _RESIDUES,
        "STEADY": _STEADY,
        "HANDED": _handed().ravel(),
    }
    lines += [_table(name, values) for name, values in tables.items()]
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
