"""The content encoder's first layer, its norm in the weights."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from cuda_on_processor import bits, needs_compiler, results
from test_fused_encoder import CONFIG, audio

from rvc_mlx import normed_conv
from rvc_mlx.models.contentvec import ContentVec
from rvc_mlx.normed_conv import normed_convolution
from rvc_mlx.steady import OwnRows, telling

_ON_PROCESSOR = (
    r"""
#undef __shared__
#define __shared__ static
#define __device__
inline int min(int a, int b) { return a < b ? a : b; }
inline float rsqrtf(float v) { return 1 / sqrtf(v); }
inline float __shfl_xor_sync(unsigned, float v, int far) {
    current->value = v;
    yield();
    const float other = lane_of(current->index.x % 32 ^ far).value;
    yield();
    return other;
}
struct Dimensions { unsigned x, y; };
static Dimensions gridDim;
"""
    + normed_conv._HEADER
    + r"""
void see(const T* x, const int* own, T* y, float* sums, int L, int frames, int limited) {
"""
    + normed_conv._SEEN.source
    + r"""
}
void weigh(const T* x, const int* own, const float* sums, const T* weight, const T* gamma,
           const T* beta, T* y, int L, int frames, int limited, int channels, int blocks,
           float eps) {
"""
    + normed_conv._WEIGHTS.source
    + r"""
}
int main(int, char**) {
    auto shape = read_array<int>("shape");  // B, L, frames, limited, channels, blocks
    const int B = shape[0], frames = shape[2], channels = shape[4], blocks = shape[5];
    auto x = read_array<T>("x"), weight = read_array<T>("weight");
    auto gamma = read_array<T>("gamma"), beta = read_array<T>("beta");
    auto own = read_array<int>("own");
    std::vector<T> y(B * (frames + channels) * COLUMNS, T(NAN));
    std::vector<float> sums(B * blocks * (TAPS + TAPS * (TAPS + 1) / 2), NAN);
    const auto launch = [&](int many) {
        gridDim = {(unsigned)many, (unsigned)B};
        for (unsigned b = 0; b < (unsigned)B; b++)
            for (unsigned i = 0; i < (unsigned)many; i++) {
                blockIdx = {i, b, 0};
                run_block(THREADS, 0);
            }
    };
    body = [&] {
        see(x.data(), own.data(), y.data(), sums.data(), shape[1], frames, shape[3]);
    };
    launch(blocks);
    body = [&] {
        weigh(x.data(), own.data(), sums.data(), weight.data(), gamma.data(), beta.data(),
              y.data() + B * frames * COLUMNS, shape[1], frames, shape[3], channels,
              blocks, 1e-5f);
    };
    launch((channels + THREADS - 1) / THREADS);
    FILE* file = fopen("y", "wb");
    fwrite(y.data(), sizeof(T), y.size(), file);
    fclose(file);
}
"""
)


def first_layer(dtype=mx.float32, channels=16):
    mx.random.seed(3)
    layer = ContentVec(CONFIG).feature_extractor.conv_layers[0]
    layer.conv.weight = mx.random.normal((channels, 10, 1)) / 3
    layer.layer_norm.weight = mx.random.normal((channels,))
    layer.layer_norm.bias = mx.random.normal((channels,))
    layer.set_dtype(dtype)
    return layer


def sound(B, L, dtype=mx.float32):
    """Louder at the end, and not around zero."""
    wave = mx.random.normal((B, L), key=mx.random.key(5)) * mx.linspace(0.01, 0.3, L)
    return (wave + 0.4).astype(dtype)


def plainly(layer, x, count=None):
    """Convolution and norm, of as many frames as count."""
    exact = first_layer(channels=len(layer.conv.weight))
    exact.update({"conv": layer.conv.parameters()})
    y = exact.conv(x.astype(mx.float32)[..., None])[:, :count].astype(mx.float32)
    normal = y - y.mean(axis=1, keepdims=True)
    normal = normal * mx.rsqrt(mx.square(normal).mean(axis=1, keepdims=True) + 1e-5)
    return normal * layer.layer_norm.weight + layer.layer_norm.bias


def test_the_layer_is_the_convolution_and_its_norm():
    layer = first_layer()
    x = audio(4003)[..., None]
    exact = 1e-5 if mx.default_device() == mx.Device(mx.cpu) else 5e-3  # TF32
    normed = normed_convolution(x[:, :4000], layer.conv, layer.layer_norm)
    assert np.allclose(nn.gelu(normed), layer(x), atol=exact)


@pytest.mark.parametrize(
    ("samples", "conv"),
    [
        (20, nn.Conv1d(1, 4, 9, stride=5)),
        (21, nn.Conv1d(1, 4, 10, stride=5)),
        (5, nn.Conv1d(1, 4, 10, stride=5)),
        (32, nn.Conv1d(1, 4, 16, stride=8)),
    ],
)
def test_sizes_that_do_not_fit_are_refused(samples, conv):
    with pytest.raises(ValueError, match=f"{samples} samples, .* do not fit"):
        normed_convolution(mx.zeros((1, samples, 1)), conv, None)


@needs_compiler
@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_the_source_sees_and_weighs(tmp_path, monkeypatch, dtype, limited):
    # 32 threads, two frames each: several blocks, the last one not full.
    monkeypatch.setattr(normed_conv, "_THREADS", 32)
    monkeypatch.setattr(normed_conv, "_EACH", 2)
    layer, B, L, channels = first_layer(dtype, 40), 2, 5 * 150, 40
    x, count = sound(B, L, dtype), 140 if limited else 149
    made = {}

    def told(kernel, inputs, outputs, grid, *, scalars, constants):
        made[kernel.name] = inputs, outputs, grid, scalars, constants
        return [mx.zeros(shape, kind) for shape, kind in outputs]

    monkeypatch.setattr(normed_conv.CudaKernel, "__call__", told)
    own = OwnRows(mx.array([7, count], mx.int32), 8) if limited else None
    seen, weights = normed_conv._on_cuda(x, layer.conv, layer.layer_norm, own)
    (given, _, grid, scalars, constants) = made["seen_samples"]
    (more, _, columns, rest, _) = made["normed_weights"]
    assert (grid[2], columns[2], grid[0], columns[0]) == (B, B, 3, 2)
    assert [*rest[:3], rest[4]] == [*scalars, grid[0]]
    for name, a in zip(
        ("x", "own", "weight", "gamma", "beta"), (*given, *more[3:]), strict=True
    ):
        bits(a.astype(a.dtype)).tofile(tmp_path / name)
    shape = [B, *scalars[:3], channels, grid[0]]
    np.array(shape, np.int32).tofile(tmp_path / "shape")
    wanted = plainly(layer, x, count)
    for y in results(tmp_path, constants, _ON_PROCESSOR, dtype):
        y = y.astype(mx.float32)
        seen = y[: B * 149 * 16].reshape(B, 149, 16)
        weights = y[B * 149 * 16 :].reshape(B, 16, channels)
        fourth = x.astype(mx.float32)[:, 3 : 3 + 149 * 5 : 5]
        np.testing.assert_array_equal(seen[..., 3], fourth)
        assert mx.all(seen[..., 10] == 1)
        assert not mx.any(seen[..., 11:])
        found = (seen @ weights)[:, :count]
        difference = mx.abs(found - wanted).max() / mx.abs(wanted).max()
        assert difference < {2: 1e-2, 4: 2e-5}[dtype.size] * (
            4 if dtype == mx.bfloat16 else 1
        )


@pytest.mark.gpu
@pytest.mark.skipif(not mx.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("count", [None, 9000])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_a_gpu_gives_the_same(dtype, count):
    layer, x = first_layer(dtype, 512), sound(3, 50000, dtype)
    own = None if count is None else OwnRows(mx.array([5, count], mx.int32), 8)
    with mx.stream(mx.cpu):
        wanted = plainly(layer, x, count)
        mx.eval(wanted)
    if own is None:
        found = normed_convolution(x[..., None], layer.conv, layer.layer_norm)
    else:
        with telling(own):
            found = normed_convolution(x[..., None], layer.conv, layer.layer_norm)
    found = found[:, :count].astype(mx.float32)
    difference = mx.abs(found - wanted).max() / mx.abs(wanted).max()
    assert difference < (5e-2 if dtype == mx.bfloat16 else 1e-2)
