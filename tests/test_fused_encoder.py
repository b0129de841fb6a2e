"""The encoder as a GPU computes it best is the encoder."""

import math
from contextlib import nullcontext

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from cuda_on_processor import bits, needs_compiler, results

from rvc_mlx import attention_kernel, fused_encoder
from rvc_mlx.models.contentvec import ContentVec, ContentVecConfig
from rvc_mlx.models.contentvec import PositionalConvEmbedding as Embedding
from rvc_mlx.steady import OwnRows, telling

CONFIG = ContentVecConfig(
    conv_dim=16,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    intermediate_size=32,
    pos_conv_kernel=16,
    pos_conv_groups=4,
    final_proj_size=8,
)


@pytest.fixture
def encoder():
    mx.random.seed(0)
    return ContentVec(CONFIG)


def audio(length):
    # An offset and unlike levels: the norm's mean and variance count.
    noise = mx.random.normal((2, length), key=mx.random.key(1))
    return noise * mx.array([[0.1], [0.4]]) + 0.05


@pytest.mark.parametrize("length", [400, 16080, 16083])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_features_are_the_plain_encoders(encoder, version, length):
    plain = encoder(audio(length), version)
    fused_encoder.quicken(encoder)
    quick = encoder(audio(length), version)
    assert quick.shape == plain.shape
    # A layer's factors have ten bits of fraction.
    assert np.abs(quick - plain).max() < 2e-3 * np.abs(plain).max()


