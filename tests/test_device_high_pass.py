"""The high pass on CUDA against the whole recording's, by scipy."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from cuda_on_processor import as_on_processor, needs_compiler, results
from scipy import signal

from rvc_mlx import device_high_pass as module
from rvc_mlx.arrays import reflected_together
from rvc_mlx.audio import SETTLED, high_pass, high_pass_design
from rvc_mlx.device_high_pass import DeviceSpool, device_high_pass
from rvc_mlx.engine import choose_engine
from rvc_mlx.spool import Spool

on_cuda = pytest.mark.skipif(not mx.cuda.is_available(), reason="needs a CUDA GPU")


_MAIN = r"""
#define __device__
#define __forceinline__ inline
%s
void kernel(const float* x, const float* x_rest, const int* pieces, float* y,
            float* y_rest) {
%s
}
int main(int, char**) {
    auto n = read_array<int>("numbers"), pieces = read_array<int>("pieces");
    auto x = read_array<float>("x"), rest = read_array<float>("rest");
    std::vector<float> y(2 * x.size(), NAN);
    body = [&] {
        kernel(x.data(), rest.data(), pieces.data(), y.data(), y.data() + x.size());
    };
    for (unsigned piece = 0; piece < (unsigned)n[1]; piece++)
        for (unsigned i = 0; i < (unsigned)n[0]; i++) {
            blockIdx = {i, piece, 0};
            run_block(THREADS, SHARED_MEMORY);
        }
    FILE* file = fopen("y", "wb");
    fwrite(y.data(), sizeof(float), y.size(), file);
    fclose(file);
}
"""


def on_processor(folder, kernel):
    """The kernel as ``CudaKernel`` is called; its source runs on the processor."""

    def launch(inputs, outputs, grid, *, constants):
        for name, array in zip(("x", "rest", "pieces"), inputs, strict=True):
            np.array(array).tofile(folder / name)
        np.array([grid.blocks, grid.rows], np.int32).tofile(folder / "numbers")
        assert grid.threads == module._THREADS
        main = _MAIN % (kernel.header, as_on_processor(kernel.source))
        sizes = constants | {"SHARED_MEMORY": grid.shared_memory}
        [y, _] = results(folder, sizes, main, mx.float32)
        return mx.split(y, 2)

    return launch


def recording(rng, n, offset=0.3):
    return (0.1 * rng.standard_normal(n) + offset).astype(np.float32)


def worst(recordings, filtered, gains):
    """Largest difference from scipy, in units of a recording's peak."""
    with ExitStack() as stack:
        sources = [stack.enter_context(Spool.around(x)) for x in recordings]
        results = [stack.enter_context(got) for got in filtered(sources, gains)]
        differences = []
        for x, got, gain in zip(recordings, results, gains, strict=True):
            assert (len(got), got.dtype) == (len(x), np.float32)
            found = got.read(0, len(x))
            expected = high_pass(x * np.float64(gain))
            difference = np.abs(found - expected).max() / np.abs(gain * x).max()
            differences.append(difference)
        return max(differences)


def plain(inputs, outputs, grid, *, constants):
    """What a launch gives, by scipy; in a piece's room that is no number."""
    x, rest, pieces = map(np.array, inputs)
    assert x.dtype == rest.dtype == np.float32
    assert grid.rows == len(pieces)
    b, a, steady, _ = high_pass_design()
    y = np.full(len(x), np.nan)
    for i, (start, length, front, back, *bits) in enumerate(pieces):
        # The last run ends in the piece's room, and so does what it reads ahead.
        end = [*pieces[:, 0], len(x)][i + 1]
        assert end == start + -(-length // module._RUN) * module._RUN + module._BATCH
        assert grid.blocks * module._RESULTS >= length
        # Before and behind these lies whatever was in memory.
        inside = slice(start + front, start + length - back)
        both = x[inside].astype(np.float64)
        if constants["RECORDING"]:
            both = np.pad(both, (front, back), "reflect", reflect_type="odd")
        else:
            assert front == back == 0
            both += rest[inside]
        gain = np.array(bits, np.int32).view(np.float32).astype(np.float64).sum()
        made = gain * signal.lfilter(b, a, both, zi=steady * both[0])[0][::-1]
        y[start : start + length] = made
    return mx.array(y.astype(np.float32)), mx.array(y - y.astype(np.float32))


@pytest.fixture
def by_scipy(monkeypatch):
    """Launches are made by scipy."""
    monkeypatch.setattr(module, "_kernel", lambda: plain)


@pytest.mark.parametrize("n", [1, 2, 5, 17, 18, 19, 100, SETTLED - 1, SETTLED, 20000])
@pytest.mark.parametrize("block", [997, SETTLED, 1 << 22])
def test_blocks_and_extended_ends_make_up_the_recording(rng, by_scipy, n, block):
    # Rounded to float32, after what rounding grows to in a filter of this form.
    found = worst([recording(rng, n)], partial(device_high_pass, block=block), [0.7])
    assert found < 1e-7


def test_recordings_go_together_each_as_alone(rng, by_scipy):
    recordings = [recording(rng, n) for n in (3000, 1, 900, 40, 5000)]
    gains = [0.7, 1.0, 0.3, 0.9, 0.5]
    assert worst(recordings, partial(device_high_pass, block=2000), gains) < 1e-7
    with ExitStack() as stack:
        sources = [stack.enter_context(Spool.around(x)) for x in recordings]
        for source, gain, got in zip(
            sources, gains, device_high_pass(sources, gains, 2000), strict=True
        ):
            [alone] = device_high_pass([source], [gain], 2000)
            n = len(source)
            np.testing.assert_array_equal(got.read(0, n), alone.read(0, n))
            assert isinstance(got, DeviceSpool) == (n <= 2000)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 19, 5000, 2 * SETTLED + 77, 50_000])
