"""The benchmarks' own machinery: names of results, rows kept, limits, tables of machines."""

import argparse
import json
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import benchmark_e2e as e2e
import common
import plots
import tables

ROOT = common.ROOT
MIB = 1 << 20


def facts(cpu="AMD EPYC", cores=2, gpu="none"):
    return {"cpu": cpu, "cores": cores, "gpu": gpu, "memory_gib": 24}


@pytest.mark.parametrize(
    ("backend", "machine", "name"),
    [
        ("cuda", facts(gpu="NVIDIA H100 80GB HBM3"), "h100"),
        ("cuda", facts(gpu="NVIDIA H200"), "h200"),
        ("cuda", facts(gpu="NVIDIA A100-SXM4-80GB"), "a100"),
        ("cuda", facts(gpu="NVIDIA GeForce RTX 4090"), "rtx4090"),
        ("metal", facts(gpu="Apple M3 Max"), "m3max"),
        ("openvino", facts("Intel(R) Xeon(R) Processor", 8, "NVIDIA H100"), "xeon-8cores"),
        ("openvino", facts("Intel(R) Core(TM) i7-9700K CPU @ 3.60GHz", 8), "corei79700k-8cores"),
        ("openvino", facts("AMD EPYC 7R13 48-Core Processor", 96), "epyc7r13-96cores"),
        ("mlx-cpu", facts(), "mlx-epyc-2cores"),
    ],
)  # fmt: skip
def test_results_are_named_by_the_machine_of_our_side(backend, machine, name):
    assert common.machine_name(backend, machine) == name


def test_published_results_carry_the_name_of_their_machine():
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        result = json.loads(path.read_text("utf-8"))
        name = common.machine_name(result["sides"]["backend"], result["environment"])
        precision = result["sides"]["precision"]
        several = ", " in precision  # are columns of one table
        assert (f"-{name}" if several else f"-{name}-{precision}") in path.stem


@pytest.mark.parametrize("text", ["0", "-5", "five", "nan", "inf", "0.05"])
def test_lengths_that_are_none_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="length"):
        common.seconds_list(f"5,{text}")


@pytest.mark.parametrize("text", ["0", "-1", "2.5", "many", ""])
def test_runs_that_are_none_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="number"):
        common.whole(text)


def test_long_audio_is_timed_five_times_at_most():
    assert [common.runs_at(s, 7) for s in (5.0, 179.0, 180.0, 300.0)] == [7, 7, 5, 5]
    assert common.runs_at(300.0, 3) == 3