def test_attention_meets_few_lengths_and_only_frames_that_are_there(
    encoder, monkeypatch
):
    lengths = range(40000, 43000, 320)
    plain = [encoder(audio(length)) for length in lengths]
    fused_encoder.quicken(encoder)
    attend, seen = mx.fast.scaled_dot_product_attention, set()

    def watched(q, *given, **named):
        seen.add(q.shape[2])
        return attend(q, *given, **named)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", watched)
    for length, expected in zip(lengths, plain, strict=True):
        found = encoder(audio(length))
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() < 2e-3 * np.abs(expected).max()
    assert seen == {128, 144}


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_attention_of_its_own_takes_frames_as_they_are(encoder, monkeypatch, dtype):
    plain = encoder(audio(4321))
    encoder.set_dtype(dtype)
    seen = []

    def attend(qkv, heads, own, recordings):
        """As the kernel."""
        assert own is None
        seen.append((qkv.shape, qkv.dtype, recordings))
        parts = qkv.reshape(recordings, len(qkv) // recordings, 3, heads, -1)
        q, k, v = parts.transpose(2, 0, 3, 1, 4)
        y = mx.softmax(q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5, axis=-1) @ v
        return y.transpose(0, 2, 1, 3).reshape(len(qkv), -1)

    monkeypatch.setattr(attention_kernel, "supports", lambda width: width == 16)
    monkeypatch.setattr(attention_kernel, "self_attention", attend)
    fused_encoder.quicken(encoder)
    quick = encoder(audio(4321).astype(dtype))
    assert (quick.shape, quick.dtype) == (plain.shape, dtype)
    tolerance = 4e-2 if dtype == mx.bfloat16 else 1e-2
    difference = np.abs(np.array(quick.astype(mx.float32)) - np.array(plain)).max()
    assert difference < tolerance * np.abs(plain).max()
    shape = (2 * plain.shape[1], 3 * CONFIG.hidden_size)
    factors = mx.float16 if dtype == mx.float32 else dtype
    for layer in encoder.encoder.layers:
        cut = (layer.attention.qkv, layer.attention.out)
        cut += (layer.feed_forward.inner, layer.feed_forward.outer)
        assert {part.dtype for one in cut for part in one} == {factors}
    assert seen == CONFIG.num_layers * [(shape, factors, 2)]


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_stays_what_it_is(encoder, dtype):
    encoder.set_dtype(dtype)
    fused_encoder.quicken(encoder)
    assert encoder(audio(4000).astype(dtype)).dtype == dtype


@pytest.mark.parametrize("frames", [1, 7, 8, 9, 150])
@pytest.mark.parametrize("kernel", [8, 16, 20])
def test_windowed_embedding_is_the_convolution(frames, kernel):
    sizes = {**vars(CONFIG), "pos_conv_kernel": kernel}
    plain = Embedding(ContentVecConfig(**sizes))
    plain.conv.bias = mx.random.normal((32,), key=mx.random.key(2))
    quick = fused_encoder.WindowedEmbedding(plain)
    x = mx.random.normal((3, frames, 32), key=mx.random.key(3))
    assert np.allclose(quick(x), plain(x), atol=1e-5)


_ON_PROCESSOR = (
    r"""
#define __device__
static Index blockDim;
void see(const T* x, const int* own, T* y, int packs, int B, int F, int count, int width,
         int all, int each, int padding, int limited) {
"""
    + fused_encoder._SEEN.source
    + r"""
}
void join(const T* x, const T* bias, T* y, int packs, int B, int F, int count, int all,
          int each) {
"""
    + fused_encoder._TOGETHER.source
    + r"""
}
int main(int, char**) {
    auto n = read_array<int>("scalars");
    auto x = read_array<T>("x"), bias = read_array<T>("bias");
    auto own = read_array<int>("own");
    std::vector<T> y(OUTPUT, T(NAN));
    body = [&] {
        if (SEES)
            see(x.data(), own.data(), y.data(), n[0], n[1], n[2], n[3], n[4], n[5], n[6],
                n[7], n[8]);
        else
            join(x.data(), bias.data(), y.data(), n[0], n[1], n[2], n[3], n[4], n[5]);
    };
    blockDim = {32, 1, 1};
    for (unsigned i = 0; i < (n[0] + 31) / 32; i++) {
        blockIdx = {i, 0, 0};
        run_block(32, 0);
    }
    FILE* file = fopen("y", "wb");
    fwrite(y.data(), sizeof(T), y.size(), file);
    fclose(file);
}
"""
)


@needs_compiler
@pytest.mark.parametrize("last", [None, 20])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_the_sources_see_and_join_groups(tmp_path, monkeypatch, dtype, last):
    sizes = {**vars(CONFIG), "pos_conv_kernel": 16}
    plain = Embedding(ContentVecConfig(**sizes))
    plain.conv.bias = mx.random.normal((32,), key=mx.random.key(2))
    quick = fused_encoder.WindowedEmbedding(plain)
    quick.set_dtype(dtype)
    x = mx.random.normal((2, 27, 32), key=mx.random.key(3)).astype(dtype)
    own = None if last is None else OwnRows(mx.array([last], mx.int32), 27)
    with nullcontext() if own is None else telling(own):
        expected = quick(x).astype(mx.float32)[:, :last]

    def launch(self, inputs, outputs, grid, *, scalars, constants):
        """On the processor."""
        ((shape, kind),) = outputs
        assert grid.blocks * grid.threads >= scalars[0] == math.prod(shape) // 8
        sees = self is fused_encoder._SEEN
        names = ("x", "own") if sees else ("x", "bias")
        for name, a in zip(names, inputs, strict=True):
            bits(a).tofile(tmp_path / name)
        np.array([int(n) for n in scalars], np.int32).tofile(tmp_path / "scalars")
        told = {**constants, "SEES": sees, "OUTPUT": math.prod(shape)}
        *_, y = results(tmp_path, told, _ON_PROCESSOR, kind)
        return [y.reshape(shape)]

    np.zeros(1, np.float32).tofile(tmp_path / "bias")
    monkeypatch.setattr(fused_encoder, "on_cuda", lambda: True)
    monkeypatch.setattr(fused_encoder.CudaKernel, "__call__", launch)
    with nullcontext() if own is None else telling(own):
        found = quick(x).astype(mx.float32)[:, :last]
    assert np.allclose(found, expected, atol=1e-5 if dtype == mx.float32 else 4e-3)


@pytest.mark.parametrize("length", [400, 719, 720, 16000, 16079, 16413])
def test_no_convolution_of_the_front_end_is_left_to_a_library(monkeypatch, length):
    def refuse(*_):
        raise AssertionError("a convolution is left to the library")

    extractor = ContentVec(CONFIG).feature_extractor
    expected = extractor(audio(length))
    monkeypatch.setattr(nn.Conv1d, "__call__", refuse)
    found = fused_encoder.ProductExtractor(extractor)(audio(length))
    assert found.shape == expected.shape
    exact = 1e-5 if mx.default_device() == mx.Device(mx.cpu) else 5e-3  # TF32
    assert np.allclose(found, expected, atol=exact)
