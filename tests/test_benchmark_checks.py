"""The benchmarks' own assertions that need neither full-size networks nor PyTorch."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import test_rmvpe_chunking_simple as chunking

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
