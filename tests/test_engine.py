"""Choosing an engine, running seams, and the compiled models kept on disk."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
import test_fused_encoder
import test_fused_prior
import test_fused_unet

from rvc_mlx import engine as module
from rvc_mlx.audio import high_pass_spools
from rvc_mlx.compiling import Replayed
from rvc_mlx.engine import (
    MLXEngine,
    OpenVINOEngine,
    Seam,
    choose_engine,
    cpu_precisions,
    describe_device,
    fingerprint,
)
from rvc_mlx.models.contentvec import ContentVec
from rvc_mlx.models.nsf_hifigan import SineSource
from rvc_mlx.models.refinegan import MergedSource
from rvc_mlx.models.rmvpe import GRU
from rvc_mlx.steady import Rows

SHAPE = (1, 12, 6)


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv("MLX_ENABLE_TF32", "1")  # is put back after the test


def values(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class Counted:
    """A seam's ``build`` that counts how often weights are loaded, and in which type."""

    def __init__(self, factor=1.0):
        self.factor = factor
        self.dtypes = []

    def __call__(self, dtype):
        self.dtypes.append(dtype)
        weight = mx.array(values(6, 6, seed=1) * self.factor).astype(dtype)
        return [lambda x, g: mx.tanh(x @ weight) + g, lambda y: y.sum(axis=-1)]


def seam(build, identity="weights", lengths=(10, 11, 14), exact=False):
    def inputs(T):
        return [((1, T, 6), mx.float32), ((1, 1, 6), mx.float32)]

    return Seam("step", identity, build, inputs, lengths, exact)


INPUTS = (values(*SHAPE), values(1, 1, 6, seed=2))
EXPECTED = (np.tanh(INPUTS[0] @ values(6, 6, seed=1)) + INPUTS[1]).sum(axis=-1)


# Memory of a GPU ----------------------------------------------------------------------


@pytest.fixture
def limits(monkeypatch):
    """MLX on CUDA, as far as its limit of memory goes; the limits that were set."""
    seen = [1 << 40]

    def set_limit(limit):
        seen.append(limit)
        return seen[-2]

    monkeypatch.setattr(mx, "set_memory_limit", set_limit)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mx, "get_active_memory", lambda: 1000)
    monkeypatch.setattr(module, "_gpu_memory", lambda _: 16 << 30)
    return seen


