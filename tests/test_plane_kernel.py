"""The pitch net's convolutions on Hopper: the kernel's source on the processor, and on a GPU."""

import mlx.core as mx
import numpy as np
import pytest
import warpgroup_on_processor
from cuda_on_processor import as_on_processor, bits, needs_compiler, results
from test_image_conv import error, expected, operands

from rvc_mlx import conv_kernel, plane_kernel
from rvc_mlx.plane_kernel import choose_tile, image_conv, pack_image_weight
from rvc_mlx.steady import OwnRows

needs_gpu = pytest.mark.skipif(not plane_kernel.supports(), reason="needs a Hopper GPU")
_ON_PROCESSOR = (
    warpgroup_on_processor.HEADER
    + r"""
}  // namespace warpgroup
void kernel(const T* x, const P* weight, const float* bias, const T* shortcut,
            const int* told, T* y, int height, int width, int inputs, int outputs,
            int padded, int rectify, int apart) {
"""
    + as_on_processor(plane_kernel._SOURCE)
    + r"""
}
int main(int, char** arguments) {
    lazy = *arguments[1] == '1';
    auto n = read_array<int>("numbers");  // rows and blocks of the grid, the scalars
    auto x = read_array<T>("x"), shortcut = read_array<T>("shortcut");
    auto weight = read_array<P>("weight");
    auto bias = read_array<float>("bias");
    auto told = read_array<int>("told");
    std::vector<T> y(n[0] * n[2] * n[3] * n[5], T(NAN));
    body = [&] {
        kernel(x.data(), weight.data(), bias.data(), shortcut.data(), told.data(), y.data(),
               n[2], n[3], n[4], n[5], n[6], n[7], n[8]);
    };
    for (unsigned b = 0; b < (unsigned)n[0]; b++)
        for (unsigned i = 0; i < (unsigned)n[1]; i++) {
            blockIdx = {i, b, 0};
            warpgroup::asked.assign(THREADS, {});
            warpgroup::counted.clear();
            run_block(THREADS, SHARED_MEMORY);
        }
    FILE* file = fopen("y", "wb");
    fwrite(y.data(), sizeof(T), y.size(), file);
    fclose(file);
}
"""
)


def on_processor(folder, x, weight, bias, shortcut, rectify, own=None):
    """What ``image_conv`` would launch, as ``cuda_on_processor`` runs it."""
    launched = []

    def launch(inputs, outputs, grid, *, scalars, constants):
        launched.append((inputs, grid, scalars, constants))
        return [mx.zeros(shape, dtype) for shape, dtype in outputs]

    packed = pack_image_weight(weight, x.dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plane_kernel, "_kernel", lambda columns: launch)
        image_conv(x, packed, bias, shortcut=shortcut, rectify=rectify, own=own)
    ((arrays, grid, scalars, constants),) = launched
    for name, a in zip(
        ("x", "weight", "bias", "shortcut", "told"), arrays, strict=True
    ):
        bits(a).tofile(folder / name)
    numbers = [grid.rows, grid.blocks, *map(int, scalars)]
    np.array(numbers, np.int32).tofile(folder / "numbers")
    constants = {**constants, "SHARED_MEMORY": grid.shared_memory}
    for y in results(folder, constants, _ON_PROCESSOR, x.dtype):
        yield y.reshape(*x.shape[:3], len(bias))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "processors"),
    [
        ((2, 11, 16, 16, 16, 3), 132),  # images, height, width, inputs, outputs, side
        ((1, 9, 24, 32, 8, 3), 0),  # outputs are padded, the width is no multiple of 16
        ((1, 18, 8, 128, 32, 3), 132),  # two chunks, weights tap by tap
        ((1, 19, 4, 192, 72, 3), 132),  # half of a tile is outside; three chunks
        ((2, 17, 8, 16, 32, 2), 0),
        ((2, 10, 16, 48, 64, 1), 0),
        ((1, 20, 16, 64, 32, 3), 0),
    ],
)
@pytest.mark.parametrize("dtype", conv_kernel.DTYPES)
def test_the_source_convolves(tmp_path, monkeypatch, dtype, shape, processors):
    monkeypatch.setattr(plane_kernel, "PROCESSORS", processors)
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


