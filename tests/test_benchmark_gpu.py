"""The GPU benchmark runs anywhere: here with the small models, on a CPU."""

import json
import sys
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import benchmark_gpu as benchmark
import common
import gpu_goals
import gpu_sides
import gpu_table
from profile_gpu import RecordingEngine
from torch_side import Place
from twins import MLX_CPU_WINDOW, Sides

from rvc_mlx.engine import choose_engine
from rvc_mlx.loading import Voice, read_weights

pytestmark = pytest.mark.usefixtures("_one_thread")


@pytest.fixture(scope="module")
def models(tmp_path_factory, small_models):
    """The small models under the names that benchmarks want."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "hubert_base.pt").symlink_to(small_models.encoder)
    (folder / "rmvpe.pt").symlink_to(small_models.rmvpe)
    (folder / "v2_48k.pth").symlink_to(small_models.voice)
    (folder / "v2.index").symlink_to(small_models.index)
    return folder


@pytest.fixture
def run(models, tmp_path, monkeypatch, capsys):
    """Words of the command line to exit code, result and output."""

    def call(*words):
        given = ["--engine", "openvino", "--precision", "f32", "--models", str(models)]
        given += ["--seconds", "0.3", "--clips", "2", "--runs", "1"]
        given += ["--most", "1000", *words]
        monkeypatch.setattr(sys, "argv", ["x", *given, "--output", str(tmp_path)])
        code = benchmark.main()
        [file] = tmp_path.glob("gpu-*.json")
        return code, json.loads(file.read_text()), capsys.readouterr().out

    return call


def test_every_row_is_measured_on_both_sides(run, monkeypatch):
    monkeypatch.setattr(benchmark, "NEW_LENGTHS", (0.9, 0.8))
    code, result, printed = run("--no-compile", "--index")
    assert code == 0
    assert [row["row"] for row in result["rows"]] == list(benchmark.ROWS)
    for row in result["rows"]:
        warm = {"ours f32"} if row["row"] == "new-length-warm" else set()
        assert row["sides"].keys() == (warm or {"ours f32", "PyTorch f32"})
        for cell in row["sides"].values():
            samples = 2 if row["row"].startswith("new-length") else 1
            assert len(cell["samples_s"]) == samples
            assert cell["finite"]
        assert f"| {row['row']} " in printed
    seconds = {row["row"]: row["seconds"] for row in result["rows"]}
    assert seconds["conversion-long"] == pytest.approx(20 * 0.3)
    assert seconds["many"] == pytest.approx(2 * 0.1)
    assert result["models"].keys() == {"hubert", "rmvpe", "voice", "index"}


def test_many_clips_share_the_calls_of_an_engine_that_batches(small_models):
    engine = choose_engine("mlx-cpu", "f32")
    engine.batch_bytes, engine.window_frames = 1 << 30, MLX_CPU_WINDOW
    watching = RecordingEngine(engine)
    files = common.models(small_models.folder, index=False)
    sides = Sides(watching, "cuda", "f32", Place(torch.device("cpu"), "f32"))
    [side] = gpu_sides.our_sides(files, [sides]).values()
    voice = Voice(read_weights(files.voice, "voice"), engine)
    row = benchmark.planned_rows(0.3, 3, voice)["many"]
    found = []
    used = watching.watch(lambda: found.extend(row.call(side)))
    assert [len(audio) for audio in found] == [
        round(0.1 * voice.config.sample_rate)
    ] * 3
    assert {
        one.seam.name: (one.calls, len(one.given[0])) for one in used
    } == dict.fromkeys(("encode", "salience", "prior", "source", "vocoder"), (1, 3))


def test_rows_can_be_chosen_and_misspelt(run):
    _, result, _ = run("--only", "hubert,rmvpe", "--mlx-only")
    assert [row["row"] for row in result["rows"]] == ["hubert", "rmvpe"]
    assert all(row["sides"].keys() == {"ours f32"} for row in result["rows"])
    with pytest.raises(SystemExit):
        run("--only", "hubert,rmpve")


def test_a_killed_run_keeps_what_it_has(run, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("gpu_sides.Ours.rmvpe", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run("--only", "hubert,rmvpe", "--mlx-only")
    [file] = tmp_path.glob("gpu-*.json")
    kept = json.loads(file.read_text())
    assert [row["row"] for row in kept["rows"]] == ["hubert"]


def test_few_samples_of_a_slow_call_are_taken(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(benchmark.gc, "collect", lambda: None)  # slow beside PyTorch

    def call(seconds):
        now[0] += seconds
        return np.zeros(1)

    def cell(seconds):
        return benchmark.time_cell(lambda: call(seconds), 7, 8.0)

    assert len(cell(0.1)["samples_s"]) == 7
    assert len(cell(2.0)["samples_s"]) == 4
    assert len(cell(100.0)["samples_s"]) == 1


def test_numbers_that_are_not_finite_are_an_error_of_ours_alone():
    table = benchmark.Table()
    cell = benchmark.time_cell(lambda: [np.zeros(2), np.array([np.nan])], 1, 1.0)
    table.put("many", 1.0, "PyTorch f16", cell)
    with pytest.raises(ValueError, match="many, ours bf16"):
        table.put("many", 1.0, "ours bf16", cell)


@pytest.fixture
def _tf32_as_before():
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = cuda.allow_tf32, cudnn.allow_tf32
    yield
    cuda.allow_tf32, cudnn.allow_tf32 = before


@pytest.mark.usefixtures("_tf32_as_before")
def test_each_way_of_pytorch_allows_tf32_where_its_name_says(small_models, monkeypatch):
    monkeypatch.setattr(gpu_sides, "TorchPipeline", lambda *_: MagicMock())
    monkeypatch.setattr(gpu_sides, "synthesize", lambda *_: allowed())

    def allowed():
        backends = torch.backends
        return backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32

    files = common.models(small_models.folder, index=False)
    place = Place(torch.device("cuda"), "tf32")
    sides = gpu_sides.torch_sides(files, place) | gpu_sides.default_side(files, place)
    found = {name: side.synthesizer(None) for name, side in sides.items()}
    assert found == {
        "PyTorch tf32": (True, True),
        "PyTorch f16": (False, False),
        "PyTorch default": (False, True),
    }
    plain = Place(torch.device("cpu"), "f32")
    assert gpu_sides.default_side(files, plain) == {}


def test_what_pytorch_cannot_do_is_told_and_nothing_else():
    def fail():
        raise RuntimeError("CUDA out of memory\nmore")

    assert benchmark.attempt(fail, "PyTorch tf32") == {"failed": "CUDA out of memory"}
    with pytest.raises(RuntimeError):
        benchmark.attempt(fail, "ours tf32")


def test_the_result_has_its_table_in_the_documents():
    cells = {"median_s": 0.05, "min_s": 0.05, "samples_s": [0.05], "finite": True}
    sides = {"ours tf32": cells, "ours bf16": cells | {"median_s": 0.025}}
    sides |= {"PyTorch default": cells | {"median_s": 0.1}, "PyTorch f16": cells}
    sides |= {"PyTorch tf32, compiled": {"failed": "no compiler"}}
    result = {
        "benchmark": "gpu",
        "file": "gpu-cuda.json",
        "sides": {"backend": "cuda", "device": "x", "precision": "tf32, bf16"},
        "environment": {"gpu": "H9000", "cores": 8, "commit": "0123456789"},
        "rows": [{"row": "conversion", "seconds": 30.0, "sides": sides}],
    }
    [line] = [x for x in gpu_table.gpu([result]).splitlines() if "H9000" in x]
    values = ["H9000, 8 cores", "0123456", "conversion", "30"]
    values += ["50", "25", "-", "-", "50", "100", "failed"]
    found = [cell.strip() for cell in line.strip("| ").split("|")]
    assert found == [*values, "1200", "2", "1"]
    assert "not measured" in gpu_table.gpu([])


def test_goals_are_met_missed_or_not_measured():
    def cell(median_s):
        return {"median_s": median_s, "samples_s": [median_s]}

    def row(name, seconds, **sides):
        named = {"ours": "ours tf32", "half": "ours f16", "theirs": "PyTorch tf32"}
        named["default"] = "PyTorch default"
        cells = {named[side]: cell(value) for side, value in sides.items()}
        return {"row": name, "seconds": seconds, "sides": cells}

    rows = [
        row("rmvpe", 30.0, ours=0.010, half=0.012),
        row("hubert", 30.0, ours=0.010, half=0.008, theirs=0.012, default=0.020),
        row("many", 640.0, half=0.32),
        row("new-length", 30.0, ours=0.036),
        row("new-length-again", 30.0, ours=0.030),
    ]
    result = {
        "benchmark": "gpu",
        "file": "gpu-cuda.json",
        "sides": {"backend": "cuda"},
        "environment": {"gpu": "H9000", "cores": 8, "commit": "0123456789"},
        "rows": rows,
    }
    lines = [x for x in gpu_goals.goals([result]).splitlines() if "H9000" in x]
    told = [[part.strip() for part in line.strip("| ").split("|")] for line in lines]
    found = {what: (reached, verdict) for *_, what, _, reached, verdict in told}
    assert found.keys() == {goal.what for goal in gpu_goals.GOALS}
    asked = {
        "RMVPE, 30 s, float32: ms": ("10", "met"),
        "RMVPE, 30 s, half: ms": ("12", "missed"),
        "RMVPE, 5 minutes: ms": ("-", "not measured"),
        "HuBERT, float32: times as fast as PyTorch with TF32": ("1.2", "missed"),
        "HuBERT, half: times as fast as PyTorch's float32 as it comes": ("2.5", "met"),
        "64 clips of 10 s, half: times real time": ("2000", "met"),
        "a new length, float32: times its third conversion": ("1.2", "met"),
        "a new length, half: times its third conversion": ("-", "not measured"),
    }
    assert {what: found[what] for what in asked} == asked
    assert "not measured" in gpu_goals.goals([])
