"""The 48 Hz high pass on NVIDIA GPUs: ``audio.high_pass_spools`` as a kernel.

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
goes from launch to launch are two float32 arrays, the nearest number and the rest.

Recordings lie one behind another, and go through together::

    x  |front| recording |back|room| |front| recording ...

The first launch makes front and back, the mirrored ends, from the recording.

Half of this long file is the CUDA source, and the filter's numbers, which are part of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import cache
from threading import Lock

import mlx.core as mx
import numpy as np

from rvc_mlx.arrays import Excerpt, begin, neighbours, to_host
from rvc_mlx.audio import HIGH_PASS_ORDER, SETTLED, edge_samples
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
struct alignas(8) Piece { int start, length, front, back, gain, gain_rest; };

// Samples of a piece: of a recording, whose ends are mirrored, or of what was made of it.
template <bool RECORDING> struct Samples {
    const float *all, *rest;
    int first, last;  // of the recording

    __device__ __forceinline__ double operator[](int n) const {
        if (!RECORDING) return (double)all[n] + (double)rest[n];
        if (n < first) return 2 * (double)all[first] - (double)all[2 * first - n];
        if (n <= last) return all[n];
        const int mirrored = 2 * last - n;  // beyond the piece there is anything
        return 2 * (double)all[last] - (double)all[mirrored > 0 ? mirrored : 0];
    }
};

template <bool RECORDING> struct Batch {
    Pack high[BATCH / 4], low[BATCH / 4];
    int start;

    __device__ __forceinline__ void read(const Samples<RECORDING>& x, int n) {
        start = n;
        #pragma unroll
        for (int k = 0; k < BATCH / 4; k++) {
            high[k] = ((const Pack*)(x.all + n))[k];
            if (!RECORDING) low[k] = ((const Pack*)(x.rest + n))[k];
        }
    }
    __device__ __forceinline__ double at(const Samples<RECORDING>& x, int k) const {
        const int n = start + k;
        if (RECORDING && (n < x.first || n > x.last)) return x[n];
        const double nearest = high[k / 4].v[k % 4];
        return RECORDING ? nearest : nearest + (double)low[k / 4].v[k % 4];
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
const Piece piece = ((const Piece*)pieces)[blockIdx.y];
const int t = threadIdx.x, length = piece.length, wanted = blockIdx.x * RESULTS;
if (wanted >= length) return;
const int begin = wanted > SETTLED ? wanted - SETTLED : 0;
const int first = begin + t * RUN;
using Reading = Batch<RECORDING>;
const Samples<RECORDING> samples{
    x + piece.start, x_rest + piece.start, piece.front, length - 1 - piece.back};
Reading now, ahead;
State start, state;
#pragma unroll
for (int k = 0; k < ORDER; k++) start.z[k] = 0;
if (t == 0) {
    const double x0 = samples[begin];
    #pragma unroll
    for (int k = 0; k < ORDER; k++) start.z[k] = STEADY[k] * x0;
}
state = start;
if (first < length) {
    ahead.read(samples, first);
    for (int n = first; n < first + RUN; n += BATCH) {
        now = ahead;
        ahead.read(samples, n + BATCH);
        #pragma unroll
        for (int k = 0; k < BATCH; k++) state.next(now.at(samples, k));
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
const double factor =
    (double)__int_as_float(piece.gain) + (double)__int_as_float(piece.gain_rest);
ahead.read(samples, first);
for (int n = first; n < first + RUN; n += BATCH) {
    now = ahead;
    ahead.read(samples, n + BATCH);
    #pragma unroll
    for (int k = 0; k < BATCH; k++) {
        const double out = factor * start.next(now.at(samples, k));
        const int place = length - 1 - n - k;
        if (place >= 0) {
            y[piece.start + place] = (float)out;
            y_rest[piece.start + place] = (float)(out - (double)(float)out);
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
        samples: ``[n]`` float32; begun, as other threads may read it first, but it may
            still be computing.
    """

    def __init__(self, samples: mx.array):
        super().__init__(memory=np.iinfo(np.int64).max)
        self._samples, self._length = samples, len(samples)
        self._nothing = mx.zeros(0)
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

    def excerpt(self, start: int, stop: int) -> Excerpt:
        """See ``Spool.excerpt``; may still be computing."""
        low, high = max(start, 0), min(stop, len(self))
        before, after = low - start, stop - high
        if low >= high or max(before, after) >= high - low:
            return Excerpt(mx.array(self.read_reflected(start, stop)))
        return Excerpt(self._samples[low:high], before, after)

    def close(self) -> None:
        """See ``Spool.close``."""
        super().close()
        self._samples = self._nothing  # made here, it would give the thread a stream


