"""The mean of two networks' weights."""

import re

import numpy as np
import pytest

from recipes.average import MEAN_OF, main
from rvc_mlx.checkpoint import hash_file, read_checkpoint, save_checkpoint

VOICE = {"kind": "voice", "step": 7}


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{name}.safetensors" for name in ("before", "after")]
    for path, step in zip(paths, (3, 7), strict=True):
        tensors = {
            "w": rng.standard_normal((3, 4)).astype(np.float16),
            "b": rng.standard_normal(5).astype(np.float32),
        }
        metadata = {"kind": "voice", "step": step, "model_hash": str(step)}
        save_checkpoint(path, tensors, metadata)
    return paths


@pytest.mark.parametrize("share", [0, 0.25, 1])
def test_a_mean_lies_between_two_files_and_tells_of_both(files, tmp_path, share):
    path = tmp_path / "new" / "mean.safetensors"
    assert main([*map(str, files), "--share", str(share), "--export", str(path)]) == 0
    before, after, found = map(read_checkpoint, (*files, path))
    for name, value in found.tensors.items():
        a, b = (part.tensors[name].astype(np.float64) for part in (before, after))
        assert value.dtype == after.tensors[name].dtype
        np.testing.assert_allclose(value, (1 - share) * a + share * b, rtol=1e-3)
    told = found.metadata.pop(MEAN_OF)
    assert found.metadata == VOICE  # no hash
    assert told == (
        f"before.safetensors (sha256 {hash_file(files[0])}) * {1 - share:g}; "
        f"after.safetensors (sha256 {hash_file(files[1])}) * {share:g}"
    )


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"w": np.zeros((3, 4)), "b": np.zeros(6)}, VOICE, r"b: .*\(6,\)"),
        ({"w": np.zeros((3, 4))}, VOICE, "b: .*nothing"),
        ({}, {"kind": "rmvpe"}, "kind rmvpe"),
    ],
)
def test_other_networks_are_refused(
    files, tmp_path, caplog, tensors, metadata, message
):
    path, other = tmp_path / "mean.safetensors", tmp_path / "other.safetensors"
    save_checkpoint(other, tensors, metadata)
    assert main([str(other), str(files[1]), "--export", str(path)]) == 1
    [record] = caplog.records
    assert not path.exists()
    assert re.search(message, record.getMessage())


def test_a_share_beyond_both_is_refused(files, tmp_path, caplog):
    path = tmp_path / "mean.safetensors"
    assert main([*map(str, files), "--share", "1.5", "--export", str(path)]) == 1
    assert "--share 1.5; expected 0 to 1" in caplog.text
    assert not path.exists()
