"""The translation of MLX graphs to OpenVINO, against MLX's own result.

Everything of dynamic length is traced at three lengths and run at others.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import openvino as ov
import pytest
import torch
from tiny_models import (
    VOICES,
    arrays,
    make_contentvec,
    make_rmvpe,
    make_voice,
    narrow_refinegan,
    randomize,
)

from rvc_mlx.engine import Seam, to_openvino
from rvc_mlx.models.contentvec import TimeNorm
from rvc_mlx.models.refinegan import Decimate, upsample_linear
from rvc_mlx.models.vits import RelativeAttention
from rvc_mlx.openvino_graph import parameter, translate
from rvc_mlx.openvino_ops import OPERATIONS, gru_sequence

TRACED = (10, 11, 14)
ELSEWHERE = (7, 17, 40)  # run here: shorter and longer, odd and even
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def small_and_plain(request, monkeypatch):
    """MLX's CPU back end would start a C compiler for each fused activation."""
    if "refinegan-wide" not in request.node.name:
        narrow_refinegan(monkeypatch)
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    mx.disable_compile()
    yield
    mx.enable_compile()
    mx.set_default_device(device)


@cache
def core():
    core = ov.Core()
    core.set_property(
        "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": "1"}
    )
    return core


def floats(*shape):
    """Values of both signs, none near an integer or a half, where functions jump."""
    values = np.random.default_rng(0).uniform(-2, 2, shape)
    return mx.array(np.where(abs(2 * values % 1 - 0.5) > 0.4, 0.3, values), mx.float32)


def of_length(T):
    return [floats(1, T, 6)]


def listed(outputs):
    return list(outputs) if isinstance(outputs, list | tuple) else [outputs]


def primitives(fn, inputs):
    events = []
    mx.export_function(events.append, fn, *inputs)
    return {event["name"] for event in events if event["type"] == "primitive"}


def run(nodes, heads, inputs):
    compiled = core().compile_model(ov.Model(nodes, heads), "CPU")
    results = compiled([np.array(x) for x in inputs])
    return [results[i] for i in range(len(nodes))]


def assert_close(actual, expected, tolerance=TOLERANCE):
    assert actual.shape == expected.shape
    difference = np.abs(actual.astype(np.float64) - np.array(expected, np.float64))
    assert difference.max() <= tolerance
    assert difference.mean() <= tolerance / 2


def check(fn, inputs=of_length, at=ELSEWHERE, traced=TRACED, tolerance=TOLERANCE):
    """Translate once, compare at every length of ``at``."""
    heads, nodes = translate(fn, [inputs(T) for T in traced])
    compiled = core().compile_model(ov.Model(nodes, heads), "CPU")
    for T in at:
        results = compiled([np.array(x) for x in inputs(T)])
        expected = listed(fn(*inputs(T)))
        assert len(nodes) == len(expected)
        for i, value in enumerate(expected):
            assert_close(results[i], value, tolerance)


# One case for every entry of the table ------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A tiny function of dynamic length, and its inputs at a length."""

    fn: Callable
    inputs: Callable = of_length


def weights(*shape, seed=1):
    values = np.random.default_rng(seed).standard_normal(shape) / 3
    return mx.array(values, mx.float32)


def with_columns(T):
    """Two different columns 0..5 for each of T rows."""
    return [floats(1, T, 6), (mx.arange(T)[:, None] % 3 + 2 * mx.arange(2))[None]]