def device_high_pass(
    sources: Sequence[Spool], gains: Sequence[float], block: int = 1 << 22
) -> list[Spool]:
    """As ``audio.high_pass_spools``, on MLX's CUDA device.

    A block is filtered together with its surroundings, as there. Recordings of one block
    are filtered together; longer ones one by one, and waited for.

    Args:
        sources: float32 recordings at 16 kHz, at least one sample each.
        gains: factors applied to the recordings.
        block: samples made at once, of one or of several results, more only with the
            surroundings; the GPU holds five arrays of them.

    Returns:
        Float32 spools of the same lengths; the arithmetic before is float64. One block
        stays on the device, a longer one is kept as the source is.

    Raises:
        ValueError: if a spool is empty.
        RuntimeError: there is no CUDA GPU or no NVRTC.
    """
    pairs = list(zip(sources, gains, strict=True))
    whole = [_Piece(s, 0, len(s), gain) for s, gain in pairs if len(s) <= block]
    runs = neighbours(whole, lambda _: None, lambda piece: piece.length, block)
    together = itertools.chain.from_iterable(map(_filtered, runs))
    with ExitStack() as made:
        found = [
            made.enter_context(
                DeviceSpool(next(together))
                if len(source) <= block
                else _by_blocks(source, gain, block)
            )
            for source, gain in pairs
        ]
        made.pop_all()
    return found


def _by_blocks(source: Spool, gain: float, block: int) -> Spool:
    count = len(source)
    result = source.like(np.float32, count)
    try:
        for start in range(0, count, block):
            stop = min(start + block, count)
            result.append(to_host(*_filtered([_Piece(source, start, stop, gain)])))
    except BaseException:
        result.close()
        raise
    return result


class _Piece:
    """Samples ``start..stop`` of a recording, and what is filtered for them.

    Attributes:
        wanted: where they are in what is filtered.
        length: of that.
        front: samples of it before the recording.
        back: samples of it behind the recording.
        gain: of the recording.
    """

    def __init__(self, source: Spool, start: int, stop: int, gain: float):
        count = len(source)
        edge = edge_samples(count)
        low = max(start - SETTLED, -edge)
        high = min(stop + SETTLED, count + edge)
        self.wanted = slice(start - low, stop - low)
        self.length, self.gain = high - low, gain
        self.front, self.back = max(-low, 0), max(high - count, 0)
        self._source, self._low = source, low

    def write(self, target: np.ndarray) -> None:
        """Write what there is of the recording to ``[length]``, without its ends."""
        first, last = self.front, self.length - self.back
        target[first:last] = self._source.read(self._low + first, self._low + last)

    def numbers(self, start: int, recording: bool) -> list[int]:
        """A ``Piece`` of the kernel, that begins at sample ``start`` of all."""
        front, back, gain = self.front, self.back, self.gain
        if not recording:
            front, back, gain = 0, 0, 1.0
        gains = np.array([gain, gain - float(np.float32(gain))], np.float32)
        return [start, self.length, front, back, *gains.view(np.int32).tolist()]


def _filtered(pieces: Sequence[_Piece]) -> list[mx.array]:
    """Forwards, then backwards: what is wanted of each piece, float32."""
    # The last run ends in a piece's room, and so does what it reads ahead.
    rooms = [-(-piece.length // _RUN) * _RUN + _BATCH for piece in pieces]
    *starts, total = np.cumsum([0, *rooms]).tolist()
    x = np.empty(total, np.float32)
    for piece, start in zip(pieces, starts, strict=True):
        piece.write(x[start : start + piece.length])
    forwards = _launch(pieces, starts, mx.array(x))
    samples, _ = _launch(pieces, starts, *forwards)
    wanted = [
        samples[start : start + piece.length][piece.wanted]
        for piece, start in zip(pieces, starts, strict=True)
    ]
    begin(*wanted)  # all of them here: another thread has not this one's stream
    return wanted


def _launch(
    pieces: Sequence[_Piece],
    starts: Sequence[int],
    x: mx.array,
    rest: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Filter pieces, from the steady state of their first samples.

    Args:
        pieces: what is filtered.
        starts: where each begins in the arrays.
        x: float32 ``[n]``.
        rest: what ``x`` lacks of float64; None where it is recordings, which are given
            their mirrored ends and multiplied by their gains.

    Returns:
        Results from their last sample to their first, in the form of ``x`` and ``rest``;
        in a piece's room there is anything.
    """
    recording = rest is None
    numbers = [
        piece.numbers(start, recording)
        for piece, start in zip(pieces, starts, strict=True)
    ]
    longest = max(piece.length for piece in pieces)
    y, y_rest = _kernel()(
        [x, x if rest is None else rest, mx.array(numbers, mx.int32)],
        [(x.shape, mx.float32)] * 2,
        Grid(
            -(-longest // _RESULTS), _THREADS, len(pieces), shared_memory=_SHARED_MEMORY
        ),
        constants={"RECORDING": recording},
    )
    return y, y_rest


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
        ("x", "x_rest", "pieces"),
        ("y", "y_rest"),
        _SOURCE,
        (),
        "\n".join(lines) + _HEADER,
        f"__launch_bounds__({_THREADS})",
    )


def _table(name: str, values: Iterable[float]) -> str:
    numbers = ", ".join(float(value).hex() for value in values)
    return f"__device__ constexpr double {name}[] = {{{numbers}}};"