def test_a_gpus_queue_is_bounded_while_a_step_is_queued(limits):
    run = MLXEngine(mx.Device(mx.cpu), "f32").bind(seam(Counted()))
    np.testing.assert_allclose(run(*INPUTS), EXPECTED, rtol=1e-5, atol=1e-5)
    assert limits == [1 << 40, 1000 + (16 << 30) // 3, 1 << 40]


def test_a_cpu_has_no_limit(limits, monkeypatch):
    monkeypatch.setattr(module, "_gpu_memory", lambda _: 0)
    run = MLXEngine(mx.Device(mx.cpu), "f32").bind(seam(Counted()))
    np.testing.assert_allclose(run(*INPUTS), EXPECTED, rtol=1e-5, atol=1e-5)
    assert limits == [1 << 40]


def test_the_limit_is_put_back_when_a_step_fails(limits):
    with pytest.raises(MemoryError), module._memory_limit(7):
        raise MemoryError
    assert limits == [1 << 40, 7, 1 << 40]


@pytest.mark.parametrize(
    ("memory", "batch"), [(0, 0), (16 << 30, 1 << 28), (1 << 37, 1 << 29)]
)
def test_a_batch_takes_a_share_of_the_memory_but_no_more_than_gains(
    monkeypatch, memory, batch
):
    monkeypatch.setattr(module, "_gpu_memory", lambda _: memory)
    assert MLXEngine(mx.Device(mx.cpu), "f32").batch_bytes == batch


def test_windows_are_long_where_no_length_is_planned(monkeypatch):
    monkeypatch.setattr(module.product_convs, "serves", lambda vocoder: vocoder == 1)
    engine = MLXEngine(mx.Device(mx.cpu), "f16")
    assert engine.windows(1) == engine.windows(2) == (3072, 256, False)
    engine = on_cuda(monkeypatch)
    assert engine.windows(1) == (4608, 8, True)
    assert engine.windows(2) == (3072, 256, False)
    engine._fast_products = False
    assert engine.windows(1) == (3072, 256, False)


def test_a_seam_beside_has_a_stream_of_its_own_in_each_thread(monkeypatch):
    engine = MLXEngine(mx.Device(mx.cpu), "f32")
    met = []

    def step(x):
        met.append(str(mx.default_stream(mx.default_device())))
        return x * 2

    def run(**options):
        seam = module.Seam(
            "double", "", lambda _: [step], lambda _: [], (1,), **options
        )
        return engine.bind(seam)(np.ones((1, 3), np.float32)).tolist()

    assert run() == run(beside=True) == [[2, 2, 2]]
    assert met[0] == met[1]  # the host has one
    engine._two_streams = True
    assert run() == run(beside=True) == [[2, 2, 2]]
    assert met[2] == met[0]
    assert met[3] != met[0]
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run, beside=True).result() == [[2, 2, 2]]
    assert len({met[0], met[3], met[4]}) == 3
    twice = engine.bind(
        module.Seam("double", "", lambda _: [step], lambda _: [], (1,), beside=True)
    )
    assert twice(twice.start(np.ones((1, 3), np.float32))).tolist() == [[4, 4, 4]]
    assert met[5] == met[6] == met[3]


# Graphs that are kept -----------------------------------------------------------------


def on_cuda(monkeypatch):
    """An engine as on CUDA, which computes on the CPU."""
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module, "_gpu_memory", lambda _: 0)
    engine = MLXEngine(mx.Device(mx.cpu), "f16")
    engine._device = mx.Device(mx.gpu)
    return engine


def test_graphs_of_a_network_are_kept_on_cuda(monkeypatch):
    engine = on_cuda(monkeypatch)
    assert isinstance(engine._joined([mx.abs]), Replayed)
    engine._fast_products = False
    assert not isinstance(engine._joined([mx.abs]), Replayed)


def test_a_recording_alone_meets_few_lengths_where_a_network_can(monkeypatch):
    engine = on_cuda(monkeypatch)
    encoder = ContentVec(test_fused_encoder.CONFIG)
    net, voice = test_fused_unet.network(), test_fused_prior.voice()
    steps = [partial(encoder, version="v2"), net.image_features, voice.prior]
    for step in steps:  # none is quickened
        assert isinstance(engine._joined([step]), Replayed)
    asked, rows = [], Rows(lambda x: x.shape[1], lambda arrays, n: arrays)
    for part, name in (
        (module.fused_encoder, "rows_of_features"),
        (module.fused_unet, "rows_of_salience"),
        (module.fused_prior, "rows_of_prior"),
    ):
        monkeypatch.setattr(part, name, lambda n: asked.append(n) or rows)
    for step in steps:
        assert engine._joined([step])._rows is rows
    assert asked == [encoder, net, voice]
    for step in (voice.dec, mx.abs):
        assert isinstance(engine._joined([step]), Replayed)
    monkeypatch.setattr(module.product_convs, "serves", lambda net: net is voice.dec)
    assert engine._joined([voice.dec])._rows is None  # its windows have few lengths
    assert isinstance(engine._joined([mx.abs]), Replayed)


def test_a_loop_over_frames_is_not_kept(monkeypatch):
    """Its graph is as deep as it has frames, and MLX descends by recursion."""
    step = on_cuda(monkeypatch)._joined([mx.abs, GRU(4, 3), mx.negative])
    assert not isinstance(step, Replayed)
    with mx.stream(mx.cpu):
        assert step(mx.ones((1, 5, 4))).shape == (1, 5, 6)