CASES = {
    "Abs": Case(mx.abs),
    "Cos": Case(mx.cos),
    "Erf": Case(mx.erf),
    "Exp": Case(mx.exp),
    "Floor": Case(mx.floor),
    "Log": Case(lambda x: mx.log(mx.abs(x) + 0.1)),
    "Negative": Case(mx.negative),
    "Sigmoid": Case(mx.sigmoid),
    "Sin": Case(mx.sin),
    "Square": Case(mx.square),
    "Tanh": Case(mx.tanh),
    "Sqrt": Case(lambda x: (mx.sqrt(mx.abs(x)), mx.rsqrt(mx.abs(x) + 0.1))),
    "Add": Case(lambda x: x + x[:, :1]),
    "Subtract": Case(lambda x: 1 - x),
    "Multiply": Case(lambda x: x * weights(6)),
    "Divide": Case(lambda x: (x / 3, 1 / (mx.abs(x) + 0.1))),
    "Maximum": Case(lambda x: mx.maximum(x, 0.1 * x)),
    "Minimum": Case(lambda x: mx.minimum(x, x[..., ::-1])),
    "Power": Case(lambda x: mx.abs(x) ** 1.5),
    "Equal": Case(lambda x: mx.floor(x) == 0),
    "Greater": Case(lambda x: x > 0),
    "GreaterEqual": Case(lambda x: x >= 0.3),
    "Less": Case(lambda x: x < weights(6)),
    "Select": Case(lambda x: (mx.where(x > 0, x, -1e4), mx.where(x < 1, 0, x[:, :1]))),
    "AsType": Case(lambda x: (x > 0).astype(mx.float32) + (2 * x).astype(mx.int32)),
    "Arange": Case(
        lambda x: (
            x * mx.arange(1, 7, dtype=mx.float32),
            x + mx.arange(2, x.shape[1] * 2 + 2, 2)[:, None],
        )
    ),
    "GatherAxis": Case(
        lambda x, i: mx.take_along_axis(x, i, axis=-1) + 1, with_columns
    ),
    "ScatterAxis": Case(
        lambda x, i: mx.put_along_axis(x, i, 2 * x[..., :2] + 1, axis=-1) + 1,
        with_columns,
    ),
    "Full": Case(lambda x: x + mx.full(x.shape, 2.0)),
    "Broadcast": Case(lambda x: mx.broadcast_to(x[:, None, :1], (3, 2, *x.shape[1:]))),
    "Transpose": Case(lambda x: (x.transpose(2, 0, 1), x.swapaxes(1, 2) * 2)),
    "Reshape": Case(lambda x: x.reshape(1, x.shape[1], 2, 3).reshape(-1, 3)),
    "Flatten": Case(lambda x: (x.flatten(), x.flatten(1), x.flatten(0, 1))),
    "Unflatten": Case(lambda x: mx.unflatten(x, -1, (2, 3))),
    "ExpandDims": Case(lambda x: (x[None], mx.expand_dims(x, (1, 3)), x[..., None])),
    "Squeeze": Case(lambda x: x.squeeze(0)),
    "Concatenate": Case(
        lambda x: (mx.concatenate([x, x[:, :3]], 1), mx.stack([x, -x], -1))
    ),
    "Split": Case(lambda x: tuple(mx.split(x, [1, 4], axis=-1))),
    "Slice": Case(lambda x: (x[:, 2:], x[:, :-1, 1::2], x[..., ::-1], x[:, 1:5])),
    "Pad": Case(
        lambda x: (
            mx.pad(x, [(0, 0), (1, 2), (0, 3)]),
            mx.pad(x, [(0, 0), (0, x.shape[1]), (0, 0)], constant_values=0.5),
        )
    ),
    "Gather": Case(
        lambda x, i: weights(9, 6)[i] + x,
        lambda T: [floats(1, T, 6), mx.arange(T)[None] * 5 % 9],
    ),
    "Reduce": Case(
        lambda x: (x.sum(1), x.max(2), x.min((1, 2), keepdims=True), x.prod(-1))
    ),
    "Scan": Case(
        lambda x: (
            mx.cumsum(x, axis=1),
            mx.cumsum(x, axis=-1, reverse=True),
            mx.cumsum(x, axis=1, inclusive=False),
        )
    ),
    "Softmax": Case(lambda x: (mx.softmax(x, -1), mx.softmax(x.swapaxes(1, 2), -1))),
    "Matmul": Case(lambda x: (x @ weights(6, 3), x @ x.swapaxes(1, 2))),
    "AddMM": Case(lambda x: mx.addmm(weights(3), x, weights(6, 3))),
    "Convolution": Case(lambda x: mx.conv1d(x, weights(4, 3, 6), padding=1)),
}


@pytest.mark.parametrize("name", list(CASES))
def test_operation(name):
    case = CASES[name]
    assert name in primitives(case.fn, case.inputs(10))
    check(case.fn, case.inputs)


