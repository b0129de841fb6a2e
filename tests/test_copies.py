"""Copies out of a device's memory: what is given to the device's copier, and what not."""

import ctypes

import mlx.core as mx
import numpy as np
import pytest

from rvc_mlx import arrays
from rvc_mlx.arrays import copy_to, to_host
from rvc_mlx.spool import Spool


@pytest.fixture
def copied(monkeypatch):
    """Sizes that the copier was given; it copies as the device's does."""
    sizes = []

    def copier(target, x):
        sizes.append(x.nbytes)
        ctypes.memmove(target.ctypes.data, x.ctypes.data, x.nbytes)
        return True

    monkeypatch.setattr(arrays, "_cuda_copier", lambda: copier)
    return sizes


def on_device(n, dtype=mx.float32):
    with mx.stream(mx.cpu):
        x = mx.random.normal((2, n)).astype(dtype)
        mx.eval(x)
    return to_host(x)


def test_the_devices_memory_goes_through_its_copier(copied):
    rows = on_device(100_000)
    with Spool() as spool:
        for x in (rows[0], rows[1][5:90_000]):
            spool.append(x)
        np.testing.assert_array_equal(spool.read(0, 100_000), rows[0])
        np.testing.assert_array_equal(spool.read(100_000, 189_995), rows[1][5:90_000])
    assert copied == [400_000, 359_980]


def test_all_else_is_copied_as_ever(copied):
    rows = on_device(200_000)
    cases = (
        np.array(rows[0]),  # the host's own
        rows[0][:1000],  # too little
        rows[0][::2],  # with gaps
        on_device(200_000, mx.float16)[0],  # of another type
    )
    for x in cases:
        target = np.zeros(len(x), np.float32)
        copy_to(target, x)
        np.testing.assert_array_equal(target, x)
    assert not copied


def test_a_copier_that_fails_is_stood_in_for(monkeypatch):
    monkeypatch.setattr(arrays, "_cuda_copier", lambda: lambda target, x: False)
    rows = on_device(100_000)
    target = np.zeros(100_000, np.float32)
    copy_to(target, rows[0])
    np.testing.assert_array_equal(target, rows[0])


@pytest.mark.skipif(mx.cuda.is_available(), reason="has a CUDA GPU")
def test_without_cuda_there_is_no_copier():
    assert arrays._cuda_copier() is None


@pytest.mark.gpu
@pytest.mark.skipif(not mx.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_copies_what_is_computed():
    copier = arrays._cuda_copier()
    assert copier is not None
    with mx.stream(mx.gpu):
        for n in (70_000, 1_000_001):
            x = to_host(mx.arange(n, dtype=mx.float32) * 2)
            target = np.zeros(n, np.float32)
            assert copier(target, x)
            np.testing.assert_array_equal(target, 2 * np.arange(n, dtype=np.float32))