@pytest.mark.parametrize("source", [SineSource(9), MergedSource()])
def test_a_source_is_one_kernel_where_products_may_be_short(monkeypatch, source):
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    step = source.from_frames
    assert MLXEngine(mx.Device(mx.cpu), "f16")._prepared(step) == step
    engine = on_cuda(monkeypatch)
    made = []
    monkeypatch.setattr(
        module.fused_source, "from_frames", lambda *given: made.append(given)
    )
    engine._prepared(step)(1, 2, 3, 4)
    assert made == [(source, 1, 2, 3, 4)]
    assert engine._prepared(source.excitation) == source.excitation
    engine._fast_products = False
    assert engine._prepared(step) == step


def test_without_the_switch_graphs_are_built_anew(monkeypatch, caplog):
    def missing(function):
        raise RuntimeError("this MLX has no switch")

    monkeypatch.setattr(module, "Replayed", missing)
    caplog.set_level("INFO", "rvc_mlx")
    step = on_cuda(monkeypatch)._joined([mx.abs, mx.negative])
    with mx.stream(mx.cpu):
        assert step(mx.array([-2.0])).tolist() == [-2.0]
    assert "built anew at each call: this MLX has no switch" in caplog.text


# Choice -------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["", "cuda", "GPU", "npu"])
def test_unknown_device(device):
    with pytest.raises(ValueError, match="unknown; choose one of auto, gpu, cpu"):
        choose_engine(device)


@pytest.mark.parametrize("precision", ["", "fp16", "f64", "int8"])
def test_unknown_precision(precision):
    with pytest.raises(ValueError, match="unknown; choose one of auto, f32, bf16, f16"):
        choose_engine("cpu", precision)


def test_no_gpu_is_an_error_not_another_device(monkeypatch):
    monkeypatch.setattr(module, "gpu_available", lambda: False)
    with pytest.raises(
        ValueError, match=r"no GPU here; use --device cpu, or\s+install"
    ):
        choose_engine("gpu")


def test_auto_takes_the_cpu_without_a_gpu(monkeypatch):
    monkeypatch.setattr(module, "gpu_available", lambda: False)
    engine = choose_engine("auto", "f32")
    assert isinstance(engine, OpenVINOEngine)
    assert engine.device.startswith("CPU (")
    assert "OpenVINO" in engine.device


def test_auto_takes_the_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(module, "gpu_available", lambda: True)
    monkeypatch.setattr(module, "describe_device", lambda device: f"a {device.type}")
    engine = choose_engine("auto")
    assert isinstance(engine, MLXEngine)
    assert "gpu" in engine.device
    assert engine.precision == "f32"


def test_precision_that_the_cpu_lacks(monkeypatch):
    monkeypatch.setattr(module, "cpu_precisions", lambda: ["f32", "f16"])
    with pytest.raises(ValueError, match=r"'bf16' was asked for.*f32, f16 in hardware"):
        choose_engine("cpu", "bf16")
    assert choose_engine("cpu", "f16").precision == "f16"


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [(["f32"], "f32"), (["f32", "f16"], "f32"), (["f32", "f16", "bf16"], "bf16")],
)
def test_automatic_precision_of_the_cpu(monkeypatch, offered, chosen):
    monkeypatch.setattr(module, "cpu_precisions", lambda: offered)
    assert choose_engine("cpu").precision == chosen


def test_this_cpu_computes_float32():
    assert cpu_precisions()[0] == "f32"
    assert set(cpu_precisions()) <= {"f32", "f16", "bf16"}


def test_openvino_missing(monkeypatch):
    monkeypatch.setattr(module, "openvino_available", lambda: False)
    with pytest.raises(ValueError, match=r"pip install 'rvc-mlx\[cpu\]'"):
        choose_engine("cpu")
    assert isinstance(choose_engine("mlx-cpu"), MLXEngine)


