"""What a voice asks of a conversion, written into its file."""

import numpy as np
import pytest

from recipes import ask
from rvc_mlx.checkpoint import read_checkpoint
from rvc_mlx.export import convert_model
from rvc_mlx.loading import Asked, asked_by


def test_a_voice_is_told_to_ask(small_models, tmp_path):
    target = tmp_path / "new" / "asking.safetensors"
    words = [
        "--f0-threshold",
        "0.02",
        "--f0-onset",
        "1",
        "--f0-offset",
        "2",
        "--export",
    ]
    assert ask.main([str(small_models.voice), *words, str(target)]) == 0
    before, after = read_checkpoint(small_models.voice), read_checkpoint(target)
    assert asked_by(before) == Asked() == (0.03, 0, 0)
    assert asked_by(after) == (0.02, 1, 2)
    assert before.metadata.items() <= after.metadata.items()
    assert before.tensors.keys() == after.tensors.keys()
    for name, values in before.tensors.items():
        np.testing.assert_array_equal(values, after.tensors[name])


def test_what_was_asked_before_is_forgotten(small_models, tmp_path):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    for source, words, target in (
        (small_models.voice, "--f0-threshold 0.02 --f0-onset 1", first),
        (first, "--f0-offset 2", second),
    ):
        assert ask.main([str(source), *words.split(), "--export", str(target)]) == 0
    told = read_checkpoint(second).metadata
    assert (told["f0_offset"], asked_by(read_checkpoint(second))) == (2, (0.03, 0, 2))
    assert "f0_threshold" not in told
    assert "f0_onset" not in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--f0-threshold 2", "f0_threshold 2.0; expected 0 to 1"),
        ("--f0-onset 11", "f0_onset 11; expected 0 to 10 frames"),
    ],
)
def test_what_cannot_be_asked_is_not_written(
    small_models, tmp_path, caplog, words, message
):
    target = tmp_path / "asking.safetensors"
    given = [str(small_models.voice), *words.split(), "--export", str(target)]
    assert ask.main(given) == 1
    assert message in caplog.text
    assert not target.exists()


def test_only_a_voice_asks(small_models, tmp_path, caplog):
    given = [str(small_models.rmvpe), "--export", str(tmp_path / "a.safetensors")]
    assert ask.main(given) == 1
    assert "expected an RVC voice" in caplog.text


def test_a_converted_voice_still_asks(small_models, tmp_path):
    asking, converted = tmp_path / "asking.safetensors", tmp_path / "half.safetensors"
    words = ["--f0-threshold", "0.5", "--f0-onset", "1", "--f0-offset", "2"]
    assert ask.main([str(small_models.voice), *words, "--export", str(asking)]) == 0
    convert_model(asking, converted, half=True)
    assert asked_by(read_checkpoint(converted)) == (0.5, 1, 2)
