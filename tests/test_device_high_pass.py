"""The high pass on CUDA against the whole recording's, by scipy."""

import mlx.core as mx
import numpy as np
import pytest
from cuda_on_processor import as_on_processor, needs_compiler, results
from scipy import signal

from rvc_mlx import device_high_pass as module
from rvc_mlx.audio import SETTLED, high_pass, high_pass_design
from rvc_mlx.device_high_pass import DeviceSpool, device_high_pass
from rvc_mlx.engine import choose_engine
from rvc_mlx.spool import Spool

on_cuda = pytest.mark.skipif(not mx.cuda.is_available(), reason="needs a CUDA GPU")


_MAIN = r"""
#define __device__
#define __forceinline__ inline
%s
void kernel(const float* x, const float* x_rest, float* y, float* y_rest, int length,
            float gain, float gain_rest) {
%s
}
int main(int, char**) {
    auto n = read_array<int>("numbers");
    auto x = read_array<float>("x"), rest = read_array<float>("rest");
    std::vector<float> y(2 * x.size(), NAN);
    body = [&] {
        kernel(x.data(), rest.data(), y.data(), y.data() + x.size(), n[1],
               __int_as_float(n[2]), __int_as_float(n[3]));
    };
    for (unsigned i = 0; i < (unsigned)n[0]; i++) {
        blockIdx = {i, 0, 0};
        run_block(THREADS, SHARED_MEMORY);
    }
    FILE* file = fopen("y", "wb");
    fwrite(y.data(), sizeof(float), y.size(), file);
    fclose(file);
}
"""


def on_processor(folder, kernel):
    """The kernel as ``CudaKernel`` is called; its source runs on the processor."""

    def launch(inputs, outputs, grid, *, scalars):
        for name, array in zip(("x", "rest"), inputs, strict=True):
            np.array(array).tofile(folder / name)
        length, *gains = scalars
        bits = np.array(gains, np.float32).view(np.int32)
        np.array([grid.blocks, length, *bits], np.int32).tofile(folder / "numbers")
        assert grid.threads == module._THREADS
        main = _MAIN % (kernel.header, as_on_processor(kernel.source))
        constants = {"SHARED_MEMORY": grid.shared_memory}
        [y, _] = results(folder, constants, main, mx.float32)
        return mx.split(y, 2)

    return launch


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


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 19, 5000, 2 * SETTLED + 77, 50_000])
def test_the_source_filters(tmp_path, rng, monkeypatch, n):
    launch = on_processor(tmp_path, module._kernel())
    monkeypatch.setattr(module, "_kernel", lambda: launch)
    x = recording(rng, n)
    assert worst(x, lambda s, gain: device_high_pass(s, gain=gain), 0.7) < 2e-7


def test_the_partial_fractions_are_the_filter():
    b, a, steady, _ = high_pass_design()
    impulse = np.zeros(3000)
    impulse[0] = 1
    numbers = (module._POLES, module._RESIDUES, module._STEADY)
    poles, residues, start = (
        np.array([v[0], complex(*v[1:3]), complex(*v[3:])]) for v in numbers
    )
    after = poles[:, None] ** np.arange(3000)
    found = (residues @ after).real + module._DIRECT[0] * impulse
    # Its usual form loses digits from sample to sample.
    expected = signal.lfilter(b, a, impulse)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-8)
    np.testing.assert_allclose(found[:5], expected[:5], rtol=1e-12)
    found = ((residues * poles * start) @ after).real
    expected = signal.lfilter(b, a, 0 * impulse, zi=steady)[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-7)
    np.testing.assert_allclose(found[:5], expected[:5], rtol=1e-12)


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
