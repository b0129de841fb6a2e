"""The picture of a training run's log."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


def plot(*words):
    command = [
        sys.executable,
        str(ROOT / "tools" / "plot_training.py"),
        *map(str, words),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def run(tmp_path):
    """A run without a discriminator at first, and without F0."""
    rows = [
        {"step": n, "epoch": n // 10, "train/loss_mel": 1 / n, "train/loss_kl": 1.0}
        | ({"train/loss_d": 4.0, "train/loss_fm": 1.0} if n > 50 else {})
        for n in range(1, 80)
    ]
    rows.append({"step": 79, "epoch": 8, "validation/mel_l1": 0.5})
    folder = tmp_path / "singer"
    folder.mkdir()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text)
    return folder


def test_runs_are_drawn(run, tmp_path):
    out = tmp_path / "training.png"
    done = plot(run, run / "metrics.jsonl", "-o", out)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes()[1:4] == b"PNG"


def test_panels_are_of_what_was_logged(run, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import plot_training

    drawn = []
    monkeypatch.setattr(
        plot_training.plt.Axes, "set_title", lambda _, text, **__: drawn.append(text)
    )
    plot_training.draw([run], tmp_path / "without.png")
    assert len(drawn) == 5  # no F0, no content
    log = run / "metrics.jsonl"
    log.write_text(log.read_text() + '{"step": 80, "train/loss_content": 0.5}\n')
    plot_training.draw([run], tmp_path / "with.png")
    assert drawn[5:] == [*drawn[:3], "content loss", *drawn[3:5]]
    log.write_text('{"step": 1, "epoch": 1}\n')
    with pytest.raises(ValueError, match="no losses in the logs"):
        plot_training.draw([run], tmp_path / "none.png")


@pytest.mark.parametrize("text", [None, "", "{}\n", "no json\n", "[1]\n"])
def test_what_is_no_log_is_one_line(tmp_path, text):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    done = plot(tmp_path, "-o", tmp_path / "x.png")
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert "metrics.jsonl" in line
    assert "expected the metrics.jsonl of a training run" in line
    assert not (tmp_path / "x.png").exists()


def test_losses_are_smoothed_and_scores_are_not(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from plot_training import MEAN_OF, curve

    rows = [
        {"step": n, "train/loss_mel": n % 2, "validation/mel_l1": n} for n in range(60)
    ]
    steps, values = curve(rows, "train/loss_mel")
    assert len(steps) == len(values) == 61 - MEAN_OF
    assert np.allclose(values, 0.5)
    assert list(curve(rows, "validation/mel_l1")[1]) == list(range(60))
