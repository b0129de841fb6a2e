"""The strongest bins as CUDA finds them are those of MLX's operations."""

import mlx.core as mx
import numpy as np
import pytest
from cuda_on_processor import needs_compiler, results

from rvc_mlx import pitch, salience_kernel

on_cuda = pytest.mark.skipif(not mx.cuda.is_available(), reason="needs a CUDA GPU")

_MAIN = r"""
template <class V> V __shfl_xor_sync(unsigned, V v, int far) {
    current->value = v;  // a bin, or its number below 2**24
    yield();
    const V other = lane_of(current->index.x %% 32 ^ far).value;
    yield();
    return other;
}
void kernel(const float* salience, int* strongest, float* strengths, int frames, int bins) {
%s
}
int main(int, char**) {
    const auto n = read_array<int>("numbers");
    const auto x = read_array<float>("x");
    std::vector<int> strongest(n[2], -1);
    std::vector<float> strengths(n[2] * (2 * NEAR + 1), NAN);
    body = [&] { kernel(x.data(), strongest.data(), strengths.data(), n[2], n[3]); };
    for (unsigned i = 0; i < (unsigned)n[0]; i++) {
        blockIdx = {i, 0, 0};
        run_block(n[1], 0);
    }
    std::vector<float> y(strongest.begin(), strongest.end());
    y.insert(y.end(), strengths.begin(), strengths.end());
    FILE* file = fopen("y", "wb");
    fwrite(y.data(), sizeof(float), y.size(), file);
    fclose(file);
}
"""


def on_processor(folder, kernel):
    """The kernel as ``CudaKernel`` is called; its source runs on the processor."""

    def launch(inputs, outputs, grid, *, scalars, constants):
        np.array(inputs[0]).tofile(folder / "x")
        numbers = [grid.blocks, grid.threads, *scalars]
        np.array(numbers, np.int32).tofile(folder / "numbers")
        y, _ = results(folder, constants, _MAIN % kernel.source, mx.float32)
        strongest, strengths = mx.split(y, [scalars[0]])
        return strongest.astype(mx.int32), strengths.reshape(outputs[1][0])

    return launch


def salience(T, bins=360):
    """With strongest bins at the edges, equal ones, and frames of nothing."""
    rng = np.random.default_rng(T)
    made = rng.random((T, bins)).astype(np.float32)
    made[::5, 0] = made[1::5, -1] = made[2::5, 3] = 2
    made[2::5, bins // 2] = 2
    made[3::5] = 0
    return made


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_device_with_cuda_decodes_by_the_kernel(monkeypatch, on_gpu):
    given, made = salience(40), []

    def watched(x, near):
        made.append(x.shape)
        at = np.array(x).argmax(axis=1)
        padded = np.pad(np.array(x), ((0, 0), (near, near)))
        around = at[:, None] + np.arange(2 * near + 1)
        strengths = np.take_along_axis(padded, around, axis=1)
        return mx.array(at.astype(np.int32)), mx.array(strengths)

    monkeypatch.setattr(pitch, "on_cuda", lambda: on_gpu)
    monkeypatch.setattr(pitch, "strongest_bins", watched)
    expected = pitch.decode_salience(given)
    assert not made  # it was on the host
    np.testing.assert_array_equal(pitch.decode_salience(mx.array(given)), expected)
    assert made == [(40, 360)] * on_gpu


def check(given):
    strongest, strengths = salience_kernel.strongest_bins(mx.array(given), 4)
    at = given.argmax(axis=1)
    np.testing.assert_array_equal(strongest, at)
    padded = np.pad(given, ((0, 0), (4, 4)))
    expected = np.take_along_axis(padded, at[:, None] + np.arange(9), axis=1)
    np.testing.assert_array_equal(strengths, expected)


@needs_compiler
@pytest.mark.parametrize(("T", "bins"), [(1, 360), (7, 9), (8, 31), (21, 360)])
def test_the_source_finds_what_numpy_finds(tmp_path, monkeypatch, T, bins):
    kernel = on_processor(tmp_path, salience_kernel._KERNEL)
    monkeypatch.setattr(salience_kernel, "_KERNEL", kernel)
    check(salience(T, bins))


@pytest.mark.gpu
@on_cuda
@pytest.mark.parametrize(("T", "bins"), [(1, 360), (7, 9), (8, 31), (3000, 360)])
def test_the_kernel_finds_what_numpy_finds(T, bins):
    check(salience(T, bins))
