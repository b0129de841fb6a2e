"""The recurrent layer of RMVPE as one kernel that never leaves the GPU.

Each step of a recurrence needs the whole state of the one before.

CUDA: sixteen blocks per sequence stay on the GPU for all of it, eight per direction;
each of their warps keeps the recurrent weights of four units in registers::

    block 0 of a direction   units   0.. 31   h[t-1] --read 256--> dot --> h[t][ 0.. 31]
    ...
    block 7                  units 224..255   h[t-1] --read 256--> dot --> h[t][224..255]

From Hopper on the eight are a cluster and write their states into each other's shared
memory; a barrier there counts the bytes that have come. Two buffers suffice: h[t + 1] is
only sent by a block that has all of h[t], and so when all have read h[t - 1].

Older GPUs have no clusters. There the states travel through the output array: it starts
as NaN, so a value that is a number is ready to be read.

Metal does not promise that two threadgroups run at the same time, so none may wait for
another: one threadgroup does a direction of a sequence, a thread per gate row, and the
state stays in threadgroup memory. The weights (393 kB of a direction in half precision)
exceed what one core keeps in registers, so they stream from its caches at every step::

    threads   0..255   gate r  --\
    threads 256..511   gate z  ---barrier--> threads 512..767   h[t] --barrier--> t + 1
    threads 512..767   gate n  --/

``checked`` compares a kernel with the plain loop before it is trusted. The sources stay
in this file, long as it is: the code that launches them fixes the layouts they read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from rvc_mlx.cuda_kernel import CudaKernel, Grid
from rvc_mlx.models.rmvpe import GRU
from rvc_mlx.steady import own_rows, told_kernel

log = logging.getLogger("rvc_mlx")

HIDDEN_SIZE = 256  # what the kernels are laid out for
TOLERANCE = 1e-4  # largest difference from the plain loop that is still rounding

Step = Callable[[mx.array], mx.array]

_CHECK_FRAMES = 32  # the plain loop takes about a millisecond a frame on a CPU
_ROWS = 3 * HIDDEN_SIZE  # gates r, z, n
_BLOCKS_PER_SEQUENCE = 16
_THREADS = 256
# Blocks wait for each other, so all of a launch should fit: an H200 has 132 processors.
# GPUs in practice take blocks in order: on a smaller one the last sequences only queue.
_SEQUENCES_AT_ONCE = 8
_FIRST_WITH_CLUSTERS = 9  # major compute capability: Hopper

_POLLING_SOURCE = r"""
const int sequence = blockIdx.x / 16, direction = blockIdx.x / 8 % 2;
const int part = blockIdx.x % 8;
const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
const int first_unit = part * 32 + warp * 4;
const size_t start = (size_t)sequence * T;

// Rows of the recurrent weights of gates r, z, n of four units; a lane has 8 columns.
float weight[12][8];
#pragma unroll
for (int row = 0; row < 12; row++) {
    const int unit = first_unit + row % 4;
    const float* source =
        recurrent + ((size_t)direction * 768 + (row / 4) * 256 + unit) * 256 + lane * 8;
    #pragma unroll
    for (int c = 0; c < 8; c++) weight[row][c] = source[c];
}
// Lanes 0 to 3 own a unit each: its biases and its state.
float bias[3] = {0.f, 0.f, 0.f}, state = 0.f;
if (lane < 4)
    for (int gate = 0; gate < 3; gate++)
        bias[gate] = biases[direction * 768 + gate * 256 + first_unit + lane];
volatile float* out = (volatile float*)states;

