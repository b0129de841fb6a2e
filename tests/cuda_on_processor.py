"""The source of a CUDA kernel with tensor cores, run on the processor."""

import shutil
import subprocess

import mlx.core as mx
import numpy as np
import pytest

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="needs g++ to run the kernel's source"
)

_CUDA_ON_PROCESSOR = r"""
// What the CUDA source needs to run on a processor: one block at a time, its threads as
// fibers in lock step (so that a missing barrier goes unseen), the warp-wide instructions
// after the tables of the PTX ISA. With `lazy`, asynchronous copies happen as late as they
// may.
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#define __shared__
#define __align__(n)
struct Index { unsigned x, y, z; };
struct uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct bfloat16 {
    uint16_t bits;
    bfloat16() = default;
    explicit bfloat16(float v) {
        uint32_t u;
        memcpy(&u, &v, 4);
        bits = (u + 0x7fff + (u >> 16 & 1)) >> 16;
    }
    operator float() const {
        const uint32_t u = (uint32_t)bits << 16;
        float v;
        memcpy(&v, &u, 4);
        return v;
    }
};

struct float16 {
    uint16_t bits;
    float16() = default;
    explicit float16(float v) {
        const _Float16 half = (_Float16)v;
        memcpy(&bits, &half, 2);
    }
    operator float() const {
        _Float16 half;
        memcpy(&half, &bits, 2);
        return (float)half;
    }
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[1 << 17]};
    Index index;
    bool done = false;
    std::deque<std::vector<std::pair<unsigned, const void*>>> groups{1};
    unsigned address, a[4], b[2];
    float value;
};
static std::vector<std::unique_ptr<Fiber>> fibers;
static Fiber* current;
static ucontext_t scheduler;
static Index blockIdx;
static unsigned char* memory_of_block;
static size_t memory_size;
static bool lazy;
static std::function<void()> body;
#define threadIdx (current->index)

inline void check(bool ok, const char* what) {
    if (!ok) { fprintf(stderr, "%s\n", what); exit(1); }
}
inline void yield() { swapcontext(&current->context, &scheduler); }
inline void __syncthreads() { yield(); }
inline Fiber& lane_of(int lane) { return *fibers[current->index.x / 32 * 32 + lane]; }
inline float __int_as_float(int i) { float f; memcpy(&f, &i, 4); return f; }

namespace fused_conv {
inline unsigned shared_address(const void* p) { return (unsigned char*)p - memory_of_block; }
inline void copy_now(unsigned target, const void* source) {
    check(target % 16 == 0 && target + 16 <= memory_size, "copy outside shared memory");
    memcpy(memory_of_block + target, source, 16);
}
inline void copy_async(unsigned target, const void* source) {
    if (lazy) current->groups.back().emplace_back(target, source);
    else copy_now(target, source);
}
inline void commit() { current->groups.emplace_back(); }
template <int PENDING> void wait() {
    while (current->groups.size() > PENDING + 1) {
        for (auto& c : current->groups.front()) copy_now(c.first, c.second);
        current->groups.pop_front();
    }
}
inline uint4 load(const void* source) { return *(const uint4*)source; }

inline void ldmatrix(unsigned (&r)[4], unsigned address) {
    current->address = address;
    yield();
    const int lane = current->index.x % 32;
    for (int i = 0; i < 4; i++) {
        const unsigned row = lane_of(i * 8 + lane / 4).address;
        check(row % 16 == 0 && row + 16 <= memory_size, "ldmatrix outside shared memory");
        memcpy(&r[i], memory_of_block + row + lane % 4 * 4, 4);
    }
    yield();
}

// The same with each 8 by 8 matrix turned.
inline void ldmatrix_turned(unsigned (&r)[4], unsigned address) {
    current->address = address;
    yield();
    const int lane = current->index.x % 32;
    for (int i = 0; i < 4; i++) {
        uint16_t halves[2];
        for (int k = 0; k < 2; k++) {
            const unsigned row = lane_of(i * 8 + lane % 4 * 2 + k).address;
            check(row % 16 == 0 && row + 16 <= memory_size, "ldmatrix outside shared memory");
            memcpy(&halves[k], memory_of_block + row + lane / 4 * 2, 2);
        }
        memcpy(&r[i], halves, 4);
    }
    yield();
}
inline float over_row(float v, float (*joined)(float, float)) {
    current->value = v;
    yield();
    const int first = current->index.x % 32 / 4 * 4;
    float all = lane_of(first).value;
    for (int k = 1; k < 4; k++) all = joined(all, lane_of(first + k).value);
    yield();
    return all;
}
inline float largest_of_row(float v) {
    return over_row(v, [](float a, float b) { return fmaxf(a, b); });
}
inline float sum_of_row(float v) {
    return over_row(v, [](float a, float b) { return a + b; });
}

// Element i of a fragment's registers, as the tables number them.
inline float element(float, const unsigned* r, int i) { return __int_as_float(r[i]); }
inline float element(bfloat16, const unsigned* r, int i) {
    return __int_as_float(r[i / 2] >> i % 2 * 16 << 16);
}
inline float element(float16, const unsigned* r, int i) {
    float16 half;
    half.bits = r[i / 2] >> i % 2 * 16;
    return half;
}
template <class T>
void mma(T, float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    memcpy(current->a, a, 16);
    current->b[0] = b0;
    current->b[1] = b1;
    yield();
    constexpr bool TF32 = sizeof(T) == 4;
    constexpr int K = TF32 ? 8 : 16;
    float A[16][K], B[K][8];
    for (int lane = 0; lane < 32; lane++) {
        const int group = lane / 4, in_group = lane % 4;
        for (int i = 0; i < (TF32 ? 4 : 8); i++) {
            const int row = TF32 ? (i % 2 ? group + 8 : group)
                                 : (i / 2 % 2 ? group + 8 : group);
            const int column = TF32 ? in_group + (i < 2 ? 0 : 4)
                                    : in_group * 2 + (i & 1) + (i < 4 ? 0 : 8);
            A[row][column] = element(T(), lane_of(lane).a, i);
        }
        for (int i = 0; i < (TF32 ? 2 : 4); i++) {
            const int row = TF32 ? in_group + 4 * i
                                 : in_group * 2 + (i & 1) + (i < 2 ? 0 : 8);
            B[row][group] = element(T(), lane_of(lane).b, i);
        }
    }
    const int lane = current->index.x % 32;
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < K; k++)
            c[i] += A[lane / 4 + (i < 2 ? 0 : 8)][k] * B[k][lane % 4 * 2 + (i & 1)];
    yield();
}

inline float rectified(float v, float slope) { return fmaxf(v, v * slope); }
inline float rectified(unsigned word, float slope) {
    return rectified(__int_as_float(word), slope);
}
inline float in_range(float v) { return fminf(fmaxf(v, -65504.f), 65504.f); }
inline unsigned pair(bfloat16, float low, float high) {
    return bfloat16(low).bits | (unsigned)bfloat16(high).bits << 16;
}
inline unsigned pair(float16, float low, float high) {
    return float16(low).bits | (unsigned)float16(high).bits << 16;
}
inline unsigned activate(float, unsigned word, float slope) {
    const float v = rectified(word, slope);
    memcpy(&word, &v, 4);
    return (word + 0x1000) & ~0x1fffu;
}
inline float unpacked(unsigned bits) {
    float16 half;
    half.bits = bits;
    return half;
}
inline unsigned activate(float16, unsigned word, float slope) {
    return pair(float16(), rectified(unpacked(word & 0xffff), slope),
                rectified(unpacked(word >> 16), slope));
}
inline unsigned activate(bfloat16, unsigned word, float slope) {
    return pair(bfloat16(), rectified(word << 16, slope), rectified(word >> 16 << 16, slope));
}
template <class T> void keep(T, T, unsigned char* to, uint4 v, float slope) {
    const unsigned words[4] = {activate(T(), v.x, slope), activate(T(), v.y, slope),
                               activate(T(), v.z, slope), activate(T(), v.w, slope)};
    memcpy(to, words, 16);
}
inline void keep(float, float16, unsigned char* to, uint4 v, float slope) {
    const unsigned words[2] = {
        pair(float16(), rectified(v.x, slope), rectified(v.y, slope)),
        pair(float16(), rectified(v.z, slope), rectified(v.w, slope))};
    memcpy(to, words, 8);
}
}  // namespace fused_conv

inline void run_block(int threads, size_t size) {
    std::vector<unsigned char> storage(size + 16, 0xff);  // NaN until written
    memory_of_block = storage.data() + (16 - (uintptr_t)storage.data() % 16) % 16;
    memory_size = size;
    fibers.clear();
    for (int i = 0; i < threads; i++) {
        fibers.emplace_back(new Fiber);
        Fiber& f = *fibers.back();
        f.index = {(unsigned)i, 0, 0};
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.get();
        f.context.uc_stack.ss_size = 1 << 17;
        f.context.uc_link = &scheduler;
        makecontext(&f.context, +[] { body(); current->done = true; }, 0);
    }
    for (bool busy = true; busy;) {
        busy = false;
        for (auto& f : fibers)
            if (!f->done) {
                busy = true;
                current = f.get();
                swapcontext(&scheduler, &f->context);
            }
    }
}

template <class V> std::vector<V> read_array(const char* path, size_t extra = 0) {
    FILE* file = fopen(path, "rb");
    check(file, path);
    fseek(file, 0, SEEK_END);
    std::vector<V> v(ftell(file) / sizeof(V) + extra);
    rewind(file);
    check(fread(v.data(), 1, v.size() * sizeof(V), file) > 0, path);
    fclose(file);
    return v;
}
"""

