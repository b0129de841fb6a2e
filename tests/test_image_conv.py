"""The pitch net's CUDA convolution: its own source on the processor, and on a GPU."""

import mlx.core as mx
import numpy as np
import pytest
from cuda_on_processor import as_on_processor, bits, needs_compiler, results

from rvc_mlx import conv_kernel, image_conv
from rvc_mlx.steady import OwnRows

needs_gpu = pytest.mark.skipif(
    not conv_kernel.supports(32, 3, mx.float32), reason="needs a CUDA GPU like an H100"
)

_MAIN = r"""
void kernel(const T* x, const P* weight, const float* bias, const T* shortcut,
            const int* told, T* y, int height, int width, int inputs, int outputs,
            int padded, int has_shortcut, int rectify, int apart) {
%s
}
int main(int, char** arguments) {
    lazy = *arguments[1] == '1';
    auto n = read_array<int>("numbers");
    auto x = read_array<T>("x"), shortcut = read_array<T>("shortcut");
    auto weight = read_array<P>("weight");
    auto bias = read_array<float>("bias");
    auto told = read_array<int>("told");
    std::vector<T> y(shortcut.size(), T(NAN));
    body = [&] {
        kernel(x.data(), weight.data(), bias.data(), shortcut.data(), told.data(), y.data(),
               n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9]);
    };
    for (unsigned b = 0; b < (unsigned)n[0]; b++)
        for (unsigned i = 0; i < (unsigned)n[1]; i++) {
            blockIdx = {i, b, 0};
            run_block(32 * WARPS_M * WARPS_N, SHARED_MEMORY);
        }
    FILE* file = fopen("y", "wb");
    fwrite(y.data(), sizeof(T), y.size(), file);
    fclose(file);
}
"""


def operands(B, T, M, inputs, outputs, side, dtype):
    x, shortcut = (
        mx.random.normal((B, T, M, n)).astype(dtype) for n in (inputs, outputs)
    )
    weight = mx.random.normal((outputs, side, side, inputs)) / (side * inputs**0.5)
    return x, weight.astype(dtype), mx.random.normal((outputs,)), shortcut


def expected(x, weight, bias, shortcut=None, rectify=True):
    """The same with MLX's convolution in float32, rounded nowhere."""
    side = weight.shape[1]
    x, weight = x.astype(mx.float32), weight.astype(mx.float32)
    around = ((side - 1) // 2, side // 2)
    y = mx.conv2d(mx.pad(x, [(0, 0), around, around, (0, 0)]), weight) + bias
    y = mx.maximum(y, 0) if rectify else y
    return y if shortcut is None else y + shortcut.astype(mx.float32)


def error(y, wanted):
    """Greatest difference over the greatest value; NaN stays NaN."""
    difference = mx.abs(y.astype(mx.float32) - wanted)
    return (mx.max(difference) / mx.max(mx.abs(wanted))).item()


def on_processor(folder, x, weight, bias, shortcut, rectify, own=None):
    """What ``image_conv`` would launch, as ``cuda_on_processor`` runs it."""
    launched = []

    def launch(inputs, outputs, grid, *, scalars, constants):
        launched.append((inputs, grid, scalars, constants))
        return [mx.zeros(shape, dtype) for shape, dtype in outputs]

    packed = image_conv.pack_image_weight(weight, x.dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_conv, "_KERNEL", launch)
        options = {"shortcut": shortcut, "rectify": rectify, "own": own}
        image_conv.image_conv(x, packed, bias, **options)
    ((arrays, grid, scalars, constants),) = launched
    for name, a in zip(
        ("x", "weight", "bias", "shortcut", "told"), arrays, strict=True
    ):
        bits(a).tofile(folder / name)
    numbers = [grid.rows, grid.blocks, *map(int, scalars)]
    np.array(numbers, np.int32).tofile(folder / "numbers")
    assert grid.threads == 32 * constants["WARPS_M"] * constants["WARPS_N"]
    constants = {**constants, "SHARED_MEMORY": grid.shared_memory}
    main = _MAIN % as_on_processor(image_conv._SOURCE)
    for y in results(folder, constants, main, x.dtype):
        yield y.reshape(shortcut.shape)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "processors"),
    [
        ((2, 11, 16, 16, 16, 3), 132),
        ((1, 9, 32, 32, 8, 3), 0),  # outputs are padded
        ((1, 18, 8, 128, 32, 3), 132),  # small tiles, two chunks
        ((1, 21, 4, 64, 72, 3), 132),
        ((1, 40, 4, 32, 64, 3), 0),
        ((2, 17, 8, 16, 32, 2), 0),
        ((2, 10, 16, 48, 64, 1), 0),
        ((1, 20, 16, 64, 32, 3), 0),  # 256 places, weights tap by tap
        ((1, 20, 16, 32, 32, 3), 0),  # and all at once
    ],
)
@pytest.mark.parametrize("dtype", conv_kernel.DTYPES)
def test_the_source_convolves(tmp_path, monkeypatch, dtype, shape, processors):
    monkeypatch.setattr(image_conv, "PROCESSORS", processors)
    given = operands(*shape, dtype)
    with mx.stream(mx.cpu):
        wanted = expected(*given, rectify=shape[-1] == 3)
        for y in on_processor(tmp_path, *given, shape[-1] == 3):
            assert error(y, wanted) < (8e-3 if dtype == mx.bfloat16 else 1e-3)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("side", [2, 3])
