"""A residual step on Hopper: the kernel's own source on the processor, and on a GPU."""

import mlx.core as mx
import numpy as np
import pytest
import warpgroup_on_processor
from cuda_on_processor import as_on_processor, bits, needs_compiler, results
from test_conv_kernel import error, expected_step, step_operands

from rvc_mlx import step_kernel
from rvc_mlx.conv_kernel import DTYPES, MAX_SHARED_MEMORY
from rvc_mlx.step_kernel import TILES, Tile, fits, fused_step, pack_step

needs_gpu = pytest.mark.skipif(
    not step_kernel.supports(32, 3, 1, mx.float32), reason="needs a Hopper GPU"
)
_ON_PROCESSOR = (
    warpgroup_on_processor.HEADER
    + r"""
struct Factor { unsigned high, low; };
template <class T> unsigned pair_rectified(T, unsigned v, Factor slope) {
    float result[2];
    for (int i = 0; i < 2; i++) {
        const float x = element(T(), &v, i), t = T(x * element(T(), &slope.low, i));
        result[i] = fmaxf(x, T(x * element(T(), &slope.high, i) + t));
    }
    return pair(T(), result[0], result[1]);
}
"""
    + step_kernel._PIECE_TEXT
    + r"""
}  // namespace warpgroup
void kernel(const T* x, const P* weight, const float* bias, const float* inner_bias,
            const T* accumulate, T* y, int L, int taps, int dilation, int pitch,
            float slope, float scale) {
"""
    + as_on_processor(step_kernel._SOURCE)
    + r"""
}
int main(int, char** arguments) {
    lazy = *arguments[1] == '1';
    auto shape = read_array<int>("shape");  // B, L, taps, dilation, pitch, blocks
    auto x = read_array<T>("x"), accumulate = read_array<T>("accumulate");
    auto weight = read_array<P>("weight");
    auto bias = read_array<float>("bias"), inner_bias = read_array<float>("inner_bias");
    auto numbers = read_array<float>("numbers");
    std::vector<T> y(x.size(), T(NAN));
    body = [&] {
        kernel(x.data(), weight.data(), bias.data(), inner_bias.data(), accumulate.data(),
               y.data(), shape[1], shape[2], shape[3], shape[4], numbers[0], numbers[1]);
    };
    for (unsigned b = 0; b < (unsigned)shape[0]; b++)
        for (unsigned i = 0; i < (unsigned)shape[5]; i++) {
            blockIdx = {i, b, 0};
            warpgroup::asked.assign(128 * GROUPS, {});
            warpgroup::counted.clear();
            run_block(128 * GROUPS, SHARED_MEMORY);
        }
    FILE* file = fopen("y", "wb");
    fwrite(y.data(), sizeof(T), y.size(), file);
    fclose(file);
}
"""
)


def tolerance(dtype):
    return 8e-3 if dtype == mx.bfloat16 else 1e-3


@pytest.fixture
def tiles(monkeypatch):
    """Tiles that tests may replace; nothing is remembered of them."""
    made = dict(TILES)
    monkeypatch.setattr(step_kernel, "TILES", made)
    caches = step_kernel._kernel, step_kernel._constants
    for cached in caches:
        cached.cache_clear()
    yield made
    for cached in caches:
        cached.cache_clear()


def on_processor(folder, x, step, accumulate):
    """What the source makes of it, twice; None accumulates nothing."""
    given = {"x": x, "accumulate": x if accumulate is None else accumulate}
    given |= {"weight": step.weight, "inner_bias": step.bias[0], "bias": step.bias[1]}
    for name, a in given.items():
        bits(a).tofile(folder / name)
    (B, L, C), taps = x.shape, step.taps
    pitch, memory = step_kernel._layout(C, taps, step.dilation)
    blocks = -(-L // (step_kernel.TILES[C].rows - taps + 1))
    shape = [B, L, taps, step.dilation, pitch, blocks]
    np.array(shape, np.int32).tofile(folder / "shape")
    np.array([step.slope, 1 / 3], np.float32).tofile(folder / "numbers")
    constants = step_kernel._constants(
        x.dtype, step.weight.dtype, C, accumulate is not None
    )
    constants = {**constants, "SHARED_MEMORY": memory}
    for y in results(folder, constants, _ON_PROCESSOR, x.dtype):
        yield y.reshape(x.shape)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "dilation", "tile"),
    [
        ((2, 141, 32, 7), 3, Tile(1, 1, 2, 1, 3)),
        ((1, 150, 32, 3), 1, Tile(2, 1, 3, 1, 24)),
        ((1, 133, 64, 3), 5, Tile(1, 2, 4, 1, 8)),
        ((1, 61, 128, 3), 1, Tile(1, 1, 3, 1, 16)),  # two stages a tap
    ],
)
def test_the_source_makes_a_step(
    tmp_path, tiles, shape, dilation, tile, dtype, accumulates
):
    tiles[shape[2]] = tile
    x, weights, biases, accumulate = step_operands(*shape, dtype)
    options = {"dilation": dilation, "slope": 0.1}
    step = pack_step(weights, biases, dtype, **options)
    added = accumulate if accumulates else mx.zeros_like(x)
    with mx.stream(mx.cpu):
        wanted = expected_step(x, weights, biases, added, **options, scale=1 / 3)
        for y in on_processor(tmp_path, x, step, accumulate if accumulates else None):
            assert error(y, wanted) < tolerance(dtype)