_TYPES = {mx.float32: "float", mx.float16: "float16", mx.bfloat16: "bfloat16"}


def bits(a):
    """The array as numpy can write it."""
    return np.array(a.view(mx.uint16) if a.dtype == mx.bfloat16 else a)


def as_on_processor(source):
    """The source with the block's memory where the processor has it."""
    return source.replace(
        "extern __shared__ __align__(16) unsigned char shared[];",
        "unsigned char* shared = memory_of_block;",
    )


def results(folder, constants, main, dtype):
    """Compile, and give what it writes to ``y``, ``[n]`` of this type.

    Twice: with asynchronous copies made at once, and as late as the kernel allows.
    """
    types = {name: value for name, value in constants.items() if value in _TYPES}
    lines = [_CUDA_ON_PROCESSOR]
    lines += [f"using {name} = {_TYPES[value]};" for name, value in types.items()]
    lines += [
        f"constexpr int {name} = {int(value)};"
        for name, value in constants.items()
        if name not in types
    ]
    (folder / "kernel.cpp").write_text("\n".join([*lines, main]))
    flags = ["-std=c++17", "-O1", "-w", "-o", "kernel", "kernel.cpp"]
    subprocess.run(["g++", *flags], cwd=folder, check=True)
    for lazy in "01":
        subprocess.run(["./kernel", lazy], cwd=folder, check=True)
        kinds = {mx.float32: np.float32, mx.float16: np.float16}
        y = mx.array(np.fromfile(folder / "y", kinds.get(dtype, np.uint16)))
        yield y if dtype in kinds else y.view(mx.bfloat16)
