"""The document of the evaluation against small result files."""

import importlib.util
import json
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "render_evaluation.py"
spec = importlib.util.spec_from_file_location("render_evaluation", TOOL)
render_evaluation = importlib.util.module_from_spec(spec)
spec.loader.exec_module(render_evaluation)

MACHINE = {
    "system": "Linux", "cpu": "a CPU", "cores": 2, "gpu": "none", "python": "3.11",
    "versions": {"mlx": "0.32", "torch": "not installed"}, "commit": "0123456789abcdef",
}  # fmt: skip
SCORE = {
    "rpa": 0.9312, "rpa_heard": 0.9, "vde": 0.05, "missed": 0.1, "false": 0.02,
    "octave": 0.001, "cents": 3.25,
}  # fmt: skip
GOAL = {"goal": "F0, %", "target": ">= 97", "reached": 93.12, "clips": 6}
PITCH = {
    "benchmark": "pitch", "environment": MACHINE, "clips": 6, "seconds": 20.5,
    "speakers": ["rms"], "trackers": {"net": {"clean": SCORE}},
    "goals": [GOAL | {"verdict": "missed"}],
}  # fmt: skip
CONTENT = {
    "benchmark": "content", "environment": MACHINE, "clips_per_speaker": 4,
    "frame_accuracy": {"rms": {"all": 0.777, "speech": 0.7, "held_out": True}},
    "speaker_named": {"features": 0.25, "log_mel_mean_and_spread": 1.0, "chance": 0.5},
    "goals": [],
}  # fmt: skip
VOICE = {
    "name": "slt", "files": {"voice": {"file": "slt.pth"}},
    "summary": {"f0": {"rpa": 96.25}},
    "clips": [{"judged": {"f0": {"rpa": 96.25}}}, {"judged": {"f0": {"note": "hum"}}}],
}  # fmt: skip
CONVERSION = {
    "benchmark": "evaluation", "environment": MACHINE, "sources": [1, 2],
    "judges": ["f0"], "voices": [VOICE],
}  # fmt: skip


@pytest.fixture
def place(tmp_path):
    """A root with the document, and a folder of results."""
    (tmp_path / "docs").mkdir()
    text = (
        f"# Before\n\n{render_evaluation.BEGIN}old\n{render_evaluation.END}\nAfter.\n"
    )
    (tmp_path / "docs" / "EVALUATION.md").write_text(text, "utf-8")
    (tmp_path / "results").mkdir()
    return tmp_path


def run(place, *words):
    folders = ["--results", str(place / "results"), "--root", str(place)]
    return render_evaluation.main([*folders, *words])


def cells(text: str, first: str) -> list[str]:
    [line] = [row for row in text.splitlines() if row.startswith(f"| {first}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_figures_come_from_the_results(place):
    for name, result in (("a", PITCH), ("b", CONTENT), ("natural", CONVERSION)):
        (place / "results" / f"{name}.json").write_text(json.dumps(result), "utf-8")
    (place / "results" / "natural.png").write_bytes(b"picture")
    assert run(place) == 0
    text = (place / "docs" / "EVALUATION.md").read_text("utf-8")
    assert text.startswith("# Before\n")
    assert text.endswith("\nAfter.\n")
    assert "old" not in text
    assert cells(text, "net")[:4] == ["net", "clean", "93.1", "90.0"]
    assert cells(text, "F0, %") == ["F0, %", ">= 97", "93.1", "6", "missed"]
    assert cells(text, "rms") == ["rms", "held out", "77.7", "70.0"]
    assert cells(text, "log mel mean and spread")[1] == "100.0"
    label = "F0 within 50 cents, %"
    assert cells(text, "slt") == ["slt", label, ">= 95", "96.25", "1 of 2", "met"]
    assert "- slt, f0: hum (1 conversions)" in text
    assert "(images/evaluation-natural.png)" in text
    image = place / "docs" / "images" / "evaluation-natural.png"
    assert image.read_bytes() == b"picture"
    assert cells(text, "`a.json`")[1:] == [
        "a CPU", "2", "python 3.11, mlx 0.32", "0123456789ab"
    ]  # fmt: skip
    assert run(place, "--check") == 0


def test_recordings_that_no_voice_made_have_no_goals():
    anchors = CONVERSION | {"label": "anchors", "voices": [VOICE | {"files": {}}]}
    assert "missed" not in "".join(render_evaluation.conversion(anchors))
    assert "verdict" not in "".join(render_evaluation.conversion(anchors))


def test_a_stale_document_is_found(place, capsys):
    assert run(place, "--check") == 1
    assert "not up to date" in capsys.readouterr().out
    assert run(place) == 0
    assert render_evaluation.NOTHING in (place / "docs/EVALUATION.md").read_text()
    (place / "results" / "p.json").write_text(json.dumps(PITCH), "utf-8")
    assert run(place, "--check") == 1


def test_what_is_no_result_is_refused(place, capsys):
    (place / "results" / "x.json").write_text("{}", "utf-8")
    assert run(place) == 1
    assert "x.json: not a result of an evaluation" in capsys.readouterr().err
    (place / "results" / "x.json").unlink()
    (place / "docs" / "EVALUATION.md").write_text("no marks", "utf-8")
    assert run(place) == 1
    assert "expected the lines" in capsys.readouterr().err


def test_the_document_of_the_repository_is_up_to_date():
    assert render_evaluation.main(["--check"]) == 0