def test_every_entry_has_a_case():
    exercised = set()
    for case in CASES.values():
        exercised |= primitives(case.fn, case.inputs(10))
    assert exercised == set(OPERATIONS)


def test_the_rest_is_out_of_reach():
    assert "StopGradient" not in primitives(
        lambda x: mx.stop_gradient(x) + 1, [floats(3)]
    )
    with pytest.raises(ValueError, match="Contiguous"):
        primitives(mx.contiguous, [floats(3, 4)])


# What a single operation does not show ------------------------------------------------


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x.mean(axis=1),
        lambda x: x.mean(axis=(0, 1), keepdims=True) * x,
        lambda x: x.mean(),
        lambda x: x - x.mean(axis=1, keepdims=True),
        lambda x: mx.square(x - x.mean(1, keepdims=True)).mean(1, keepdims=True),
        lambda x: x[:, 1:].mean(axis=1),
        lambda x: mx.pad(x, [(0, 0), (0, x.shape[1]), (0, 0)]).mean(axis=1),
    ],
)
def test_means_over_the_length(fn):
    check(fn, at=(5, 7, 12, 13, 101))


@pytest.mark.parametrize("stride", [2, 3, 5])
def test_mean_over_a_shortened_axis(stride):
    # The shortened length is an affine function of the length only at whole strides;
    # between them it is the floor of one.
    def fn(x):
        return mx.conv1d(x, weights(4, 2 * stride, 6), stride=stride).mean(axis=1)

    traced = tuple(stride * k for k in (4, 5, 7))
    check(fn, at=range(2 * stride, 7 * stride), traced=traced)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x[:, -5:],
        lambda x: x[:, -5:-2],
        lambda x: x[:, -1:],
        lambda x: x[:, 1:-1],
        lambda x: x[:, 3:5],
        lambda x: x[:, :3],
        lambda x: x[:, 1::2],
        lambda x: x[:, ::3],
        lambda x: x[:, ::-1],
        lambda x: x[:, -2::-1],
        lambda x: x[:, :-4:-1],
        lambda x: x[:, 4::-1],
        lambda x: x[:, -2:2:-1],
        lambda x: x[..., 4:1:-1],
        lambda x: x[..., -2::-2],
        lambda x: x[..., ::-2],
        lambda x: x[:, ::-1, ::-1],
        lambda x: x.swapaxes(1, 2)[:, ::-1, -3:],
        lambda x: x.flatten(1)[:, : x.shape[1] * 2],
        lambda x: x.flatten(1)[:, x.shape[1] * 2 :],
        lambda x: x.flatten(1)[:, x.shape[1] : x.shape[1] * 2],
        lambda x: mx.concatenate([x[:, :1], x[:, :-1]], axis=1),
    ],
)
def test_slices(fn):
    check(fn)


def attention_like(x):
    """Channels-first convolution, transpose, product, reshape, convolution again."""
    y = mx.conv1d(x, weights(8, 3, 6), padding=1)
    y = mx.unflatten(y, -1, (2, 4)).transpose(0, 2, 1, 3)  # [1, 2, T, 4]
    scores = mx.softmax(y @ y.swapaxes(-1, -2), axis=-1)
    y = (scores @ y).transpose(0, 2, 1, 3).flatten(-2)
    return mx.conv1d(y + x[..., :1], weights(5, 5, 8), padding=2)


