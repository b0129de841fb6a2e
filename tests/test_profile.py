"""What the GPU profile counts and how it names kernels; the GPU itself is not needed."""

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import profile_gpu  # noqa: E402
import stages  # noqa: E402
from profile_gpu import Recorded, count_work, family, profile_stage  # noqa: E402
from torch_side import Place  # noqa: E402
from twins import Sides  # noqa: E402

from rvc_mlx.engine import MLXEngine, gpu_available  # noqa: E402
from rvc_mlx.loading import PitchNet, read_weights  # noqa: E402
from rvc_mlx.models.rmvpe import GRU  # noqa: E402


@pytest.mark.parametrize(
    ("layer", "length", "flops"),
    [
        (nn.Conv1d(4, 6, 3, padding=1), 10, 2 * 10 * 6 * 3 * 4),
        (nn.Conv1d(4, 6, 3, padding=1, groups=2), 10, 2 * 10 * 6 * 3 * 2),
        (nn.Conv1d(4, 6, 4, stride=2), 10, 2 * 4 * 6 * 4 * 4),
        # Every input meets every tap once, but for what is cut off at the ends.
        (nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1), 10, 2 * 10 * 4 * 4 * 6),
        (nn.Linear(4, 6), 10, 2 * 10 * 4 * 6),
        (GRU(4, 5), 10, 2 * 10 * 2 * 3 * 5 * (4 + 5)),
    ],
)
def test_products_are_counted(layer, length, flops):
    x = mx.zeros((1, length, 4))
    mx.eval(layer.parameters())
    assert count_work([layer], [x]).flops == flops


def test_traffic_of_a_product_is_its_arrays_once():
    layer = nn.Linear(4, 6, bias=False)
    mx.eval(layer.parameters())
    assert count_work([layer], [mx.zeros((1, 10, 4))]).values == 40 + 24 + 60


def test_attention_is_two_products():
    def attend(x):
        return mx.fast.scaled_dot_product_attention(x, x, x, scale=1.0)

    work = count_work([attend], [mx.zeros((1, 2, 10, 8))])
    assert work.flops == 2 * (2 * 2 * 10 * 10 * 8)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sm90_xmma_fprop_implicit_gemm_tf32f32_nhwc", "convolution"),
        ("cutlass_80_tensorop_s1688gemm_128x128", "matrix product"),
        ("mlx::core::cu::binary_vv<Add, float, unsigned int, 4>", "element-wise"),
        ("mlx::core::cu::col_reduce_looped<float>", "reduction"),
        ("custom_kernel_rvc_gru_forward", "own GRU"),
        ("void fused_conv::conv_128_tf32", "own convolution"),
        ("residual_step_9a6b22324b18b9a5", "own convolution"),
        ("image_conv_df88f7662eb76232", "own convolution"),
        ("waveform_da2cc087b8857492", "own convolution"),
        ("harmonic_source_49c79335b36a66df", "element-wise"),
        ("high_pass_576bc4ea9676f95c", "element-wise"),
        ("strongest_bins_9b15abe109689d14", "reduction"),
        ("windows_da2cc087b8857492", "copy"),
        ("gelu_49c79335b36a66df", "element-wise"),
        ("mlx::core::cu::copy_gg_dynamic", "copy"),
        ("mystery", "other"),
    ],
)
def test_families(name, expected):
    assert family(name) == expected


def test_a_stage_is_profiled_on_what_it_was_given(small_models, monkeypatch):
    engine = profile_gpu.RecordingEngine(MLXEngine(mx.Device(mx.cpu), "f32"))
    net = PitchNet(read_weights(small_models.rmvpe, "rmvpe"), engine)
    mel = np.zeros((1, 64, net.config.n_mels), np.float32)
    net.salience(mel)
    [stage] = [one for one in engine.recorded if one.given]
    assert isinstance(stage, Recorded)
    assert stage.calls == 1
    monkeypatch.setattr(profile_gpu, "kernel_times", lambda *_: {"a_gemm": (2.0, 3.0)})
    roof = {"flops": 1e12, "bytes": 1e12}
    row = profile_stage(stage, mx.float32, roof, 1)
    assert row["shapes"] == [[1, 64, net.config.n_mels]]
    assert row["families_ms"] == {"matrix product": 2.0}
    assert row["launches"] == 3
    assert row["flops"] > 1e6
    assert row["flops_of_roof"] == pytest.approx(row["flops"] / row["seconds"] / 1e12)
    table = profile_gpu._report([row], 1.0, roof)
    assert "matrix product" in table


def test_calls_are_those_of_one_conversion(small_models, monkeypatch, capsys):
    def convert(ours, clip, _):
        return stages.convert_ours(ours, clip, pad=0.25)

    def median_time(call, runs):
        call()
        return 0.5

    saved = {}
    roof = {"flops": 1e12, "bytes": 1e12}
    for name, stand_in in {
        "convert_ours": convert,
        "median_time": median_time,
        "kernel_times": lambda *_: {"gemm": (1.0, 4.0)},
        "measure_roof": lambda _: roof,
        "save": lambda *_, **content: saved.update(content),
    }.items():
        monkeypatch.setattr(profile_gpu, name, stand_in)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    engine = MLXEngine(mx.Device(mx.cpu), "f32")
    engine.window_frames = engine.window_step = 16
    sides = Sides(engine, "cuda", "f32", Place(torch.device("cpu"), "f32"))
    asked = Namespace(models=small_models.folder, seconds=0.3, audio=None, runs=7)
    assert profile_gpu.measure(asked, sides) == 0
    calls = {row["stage"]: row["calls"] for row in saved["rows"]}
    # 31 frames of output are two windows of 16.
    assert calls == {"encode": 1, "salience": 1, "prior": 1, "source": 2, "vocoder": 2}
    assert "its networks alone 3500.0 ms" in capsys.readouterr().out


def test_kernels_are_counted_per_call(monkeypatch):
    calls = []
    events = [
        ("gemm", torch.autograd.DeviceType.CUDA, 30.0),
        ("gemm", torch.autograd.DeviceType.CUDA, 50.0),
        ("copy", torch.autograd.DeviceType.CUDA, 5.0),
        ("cudaLaunchKernel", torch.autograd.DeviceType.CPU, 9.0),
    ]

    class Profiled:
        """As of PyTorch's profiler: every call leaves the same events."""

        def __init__(self, activities):
            assert activities == [torch.profiler.ProfilerActivity.CUDA]

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def events(self):
            names = ("name", "device_type", "device_time")
            kept = [Namespace(**dict(zip(names, e, strict=True))) for e in events]
            return kept * len(calls)

    monkeypatch.setattr(torch.profiler, "profile", Profiled)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    found = profile_gpu.kernel_times(lambda: calls.append(1), 10)
    assert found == {
        "gemm": pytest.approx((0.08, 2)),
        "copy": pytest.approx((0.005, 1)),
    }


@pytest.mark.skipif(gpu_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_profile_says_so():
    run = subprocess.run(
        [sys.executable, BENCHMARKS / "profile_gpu.py", "--precision", "f32"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert "needs an NVIDIA GPU" in run.stderr