@needs_compiler
@pytest.mark.slow
def test_what_float16_cannot_hold_is_cut(tmp_path, tiles):
    tiles[32] = Tile(1, 1, 2, 1, 3)
    eye = mx.eye(32)[:, None]  # one tap: both convolutions give what they are given
    biases = mx.full((32,), 3e4), mx.zeros((32,))
    step = pack_step((eye, eye), biases, mx.float32, 1, 0.1)
    x = mx.array([[1e6, -1e6, 5e4, -5e4, 1.0, *27 * [0.0]]])[None]
    with mx.stream(mx.cpu):
        seen = mx.clip(mx.maximum(x, 0.1 * x), -65504, 65504)
        between = mx.clip(mx.maximum(seen + 3e4, 0.1 * (seen + 3e4)), -65504, 65504)
        wanted = (x + between) / 3
        for y in on_processor(tmp_path, x, step, None):
            assert mx.isfinite(y).all()
            assert mx.abs(y - wanted).max() < 20  # of 65504, as float16 rounds


@pytest.mark.parametrize("channels", TILES)
def test_blocks_fit_a_multiprocessor(channels):
    tile = TILES[channels]
    pitch, memory = step_kernel._layout(channels, 11, 5)
    assert memory == step_kernel._layout(channels, 3, 1)[1]  # one function for all
    assert tile.together * (memory + 1024) <= 228 * 1024
    assert pitch >= tile.rows + 50
    # Two rows of four planes, 16 bytes each, in different banks.
    pieces = {(plane * pitch + row) % 8 for plane in range(4) for row in range(2)}
    assert len(pieces) == 8
    assert tile.stages * 8 <= step_kernel._BARRIERS


def test_only_what_fits_is_taken():
    assert fits(128, 11, 5, mx.float16)
    assert not fits(16, 3, 1, mx.float16)
    assert not fits(128, 4, 1, mx.float16)
    assert not fits(128, 3, 1, mx.int32)
    assert not fits(32, 33, 1, mx.float16)  # neighbours would make too much again
    assert not fits(32, 3, 0, mx.float16)
    dilation = next(d for d in range(1, 500) if not fits(256, 11, d, mx.float16))
    assert step_kernel._layout(256, 11, dilation - 1)[1] <= MAX_SHARED_MEMORY
    assert step_kernel._layout(256, 11, dilation)[1] > MAX_SHARED_MEMORY


@pytest.mark.parametrize(
    ("capability", "cuda", "wanted"),
    [((9, 0), True, True), ((9, 0), False, False), ((10, 0), True, False)],
)
def test_only_a_hopper_is_served(monkeypatch, capability, cuda, wanted):
    major, minor = capability
    told = {"compute_capability_major": major, "compute_capability_minor": minor}
    monkeypatch.setattr(mx.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(mx, "device_info", lambda _: told)
    assert step_kernel.supports(128, 11, 5, mx.float16) == wanted
    assert not step_kernel.supports(16, 11, 5, mx.float16)


def test_steps_that_do_not_go_together_are_refused():
    one, bias = mx.zeros((32, 3, 32)), mx.zeros((32,))
    for slope in (0.0, 1.5):
        with pytest.raises(ValueError, match="a slope of 1 at most"):
            pack_step((one, one), (bias, bias), mx.float16, 1, slope)
    for *weights, other in (
        (mx.zeros((16, 3, 16)), mx.zeros((16, 3, 16)), mx.zeros((16,))),
        (one, mx.zeros((32, 5, 32)), bias),
        (mx.zeros((32, 4, 32)), mx.zeros((32, 4, 32)), bias),
        (one, one, mx.zeros((16,))),
    ):
        with pytest.raises(ValueError, match="want two of one shape, an odd"):
            pack_step(weights, (other, bias), mx.float16, 1, 0.1)


def test_arrays_that_do_not_fit_are_refused():
    one, bias = mx.zeros((32, 3, 32)), mx.zeros((32,))
    step = pack_step((one, one), (bias, bias), mx.float16, 1, 0.1)
    good = mx.zeros((1, 5, 32), mx.float16)
    for x, added in (
        (good.astype(mx.float32), None),
        (good[0], None),
        (good[:, :0], None),
        (mx.zeros((1, 5, 64), mx.float16), None),
        (good, good[:, :4]),
        (good, good.astype(mx.float32)),
    ):
        with pytest.raises(
            ValueError, match=r"want both mlx.core.float16 \[B, L, 32\]"
        ):
            fused_step(x, step, added)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "dilation"), [(3, 1), (7, 3), (11, 5)])
@pytest.mark.parametrize("channels", TILES)
def test_a_step_equals_mlx(channels, k, dilation, dtype):
    check_on_gpu(2, 777, channels, k, dilation, dtype)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("channels", TILES)
@pytest.mark.parametrize(
    ("B", "L", "k"), [(1, 1, 1), (3, 5, 11), (1, 0, 7), (70, 3, 3)]
)
def test_short_sequences_equal_mlx(channels, B, L, k):
    whole = 2 * (TILES[channels].rows - k + 1)  # blocks, exactly
    check_on_gpu(B, L or whole, channels, k, 3, mx.float16)


def check_on_gpu(B, L, channels, k, dilation, dtype):
    x, weights, biases, accumulate = step_operands(B, L, channels, k, dtype)
    options = {"dilation": dilation, "slope": 0.1}
    step = pack_step(weights, biases, dtype, **options)
    for added in (None, accumulate):
        with mx.stream(mx.cpu):
            given = mx.zeros_like(x) if added is None else added
            wanted = expected_step(x, weights, biases, given, **options, scale=1 / 3)
            mx.eval(wanted)
        assert error(fused_step(x, step, added, 1 / 3), wanted) < 2 * tolerance(dtype)