def image_like(x):
    """Convolve as an image, pool by reshape, fold the width into channels."""
    y = mx.conv2d(x[..., None], weights(4, 3, 3, 1), padding=1)  # [1, T, 6, 4]
    B, T, M, C = y.shape
    pooled = y.reshape(B, T // 2, 2, M // 2, 2, C).mean(axis=(2, 4))
    up = mx.conv_transpose2d(
        pooled, weights(4, 3, 3, 4), stride=2, padding=1, output_padding=1
    )
    joined = mx.concatenate([up, y], axis=-1)
    image = mx.conv2d(joined, weights(3, 3, 3, 8), padding=1)
    return image.transpose(0, 1, 3, 2).flatten(-2)


@pytest.mark.parametrize(
    "fn",
    [
        attention_like,
        lambda x: mx.conv1d(x, weights(6, 3, 6), padding=1).swapaxes(1, 2) @ x,
        lambda x: mx.conv1d(x, weights(6, 3, 6), padding=1).reshape(1, -1, 2, 3),
        lambda x: mx.conv1d(x, weights(6, 3, 6), padding=1).flatten(1),
        lambda x: mx.conv1d(x, weights(6, 1, 6)) * x + weights(6),
        lambda x: mx.conv1d(mx.conv1d(x, weights(6, 1, 6)) * 2, weights(6, 3, 6)),
        lambda x: mx.concatenate([mx.conv1d(x, weights(6, 1, 6)), x], axis=-1),
        lambda x: mx.conv1d(x, weights(6, 1, 6)).transpose(2, 0, 1).sum(axis=0),
        lambda x: mx.softmax(mx.conv1d(x, weights(6, 1, 6)), axis=-1),
        lambda x: mx.cumsum(mx.conv1d(x, weights(6, 1, 6)), axis=1),
        lambda x: mx.split(mx.conv1d(x, weights(6, 1, 6)), 2, axis=-1)[1],
        lambda x: mx.pad(mx.conv1d(x, weights(6, 1, 6)), [(0, 0), (2, 0), (0, 1)]),
        lambda x: mx.repeat(mx.conv1d(x, weights(6, 1, 6)), 3, axis=1),
        lambda x: mx.conv1d(x, weights(1, 1, 6))[..., 0],
        lambda x: mx.conv1d(x.reshape(1, -1, 1), weights(4, 6, 1), stride=6),
        lambda x: nn.LayerNorm(6)(mx.conv1d(x, weights(6, 1, 6))),
    ],
)
def test_layouts(fn):
    check(fn)


def test_images():
    check(image_like, traced=(8, 10, 16), at=(6, 22, 64))


@pytest.mark.parametrize("heads", [1, 2])
def test_relative_positions_inside_attention(heads):
    attention = RelativeAttention(8, heads)
    attention.emb_rel_k = weights(*attention.emb_rel_k.shape)
    attention.emb_rel_v = weights(*attention.emb_rel_v.shape)
    mx.eval(attention.parameters())
    check(attention, lambda T: [floats(1, T, 8)])


@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        (1, {}),
        (3, {"padding": 1}),
        (3, {"padding": 3, "dilation": 3}),
        (4, {"stride": 2, "padding": 1}),
        (4, {"padding": 2}),
        (3, {"groups": 3}),
        (3, {"groups": 6, "padding": 1}),
        (5, {"groups": 2, "stride": 2, "dilation": 1}),
    ],
)
def test_convolution(kernel, options):
    width = 6 // options.get("groups", 1)
    check(lambda x: mx.conv1d(x, weights(6, kernel, width), **options))


@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        (1, {}),
        (3, {"padding": 1}),
        (4, {"stride": 2, "padding": 1}),
        (3, {"stride": 2, "padding": 1, "output_padding": 1}),
        (10, {"stride": 5, "padding": 3, "output_padding": 1}),
        (16, {"stride": 10, "padding": 3}),
        (2, {"stride": 3}),
        (3, {"stride": 2, "padding": 2}),
    ],
)
def test_transposed_convolution(kernel, options):
    check(lambda x: mx.conv_transpose1d(x, weights(4, kernel, 6), **options))


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2, "padding": 1, "output_padding": 1},
        {"stride": (2, 1), "padding": (1, 0)},
        {"stride": (1, 2), "padding": (0, 1), "output_padding": (0, 1)},
    ],
)
def test_transposed_convolution_of_images(options):
    check(
        lambda x: mx.conv_transpose2d(x, weights(4, 3, 3, 6), **options),
        lambda T: [floats(1, T, 5, 6)],
    )


def test_grouped_convolution_of_images():
    check(
        lambda x: mx.conv2d(x, weights(6, 3, 3, 1), padding=1, groups=6),
        lambda T: [floats(1, T, 5, 6)],
    )


@pytest.mark.parametrize("rate", [2, 5])
def test_broadcast_kernel(rate):
    decimate = Decimate(rate)
    traced = tuple(rate * T for T in TRACED)
    check(decimate, of_length, at=[rate * T for T in ELSEWHERE], traced=traced)


