"""Measuring: timed calls, peak memory, and the benchmark of a conversion."""

import json

import pytest

from rvc_mlx import bench
from rvc_mlx.cli import main


def test_calls_are_timed_in_turns():
    order = []
    timings = bench.time_calls(
        [lambda: order.append("a"), lambda: order.append("b")], runs=2, warmup=1
    )
    assert order == ["a", "b"] * 3
    assert [len(timing.samples) for timing in timings] == [2, 2]
    assert all(sample >= 0 for timing in timings for sample in timing.samples)


def test_timing_keeps_every_sample():
    facts = bench.Timing((3.0, 1.0, 2.0)).as_dict()
    assert facts == {"median_s": 2.0, "min_s": 1.0, "samples_s": [3.0, 1.0, 2.0]}


def test_peak_memory_grows_with_what_is_held():
    before = bench.peak_memory()
    held = bytearray(64 << 20)
    held[::4096] = b"x" * len(held[::4096])
    assert bench.peak_memory() >= max(before, 64 << 20)


def test_environment_names_no_host_and_no_path():
    import socket

    text = json.dumps(bench.environment())
    assert socket.gethostname() not in text
    assert "/" not in text.replace("x86_64", "")


@pytest.mark.parametrize(
    ("seconds", "runs"), [(0.0, 1), (1.0, 0), (float("nan"), 1), (float("inf"), 1)]
)
def test_impossible_numbers_are_refused(seconds, runs):
    with pytest.raises(ValueError, match="expected"):
        bench.run_benchmark(bench.BenchFiles(), seconds, runs, "auto", "auto")


def test_command_writes_a_report(tmp_path, capsys):
    target = tmp_path / "bench.json"
    words = ["bench", "--seconds", "0.5", "--runs", "1", "--device", "cpu"]
    assert main([*words, "--precision", "f32", "-o", str(target)]) == 0
    assert "x realtime" in capsys.readouterr().out
    report = json.loads(target.read_text())
    assert report["precision"] == "f32"
    assert report["device"].startswith("CPU (")
    assert "OpenVINO" in report["device"]
    assert 0 < report["compile_s"] < report["first_run_s"]
    assert report["rtf"] == pytest.approx(report["warm"]["median_s"] / 0.5)
    assert report["rtf"] * report["realtime_factor"] == pytest.approx(1.0)
    assert report["peak_memory_bytes"] > 1 << 20
    assert {"pitch", "content", "vocoder"} <= report["stages_s"].keys()
    assert main([*words, "-o", str(target)]) == 1
    assert "--force" in capsys.readouterr().err
    assert main([*words, "-o", str(tmp_path / "none" / "bench.json")]) == 1
    assert "no such folder" in capsys.readouterr().err