for (int step = 0; step < T; step++) {
    const size_t t = start + (direction ? T - 1 - step : step);
    float input[3] = {0.f, 0.f, 0.f};
    if (lane < 4)
        for (int gate = 0; gate < 3; gate++)
            input[gate] =
                projected[(t * 2 + direction) * 768 + gate * 256 + first_unit + lane];
    float sum[12];
    #pragma unroll
    for (int row = 0; row < 12; row++) sum[row] = 0.f;
    if (step > 0) {
        const size_t before = direction ? t + 1 : t - 1;
        volatile float* previous = out + (before * 2 + direction) * 256 + lane * 8;
        float h[8];
        bool ready;
        do {
            ready = true;
            #pragma unroll
            for (int c = 0; c < 8; c++) {
                h[c] = previous[c];
                ready = ready && (h[c] == h[c]);
            }
        } while (!ready);
        __syncwarp();
        #pragma unroll
        for (int row = 0; row < 12; row++)
            #pragma unroll
            for (int c = 0; c < 8; c++) sum[row] += weight[row][c] * h[c];
        #pragma unroll
        for (int offset = 16; offset > 0; offset >>= 1)
            #pragma unroll
            for (int row = 0; row < 12; row++)
                sum[row] += __shfl_xor_sync(0xffffffffu, sum[row], offset);
    }
    if (lane < 4) {
        float r = 0.f, z = 0.f, n = 0.f;
        #pragma unroll
        for (int unit = 0; unit < 4; unit++)
            if (lane == unit) {
                r = sum[unit];
                z = sum[4 + unit];
                n = sum[8 + unit];
            }
        r = 1.f / (1.f + expf(-(input[0] + r + bias[0])));
        z = 1.f / (1.f + expf(-(input[1] + z + bias[1])));
        n = tanhf(input[2] + r * (n + bias[2]));
        state = (1.f - z) * n + z * state;
        // NaN means "not ready": a broken input must not make the others wait for ever.
        if (state != state) state = __int_as_float(0x7f800000);
        out[(t * 2 + direction) * 256 + first_unit + lane] = state;
    }
}
"""

_CLUSTER_HEADER = r"""
namespace cluster {

__device__ __forceinline__ unsigned address(const void* pointer) {
    return (unsigned)__cvta_generic_to_shared(pointer);
}

// The same place in the shared memory of another block of the cluster.
__device__ __forceinline__ unsigned address_in(unsigned own, unsigned block) {
    unsigned result;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(result) : "r"(own), "r"(block));
    return result;
}