def test_linear_upsampling():
    check(lambda x: upsample_linear(x, 3))


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: mx.broadcast_to(x[:, :1], x.shape) @ weights(6, 3),
        lambda x: mx.broadcast_to(x[..., :1], x.shape) @ weights(6, 3),
        lambda x: x.swapaxes(1, 2) @ mx.broadcast_to(x[:, :1], x.shape),
        lambda x: mx.broadcast_to(x[:, None], (1, 3, *x.shape[1:])) @ weights(6, 3),
        lambda x: mx.broadcast_to(x[:, :1], x.shape).sum(axis=1),
        lambda x: mx.softmax(mx.broadcast_to(x[..., :1], x.shape), -1),
        lambda x: mx.cumsum(mx.broadcast_to(x[:, :1], x.shape), axis=1),
        lambda x: mx.broadcast_to(x[:, :1], x.shape).reshape(1, -1, 3),
        lambda x: mx.broadcast_to(x[:, :1], x.shape).swapaxes(1, 2) + x.swapaxes(1, 2),
        lambda x: mx.conv1d(mx.broadcast_to(x[:, :1], x.shape), weights(2, 3, 6)),
        lambda x: mx.concatenate([mx.broadcast_to(x[:, :1], x.shape), x], axis=1),
        lambda x: mx.broadcast_to(x[:, :1], x.shape)[:, 2:],
        lambda x: mx.broadcast_to(x.max(), x.shape),
        lambda x: mx.broadcast_to(x[:, :1], x.shape)[None] * 2,
        lambda x: x + mx.zeros((1, x.shape[1], 1)) + mx.ones((6,)),
    ],
)
def test_broadcast_values(fn):
    check(fn)


def centred(x, axis):
    return x - x.mean(axis=axis, keepdims=True)


def deviation(x, axis):
    return mx.square(centred(x, axis)).mean(axis=axis, keepdims=True)


def shared(x, fn):
    """Apply ``fn``, whose several uses of ``x`` are then one value of the graph."""
    return fn(x)


@pytest.mark.parametrize(
    "fn",
    [
        nn.gelu,
        lambda x: nn.gelu(mx.conv1d(x, weights(6, 3, 6))) * 2,
        lambda x: nn.gelu(x[:, :1]) + x,
        lambda x: (x + 3) * (1 + mx.erf(math.sqrt(2) / (x + 3))) / 2,
        lambda x: shared(x + 3, lambda y: y * (1 + mx.erf(math.sqrt(2) / y)) / 2),
        lambda x: x[:, ::-1] * (1 + mx.erf(x / math.sqrt(2))) / 2,
        lambda x: shared(x + 3, lambda y: 2 / (y * (1 + mx.erf(y / math.sqrt(2))))),
        lambda x: x * (1 - mx.erf(x / math.sqrt(2))) / 2,
        lambda x: x * (1 + mx.erf(x / math.sqrt(2))) / 3,
        lambda x: mx.erf(x / math.sqrt(2)) + (1 + mx.erf(x / math.sqrt(2))) * x,
    ],
)
def test_gelu_and_what_looks_like_it(fn):
    check(fn)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: centred(x, 2) * mx.rsqrt(deviation(x, 2) + 1e-5),
        lambda x: centred(x, 1) * mx.rsqrt(deviation(x, 1) + 1e-5),
        lambda x: centred(x, (1, 2)) * mx.rsqrt(deviation(x, (1, 2)) + 1e-5),
        lambda x: centred(x, 0) + centred(x, 1) * mx.rsqrt(deviation(x, 1) + 0.5),
        lambda x: TimeNorm(6)(mx.conv1d(x, weights(6, 3, 6))) * weights(6),
        lambda x: nn.LayerNorm(6)(mx.conv1d(x, weights(6, 3, 6))) + weights(6),
        lambda x: nn.LayerNorm(6)(x.swapaxes(1, 2).reshape(1, -1, 6)),
        lambda x: -centred(x, 1) * mx.rsqrt(deviation(x, 1) + 1e-5),
        lambda x: (x.mean(1, keepdims=True) - x) * mx.rsqrt(deviation(x, 1) + 1e-5),
        lambda x: centred(x, 2) * mx.rsqrt(deviation(x, 1) + 1e-5),
        lambda x: (
            centred(x, 1) * mx.rsqrt(mx.square(centred(x, 1)).mean(2) + 1)[..., None]
        ),
        lambda x: centred(x, 1) * mx.rsqrt(deviation(x * 2, 1) + 1e-5),
        lambda x: centred(x, 1) * mx.rsqrt(deviation(x, 1) + x * x + 1),
        lambda x: centred(x, 1) * mx.sqrt(deviation(x, 1) + 1e-5),
        lambda x: x * mx.rsqrt(deviation(x, 1) + 1e-5),
        lambda x: centred(x, 1) * mx.rsqrt(mx.square(x).mean(1, keepdims=True) + 1),
        lambda x: mx.square(centred(x, 1)).sum(1) / x.shape[2],
    ],
)
def test_normalisation_and_what_looks_like_it(fn):
    check(fn)