def test_the_source_filters(tmp_path, rng, monkeypatch, n):
    launch = on_processor(tmp_path, module._kernel())
    monkeypatch.setattr(module, "_kernel", lambda: launch)
    recordings = [recording(rng, n), recording(rng, 3000)]
    assert worst(recordings, device_high_pass, [0.7, 0.9]) < 2e-7


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


def test_another_thread_than_the_one_that_filtered_reads(rng, by_scipy):
    recordings = [recording(rng, n) for n in (3000, 40)]

    def filtered():
        with ExitStack() as stack, mx.stream(mx.new_stream(mx.cpu)):
            sources = [stack.enter_context(Spool.around(x)) for x in recordings]
            return device_high_pass(sources, [1.0, 0.5])

    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(filtered).result()
    for x, gain, spool in zip(recordings, [1.0, 0.5], found, strict=True):
        expected = high_pass(x * gain)
        np.testing.assert_allclose(spool.read(0, len(x)), expected, atol=1e-7)


def test_a_recording_is_closed_without_the_device(rng, monkeypatch):
    spool = DeviceSpool(mx.array(recording(rng, 50)))
    monkeypatch.setattr(module, "mx", None)
    spool.close()
    assert len(spool._samples) == 0


def test_only_so_much_is_filtered_together(rng, monkeypatch):
    made = []

    def launch(inputs, outputs, grid, *, constants):
        made.append(grid.rows)
        return plain(inputs, outputs, grid, constants=constants)

    monkeypatch.setattr(module, "_kernel", lambda: launch)
    recordings = [recording(rng, 900) for _ in range(5)]
    filtered = partial(device_high_pass, block=2000)
    assert worst(recordings, filtered, 5 * [1.0]) < 1e-7
    assert made == [2, 2, 2, 2, 1, 1]  # forwards and backwards


def test_a_long_result_is_kept_as_the_source_is(rng, by_scipy):
    with Spool(memory=0) as source:
        source.append(recording(rng, 100))
        [long], [short] = (device_high_pass([source], [1.0], n) for n in (60, 100))
        with long, short:
            assert long._file
            assert isinstance(short, DeviceSpool)


@pytest.mark.parametrize(
    ("start", "stop"),
    [(0, 50), (3, 40), (-20, 50), (7, 60), (-30, 95), (-49, 99), (-60, 10), (48, 130)],
)
def test_a_recording_on_the_device_is_read_there_as_on_the_host(rng, start, stop):
    x = recording(rng, 50)
    with Spool.around(x) as host, DeviceSpool(mx.array(x)) as device:
        excerpt = device.excerpt(start, stop)
        assert isinstance(excerpt.samples, mx.array)
        [found] = reflected_together([excerpt])
        np.testing.assert_array_equal(found, host.excerpt(start, stop).samples)
        np.testing.assert_array_equal(device.read_reflected(start, stop), found)
        assert [len(block) for block in device.blocks(20)] == [20, 20, 10]


def test_the_host_fetches_a_recording_when_it_reads(rng, monkeypatch):
    fetched = []
    monkeypatch.setattr(module, "to_host", lambda a: fetched.append(a) or np.array(a))
    x = recording(rng, 50)
    with DeviceSpool(mx.array(x)) as spool:
        assert len(spool) == 50
        assert isinstance(spool.excerpt(-10, 40).samples, mx.array)
        assert not fetched
        np.testing.assert_array_equal(spool.read(3, 40), x[3:40])
        np.testing.assert_array_equal(spool.take(), x)
        assert len(fetched) == 1


def test_nothing_is_refused():
    with Spool() as source, pytest.raises(ValueError, match="recording is empty"):
        device_high_pass([source], [1.0])


@pytest.mark.skipif(mx.cuda.is_available(), reason="has a CUDA GPU")
def test_without_a_gpu_it_does_not_go_elsewhere(rng):
    with (
        Spool.around(recording(rng, 100)) as source,
        pytest.raises(RuntimeError, match="no CUDA GPU"),
    ):
        device_high_pass([source], [1.0])


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
    recordings = [recording(rng, m) for m in (n, 30000, n)]
    filtered = partial(device_high_pass, block=block)
    # Of a few samples most is the steady state, of which scipy's own is 1e-7 off.
    assert worst(recordings, filtered, [0.7, 1.0, 0.4]) < (2e-7 if n > 100 else 4e-7)


@pytest.mark.gpu
@on_cuda
@pytest.mark.parametrize("precision", ["auto", "f32"])
def test_an_engine_filters_on_the_gpu_beside_its_networks(rng, monkeypatch, precision):
    monkeypatch.setenv("MLX_ENABLE_TF32", "1")  # is put back after the test
    engine = choose_engine("gpu", precision)
    queued = mx.random.normal((512, 512)) @ mx.random.normal((512, 512))
    mx.async_eval(queued)
    for n in (1, 30000, 100_000):
        assert worst([recording(rng, n)], engine.high_pass, [0.5]) < 2e-7