def test_tiles_are_as_large_as_leaves_none_idle():
    assert choose_tile(1, 3008, 128, 16, 1)[:3] == (2, 2, 16)
    assert choose_tile(1, 94, 4, 64, 8)[:3] == (1, 1, 64)
    assert choose_tile(8, 94, 4, 64, 8)[:3] == (2, 1, 64)
    for inputs, columns, tall, wide in (
        (512, 64, 2, 2),
        (512, 64, 2, 1),
        (64, 64, 2, 2),
    ):
        tile = plane_kernel.Tile(tall, wide, columns)
        assert 2 * (plane_kernel._memory(tile, 3, inputs) + 1024) <= 228 * 1024
        assert plane_kernel._stages(tile, 3, inputs) * 8 <= plane_kernel._BARRIERS


def test_what_it_does_not_serve_is_refused():
    for shape in ((8, 4, 4, 16), (8, 3, 1, 16), (12, 3, 3, 16), (8, 3, 3, 8)):
        with pytest.raises(ValueError, match="the kernel wants"):
            pack_image_weight(mx.zeros(shape), mx.float32)
    weight = pack_image_weight(mx.zeros((8, 3, 3, 16)), mx.float16)
    bias = mx.zeros((8,))
    for x, match in (
        (mx.zeros((1, 5, 16, 16), mx.bfloat16), "weight is"),
        (mx.zeros((1, 5, 16, 32), mx.float16), "weight is"),
        (mx.zeros((5, 16, 16), mx.float16), "want .B, T, M, C."),
    ):
        with pytest.raises(ValueError, match=match):
            image_conv(x, weight, bias)
    x = mx.zeros((1, 5, 16, 16), mx.float16)
    with pytest.raises(ValueError, match="bias is"):
        image_conv(x, weight, mx.zeros((16,)))
    with pytest.raises(ValueError, match="cannot add"):
        image_conv(x, weight, bias, shortcut=x)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", conv_kernel.DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        *((2, 77, 128, 16, 16, 3), (1, 40, 64, 32, 32, 3), (1, 24, 32, 128, 64, 3)),
        *((2, 50, 4, 512, 512, 3), (1, 33, 8, 256, 512, 2), (1, 300, 128, 32, 16, 1)),
        *((1, 544, 128, 32, 32, 3), (1, 544, 128, 64, 32, 3), (1, 544, 128, 16, 16, 3)),
        # Large tiles with several chunks, and a width that is no multiple of them.
        *(
            (1, 544, 128, 128, 64, 3),
            (1, 544, 128, 192, 128, 2),
            (1, 100, 24, 128, 72, 3),
        ),
    ],
)
@pytest.mark.parametrize("bare", [False, True])
def test_convolution_equals_mlx(shape, dtype, bare):
    x, weight, bias, shortcut = operands(*shape, dtype)
    options = {"rectify": not bare, "shortcut": None if bare else shortcut}
    with mx.stream(mx.cpu):
        wanted = expected(x, weight, bias, **options)
        mx.eval(wanted)
    y = image_conv(x, pack_image_weight(weight, dtype), bias, **options)
    assert error(y, wanted) < (8e-3 if dtype == mx.bfloat16 else 2e-3)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("side", [1, 2, 3])
def test_rows_behind_its_own_are_not_seen_on_a_gpu(side):
    x, weight, bias, shortcut = operands(1, 96, 16, 32, 64, side, mx.float16)
    with mx.stream(mx.cpu):
        wanted = expected(x[:, :50], weight, bias, shortcut[:, :50])
        mx.eval(wanted)
    own = OwnRows(mx.array([100]), 192)
    packed = pack_image_weight(weight, mx.float16)
    y = image_conv(x, packed, bias, shortcut=shortcut, own=own)
    assert error(y[:, :50], wanted) < 2e-3