def test_float32_switches_tf32_off():
    choose_engine("mlx-cpu", "auto")
    assert os.environ["MLX_ENABLE_TF32"] == "1"
    choose_engine("mlx-cpu", "f32")
    assert os.environ["MLX_ENABLE_TF32"] == "0"


def test_devices_are_described():
    assert describe_device(mx.Device(mx.cpu)).startswith("CPU (")
    assert choose_engine("mlx-cpu").device.endswith("MLX)")


# High pass ----------------------------------------------------------------------------


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("device", [mx.cpu, mx.gpu])
def test_only_cuda_filters_on_the_device(monkeypatch, device, cuda):
    monkeypatch.setattr(mx.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(module, "describe_device", lambda device: f"a {device.type}")
    monkeypatch.setattr(module, "_gpu_memory", lambda _: 0)
    engine = MLXEngine(mx.Device(device), "f32")
    on_device = cuda and device == mx.gpu
    assert engine.high_pass == (engine._high_pass if on_device else high_pass_spools)
    assert OpenVINOEngine.high_pass is high_pass_spools


def test_recordings_are_filtered_on_one_thread_aside(monkeypatch):
    """Each thread has a stream of its own: this one waits for no network."""
    calls = []

    def filtered(sources, gains):
        calls.append((sources, gains, threading.current_thread()))
        if gains == [2]:
            raise ValueError("the recording is empty")
        return sources

    monkeypatch.setattr(module, "device_high_pass", filtered)
    engine = MLXEngine(mx.Device(mx.cpu), "f32")
    assert [engine._high_pass([n], [0.5]) for n in (1, 2)] == [[1], [2]]
    with pytest.raises(ValueError, match="empty"):
        engine._high_pass([3], [2])
    assert [call[:2] for call in calls] == [([1], [0.5]), ([2], [0.5]), ([3], [2])]
    [thread] = {call[2] for call in calls}
    assert thread is not threading.current_thread()


# Running ------------------------------------------------------------------------------


@pytest.fixture(params=["cpu", "mlx-cpu"])
def engine(request):
    return choose_engine(request.param, "f32")


@pytest.mark.parametrize("lengths", [(12,), (10, 11, 14)])
def test_a_seam_runs(engine, lengths):
    run = engine.bind(seam(Counted(), lengths=lengths))
    result = run(*INPUTS)
    assert result.dtype == np.float32
    assert result.shape == EXPECTED.shape
    assert np.abs(result - EXPECTED).max() < 1e-5


def test_lengths_may_vary_from_call_to_call(engine):
    run = engine.bind(seam(Counted()))
    for T in (12, 40, 7, 12):
        x = values(1, T, 6)
        expected = (np.tanh(x @ values(6, 6, seed=1)) + INPUTS[1]).sum(axis=-1)
        assert np.abs(run(x, INPUTS[1]) - expected).max() < 1e-5


def test_weights_are_loaded_once_at_the_first_call(engine):
    build = Counted()
    run = engine.bind(seam(build))
    assert build.dtypes == []
    run(*INPUTS)
    run(*INPUTS)
    assert build.dtypes == [mx.float32]


def test_results_are_kept(engine):
    run = engine.bind(seam(Counted()))
    first = run(*INPUTS)
    kept = first.copy()
    run(-INPUTS[0], INPUTS[1])
    np.testing.assert_array_equal(first, kept)


def test_views_are_read_as_they_are(engine):
    run = engine.bind(seam(Counted()))
    turned = np.asfortranarray(INPUTS[0][0])[None]
    strided = np.repeat(INPUTS[0], 2, axis=1)[:, ::2]
    for x in (turned, strided):
        assert np.abs(run(x, INPUTS[1]) - EXPECTED).max() < 1e-5


def test_integers_stay_integers(engine):
    table = values(300, 4)

    def inputs(T):
        return [((1, T), mx.int32)]

    run = engine.bind(
        Seam(
            "look", "table", lambda d: [lambda i: mx.array(table)[i]], inputs, (3, 4, 6)
        )
    )
    index = np.array([[0, 255, 299, 7]], np.int32)
    np.testing.assert_allclose(run(index), table[index], rtol=1e-6)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("f16", mx.float16), ("bf16", mx.bfloat16)]
)
def test_mlx_computes_in_the_precision_asked_for(precision, dtype):
    engine = choose_engine("mlx-cpu", precision)
    build = Counted()
    result = engine.bind(seam(build))(*INPUTS)
    assert build.dtypes == [dtype]
    assert result.dtype == np.float32
    assert 1e-6 < np.abs(result - EXPECTED).max() < 0.1


