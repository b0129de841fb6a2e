"""The vocoder's last layer as it is computed on CUDA is the model's."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from cuda_on_processor import bits, needs_compiler, results

from rvc_mlx import fused_waveform
from rvc_mlx.models import nsf_hifigan

SUMS = 4e-6  # of hundreds of products in another order, whatever their types

_MAIN = r"""
#define __device__
inline int min(int a, int b) { return a < b ? a : b; }
inline float __shfl_xor_sync(unsigned, float v, int far) {
    current->value = v;
    yield();
    const float other = lane_of(current->index.x %% 32 ^ far).value;
    yield();
    return other;
}
void kernel(const T* x, const T* weight, const T* bias, float* y, int L, int has_bias,
            float slope) {
%s
}
int main(int, char**) {
    auto n = read_array<int>("numbers");  // blocks, B, L, has_bias
    auto x = read_array<T>("x"), weight = read_array<T>("weight");
    auto bias = read_array<T>("bias");
    auto slope = read_array<float>("slope");
    std::vector<float> y(n[1] * n[2] + 1, NAN);  // one more, which stays
    body = [&] {
        kernel(x.data(), weight.data(), bias.data(), y.data(), n[2], n[3], slope[0]);
    };
    for (unsigned b = 0; b < (unsigned)n[1]; b++)
        for (unsigned i = 0; i < (unsigned)n[0]; i++) {
            blockIdx = {i, b, 0};
            run_block(THREADS, 0);
        }
    FILE* file = fopen("y", "wb");
    fwrite(y.data(), sizeof(float), y.size(), file);
    fclose(file);
}
"""


def on_processor(folder):
    """The kernel as ``CudaKernel`` is called; its source runs on the processor."""
    main = _MAIN % fused_waveform._KERNEL.source

    def launch(inputs, outputs, grid, *, scalars, constants):
        for name, array in zip(("x", "weight", "bias"), inputs, strict=True):
            bits(array).tofile(folder / name)
        [((B, L), dtype)], (length, has_bias, slope) = outputs, scalars
        assert (L, B, dtype) == (length, grid.rows, mx.float32)
        assert grid.threads == constants["THREADS"]
        numbers = [grid.blocks, B, L, has_bias]
        np.array(numbers, np.int32).tofile(folder / "numbers")
        np.array([slope], np.float32).tofile(folder / "slope")
        y, _ = results(folder, constants, main, dtype)
        assert np.isnan(y[-1].item())
        return [y[:-1].reshape(B, L)]

    return launch


def layer(C, taps, bias, dtype):
    mx.random.seed(2)
    made = nn.Conv1d(C, 1, taps, padding=taps // 2, bias=bias)
    made.weight = mx.random.normal(made.weight.shape) / (C * taps) ** 0.5
    if bias:
        made.bias = mx.array([0.3])
    made.set_dtype(dtype)
    return made


def exactly(x, conv):
    """As the model has it, of the numbers that are given, in float32."""
    exact = nn.Conv1d(x.shape[2], 1, conv.weight.shape[1], padding=conv.padding)
    exact.weight = conv.weight.astype(mx.float32)
    exact.bias = conv.bias.astype(mx.float32) if "bias" in conv else mx.zeros(1)
    with mx.stream(mx.cpu):
        return np.array(nsf_hifigan.waveform(x.astype(mx.float32), exact))


@needs_compiler
@pytest.mark.parametrize(
    ("B", "L", "C", "taps", "bias", "dtype"),
    [
        (1, 1, 32, 7, False, mx.float16),
        (3, 5, 32, 7, True, mx.float32),
        (2, 64, 16, 7, True, mx.float16),
        (2, 2131, 32, 7, False, mx.float16),  # blocks of 32 runs of 64
        (2, 1100, 32, 7, False, mx.float32),
        (2, 333, 32, 3, True, mx.bfloat16),
        (1, 4100, 16, 7, False, mx.bfloat16),
        (2, 67, 16, 3, False, mx.float32),
        (1, 131, 8, 7, True, mx.float16),
        (1, 131, 256, 1, True, mx.float16),
    ],
)
def test_the_source_text_is_the_models(
    tmp_path, monkeypatch, B, L, C, taps, bias, dtype
):
    conv = layer(C, taps, bias, dtype)
    x = 2 * mx.random.normal((B, L, C)).astype(dtype)
    monkeypatch.setattr(fused_waveform, "_KERNEL", on_processor(tmp_path))
    found = fused_waveform.waveform(x, conv)
    assert (found.dtype, found.shape) == (mx.float32, (B, L))
    wanted = exactly(x, conv)
    assert np.abs(wanted).max() > 0.05
    np.testing.assert_allclose(found, wanted, rtol=0, atol=SUMS)


@pytest.mark.parametrize(
    ("C", "conv"),
    [
        (32, nn.Conv1d(32, 1, 7, padding=2)),
        (32, nn.Conv1d(32, 1, 6, padding=3)),
        (32, nn.Conv1d(32, 1, 7, stride=2, padding=3)),
        (32, nn.Conv1d(32, 1, 7, padding=3, dilation=2)),
        (32, nn.Conv1d(32, 2, 7, padding=3)),
        (32, nn.Conv1d(16, 1, 7, padding=3)),
        (24, nn.Conv1d(24, 1, 7, padding=3)),
        (512, nn.Conv1d(512, 1, 7, padding=3)),
    ],
)
def test_another_layer_is_refused(C, conv):
    with pytest.raises(ValueError, match=rf"x is \(2, 9, {C}\), the weight .* one of"):
        fused_waveform.waveform(mx.zeros((2, 9, C)), conv)


@pytest.mark.gpu
@pytest.mark.skipif(not mx.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize(
    ("B", "L", "C", "taps", "bias"),
    [
        *((1, 1, 32, 7, False), (3, 50001, 32, 7, True), (2, 30000, 16, 7, False)),
        *((1, 12345, 16, 3, True), (2, 2050, 8, 7, True), (2, 999, 256, 3, False)),
    ],
)
def test_a_gpu_gives_the_same(dtype, B, L, C, taps, bias):
    conv = layer(C, taps, bias, dtype)
    x = 2 * mx.random.normal((B, L, C)).astype(dtype)
    found = fused_waveform.waveform(x, conv)
    assert found.dtype == mx.float32
    np.testing.assert_allclose(found, exactly(x, conv), rtol=0, atol=SUMS)
