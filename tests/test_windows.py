"""What each frame's taps see."""

import mlx.core as mx
import numpy as np
import pytest

from rvc_mlx.steady import OwnRows
from rvc_mlx.windows import windows

CASES = [
    (5, {}),
    (3, {"slope": 0.0}),
    (3, {"stride": 2, "before": 0, "frames": 18}),
    (3, {"before": 1, "frames": 40, "slope": 0.1}),
    (4, {"stride": 3, "before": 2, "frames": 15}),
    (1, {"before": 0}),
    (2, {"stride": 2, "before": 0, "frames": 18}),
    (2, {"stride": 2, "before": 0, "frames": 19}),
    (2, {"stride": 2, "before": 0, "frames": 18, "own": 20}),
    (3, {"own": 20}),
    (5, {"own": 1, "slope": 0.0}),
]


def seen(x, taps, stride=1, before=None, frames=None, own=None, slope=1.0):
    """Frame by frame, tap by tap."""
    before = taps // 2 if before is None else before
    B, L, C = x.shape
    y = np.zeros((B, frames or L, taps, C), np.float32)
    for frame in range(y.shape[1]):
        for tap in range(taps):
            position = frame * stride + tap - before
            if 0 <= position < (own or L):
                values = x[:, position]
                y[:, frame, tap] = np.where(values > 0, values, slope * values)
    return y.reshape(B, y.shape[1], -1)


def check(dtype, channels, taps, options):
    x = mx.random.normal((2, 37, channels)).astype(dtype)
    given = {**options}
    if "own" in given:
        given["own"] = OwnRows(mx.array([given["own"]]), 37)
    found = windows(x, taps, **given)
    assert found.dtype == dtype
    expected = seen(np.array(x.astype(mx.float32)), taps, **options)
    rows = windows(x.flatten(0, 1), taps, recordings=2, **given)
    assert mx.array_equal(rows, found.flatten(0, 1))
    found = np.array(found.astype(mx.float32))
    assert found.shape == expected.shape
    tolerance = 1e-6 if dtype == mx.float32 else 8e-3
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("channels", [1, 24])
@pytest.mark.parametrize(("taps", "options"), CASES)
def test_frames_see_their_taps(channels, taps, options):
    check(mx.float32, channels, taps, options)


@pytest.mark.gpu
@pytest.mark.skipif(not mx.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("channels", [1, 24])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize(("taps", "options"), CASES)
def test_the_kernel_gathers_the_same(dtype, channels, taps, options):
    check(dtype, channels, taps, options)