def attend(q, k, v):
    return mx.softmax(q @ k.swapaxes(-1, -2), axis=-1) @ v


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: attend(x, x * 2, x - 1),
        lambda x: attend(x[None], x[None] * 2, x[None] - 1),
        lambda x: attend(x, x[:, 2:], x[:, 1:-1]),
        lambda x: attend(x, weights(6, 6), weights(6, 4)),
        lambda x: attend(x[:, None], weights(1, 3, 4, 6), weights(1, 3, 4, 5)),
        lambda x: attend(
            mx.conv1d(x, weights(6, 3, 6)), x, x.swapaxes(1, 2).swapaxes(1, 2)
        ),
        lambda x: attend(x.swapaxes(1, 2), x.swapaxes(1, 2), x.swapaxes(1, 2)),
        lambda x: attend(mx.broadcast_to(x[:, :1], x.shape), x, x),
        lambda x: attend(x, x, mx.broadcast_to(x[:, :1], x.shape)),
        lambda x: mx.softmax(0.3 * (x @ x.swapaxes(1, 2)), -1) @ x,
        lambda x: mx.softmax(x @ weights(6, 6), -1) @ weights(6, 3),
        lambda x: mx.softmax(x @ x.swapaxes(1, 2), -1).swapaxes(1, 2) @ x,
        lambda x: mx.softmax((x @ x.swapaxes(1, 2))[:, 1:], -1) @ x,
        lambda x: x.swapaxes(1, 2) @ mx.softmax(x @ x.swapaxes(1, 2), -1),
        lambda x: (mx.softmax(x @ x.swapaxes(1, 2), -1), attend(x, x, x)),
        lambda x: mx.addmm(
            weights(3), mx.softmax(x.squeeze(0) @ weights(6, 6), -1), weights(6, 3)
        ),
    ],
)
def test_attention_and_what_looks_like_it(fn):
    check(fn)


def test_several_inputs_and_outputs():
    def fn(x, g, i):
        return x + g, (g * 2).sum(), i + 1

    check(fn, lambda T: [floats(1, T, 6), floats(1, 1, 6), mx.arange(T)[None]])


def test_an_input_may_be_an_output():
    check(lambda x: (x, x.swapaxes(1, 2), x + 1))


def test_static_length():
    def fn(x):
        return attention_like(x) + mx.arange(x.shape[1], dtype=mx.float32)[:, None]

    heads, nodes = translate(fn, [of_length(12)])
    assert heads[0].get_partial_shape().is_static
    assert_close(run(nodes, heads, of_length(12))[0], fn(*of_length(12)))


def test_lengths_that_are_multiples_of_the_input():
    # The input that varies is [1, 3 T, 2]; sizes must come out of it, not of T.
    def inputs(T):
        return [floats(1, 3 * T, 2)]

    def fn(x):
        y = x.reshape(1, -1, 3, 2)
        return mx.broadcast_to(y[:, :1], y.shape) + y.mean(axis=1)

    check(fn, inputs)


