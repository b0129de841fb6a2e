"""What kernels of warpgroups need to run on the processor, behind ``cuda_on_processor``."""

from rvc_mlx import warpgroup

HEADER = (
    r"""
#define __device__
#define __forceinline__
inline void __syncwarp() {}
inline int min(int a, int b) { return a < b ? a : b; }
inline unsigned __float_as_uint(float f) { unsigned u; memcpy(&u, &f, 4); return u; }
inline float __uint_as_float(unsigned u) { return __int_as_float(u); }

// Products happen at once and copies as late as somebody waits for them; if lazy, copies at
// once and products late.
namespace warpgroup {
using namespace fused_conv;

static std::vector<std::deque<std::vector<std::function<void()>>>> asked;  // by thread
static std::vector<std::function<void()>> being_asked;
struct Barrier { int done = 0; std::deque<std::function<void()>> pending; };
static std::vector<Barrier> counted;

inline void begin_products() { being_asked.clear(); }
inline void end_products() { asked[threadIdx.x].push_back(being_asked); }
template <int PENDING> void wait_for_products() {
    auto& groups = asked[threadIdx.x];
    for (; groups.size() > PENDING; groups.pop_front())
        for (auto& product : groups.front()) product();
}
template <int COUNT> void settle(float (&)[COUNT]) {}
inline void publish() {}
inline void not_before() {}
inline int anew(int i) { return i; }

struct Matrix { unsigned address, plane, rows; };
inline Matrix described(unsigned address, int plane, int rows = 8) {
    return {address, (unsigned)plane, (unsigned)rows};
}
template <class T> float at(T, Matrix m, int row, int k) {
    const unsigned a = m.address + (k / 8 * m.plane + row / 8 * m.rows + row % 8) * 16 + k % 8 * 2;
    check(m.address % 16 == 0 && a + 2 <= memory_size, "a product reads outside");
    T v;
    memcpy(&v, memory_of_block + a, 2);
    return v;
}
template <class T, int COUNT>
void product(T, float (&c)[COUNT], Matrix rows, Matrix weights) {
    const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane / 4;
    auto now = [=, &c] {
        for (int i = 0; i < COUNT; i++)
            for (int k = 0; k < 16; k++)
                c[i] += at(T(), rows, row + i / 2 % 2 * 8, k) *
                        at(T(), weights, i / 4 * 8 + lane % 4 * 2 + i % 2, k);
    };
    if (lazy) being_asked.push_back(now);
    else now();
}

inline void make_barrier(unsigned barrier) {
    check(barrier % 8 == 0 && barrier + 8 <= BARRIERS, "a barrier elsewhere");
    counted.resize(BARRIERS / 8);
}
inline void copy_bytes(unsigned target, const void* source, int bytes, unsigned barrier) {
    check(target % 16 == 0 && target + bytes <= memory_size, "a copy outside");
    auto now = [=] {
        memcpy(memory_of_block + target, source, bytes);
        counted[barrier / 8].done++;
    };
    if (lazy) now();
    else counted[barrier / 8].pending.push_back(now);
}
inline void wait_for(unsigned barrier, unsigned parity) {
    Barrier& b = counted[barrier / 8];
    if (b.done % 2 == parity) {
        check(!b.pending.empty(), "nobody has asked for a copy");
        b.pending.front()();
        b.pending.pop_front();
    }
}
"""
    + warpgroup.WORDS
)
