"""Clips for the judges: who speaks them, and what is written beside them."""

import importlib.util
import json
import os
import shutil

import numpy as np
import pytest
import soundfile

from recipes import make_judge_clips, neural


def need(programs=(), modules=()):
    """Skip without them, unless they are required."""
    missing = [name for name in programs if not shutil.which(name)]
    missing += [name for name in modules if not importlib.util.find_spec(name)]
    if missing and os.environ.get("RVC_MLX_REQUIRE_ENGINES"):
        pytest.fail(f"not installed: {', '.join(missing)}")
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


def test_phonemes_become_numbers_with_pads_and_the_sentence_s_sign():
    numbers = {"_": [0], "^": [1], "$": [2], " ": [3], ",": [8], ".": [10], "?": [13]}
    numbers |= {"a": [14], "b": [15]}
    found = neural.phoneme_numbers("a\u0303b\n a\n", "Ab, a?", numbers)
    assert found == [1, 0, 14, 0, 15, 0, 8, 0, 3, 0, 14, 0, 13, 0, 2]
    assert neural.phoneme_numbers("a\n", "A!", numbers | {"!": [4]})[-3:] == [4, 0, 2]
    assert neural.phoneme_numbers("a\n", "A", numbers)[-3:] == [10, 0, 2]


@pytest.mark.parametrize("voice", list(neural.NEURAL))
def test_a_neural_voice_speaks_the_same_twice(voice):
    need(["espeak-ng"], [neural.NEURAL[voice][0], "onnxruntime"])
    made = []
    for _ in range(2):
        neural._piper.cache_clear()
        made.append(neural.speak("The boat left the harbour, did it?", voice))
    assert made[0].dtype == np.float32
    assert 1 < len(made[0]) / 16000 < 4
    assert 0.05 < np.abs(made[0]).max() < 1
    assert np.array_equal(*made)


def test_a_missing_voice_says_what_to_install(monkeypatch):
    monkeypatch.setattr(neural, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="install --no-deps hibari-tts"):
        neural.speak("hello", "heart")
    assert neural.neural_versions() == {}


def test_clips_have_their_words_beside_them(tmp_path):
    need(["flite"])
    words = ["--voices", "rms", "awb", "--count", "3"]
    make_judge_clips.main([str(tmp_path), *words])
    sentences = make_judge_clips.SENTENCES.read_text("utf-8").splitlines()
    names = ["00-rms.flac", "01-awb.flac", "02-rms.flac"]
    lines = (tmp_path / "transcripts.txt").read_text("utf-8").splitlines()
    assert lines == [f"{n}|{s}" for n, s in zip(names, sentences[:3], strict=True)]
    for name in names:
        audio, rate = soundfile.read(tmp_path / name)
        assert rate == 16000
        assert np.sqrt(np.square(audio).mean()) == pytest.approx(0.08, rel=0.1)
    assert json.loads((tmp_path / "provenance.json").read_text("utf-8"))["seed"] == 5


@pytest.mark.parametrize("count", ["0", "41"])
def test_more_clips_than_sentences_are_refused(tmp_path, capsys, count):
    with pytest.raises(SystemExit):
        make_judge_clips.main([str(tmp_path / "new"), "--count", count])
    assert f"--count {count}: expected 1 to 40" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
