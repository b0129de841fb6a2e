"""The benchmarks' own assertions that need no full-size networks."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import test_rmvpe_chunking_simple as chunking

from rvc_mlx.engine import choose_engine

SMALL_VOICE = Path(__file__).with_name("small_models") / "voice.pth"

QUICK = [
    check
    for check in chunking.CHECKS
    if check is not chunking.test_default_chunks_of_32000_frames
]


@pytest.mark.parametrize("check", QUICK, ids=lambda check: check.__name__)
def test_chunking(check):
    check()


def test_a_lost_context_is_found(monkeypatch):
    monkeypatch.setattr(chunking.pitch, "CHUNK_CONTEXT", chunking.REACH // 2)
    with pytest.raises(AssertionError):
        chunking.test_chunked_equals_whole()


def test_every_step_of_an_attention_is_compared():
    torch = pytest.importorskip("torch")
    import stages
    from torch_side import Place
    from twins import Sides

    engine = choose_engine("cpu", "f32", None)
    sides = Sides(engine, "openvino", "f32", Place(torch.device("cpu"), "f32"))
    rows = stages.attention_rows(sides, SMALL_VOICE, 24)
    names = [row["stage"].removeprefix("attention: ") for row in rows]
    assert names == ["Q", "K", "V", "scores", "weights", "output"]
    assert all(row["passed"] for row in rows)