def test_a_killed_write_leaves_the_last_result(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    path = common.write_json(tmp_path, "rows", {"rows": [1]})
    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        common.write_json(tmp_path, "rows", {"rows": [1, 2]})
    assert json.loads(path.read_text("utf-8")) == {"rows": [1]}


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("two\nlines"), "error: two lines\n"),
        (FileNotFoundError(2, "No such file", "a.pth"), "error: a.pth: No such file\n"),
        (ChildProcessError("out of memory"), "error: out of memory\n"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(error, line, capsys):
    def main():
        raise error

    assert common.exit_code(main) == 1
    assert capsys.readouterr().err == line


class StubRunner:
    """Stands in for fresh processes: PyTorch's memory grows with the clip, ours does not."""

    def __init__(self, device, failing=()):
        self.common = {"device": device}
        self.calls = []
        self.failing = failing

    def run(self, side, seconds, runs=0, **more):
        self.calls.append((side, seconds))
        if (side, seconds) in self.failing:
            raise ChildProcessError(f"{side}, {seconds:g} s: out of memory")
        gpu = 900 * MIB if side == "ours" else round(100 + seconds) * MIB
        once = 0.1 if side == "ours" else 0.4
        return {
            **more, "side": side, "seconds": seconds, "cold_s": 3.0, "first_s": 1.0,
            "precision": "tf32", "warm_s": [once * seconds] * runs,
            "stages_s": [{"vocoder": once * seconds}] * runs,
            "peak_memory_bytes": 2000 * MIB,
            "gpu_peak_bytes": gpu if self.common["device"] == "gpu" else 0,
        }  # fmt: skip


VARIANTS = [
    {"side": "ours", "precision": "auto", "label": "tf32", "against": "tf32"},
    {"side": "torch", "torch_precision": "tf32"},
]


def options(**given):
    return argparse.Namespace(
        **{"torch_limit": 600.0, "memory": None, "runs": 5, "cold_runs": 1} | given
    )


def test_memory_by_length_is_of_both_sides_up_to_pytorchs_limit():
    runner, saved = StubRunner("gpu"), []
    rows = e2e.measure_memory(
        runner,
        options(memory=[3600.0, 5.0, 30.0], torch_limit=30.0),
        VARIANTS,
        lambda rows: saved.append(len(rows)),
    )
    assert [(r["side"], r["seconds"]) for r in rows] == [
        *(("ours", 5.0), ("torch", 5.0), ("ours", 30.0), ("torch", 30.0)),
        ("ours", 3600.0),
    ]
    assert runner.calls == [(r["side"], r["seconds"]) for r in rows]  # nothing beside
    assert [r["gpu_peak_bytes"] // MIB for r in rows] == [900, 105, 900, 130, 900]
    assert saved == [1, 2, 3, 4, 5]


def test_memory_of_the_cpu_is_measured_with_compiled_networks():
    runner = StubRunner("cpu")
    e2e.measure_memory(runner, options(memory=[30.0]), VARIANTS, lambda _: None)
    assert runner.calls == [("ours", 5.0), ("ours", 30.0), ("torch", 30.0)]


def test_rows_before_a_failure_are_saved():
    runner, saved = StubRunner("gpu", failing=[("torch", 600.0)]), []
    given = options(memory=[30.0, 600.0])
    with pytest.raises(ChildProcessError, match="600 s"):
        e2e.measure_memory(runner, given, VARIANTS, lambda r: saved.append(len(r)))
    assert saved == [1, 2, 3]


def test_speed_has_no_speedup_where_pytorch_has_no_row():
    saved = []
    rows = e2e.measure_speed(
        StubRunner("gpu"),
        options(seconds=[300.0, 30.0], torch_limit=30.0, runs=7),
        VARIANTS,
        lambda rows: saved.append([r["speedup"] for r in rows]),
    )
    assert [(r["side"], r["seconds"], r["speedup"]) for r in rows] == [
        ("ours", 30.0, 4.0),
        ("torch", 30.0, 1.0),
        ("ours", 300.0, None),
    ]
    assert [len(r["warm_s"]) for r in rows] == [7, 7, 5]
    assert [r["first_run_s"] for r in rows] == [3.0, None, None]
    assert saved[0] == [None]


def result(benchmark, backend, machine, rows):
    sides = {"backend": backend, "precision": "tf32"}
    sides |= {"torch_device": "cuda", "torch_precision": "tf32"}
    name = common.machine_name(backend, machine)
    return {
        "benchmark": benchmark, "sides": sides, "environment": machine, "rows": rows,
        "file": f"{benchmark}-{name}-tf32.json",
    }  # fmt: skip


def memory_rows():
    given = options(memory=[5.0, 30.0])
    return e2e.measure_memory(StubRunner("gpu"), given, VARIANTS, lambda _: None)


def test_tables_show_every_machine_and_what_nobody_measured():
    found = [
        result("memory", "cuda", facts(gpu=card), memory_rows())
        for card in ("NVIDIA H100 80GB HBM3", "NVIDIA H200")
    ]
    lines = tables.memory(found).splitlines()
    assert sum("NVIDIA H100 80GB HBM3" in line for line in lines) == 4
    assert sum("NVIDIA H200" in line for line in lines) == 4
    [apple] = [line for line in lines if "Apple" in line]
    assert "not measured" in apple
    [cpu] = [line for line in lines if "OpenVINO" in line]
    assert "not measured" in cpu


def test_memory_is_drawn_for_cpus_and_gpus_apart(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_finish", lambda figure, _: drawn.append(figure))
    machines = [("cuda", facts(gpu="NVIDIA H100")), ("openvino", facts())]
    found = [result("memory", *machine, memory_rows()) for machine in machines]
    assert plots.plot_memory(found, tmp_path / "memory.png")
    cpu, gpu = drawn[0].axes
    assert [list(line.get_ydata()) for line in gpu.lines] == [[900, 900], [105, 130]]
    assert [list(line.get_ydata()) for line in cpu.lines] == [[2000, 2000]] * 2


def test_a_speed_result_that_was_cut_short_is_drawn_as_far_as_it_goes(tmp_path):
    given = options(seconds=[5.0, 300.0], torch_limit=5.0)
    saved = []
    rows = e2e.measure_speed(
        StubRunner("gpu"), given, VARIANTS, lambda rows: saved.append(deepcopy(rows))
    )
    whole = result("e2e", "cuda", facts(gpu="NVIDIA H100"), rows)
    assert plots.plot_stages([whole], tmp_path / "stages.png")
    assert not plots.plot_stages([whole | {"rows": saved[0]}], tmp_path / "none.png")
    assert "300" in tables.e2e([whole])


def run_script(tmp_path, script, *words):
    command = [sys.executable, f"benchmarks/{script}.py", "--engine", "openvino"]
    command += ["--precision", "f32", "--models", "tests/small_models"]
    command += ["--output", str(tmp_path), *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_memory_is_measured_in_fresh_processes(tmp_path):
    done = run_script(
        tmp_path, "benchmark_e2e", "--memory", "1,2", "--torch-limit", "1"
    )
    assert done.returncode == 0, done.stderr
    [path] = tmp_path.glob("memory-*.json")
    rows = json.loads(path.read_text("utf-8"))["rows"]
    assert [(r["side"], r["seconds"]) for r in rows] == [
        ("ours", 1.0),
        ("torch", 1.0),
        ("ours", 2.0),
    ]
    assert all(r["peak_memory_bytes"] > 50 * MIB for r in rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("benchmark_rmvpe", ["--seconds", "1"]),
        ("benchmark_components", ["--seconds", "1"]),
        ("benchmark_rvc_full", ["--seconds", "1"]),
    ],
)
def test_scripts_run_with_small_networks(tmp_path, script, words):
    done = run_script(tmp_path, script, *words, "--runs", "1")
    assert done.returncode == 0, done.stderr
    [path] = tmp_path.glob("*.json")
    rows = json.loads(path.read_text("utf-8"))["rows"]
    assert rows
    assert all(row["ours"]["median_s"] > 0 < row["torch"]["median_s"] for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "words", "told"),
    [
        ("benchmark_rvc_full", ["--pt-model", "LICENSE"], "LICENSE"),
        ("benchmark_rvc_full", ["--mlx-model", "missing.pth"], "missing.pth"),
        ("benchmark_rmvpe", ["--models", "docs"], "rmvpe.pt"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, script, words, told):
    done = run_script(tmp_path, script, *words)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert told in lines[0]
    assert not list(tmp_path.iterdir())