__device__ __forceinline__ void synchronise() {
    asm volatile("barrier.cluster.arrive.release.aligned;\n"
                 "barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ void make_barrier(unsigned barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(barrier) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void expect(unsigned barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 :: "r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void wait(unsigned barrier, unsigned parity) {
    unsigned done;
    do {
        asm volatile(
            "{\n.reg .pred p;\n"
            "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n}"
            : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    } while (!done);
}

__device__ __forceinline__ void send(unsigned target, float value, unsigned barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 "
                 "[%0], %1, [%2];" :: "r"(target), "f"(value), "r"(barrier) : "memory");
}

}  // namespace cluster
"""

_CLUSTER_SOURCE = r"""
using namespace cluster;
const int sequence = blockIdx.x / 16, direction = blockIdx.x / 8 % 2;
const int part = blockIdx.x % 8;
const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
const int first_unit = part * 32 + warp * 4, unit = first_unit + lane / 8;
const size_t start = (size_t)sequence * T;
const int steps = limited ? told[0] : T;  // what is behind is not computed

// States of the step before, of even and odd steps, and who tells that they are here.
__shared__ __align__(16) float kept[2][256];
__shared__ __align__(8) unsigned long long arrived[2];
const unsigned barriers = address(arrived);
if (threadIdx.x == 0)
    for (int i = 0; i < 2; i++) {
        make_barrier(barriers + i * 8);
        expect(barriers + i * 8, sizeof(kept[0]));
    }

// Rows of the recurrent weights of gates r, z, n of four units; a lane has 8 columns,
// 4 in each half.
float weight[4][3][8];
#pragma unroll
for (int u = 0; u < 4; u++)
    #pragma unroll
    for (int gate = 0; gate < 3; gate++) {
        const float* source = recurrent + lane * 4 +
            ((size_t)direction * 768 + gate * 256 + first_unit + u) * 256;
        #pragma unroll
        for (int c = 0; c < 8; c++) weight[u][gate][c] = source[c / 4 * 128 + c % 4];
    }
// Eight lanes share a unit; each sends its state to another block.
float bias[3], state = 0.f, ahead[4][3];
for (int gate = 0; gate < 3; gate++)
    bias[gate] = biases[direction * 768 + gate * 256 + unit];
const unsigned target = address_in(address(&kept[0][unit]), lane % 8);
const unsigned target_barriers = address_in(barriers, lane % 8);
auto fetch = [&](int step, float (&input)[3]) {
    const size_t t = start + (direction ? steps - 1 - step : step);
    if (step < steps)
        for (int gate = 0; gate < 3; gate++)
            input[gate] = projected[(t * 2 + direction) * 768 + gate * 256 + unit];
};
#pragma unroll
for (int i = 0; i < 4; i++) fetch(i, ahead[i]);
synchronise();

for (int first = 0; first < steps; first += 4) {
    #pragma unroll
    for (int i = 0; i < 4; i++) {
        const int step = first + i;
        if (step >= steps) break;
        float own[3] = {0.f, 0.f, 0.f};
        if (step > 0) {
            const int from = (i + 1) % 2;  // step - 1
            wait(barriers + from * 8, (step - 1) / 2 % 2);
            if (threadIdx.x == 0) expect(barriers + from * 8, sizeof(kept[0]));
            float h[8], sum[4][3], half[2][3];
            *(float4*)&h[0] = *(const float4*)&kept[from][lane * 4];
            *(float4*)&h[4] = *(const float4*)&kept[from][128 + lane * 4];
            #pragma unroll
            for (int u = 0; u < 4; u++)
                #pragma unroll
                for (int gate = 0; gate < 3; gate++) {
                    sum[u][gate] = weight[u][gate][0] * h[0];
                    #pragma unroll
                    for (int c = 1; c < 8; c++) sum[u][gate] += weight[u][gate][c] * h[c];
                }
            // Each exchange halves the units that a lane has sums of.
            const bool upper = lane & 16, odd = lane & 8;
            #pragma unroll
            for (int u = 0; u < 2; u++)
                #pragma unroll
                for (int gate = 0; gate < 3; gate++)
                    half[u][gate] = (upper ? sum[u + 2][gate] : sum[u][gate]) +
                        __shfl_xor_sync(~0u, upper ? sum[u][gate] : sum[u + 2][gate], 16);
            #pragma unroll
            for (int gate = 0; gate < 3; gate++)
                own[gate] = (odd ? half[1][gate] : half[0][gate]) +
                    __shfl_xor_sync(~0u, odd ? half[0][gate] : half[1][gate], 8);
            #pragma unroll
            for (int offset = 4; offset > 0; offset >>= 1)
                #pragma unroll
                for (int gate = 0; gate < 3; gate++)
                    own[gate] += __shfl_xor_sync(~0u, own[gate], offset);
        }
        const float r = 1.f / (1.f + expf(-(ahead[i][0] + own[0] + bias[0])));
        const float z = 1.f / (1.f + expf(-(ahead[i][1] + own[1] + bias[1])));
        const float n = 1.f - 2.f / (1.f + expf(2.f * (ahead[i][2] + r * (own[2] + bias[2]))));
        state = (1.f - z) * n + z * state;
        if (step + 1 < steps) send(target + i % 2 * sizeof(kept[0]), state, target_barriers + i % 2 * 8);
        fetch(step + 4, ahead[i]);
        if (lane % 8 == 0)
            states[((start + (direction ? steps - 1 - step : step)) * 2 + direction) * 256 + unit] = state;
    }
}
synchronise();  // no block may end while others write into it
"""

_METAL_SOURCE = r"""
const uint row = thread_index_in_threadgroup;
const uint unit = row % 256;
const uint sequence = threadgroup_position_in_grid.x / 2;
const uint direction = threadgroup_position_in_grid.x % 2;
const uint T = uint(steps[0]);
const float bias = biases[direction * 768 + row];
// Four columns of a row lie together, then the rows: neighbours read neighbours.
const device metal::vec<W, 4>* weight =
    (const device metal::vec<W, 4>*)recurrent + direction * 64 * 768 + row;

threadgroup float4 state[64];
threadgroup float gates[512];
float h = 0.0f;
if (row < 64) state[row] = float4(0.0f);
threadgroup_barrier(metal::mem_flags::mem_threadgroup);

for (uint step = 0; step < T; step++) {
    const size_t t = size_t(sequence) * T + (direction ? T - 1 - step : step);
    const float input = projected[(t * 2 + direction) * 768 + row];
    float4 sum = float4(bias, 0.0f, 0.0f, 0.0f);
    for (uint k = 0; k < 64; k++) sum += float4(weight[k * 768]) * state[k];
    const float total = (sum.x + sum.y) + (sum.z + sum.w);
    if (row < 512) gates[row] = 1.0f / (1.0f + metal::precise::exp(-(input + total)));
    threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    if (row >= 512) {
        const float r = gates[unit], z = gates[256 + unit];
        h = (1.0f - z) * metal::precise::tanh(input + r * total) + z * h;
        ((threadgroup float*)state)[unit] = h;
        states[(t * 2 + direction) * 256 + unit] = h;
    }
    threadgroup_barrier(metal::mem_flags::mem_threadgroup);
}
"""


_CLUSTER_KERNEL = CudaKernel(
    "gru",
    ("projected", "recurrent", "biases", "told"),
    ("states",),
    _CLUSTER_SOURCE,
    (("T", "int"), ("limited", "int")),
    _CLUSTER_HEADER,
    f"__cluster_dims__(8, 1, 1) __launch_bounds__({_THREADS}, 1)",
)
_POLLING_KERNEL = CudaKernel(
    "polling_gru",
    ("projected", "recurrent", "biases", "before"),
    ("states",),
    _POLLING_SOURCE,
    (("T", "int"),),
)


def supports(gru: GRU) -> bool:
    """Whether a kernel fits this layer on this machine's GPU."""
    on_gpu = mx.cuda.is_available() or mx.metal.is_available()
    return on_gpu and gru.hidden_size == HIDDEN_SIZE


def cuda_gru(gru: GRU) -> Step:
    """The layer as a function ``[B, T, C]`` to ``[B, T, 512]``, computed in float32.

    The result equals ``torch.nn.GRU`` to rounding, in the type of the input.
    """
    w_ih, w_hh, b_ih, b_hh = gru.stacked()
    project = _projection(w_ih, b_ih)
    recurrent, biases = mx.array(w_hh), mx.array(b_hh)
    mx.eval(recurrent, biases)
    major = mx.device_info(mx.gpu).get("compute_capability_major", 0)
    clusters = int(major) >= _FIRST_WITH_CLUSTERS

    def scan(projected: mx.array, before: mx.array) -> mx.array:
        B, T, _ = projected.shape
        inputs, own = [projected, recurrent, biases], own_rows()
        told = told_kernel(own)
        (states,) = (_CLUSTER_KERNEL if clusters else _POLLING_KERNEL)(
            [*inputs, told if clusters else before],
            [((B, T, 2 * HIDDEN_SIZE), mx.float32)],
            Grid(B * _BLOCKS_PER_SEQUENCE, _THREADS),
            scalars=[T, own is not None] if clusters else [T],
            init_value=None if clusters else float("nan"),
        )
        return states

    if clusters:
        return lambda x: scan(project(x), x).astype(x.dtype)
    return lambda x: _scan_in_groups(scan, project(x)).astype(x.dtype)


def metal_gru(gru: GRU) -> Step:
    """``cuda_gru`` for Apple GPUs; the same layouts, types and arithmetic.

    Weights of a half-precision layer are read as float16, which holds any bfloat16 of
    usual size to 3e-8. Never run by its authors: take it through ``checked``.
    """
    w_ih, w_hh, b_ih, b_hh = gru.stacked()
    project = _projection(w_ih, b_ih)
    dtype = mx.float32 if gru["weight_hh_l0"].dtype == mx.float32 else mx.float16
    recurrent, biases = mx.array(_by_column(w_hh)).astype(dtype), mx.array(b_hh)
    mx.eval(recurrent, biases)
    kernel: Any = mx.fast.metal_kernel(
        name="bidirectional_gru",
        input_names=["projected", "recurrent", "biases", "steps"],
        output_names=["states"],
        source=_METAL_SOURCE,
    )

    def run(x: mx.array) -> mx.array:
        B, T, _ = x.shape
        (states,) = kernel(
            inputs=[project(x), recurrent, biases, mx.array([T], mx.int32)],
            template=[("W", dtype)],
            grid=(B * 2 * _ROWS, 1, 1),
            threadgroup=(_ROWS, 1, 1),
            output_shapes=[(B, T, 2 * HIDDEN_SIZE)],
            output_dtypes=[mx.float32],
        )
        return states.astype(x.dtype)

    return run


def checked(gru: GRU, kernel: Callable[[GRU], Step] | None = None) -> Step:
    """The layer through its kernel if that agrees with the plain loop, else the loop.

    The kernel runs 32 random frames, one sequence and two at once, with the layer's
    recurrent weights. If it raises, gives a value that is not finite or is off by more
    than ``TOLERANCE``, a warning says so and the layer itself is returned.

    Args:
        gru: the layer.
        kernel: makes the step; by default the kernel of this machine's GPU.
    """
    if kernel is None:
        kernel = metal_gru if mx.metal.is_available() else cuda_gru
    defect = _defect(gru, kernel)
    if not defect:
        return kernel(gru)
    log.warning(
        "SLOW PITCH: %s on %s %s. The plain loop is used instead: results stay right, "
        "but this layer takes some 75 times as long (on an NVIDIA H200 19 ms instead of "
        "0.25 ms per second of audio). Please report this message.",
        getattr(kernel, "__name__", "kernel"),
        mx.device_info().get("device_name", "unknown device"),
        defect,
    )
    return gru


def _projection(w_ih: np.ndarray, b_ih: np.ndarray) -> Step:
    """The input's part of all gates: ``[B, T, C]`` to ``[B, T, 2 * 768]`` float32."""
    weight = mx.array(np.concatenate(list(w_ih)).T.copy())  # [C, 2 * 768]
    offset = mx.array(b_ih.reshape(-1))
    mx.eval(weight, offset)
    return lambda x: mx.addmm(offset, x.astype(mx.float32), weight)


def _scan_in_groups(
    scan: Callable[[mx.array, mx.array], mx.array], projected: mx.array
) -> mx.array:
    """``scan`` over the first axis, as many sequences at once as the GPU can hold.

    A launch is given the result of the one before, which it does not read: without that
    dependency MLX may run both at once, and together they would not fit.
    """
    groups = [projected]
    for first in range(0, projected.shape[0], _SEQUENCES_AT_ONCE):
        group = projected[first : first + _SEQUENCES_AT_ONCE]
        groups.append(scan(group, groups[-1]))
    return mx.concatenate(groups[1:])


def _by_column(w_hh: np.ndarray) -> np.ndarray:
    """``[2, 768, 256]`` to ``[2, 64, 768, 4]``: four columns, for all rows in turn."""
    return w_hh.reshape(2, _ROWS, -1, 4).transpose(0, 2, 1, 3).copy()


def _probe(gru: GRU, dtype: mx.Dtype) -> GRU:
    """A layer with 8 inputs and the recurrent weights of ``gru``.

    Its input weights are multiples of 1/16, so that their products are exact in TF32
    too, which MLX's GPU matmul uses: what differs comes from the kernel.
    """
    rng = np.random.default_rng(0)
    probe = GRU(8, gru.hidden_size)
    for name, weight in gru.parameters().items():
        if name.startswith("weight_ih"):
            values = rng.integers(-8, 9, (weight.shape[0], 8)) / 16
            weight = mx.array(values.astype(np.float32))
        probe[name] = weight.astype(dtype)
    return probe


def _defect(gru: GRU, kernel: Callable[[GRU], Step]) -> str:
    """What is wrong with a kernel, for a message; empty if nothing is."""
    values = np.random.default_rng(1).integers(-8, 9, (2, _CHECK_FRAMES, 8)) / 8
    x = mx.array(values.astype(np.float32))
    with mx.stream(mx.cpu):  # in float32 whatever the GPU's matmul rounds to
        expected = np.array(_probe(gru, mx.float32)(x))
    try:
        step = kernel(_probe(gru, gru["weight_hh_l0"].dtype))
        outputs = [np.array(step(x[:1])), np.array(step(x))]
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        return f"raises {type(error).__name__}: {reason[:400]}"
    for B, output in enumerate(outputs, start=1):
        if output.shape != expected[:B].shape:
            return f"gives the shape {output.shape} instead of {expected[:B].shape}"
        if not np.isfinite(output).all():
            return f"gives values that are not finite at batch {B}"
        difference = np.abs(output - expected[:B]).max()
        if difference > TOLERANCE:
            return (
                f"differs from the plain loop by {difference:.2e} at batch {B}, "
                f"where rounding explains {TOLERANCE:.0e}"
            )
    return ""
