"""The strongest bins as CUDA finds them are those of MLX's operations."""

import mlx.core as mx
import numpy as np
import pytest

from rvc_mlx import pitch, salience_kernel

on_cuda = pytest.mark.skipif(not mx.cuda.is_available(), reason="needs a CUDA GPU")


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


@pytest.mark.gpu
@on_cuda
@pytest.mark.parametrize(("T", "bins"), [(1, 360), (7, 9), (8, 31), (3000, 360)])
def test_the_kernel_finds_what_mlx_finds(T, bins):
    given = salience(T, bins)
    strongest, strengths = salience_kernel.strongest_bins(mx.array(given), 4)
    at = given.argmax(axis=1)
    np.testing.assert_array_equal(strongest, at)
    padded = np.pad(given, ((0, 0), (4, 4)))
    around = at[:, None] + np.arange(9)
    expected = np.take_along_axis(padded, around, axis=1)
    np.testing.assert_array_equal(strengths, expected)
