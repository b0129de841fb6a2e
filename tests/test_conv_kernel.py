"""The vocoder's CUDA convolution: its own source on the processor, and on a GPU."""

import mlx.core as mx
import numpy as np
import pytest
from cuda_on_processor import as_on_processor, bits, needs_compiler, results

from rvc_mlx import conv_kernel
from rvc_mlx.conv_kernel import Output, Tile, fused_conv, pack_weight

needs_gpu = pytest.mark.skipif(
    not conv_kernel.supports(32, 3, mx.float32), reason="needs a CUDA GPU like an H100"
)
_MAIN = r"""
void kernel(const T* x, const P* weight, const float* bias, const R* residual,
            const R* accumulate, const float* inner_bias, R* y, int L, int taps,
            int dilation, int has_residual, int has_accumulate, float slope, float scale, float out_slope) {
%s
}
int main(int, char** arguments) {
    lazy = *arguments[1] == '1';
    auto shape = read_array<int>("shape");  // B, L, dilation, k, blocks
    auto x = read_array<T>("x");
    auto weight = read_array<P>("weight");
    auto residual = read_array<R>("residual"), accumulate = read_array<R>("accumulate");
    auto bias = read_array<float>("bias"), inner_bias = read_array<float>("inner_bias");
    auto numbers = read_array<float>("numbers");  // slope, scale, out_slope
    std::vector<R> y(x.size(), R(NAN));
    body = [&] {
        kernel(x.data(), weight.data(), bias.data(), residual.data(), accumulate.data(),
               inner_bias.data(), y.data(), shape[1], shape[3], shape[2], true, true, numbers[0], numbers[1],
               numbers[2]);
    };
    for (unsigned b = 0; b < (unsigned)shape[0]; b++)
        for (unsigned i = 0; i < (unsigned)shape[4]; i++) {
            blockIdx = {i, b, 0};
            run_block(32 * WARPS_M * WARPS_N, SHARED_MEMORY);
        }
    FILE* file = fopen("y", "wb");
    fwrite(y.data(), sizeof(R), y.size(), file);
    fclose(file);
}
"""


def operands(B, L, C, k, dtype, out_dtype=None):
    """Input, weight, bias and two arrays to add, all exact in their types."""
    shapes = {"x": (B, L, C), "weight": (C, k, C), "bias": (C,)}
    shapes |= {"residual": (B, L, C), "accumulate": (B, L, C)}
    arrays = {name: mx.random.normal(shape) for name, shape in shapes.items()}
    arrays["weight"] /= (C * k) ** 0.5
    added = out_dtype or dtype
    types = {"bias": mx.float32, "residual": added, "accumulate": added}
    return {name: a.astype(types.get(name, dtype)) for name, a in arrays.items()}


def expected(
    x,
    weight,
    bias,
    *,
    dilation,
    slope,
    residual=0,
    accumulate=0,
    scale=1,
    out_slope=1,
):
    """The same with MLX's convolution in float32, rounded nowhere."""
    x = x.astype(mx.float32)
    x = mx.maximum(x, slope * x)
    pad = (weight.shape[1] - 1) // 2 * dilation
    y = mx.conv1d(x, weight.astype(mx.float32), padding=pad, dilation=dilation)
    y = (y + bias + residual + accumulate) * scale
    return mx.maximum(y, out_slope * y)


def error(y, wanted):
    """Greatest difference over the greatest value; NaN stays NaN."""
    difference = mx.abs(y.astype(mx.float32) - wanted)
    return (mx.max(difference) / mx.max(mx.abs(wanted))).item()