@pytest.mark.parametrize("precision", ["f16", "bf16"])
def test_exact_seams_stay_float32(precision, monkeypatch):
    build = Counted()
    run = choose_engine("mlx-cpu", precision).bind(seam(build, exact=True))
    assert np.abs(run(*INPUTS) - EXPECTED).max() < 1e-5
    assert build.dtypes == [mx.float32]
    monkeypatch.setattr(module, "cpu_precisions", lambda: ["f32", precision])
    engine = choose_engine("cpu", precision)
    hints = [
        engine._options(seam(build, exact=exact))["INFERENCE_PRECISION_HINT"]
        for exact in (True, False)
    ]
    assert hints == ["f32", precision]


@pytest.mark.parametrize(("variable", "threads"), [("1", 1), ("2", 2), ("1,2", 1)])
def test_threads_are_those_of_openmp(monkeypatch, variable, threads, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    for _ in range(2):  # compiled, then read back
        engine = choose_engine("cpu", "f32", tmp_path)
        same = seam(Counted())
        path = engine._cache_path(same)
        compiled = engine._read_back(path, engine._options(same))
        compiled = compiled or engine._compile(same, path)
        assert compiled.get_property("INFERENCE_NUM_THREADS") == threads
        assert compiled.get_property("NUM_STREAMS") == 1


def test_without_openmp_openvino_chooses_the_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    engine = choose_engine("cpu", "f32")
    assert "INFERENCE_NUM_THREADS" not in engine._options(seam(Counted()))


# Compiled models on disk --------------------------------------------------------------


def blobs(folder):
    return sorted(folder.glob("*"))


def run_once(cache, build, **options):
    return choose_engine("cpu", "f32", cache).bind(seam(build, **options))(*INPUTS)


def test_a_second_engine_reads_the_compiled_model(tmp_path):
    cache = tmp_path / "not" / "there"
    first, second = Counted(), Counted()
    result = run_once(cache, first)
    assert len(blobs(cache)) == 1
    again = run_once(cache, second)
    assert (len(first.dtypes), len(second.dtypes)) == (1, 0)
    np.testing.assert_array_equal(again, result)
    assert len(blobs(cache)) == 1


SECOND_PROCESS = """
import sys
from pathlib import Path
import mlx.core as mx
import numpy as np
from rvc_mlx.engine import Seam, choose_engine

def build(dtype):
    raise AssertionError("the compiled model is on disk")

def inputs(T):
    return [((1, T, 6), mx.float32), ((1, 1, 6), mx.float32)]

folder = Path(sys.argv[1])
seam = Seam("step", "weights", build, inputs, (10, 11, 14))
run = choose_engine("cpu", "f32", folder / "cache").bind(seam)
arrays = np.load(folder / "inputs.npz")
np.save(folder / "result.npy", run(arrays["x"], arrays["g"]))
"""


def test_another_process_reads_the_compiled_model(tmp_path):
    result = run_once(tmp_path / "cache", Counted())
    np.savez(tmp_path / "inputs.npz", x=INPUTS[0], g=INPUTS[1])
    subprocess.run([sys.executable, "-c", SECOND_PROCESS, str(tmp_path)], check=True)
    np.testing.assert_array_equal(np.load(tmp_path / "result.npy"), result)


def test_nothing_is_kept_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_once(None, Counted())
    assert blobs(tmp_path) == []


def test_other_weights_are_compiled_anew(tmp_path):
    first = run_once(tmp_path, Counted(), identity="one")
    build = Counted(factor=2.0)
    second = run_once(tmp_path, build, identity="two")
    assert len(build.dtypes) == 1
    assert len(blobs(tmp_path)) == 2
    assert np.abs(second - first).max() > 0.1


@pytest.mark.parametrize("change", ["lengths", "threads", "code", "openvino", "exact"])
def test_whatever_changes_the_model_compiles_anew(tmp_path, monkeypatch, change):
    run_once(tmp_path, Counted())
    options = {}
    if change == "lengths":
        options["lengths"] = (12,)
    elif change == "exact":  # the same in float32, and so the same model
        options["exact"] = True
    elif change == "threads":
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
    elif change == "code":
        monkeypatch.setattr(module, "_source_hash", lambda: "another")
    else:
        version = module.importlib.metadata.version
        monkeypatch.setattr(
            module.importlib.metadata,
            "version",
            lambda name: "9.9" if name == "openvino" else version(name),
        )
    build = Counted()
    run_once(tmp_path, build, **options)
    assert len(build.dtypes) == (change != "exact")


def test_the_code_that_translates_is_part_of_the_name():
    digest = module._source_hash()
    assert len(digest) == 64
    assert module._source_hash.__wrapped__() == digest


def aged(path, seconds):
    status = path.stat()
    os.utime(path, (status.st_atime - seconds, status.st_mtime - seconds))


def test_the_oldest_models_go_when_the_folder_is_full(tmp_path, monkeypatch):
    run_once(tmp_path, Counted(), identity="a")
    [a] = blobs(tmp_path)
    monkeypatch.setattr(module, "_CACHE_LIMIT", int(2.5 * a.stat().st_size))
    aged(a, 200)
    run_once(tmp_path, Counted(), identity="b")
    [b] = set(blobs(tmp_path)) - {a}
    aged(b, 100)
    run_once(tmp_path, Counted(), identity="a")  # read: now the newest
    run_once(tmp_path, Counted(), identity="c")
    left = blobs(tmp_path)
    assert len(left) == 2
    assert a in left
    assert b not in left


def test_other_files_are_never_deleted(tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.setattr(module, "_CACHE_LIMIT", 0)
    run_once(tmp_path, Counted())
    assert [path.name for path in blobs(tmp_path)] == ["notes.txt"]


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(self, data):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        run_once(tmp_path, Counted())
    assert blobs(tmp_path) == []


# Identity of weights ------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "voice.pth"
    path.write_bytes(bytes(300_000))
    return path


def test_fingerprint_is_stable(weights):
    assert fingerprint(weights, "v1", 3) == fingerprint(weights, "v1", 3)


def test_settings_change_the_fingerprint(weights):
    prints = {fingerprint(weights, *s) for s in ((), ("v1",), ("v2",), ("v1", 3))}
    assert len(prints) == 4


@pytest.mark.parametrize("place", [0, 65_535, 300_000 - 65_536, 299_999])
def test_content_changes_the_fingerprint(weights, place):
    before, times = fingerprint(weights), weights.stat()
    data = bytearray(weights.read_bytes())
    data[place] = 1
    weights.write_bytes(data)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fingerprint(weights) != before


def test_time_and_size_change_the_fingerprint(weights):
    before = fingerprint(weights)
    aged(weights, 5)
    older = fingerprint(weights)
    weights.write_bytes(bytes(300_001))
    assert len({before, older, fingerprint(weights)}) == 3


def test_small_files_have_fingerprints(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    (tmp_path / "b").write_bytes(b"x")
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")


def test_a_missing_file_has_none(tmp_path):
    with pytest.raises(FileNotFoundError):
        fingerprint(tmp_path / "voice.pth")