# Refusals -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fn", "name"),
    [
        (lambda x: mx.sort(x, axis=-1), "Sort"),
        (lambda x: mx.logical_not(x > 0), "LogicalNot"),
        (lambda x: x <= 0, "LessEqual"),
        (lambda x: mx.fft.rfft(x), "FFT"),
    ],
)
def test_an_unknown_primitive_is_named(fn, name):
    with pytest.raises(NotImplementedError, match=rf"primitive {name}\b.*\(1, 10, 6\)"):
        translate(fn, [of_length(T) for T in TRACED])


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: mx.all(x > 0, axis=1),
        lambda x: mx.cumprod(x, axis=1),
        lambda x: mx.addmm(x[:, :1, :3], x, weights(6, 3), alpha=2.0),
        lambda x: mx.take(weights(3, 4), (x[0, :, 0] > 0).astype(mx.int32), axis=1),
        lambda x: mx.conv_general(x, weights(6, 3, 6), input_dilation=2),
        lambda x: mx.conv_general(x, weights(6, 3, 6), stride=2, flip=True),
        lambda x: mx.conv_transpose1d(x, weights(6, 3, 6), stride=2, dilation=2),
        lambda x: mx.conv_general(x, weights(6, 3, 6), padding=4, flip=True),
        lambda x: x + mx.arange(0.5, x.shape[1])[:, None],
    ],
)
def test_unknown_arguments_are_refused(fn):
    with pytest.raises(NotImplementedError):
        translate(fn, [of_length(T) for T in TRACED])


@pytest.mark.parametrize(
    "make",
    [
        lambda T: np.arange(T, dtype=np.float32)[None, :, None],
        lambda T: np.float32(T),
        lambda T: np.float32(T - 10),  # 0 at the first length
        lambda T: np.float32(1 / np.sqrt(T)),
        lambda T: np.full(3, 1 / T, np.float32).sum(),
        lambda T: np.full(6, T, np.float32),
    ],
)
def test_a_constant_that_depends_on_the_length_is_refused(make):
    with pytest.raises(ValueError, match=r"constant .*depends on the input"):
        translate(
            lambda x: x * mx.array(make(x.shape[1])), [of_length(T) for T in TRACED]
        )