def convolution_on_processor(
    folder, arrays, *, dilation, slope, scale, out_slope, tile, products, out_dtype
):
    """See ``on_processor``."""
    x = arrays["x"]
    L, C, k = *x.shape[1:], arrays["weight"].shape[1]
    packed = pack_weight(
        arrays["weight"], x.dtype, tile, products, Output(out_dtype, out_slope)
    ).array
    given = {**arrays, "weight": packed, "inner_bias": arrays["bias"]}
    blocks = -(-L // tile.positions) * (C // tile.columns)
    numbers = [slope, scale, out_slope]
    return on_processor(folder, given, k, dilation, blocks, numbers, tile, out_dtype)


def on_processor(
    folder, arrays, k, dilation, blocks, numbers, tile, out_dtype, step=False
):
    """Run the kernel's source, block after block, as ``_CUDA_ON_PROCESSOR`` has it.

    Twice: with asynchronous copies made at once, and as late as the kernel allows.
    """
    x, products = arrays["x"], arrays["weight"].dtype
    dtype, (B, L, C) = x.dtype, x.shape
    memory = tile.shared_memory(k, dilation)
    for name, a in arrays.items():
        bits(a).tofile(folder / name)
    np.array([B, L, dilation, k, blocks], np.int32).tofile(folder / "shape")
    np.array(numbers, np.float32).tofile(folder / "numbers")
    constants = conv_kernel._constants(dtype, products, C, tile, out_dtype, step)
    constants = {**constants, "SHARED_MEMORY": memory}
    main = _MAIN % as_on_processor(conv_kernel._SOURCE)
    for y in results(folder, constants, main, out_dtype):
        yield y.reshape(B, L, C)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "dilation", "tile"),
    [
        ((2, 41, 16, 3), 3, Tile(2, 1, 1, 2, 64, 64, 2)),
        ((1, 35, 32, 7), 5, Tile(1, 1, 2, 4, 64, 32, 3)),
        ((1, 20, 64, 3), 30, Tile(1, 1, 2, 4, 128, 64, 4)),  # two blocks of columns
    ],
)
@pytest.mark.parametrize(
    ("dtype", "products", "out_dtype"),
    [
        (mx.float32, mx.float32, mx.float32),
        (mx.float32, mx.float16, mx.float32),
        (mx.float32, mx.float16, mx.float16),
        (mx.float16, mx.float16, mx.float32),
        (mx.bfloat16, mx.bfloat16, mx.bfloat16),
    ],
)
def test_the_source_convolves(
    tmp_path, dtype, products, out_dtype, shape, dilation, tile
):
    if products.size == 2 and shape[2] == 16:
        tile = Tile(2, 1, 1, 2, 32, 32, 2)
    arrays = operands(*shape, dtype, out_dtype)
    options = {"dilation": dilation, "slope": 0.1, "scale": 1 / 3, "out_slope": 0.2}
    kinds = {"products": products, "out_dtype": out_dtype}
    with mx.stream(mx.cpu):
        wanted = expected(**arrays, **options)
        for y in convolution_on_processor(
            tmp_path, arrays, **options, tile=tile, **kinds
        ):
            # Ten bits of fraction in TF32 and float16, seven in bfloat16.
            assert error(y, wanted) < (8e-3 if dtype == mx.bfloat16 else 1e-3)


def step_operands(B, L, C, k, dtype):
    """Input, two weights, two biases and an array to add."""
    x, weight, bias, _, accumulate = operands(B, L, C, k, dtype).values()
    _, again, second_bias, _, _ = operands(1, 1, C, k, dtype).values()
    return x, (weight, again), (bias, second_bias), accumulate


