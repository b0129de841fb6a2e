"""What CUDA kernels need to multiply with a warpgroup of Hopper, and to copy beside that.

``wgmma`` multiplies matrices in shared memory, where they lie in pieces of 8 rows by 16
bytes; it goes on while its threads wait. A copy in one piece tells a barrier when it is done.
"""

from __future__ import annotations

from functools import cache


@cache
def product(channels: int) -> str:
    """``wgmma`` of 64 rows by so many output channels, both from shared memory."""
    count = channels // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+f"(c[{i}])' for i in range(count))
    return "".join(
        f"__device__ __forceinline__ void product({kind}, float (&c)[{count}], "
        "unsigned long long rows, unsigned long long weights) {\n"
        '    asm volatile("wgmma.mma_async.sync.aligned.'
        f"m64n{channels}k16.f32.{name}.{name} "
        f'{{{sums}}}, %{count}, %{count + 1}, 1, 1, 1, 0, 0;"\n'
        f'        : {operands} : "l"(rows), "l"(weights));\n}}\n'
        for kind, name in (("float16", "f16"), ("bfloat16", "bf16"))
    )


HEADER = r"""
namespace warpgroup {
using namespace fused_conv;

__device__ __forceinline__ void begin_products() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void end_products() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int PENDING>
__device__ __forceinline__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(PENDING) : "memory");
}
// The compiler moves no copy of a sum across this, where products are under way.
template <int COUNT>
__device__ __forceinline__ void settle(float (&c)[COUNT]) {
    #pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(c[i]) :: "memory");
}
// What threads have stored is seen by the products behind the next barrier.
__device__ __forceinline__ void publish() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// Where a product finds pieces of 8 rows by 16 bytes: the next 8 channels ``plane`` times 16
// bytes on, the next 8 rows ``rows`` times 16 bytes, behind them if that is 8.
__device__ __forceinline__ unsigned long long described(
    unsigned address, int plane, int rows = 8) {
    return (unsigned long long)(address >> 4) | (unsigned long long)plane << 16 |
           (unsigned long long)rows << 32;
}

__device__ __forceinline__ void make_barrier(unsigned barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\n"
                 "fence.mbarrier_init.release.cluster;" :: "r"(barrier) : "memory");
}
// Bytes to shared memory, in the background; the barrier is told when they are there.
__device__ __forceinline__ void copy_bytes(
    unsigned target, const void* source, int bytes, unsigned barrier) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 :: "r"(barrier), "r"(bytes) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1], %2, [%3];"
                 :: "r"(target), "l"(source), "r"(bytes), "r"(barrier) : "memory");
}
// Whether copies of this parity, counted from 0, have come.
__device__ __forceinline__ void wait_for(unsigned barrier, unsigned parity) {
    unsigned there;
    do {
        asm volatile("{\n.reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n}"
            : "=r"(there) : "r"(barrier), "r"(parity) : "memory");
    } while (!there);
    __syncwarp();
}

// Few registers are left beside the sums. What comes of ``anew`` is not kept for later, and
// what is loaded behind ``not_before`` is not loaded sooner.
__device__ __forceinline__ int anew(int i) { asm volatile("" : "+r"(i)); return i; }
__device__ __forceinline__ void not_before() { asm volatile("" ::: "memory"); }
"""

WORDS = r"""
template <int COUNT> struct alignas(16) Floats { float v[COUNT]; };
struct alignas(16) Words { unsigned w[4]; };

// Sixteen bytes of float32, or of 16 bits each.
__device__ __forceinline__ Words packed(float, const float (&v)[4]) {
    return {__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]),
            __float_as_uint(v[3])};
}
template <class T>
__device__ __forceinline__ Words packed(T, const float (&v)[8]) {
    return {pair(T(), v[0], v[1]), pair(T(), v[2], v[3]), pair(T(), v[4], v[5]),
            pair(T(), v[6], v[7])};
}
// Number ``e`` of them.
__device__ __forceinline__ float number(float, const Words& words, int e) {
    return __uint_as_float(words.w[e]);
}
__device__ __forceinline__ float number(bfloat16, const Words& words, int e) {
    const unsigned word = words.w[e / 2];
    return __uint_as_float(e % 2 ? word & 0xffff0000u : word << 16);
}
__device__ __forceinline__ float number(float16, const Words& words, int e) {
    float16 half;
    half.bits = words.w[e / 2] >> e % 2 * 16;
    return half;
}
"""
