"""The harmonic source as it is computed on CUDA is the module's."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from cuda_on_processor import needs_compiler, results

from rvc_mlx import fused_source
from rvc_mlx.models.nsf_hifigan import SineSource
from rvc_mlx.models.refinegan import MergedSource

on_cuda = pytest.mark.skipif(not mx.cuda.is_available(), reason="needs a CUDA GPU")

_MAIN = r"""
#include <string>
static Index blockDim;
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
void kernel(%s, float* y, %s) {
%s
}
int main(int, char**) {
    std::vector<std::vector<float>> in;
    for (int i = 0; i < 7; i++) in.push_back(read_array<float>(std::to_string(i).c_str()));
    const auto n = read_array<int>("whole");
    const auto f = read_array<float>("real");
    std::vector<float> y(n[2], NAN);
    body = [&] {
        kernel(in[0].data(), in[1].data(), in[2].data(), in[3].data(), in[4].data(),
               in[5].data(), in[6].data(), y.data(), n[2], n[3], n[4], n[5], n[6], n[7],
               f[0], f[1], f[2]);
    };
    blockDim = {(unsigned)n[1], 1, 1};
    for (unsigned i = 0; i < (unsigned)n[0]; i++) {
        blockIdx = {i, 0, 0};
        run_block(n[1], 0);
    }
    FILE* file = fopen("y", "wb");
    fwrite(y.data(), sizeof(float), y.size(), file);
    fclose(file);
}
"""


def on_processor(folder, kernel):
    """The kernel as ``CudaKernel`` is called; its source runs on the processor."""
    arrays = ", ".join(f"const float* {name}" for name in kernel.inputs)
    numbers = ", ".join(f"{kind} {name}" for name, kind in kernel.scalars)
    main = _MAIN % (arrays, numbers, kernel.source)

    def launch(inputs, outputs, grid, *, scalars):
        for i, array in enumerate(inputs):
            np.array(array, np.float32).tofile(folder / str(i))
        whole = [grid.blocks, grid.threads, *scalars[:6]]
        np.array(whole, np.int32).tofile(folder / "whole")
        np.array(scalars[6:], np.float32).tofile(folder / "real")
        [(shape, dtype)] = outputs
        y, _ = results(folder, {}, main, dtype)
        return [y.reshape(shape)]

    return launch


class Summed(nn.Linear):
    """A layer without a product, which on a GPU would be short of float32."""

    def __call__(self, x):
        y = (x * self.weight).sum(axis=-1, keepdims=True)
        return y + self.bias if "bias" in self else y


def source(harmonics):
    """A source; ``None`` harmonics: of a RefineGAN, which has one and no bias."""
    mx.random.seed(1)
    made = SineSource(harmonics) if harmonics else MergedSource()
    layer = made.merge_layer
    layer.weight = 1 + mx.random.uniform(shape=layer.weight.shape)
    if "bias" in layer:
        layer.bias = mx.array([0.2])
    return made


def operands(B, T, U, harmonics, glides=False):
    """About a third unvoiced: frames, or samples where the pitch glides."""
    harmonics = harmonics or 1
    cycles = mx.random.uniform(0.001, 0.03, (B, T, U if glides else 1))
    cycles = cycles * (mx.random.uniform(shape=cycles.shape) > 0.3)
    return (
        cycles,
        mx.random.uniform(-0.5, 0.5, (B, T, 1)),
        mx.random.uniform(shape=(B, 1, harmonics)),
        mx.random.normal((B, T * U, harmonics)),
    )


@needs_compiler
@pytest.mark.parametrize(
    ("B", "T", "U", "harmonics", "glides"),
    [
        *((1, 1, 1, 1, False), (2, 7, 48, 1, False), (3, 5, 40, 9, False)),
        *((2, 7, 48, None, True), (2, 3, 30, 2, True), (1, 4, 100, None, False)),
    ],
)
def test_the_source_text_is_the_modules(
    tmp_path, monkeypatch, B, T, U, harmonics, glides
):
    kernel = on_processor(tmp_path, fused_source._KERNEL)
    monkeypatch.setattr(fused_source, "_KERNEL", kernel)
    net = source(harmonics)
    given = operands(B, T, U, harmonics, glides)
    wanted = np.array(net.from_frames(*given))
    monkeypatch.delattr(SineSource, "from_frames")  # it is not asked
    found = fused_source.from_frames(net, *given)
    assert (found.dtype, found.shape) == (mx.float32, (B, T * U, 1))
    assert np.abs(wanted).max() > 0.05
    # Sines and the sum over harmonics are rounded in other ways, the phase is not.
    np.testing.assert_allclose(found, wanted, rtol=0, atol=4e-7)


def test_what_the_kernel_does_not_serve_is_left_to_mlx(monkeypatch):
    monkeypatch.setattr(fused_source, "_KERNEL", None)
    net, (cycles, start, offset, noise) = source(2), operands(2, 3, 4, 2)
    for given in (
        (cycles, start, offset[:1], noise),
        (cycles, start[:, :1], offset, noise),
        (cycles, start, offset, noise[:, :, :1]),
        (cycles, start, offset, noise[:1]),
        (cycles, start, offset, noise[:, :0]),
        (cycles[:0], start[:0], offset[:0], noise[:0]),
    ):
        wanted = _result(net.from_frames, *given)
        found = _result(lambda *a: fused_source.from_frames(net, *a), *given)
        assert str(found) == str(wanted)
    monkeypatch.setattr(fused_source, "_MOST", 24)
    wanted = net.from_frames(cycles, start, offset, noise)
    found = fused_source.from_frames(net, cycles, start, offset, noise)
    assert mx.array_equal(found, wanted)


def _result(function, *given):
    try:
        return function(*given)
    except ValueError as error:
        return error


@pytest.mark.parametrize("shape", [(2, 3, 3), (2, 3, 5)])
def test_shapes_that_do_not_go_together_are_refused(monkeypatch, shape):
    monkeypatch.setattr(fused_source, "_KERNEL", None)
    _, start, offset, noise = operands(2, 3, 4, 1)
    with pytest.raises(ValueError, match="broadcast"):
        fused_source.from_frames(source(1), mx.ones(shape), start, offset, noise)


@pytest.mark.gpu
@on_cuda
@pytest.mark.parametrize("glides", [False, True])
@pytest.mark.parametrize(
    ("B", "T", "U", "harmonics"),
    [(1, 1, 480, 1), (6, 1000, 480, 1), (2, 333, 400, 9), (3, 50, 320, None)],
)
def test_a_gpu_gives_the_same(B, T, U, harmonics, glides):
    net, given = source(harmonics), operands(B, T, U, harmonics, glides)
    with mx.stream(mx.cpu):
        wanted = np.array(net.from_frames(*given))
    found = np.array(fused_source.from_frames(net, *given))
    # A running sum has another order on a GPU, and the ninth harmonic nine times its error.
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-4 if glides else 2e-6)


@pytest.mark.gpu
@on_cuda
@pytest.mark.parametrize("glides", [False, True])
def test_a_gpu_has_the_phases_of_its_own_operations(glides):
    net, given = source(9), operands(4, 500, 480, 9, glides)
    net.l_linear = Summed(9, 1)
    found = fused_source.from_frames(net, *given)
    np.testing.assert_allclose(found, net.from_frames(*given), rtol=0, atol=2e-6)