def expected_step(x, weights, biases, accumulate, *, dilation, slope, scale):
    """The same with MLX's convolutions, what is between rounded as products want it."""
    y = expected(
        x, weights[0], biases[0], dilation=dilation, slope=slope, out_slope=slope
    )
    y = y.astype(mx.float16 if x.dtype == mx.float32 else x.dtype)
    added = {"residual": x, "accumulate": accumulate, "scale": scale}
    return expected(y, weights[1], biases[1], dilation=1, slope=1, **added)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "dilation", "tile"),
    [
        ((2, 41, 16, 3), 3, Tile(2, 1, 1, 2, 32, 32, 2)),
        ((1, 75, 32, 7), 5, Tile(1, 1, 2, 4, 64, 32, 3)),
        ((1, 70, 64, 3), 1, Tile(2, 2, 1, 4, 128, 64, 4)),
    ],
)
@pytest.mark.parametrize("dtype", conv_kernel.DTYPES)
def test_the_source_makes_a_step(tmp_path, dtype, shape, dilation, tile):
    x, weights, biases, accumulate = step_operands(*shape, dtype)
    options = {"dilation": dilation, "slope": 0.1}
    step = conv_kernel.pack_step(weights, biases, dtype, **options, tile=tile)
    given = {
        "x": x,
        "weight": step.weight.array,
        "residual": x,
        "accumulate": accumulate,
    }
    given |= {"inner_bias": step.bias[0], "bias": step.bias[1]}
    L, k, numbers = shape[1], shape[3], [0.1, 1 / 3, 1.0]
    blocks = -(-L // (tile.positions - k + 1))
    made = on_processor(
        tmp_path, given, k, dilation, blocks, numbers, tile, dtype, step=True
    )
    with mx.stream(mx.cpu):
        wanted = expected_step(x, weights, biases, accumulate, **options, scale=1 / 3)
        for y in made:
            assert error(y, wanted) < (8e-3 if dtype == mx.bfloat16 else 1e-3)


def test_steps_that_do_not_go_together_are_refused():
    one, bias = mx.zeros((32, 3, 32)), mx.zeros((32,))
    for *weights, other in (
        (mx.zeros((256, 3, 256)), mx.zeros((256, 3, 256)), mx.zeros((256,))),
        (one, mx.zeros((32, 5, 32)), bias),
        (mx.zeros((32, 33, 32)), mx.zeros((32, 33, 32)), bias),
        (one, one, mx.zeros((16,))),
    ):
        with pytest.raises(ValueError, match="want two of one shape, with 128"):
            conv_kernel.pack_step(weights, (other, bias), mx.float16, 1, 0.1)
    tile = Tile(2, 2, 1, 2, 64, 64, 2)  # half of the input channels at a time
    weights, biases = 2 * (mx.zeros((64, 3, 64)),), 2 * (mx.zeros((64,)),)
    with pytest.raises(ValueError, match="does not take all of 64 channels"):
        conv_kernel.pack_step(weights, biases, mx.float16, 1, 0.1, tile)


@pytest.mark.parametrize("dtype", conv_kernel.DTYPES)
@pytest.mark.parametrize("channels", conv_kernel.CHANNELS)
def test_tiles_divide_the_work_and_fit_a_block(channels, dtype):
    for tile in conv_kernel.candidate_tiles(channels, dtype):
        row = channels * dtype.size
        assert channels % tile.columns == 0
        assert row % tile.chunk == tile.chunk % tile.depth == tile.depth % 32 == 0
        assert tile.nt % conv_kernel._group(channels, dtype) == tile.nt % 2 == 0
        assert 2 * (tile.shared_memory(11, 5) + 1024) <= 228 * 1024


def test_packed_weights_are_the_same_numbers_rounded_to_tf32():
    weight = mx.random.normal((32, 3, 32))
    packed = pack_weight(weight, mx.float32).array
    assert packed.shape == (3, 32, 32)
    assert not np.any(np.array(packed).view(np.uint32) & 0x1FFF)
    ours, theirs = np.sort(np.array(packed).ravel()), np.sort(np.array(weight).ravel())
    np.testing.assert_allclose(ours, theirs, rtol=2.0**-11)


@pytest.mark.parametrize("shape", [(32, 4, 32), (48, 3, 48), (32, 3, 64)])
def test_other_weights_are_refused(shape):
    with pytest.raises(ValueError, match="the kernel wants"):
        pack_weight(mx.zeros(shape), mx.float32)


def test_arrays_that_do_not_fit_are_refused():
    weight = pack_weight(mx.zeros((32, 3, 32)), mx.float32)
    with pytest.raises(ValueError, match="weight is"):
        fused_conv(mx.zeros((1, 5, 64)), weight, mx.zeros((64,)), dilation=1, slope=0.1)


@pytest.mark.parametrize("out_dtype", conv_kernel.DTYPES)
@pytest.mark.parametrize("dtype", conv_kernel.DTYPES)
def test_results_may_be_of_another_type_unless_it_is_bfloat16(dtype, out_dtype):
    x = mx.zeros((1, 5, 32), dtype)
    weight = pack_weight(mx.zeros((32, 3, 32)), dtype, output=Output(out_dtype))
    bias, added = mx.zeros((32,)), [mx.zeros((1, 5, 32), out_dtype)]
    if dtype == out_dtype or mx.bfloat16 not in (dtype, out_dtype):
        conv_kernel._check(x, weight, bias, added)
    else:
        with pytest.raises(ValueError, match=rf"a result of {out_dtype} for x {dtype}"):
            conv_kernel._check(x, weight, bias, added)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", conv_kernel.DTYPES)
@pytest.mark.parametrize(("k", "dilation"), [(3, 1), (7, 3), (11, 5)])
@pytest.mark.parametrize("channels", conv_kernel.CHANNELS)
def test_convolution_equals_mlx(channels, k, dilation, dtype):
    arrays = operands(2, 777, channels, k, dtype)
    options = {"dilation": dilation, "slope": 0.1, "scale": 1 / 3}
    with mx.stream(mx.cpu):
        wanted = expected(**arrays, **options)
        mx.eval(wanted)
    kinds = [(dtype, tile) for tile in conv_kernel.candidate_tiles(channels, dtype)]
    if dtype == mx.float32:
        half = conv_kernel.candidate_tiles(channels, mx.float16)
        kinds += [(mx.float16, tile) for tile in half]
    for products, tile in kinds:
        weight = pack_weight(arrays["weight"], dtype, tile, products)
        y = fused_conv(**{**arrays, "weight": weight}, **options)
        # Ten bits of fraction (seven in bfloat16), and sums of thousands of products.
        assert error(y, wanted) < (8e-3 if dtype == mx.bfloat16 else 2e-3)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("channels", conv_kernel.CHANNELS)
@pytest.mark.parametrize("kinds", [(mx.float32, mx.float16), (mx.float16, mx.float32)])
def test_convolution_into_another_type(channels, kinds):
    dtype, out_dtype = kinds
    arrays = operands(2, 777, channels, 7, dtype, out_dtype)
    options = {"dilation": 3, "slope": 0.1, "scale": 1 / 3}
    with mx.stream(mx.cpu):
        wanted = expected(**arrays, **options, out_slope=0.1)
        mx.eval(wanted)
    output = Output(out_dtype, 0.1)
    weight = pack_weight(arrays["weight"], dtype, None, mx.float16, output)
    y = fused_conv(**{**arrays, "weight": weight}, **options)
    assert y.dtype == out_dtype
    assert error(y, wanted) < 2e-3


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", conv_kernel.DTYPES)
@pytest.mark.parametrize(("k", "dilation"), [(3, 1), (7, 3), (11, 5)])
@pytest.mark.parametrize("channels", [c for c in conv_kernel.CHANNELS if c <= 128])
def test_a_step_equals_mlx(channels, k, dilation, dtype):
    x, weights, biases, accumulate = step_operands(2, 777, channels, k, dtype)
    options = {"dilation": dilation, "slope": 0.1}
    with mx.stream(mx.cpu):
        wanted = expected_step(x, weights, biases, accumulate, **options, scale=1 / 3)
        mx.eval(wanted)
    step = conv_kernel.pack_step(weights, biases, dtype, **options)
    y = conv_kernel.fused_step(x, step, accumulate, 1 / 3)
    assert error(y, wanted) < (8e-3 if dtype == mx.bfloat16 else 2e-3)
