"""The high pass on CUDA against the whole recording's, by scipy."""

import mlx.core as mx
import numpy as np
import pytest
from scipy import signal

from rvc_mlx import device_high_pass as module
from rvc_mlx.audio import SETTLED, high_pass, high_pass_design
from rvc_mlx.device_high_pass import DeviceSpool, device_high_pass
from rvc_mlx.engine import choose_engine
from rvc_mlx.spool import Spool

on_cuda = pytest.mark.skipif(not mx.cuda.is_available(), reason="needs a CUDA GPU")


def recording(rng, n, offset=0.3):
    return (0.1 * rng.standard_normal(n) + offset).astype(np.float32)


def worst(x, filtered, gain):
    """Largest difference from scipy, in units of the recording's peak."""
    with Spool.around(x) as source, filtered(source, gain) as got:
        assert (len(got), got.dtype) == (len(x), np.float32)
        found = got.read(0, len(x))
        expected = high_pass(x * np.float64(gain))
        return np.abs(found - expected).max() / np.abs(gain * x).max()


def plain(x, rest, length, gain=1.0):
    """What a launch gives, by scipy; beyond ``length`` that is no number."""
    assert x.dtype == rest.dtype == mx.float32
    assert x.shape == rest.shape
    # The last run ends in the arrays, and so does what it reads ahead.
    assert len(x) == -(-length // module._RUN) * module._RUN + module._BATCH
    b, a, steady, _ = high_pass_design()
    both = (np.array(x, np.float64) + np.array(rest, np.float64))[:length]
    y = gain * signal.lfilter(b, a, both, zi=steady * both[0])[0][::-1]
    y = np.pad(y, (0, len(x) - length), constant_values=np.nan)
    return mx.array(y.astype(np.float32)), mx.array(y - y.astype(np.float32))


@pytest.mark.parametrize("n", [1, 2, 5, 17, 18, 19, 100, SETTLED - 1, SETTLED, 20000])
@pytest.mark.parametrize("block", [997, SETTLED, 1 << 22])
def test_blocks_and_extended_ends_make_up_the_recording(rng, monkeypatch, n, block):
    monkeypatch.setattr(module, "_filtered", plain)
    x = recording(rng, n)
    # Rounded to float32, after what rounding grows to in a filter of this form.
    assert worst(x, lambda s, gain: device_high_pass(s, block, gain=gain), 0.7) < 1e-7


def test_extended_ends_are_exact_in_two_arrays(rng):
    x = recording(rng, 1000)
    with Spool.around(x) as source:
        found, rest = (
            np.array(a, np.float64) for a in module._operands(source, -18, 1018)
        )
    expected = np.pad(x.astype(np.float64), 18, "reflect", reflect_type="odd")
    assert np.abs(expected - found[:1036]).max() > 1e-9
    np.testing.assert_allclose((found + rest)[:1036], expected, rtol=1e-14)
    assert not rest[18:1018].any()


def test_a_long_result_is_kept_as_the_source_is(rng, monkeypatch):
    monkeypatch.setattr(module, "_filtered", plain)
    with Spool(memory=0) as source:
        source.append(recording(rng, 100))
        with device_high_pass(source, 60) as got:
            assert got._file
        with device_high_pass(source, 100) as got:
            assert isinstance(got, DeviceSpool)


@pytest.mark.parametrize(
    ("start", "stop"),
    [(0, 50), (3, 40), (-20, 50), (7, 60), (-30, 95), (-49, 99), (-60, 10), (48, 130)],
)
def test_a_recording_on_the_device_is_read_there_as_on_the_host(rng, start, stop):
    x = recording(rng, 50)
    with Spool.around(x) as host, DeviceSpool(mx.array(x)) as device:
        found = device.part(start, stop)
        assert isinstance(found, mx.array)
        np.testing.assert_array_equal(found, host.part(start, stop))
        np.testing.assert_array_equal(device.read_reflected(start, stop), found)
        assert [len(block) for block in device.blocks(20)] == [20, 20, 10]


def test_the_host_fetches_a_recording_when_it_reads(rng, monkeypatch):
    fetched = []
    monkeypatch.setattr(module, "to_host", lambda a: fetched.append(a) or np.array(a))
    x = recording(rng, 50)
    with DeviceSpool(mx.array(x)) as spool:
        assert len(spool) == 50
        assert isinstance(spool.part(-10, 40), mx.array)
        assert not fetched
        np.testing.assert_array_equal(spool.read(3, 40), x[3:40])
        np.testing.assert_array_equal(spool.take(), x)
        assert len(fetched) == 1


def test_nothing_is_refused():
    with Spool() as source, pytest.raises(ValueError, match="recording is empty"):
        device_high_pass(source)


@pytest.mark.skipif(mx.cuda.is_available(), reason="has a CUDA GPU")
def test_without_a_gpu_it_does_not_go_elsewhere(rng):
    with (
        Spool.around(recording(rng, 100)) as source,
        pytest.raises(RuntimeError, match="no CUDA GPU"),
    ):
        device_high_pass(source)


@pytest.mark.gpu
@on_cuda
@pytest.mark.parametrize(
    "n",
    [
        *(1, 5, 17, 18, 19, 100, SETTLED - 1, SETTLED, SETTLED + 1),
        *(20000, 480_000, 1_000_000),
    ],
)
@pytest.mark.parametrize("block", [1 << 17, 1 << 22])
def test_the_kernel_equals_filtfilt(rng, n, block):
    x = recording(rng, n)
    # As above; scipy's own blocks differ as much.
    assert worst(x, lambda s, gain: device_high_pass(s, block, gain=gain), 0.7) < 2e-7


@pytest.mark.gpu
@on_cuda
@pytest.mark.parametrize("precision", ["auto", "f32"])
def test_an_engine_filters_on_the_gpu_beside_its_networks(rng, monkeypatch, precision):
    monkeypatch.setenv("MLX_ENABLE_TF32", "1")  # is put back after the test
    engine = choose_engine("gpu", precision)
    queued = mx.random.normal((512, 512)) @ mx.random.normal((512, 512))
    mx.async_eval(queued)
    for n in (1, 30000, 100_000):
        x = recording(rng, n)
        assert worst(x, lambda s, gain: engine.high_pass(s, gain=gain), 0.5) < 2e-7
