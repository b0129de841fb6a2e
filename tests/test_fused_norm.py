"""Sum and layer norm in one kernel against MLX's two."""

import mlx.core as mx
import numpy as np
import pytest

from rvc_mlx import fused_norm
from rvc_mlx.elementwise import on_cuda
from rvc_mlx.fused_norm import added_norm, cut_norm

EPS = 1e-5


def operands(rng, shape, dtype, added_dtype=None):
    x, added = (3 * rng.standard_normal((2, *shape)) + 1).astype(np.float32)
    weight, bias = rng.standard_normal((2, shape[-1])).astype(np.float32)
    x, added, weight, bias = (
        mx.array(a).astype(dtype) for a in (x, added, weight, bias)
    )
    return [x, added.astype(added_dtype or dtype), weight, bias]


def expected(*arrays):
    x, added, weight, bias = (
        np.array(a.astype(mx.float32), np.float64) for a in arrays
    )
    total = x + added
    centred = total - total.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    return centred / np.sqrt(variance + EPS) * weight + bias


def check(given, tolerance):
    found = added_norm(*given, EPS)
    assert found.dtype == given[0].dtype
    near(found, given, tolerance)


def near(found, given, tolerance):
    found = np.array(found.astype(mx.float32))
    np.testing.assert_allclose(found, expected(*given), rtol=tolerance, atol=tolerance)


def check_cut(given, tolerance):
    y, cut = cut_norm(*given, EPS)
    assert (y.dtype, cut.dtype) == (given[0].dtype, given[1].dtype)
    near(y, given, tolerance)
    near(cut, given, 2e-2 if cut.dtype == mx.bfloat16 else 2e-3)


@pytest.mark.parametrize("shape", [(1, 5, 8), (2, 3, 192), (7, 30)])
def test_the_sum_is_normed(rng, shape):
    with mx.stream(mx.cpu):
        check(operands(rng, shape, mx.float32), 1e-5)


@pytest.mark.parametrize("added", [mx.float32, mx.float16])
def test_the_sum_is_normed_and_cut(rng, added):
    with mx.stream(mx.cpu):
        check_cut(operands(rng, (2, 3, 192), mx.float32, added), 1e-5)
        y, cut = cut_norm(*operands(rng, (2, 3, 8), mx.bfloat16, mx.float16), EPS)
        assert (y.dtype, cut.dtype) == (mx.bfloat16, mx.float16)
        y, cut = cut_norm(*operands(rng, (2, 3, 8), mx.float16), EPS)
    assert cut is y


def test_the_kernel_takes_what_fits(rng, monkeypatch):
    launched = []

    def launch(inputs, outputs, grid, *, scalars, constants):
        cut = constants["CUT"] and outputs[1]
        launched.append(
            (scalars, constants["WIDTH"], constants["EACH"], grid.blocks, cut)
        )
        return [mx.zeros(shape, dtype) for shape, dtype in outputs]

    monkeypatch.setattr(fused_norm, "_KERNEL", launch)
    monkeypatch.setattr(fused_norm, "whole_packs", lambda x: x.size % 8 == 0)
    with mx.stream(mx.cpu):
        for shape in ((2, 9, 768), (1, 1, 192), (3, 1000)):
            added_norm(*operands(rng, shape, mx.float16), EPS)
        for shape in ((2, 12), (1, 8, 1032)):  # no whole packs a row, too wide
            check(operands(rng, shape, mx.float32), 1e-5)
        made = cut_norm(*operands(rng, (2, 9, 768), mx.float32, mx.float16), EPS)
        same = cut_norm(*operands(rng, (1, 1, 192), mx.float32), EPS)
    assert [a.dtype for a in made] == [mx.float32, mx.float16]
    assert same[0] is same[1]
    assert launched == [
        ([18, EPS], 96, 3, 3, False),
        ([1, EPS], 24, 1, 1, False),
        ([3, EPS], 125, 4, 1, False),
        ([18, EPS], 96, 3, 3, ((2, 9, 768), mx.float16)),
        ([1, EPS], 24, 1, 1, False),
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not on_cuda(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(mx.float32, 2e-6), (mx.float16, 2e-3), (mx.bfloat16, 2e-2)],
)
@pytest.mark.parametrize("shape", [(1, 8), (2, 33, 192), (1, 1499, 768), (3, 5, 1000)])
def test_the_kernel_norms_the_sum(rng, shape, dtype, tolerance):
    check(operands(rng, shape, dtype), tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not on_cuda(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("added", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("shape", [(1, 8), (2, 33, 192), (1, 1499, 768), (3, 5, 1000)])
def test_the_kernel_cuts_what_it_norms(rng, shape, added):
    check_cut(operands(rng, shape, mx.float32, added), 2e-6)