@pytest.mark.parametrize(
    ("fn", "name"),
    [
        (lambda x: mx.split(x, [x.shape[1] // 2], axis=1)[0], "Split"),
        (lambda x: mx.conv1d(x, weights(6, 3, 6), padding=x.shape[1]), "Convolution"),
    ],
)
def test_arguments_that_depend_on_the_length_are_refused(fn, name):
    with pytest.raises(ValueError, match=f"{name} depends on the length"):
        translate(fn, [of_length(T) for T in TRACED])


def test_other_operations_at_other_lengths_are_refused():
    with pytest.raises(ValueError, match="other operations at other lengths"):
        translate(
            lambda x: x + 1 if x.shape[1] == 11 else x * 2,
            [of_length(T) for T in TRACED],
        )


def test_sizes_that_are_not_affine_are_refused():
    with pytest.raises(NotImplementedError, match="not an affine function"):
        translate(
            lambda x: mx.zeros((x.shape[1] ** 2, 6)) + x.mean(axis=1),
            [of_length(T) for T in TRACED],
        )


# The recurrent layer ------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [1, 7])
def test_gru_sequence_equals_torch(hidden):
    reference = torch.nn.GRU(5, hidden, batch_first=True, bidirectional=True)
    randomize(reference)
    tensors = arrays(reference)
    stacked = [
        np.stack([tensors[f"{name}_l0"], tensors[f"{name}_l0_reverse"]])
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    ]
    head = parameter(((1,), (10, 11), (5,)), mx.float32)
    node = gru_sequence(head, stacked, hidden)
    compiled = core().compile_model(ov.Model([node], [head]), "CPU")
    for T in (1, 2, 33):
        x = np.array(floats(1, T, 5))
        with torch.inference_mode():
            expected = reference(torch.from_numpy(x))[0].numpy()
        assert_close(compiled([x])[0], expected)


# Whole networks -----------------------------------------------------------------------


def check_seam(seam, whole, lengths):
    """Compare a seam's model with the network at other lengths."""
    compiled = core().compile_model(to_openvino(seam), "CPU")
    for T in lengths:
        inputs = [
            floats(*shape) if dtype == mx.float32 else mx.full(shape, 99, dtype)
            for shape, dtype in seam.inputs(T)
        ]
        expected = np.array(whole(*inputs))
        result = compiled([np.array(x) for x in inputs])[0]
        assert_close(result, expected, TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_contentvec(version):
    network = make_contentvec()[1]
    seam = Seam(
        "encode",
        "",
        lambda dtype: [lambda x: network(x, version)],
        lambda T: [((1, T), mx.float32)],
        (320 * 5 + 80, 320 * 6 + 80, 320 * 8 + 80),
    )
    # Also between whole strides of the convolutions. Not one frame first: see below.
    lengths = (720, 400, 719, 1039, *range(4001, 4006), 320 * 20 + 80)
    check_seam(seam, lambda x: network(x, version), lengths)


@pytest.mark.xfail(strict=True, reason="OpenVINO 2026.4: wrong after one frame first")
def test_attention_may_see_one_frame_first():
    """No recording is that short, so nothing works around it; passes once it is mended."""

    def fn(x):
        q, k, v = (x @ weights(6, 6, seed=seed) for seed in (1, 2, 3))
        return mx.softmax(q @ k.swapaxes(1, 2), axis=-1) @ v

    check(fn, at=(1, 9, 20))


def test_rmvpe():
    network = make_rmvpe()[1]
    seam = Seam(
        "salience",
        "",
        lambda dtype: [network.image_features, network.fc[0].gru, network.classify],
        lambda T: [((1, T, 32), mx.float32)],
        (16, 24, 40),
    )
    check_seam(seam, network, (8, 48))


@pytest.mark.parametrize("name", ["nsf", "plain"])
def test_prior(name):
    network = make_voice(name)[1]

    def inputs(T):
        shapes = [((1, T, 256), mx.float32), ((1, T, 12), mx.float32)]
        shapes.append(((1, 1, 8), mx.float32))
        return shapes + [((1, T), mx.int32)] * network.config.f0

    seam = Seam("prior", "", lambda dtype: [network.prior], inputs, (25, 26, 30))
    check_seam(seam, network.prior, (11, 33))


@pytest.mark.parametrize("length", [(9,), (8, 9, 12)], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", [n for n in VOICES if n != "refinegan-wide"])
def test_vocoder(name, length):
    network = make_voice(name)[1]
    config, U = network.config, network.config.samples_per_frame

    def inputs(T):
        shapes = [(1, T, 12), (1, 1, 8)]
        shapes += [(1, T * U, 1)] if config.f0 else []
        if config.vocoder == "RefineGAN":
            shapes += [(1, T * n, 6 * C) for n, C in network.dec.noise_shapes()]
        return [(shape, mx.float32) for shape in shapes]

    seam = Seam("vocoder", "", lambda dtype: [network.dec], inputs, length)
    check_seam(seam, network.dec, length if len(length) == 1 else (5, 14))


@pytest.mark.parametrize("name", ["nsf", "mrf"])
def test_source(name):
    network = make_voice(name)[1]
    U, H = network.config.samples_per_frame, network.dec.HARMONICS

    def inputs(T):
        per_frame = U if "RefineGAN" in network.config.vocoder else 1
        shapes = [(1, T, per_frame), (1, T, 1), (1, 1, H), (1, T * U, H)]
        return [(shape, mx.float32) for shape in shapes]

    def source(cycles, *rest):  # cycles per sample as voices have them
        return network.dec.m_source.from_frames(0.01 * cycles, *rest)

    seam = Seam("source", "", lambda dtype: [source], inputs, (9,), exact=True)
    check_seam(seam, source, (9,))


def test_a_step_may_change_the_length():
    def double(x):
        return mx.repeat(x, 2, axis=1)

    def spread(x):
        return (
            mx.broadcast_to(x.mean(axis=1, keepdims=True), x.shape)
            + x.flatten(1)[:, -x.shape[1] :, None]
        )

    seam = Seam(
        "two",
        "",
        lambda dtype: [double, spread],
        lambda T: [((1, T, 6), mx.float32)],
        TRACED,
    )
    check_seam(seam, lambda x: spread(double(x)), ELSEWHERE)