def test_rows_behind_its_own_are_not_seen(tmp_path, side):
    x, *others = operands(1, 18, 8, 16, 16, side, mx.float16)
    with mx.stream(mx.cpu):
        wanted = expected(x[:, :10], *others[:2], others[2][:, :10])
        own = OwnRows(mx.array([40]), 72)  # 10 of these 18
        for y in on_processor(tmp_path, x, *others, True, own):
            assert error(y[:, :10], wanted) < 1e-3


def test_what_it_does_not_serve_is_refused():
    for shape in ((8, 4, 4, 16), (8, 3, 1, 16), (12, 3, 3, 16), (8, 3, 3, 8)):
        with pytest.raises(ValueError, match="the kernel wants"):
            image_conv.pack_image_weight(mx.zeros(shape), mx.float32)
    weight = image_conv.pack_image_weight(mx.zeros((8, 3, 3, 16)), mx.float16)
    bias = mx.zeros((8,))
    for x, match in (
        (mx.zeros((1, 5, 24, 16), mx.float16), "24 wide"),
        (mx.zeros((1, 5, 16, 16), mx.bfloat16), "weight is"),
        (mx.zeros((1, 5, 16, 32), mx.float16), "weight is"),
        (mx.zeros((5, 16, 16), mx.float16), "want .B, T, M, C."),
    ):
        with pytest.raises(ValueError, match=match):
            image_conv.image_conv(x, weight, bias)
    x = mx.zeros((1, 5, 16, 16), mx.float16)
    with pytest.raises(ValueError, match="bias is"):
        image_conv.image_conv(x, weight, mx.zeros((16,)))
    with pytest.raises(ValueError, match="cannot add"):
        image_conv.image_conv(x, weight, bias, shortcut=x)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", conv_kernel.DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        *((2, 77, 128, 16, 16, 3), (1, 40, 64, 32, 32, 3), (1, 24, 32, 128, 64, 3)),
        *((2, 50, 4, 512, 512, 3), (1, 33, 8, 256, 512, 2), (1, 300, 128, 32, 16, 1)),
        *((1, 544, 128, 32, 32, 3), (1, 544, 128, 64, 32, 3), (1, 544, 128, 16, 16, 3)),
    ],
)
@pytest.mark.parametrize("bare", [False, True])
def test_convolution_equals_mlx(shape, dtype, bare):
    x, weight, bias, shortcut = operands(*shape, dtype)
    options = {"rectify": not bare, "shortcut": None if bare else shortcut}
    with mx.stream(mx.cpu):
        wanted = expected(x, weight, bias, **options)
        mx.eval(wanted)
    packed = image_conv.pack_image_weight(weight, dtype)
    y = image_conv.image_conv(x, packed, bias, **options)
    assert error(y, wanted) < (8e-3 if dtype == mx.bfloat16 else 2e-3)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("side", [1, 2, 3])
def test_rows_behind_its_own_are_not_seen_on_a_gpu(side):
    x, weight, bias, shortcut = operands(1, 96, 16, 32, 64, side, mx.float16)
    with mx.stream(mx.cpu):
        wanted = expected(x[:, :50], weight, bias, shortcut[:, :50])
        mx.eval(wanted)
    packed = image_conv.pack_image_weight(weight, mx.float16)
    own = OwnRows(mx.array([100]), 192)
    y = image_conv.image_conv(x, packed, bias, shortcut=shortcut, own=own)
    assert error(y[:, :50], wanted) < 2e-3
