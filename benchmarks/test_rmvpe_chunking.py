"""The chunking of F0 estimation with the network: a frame does not depend on the cuts.

    python benchmarks/test_rmvpe_chunking.py [--engine ...] [--precision f32]

The full-size network on half a minute, the small one of the tests on 32,000 frames. Also runs
under ``pytest benchmarks``.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import common
import numpy as np
from twins import Sides, choose_sides

from rvc_mlx import pitch
from rvc_mlx.loading import PitchNet, read_weights

SMALL_MODEL = common.ROOT / "tests" / "small_models" / "rmvpe.pt"
FULL_CHUNK = 2 * pitch.CHUNK_CONTEXT + 576  # frames
MAX_CENTS, MEAN_CENTS = 0.01, 0.001  # at every frame; on average
# Of salience: a frame that is nearer to the threshold may be voiced by rounding alone.
ROUNDING = 1e-5


@cache
def _sides() -> Sides:
    parser = common.parser(__doc__, precisions=("f32",))
    words = sys.argv[1:] if __name__ == "__main__" else []
    return choose_sides(parser.parse_args(words), keep=False)


@cache
def _net(path: Path) -> PitchNet:
    return PitchNet(read_weights(path, "rmvpe"), _sides().engine)


def _estimate(
    path: Path,
    audio: np.ndarray,
    chunk: int,
    threshold: float = pitch.VOICING_THRESHOLD,
) -> np.ndarray:
    net = _net(path)
    return pitch.estimate_f0(
        net.salience,
        lambda start, stop: audio[start:stop],
        len(audio),
        net.config.n_mels,
        threshold,
        frames_multiple=net.frames_multiple,
        chunk_frames=chunk,
    )


def _audio(frames: int) -> np.ndarray:
    return common.synthetic_audio(frames / 100)[: (frames - 1) * 160]


def _check(path: Path, frames: int, chunk: int) -> None:
    """Chunked equals unchunked at every frame."""
    audio = _audio(frames)
    longest = 32 * (frames // 32 + 1)
    whole = _estimate(path, audio, longest)
    chunked = _estimate(path, audio, chunk)
    assert len(whole) == len(chunked) == frames, (len(whole), len(chunked))
    facts = common.difference_f0(chunked, whole)
    print(
        f"{frames} frames in chunks of {chunk}: max {facts['max_cents']:.1e}, "
        f"mean {facts['mean_cents']:.1e} cents, voicing {facts['voicing_agreement']}"
    )
    assert 0.1 < facts["voiced"] < 0.95, facts
    differ = np.flatnonzero((whole > 0) != (chunked > 0))
    assert len(differ) <= 2, facts
    if len(differ):
        low, high = (
            _estimate(path, audio, longest, pitch.VOICING_THRESHOLD + off) > 0
            for off in (-ROUNDING, ROUNDING)
        )
        assert (low != high)[differ].all(), (facts, differ)
    assert facts["max_cents"] <= MAX_CENTS, facts
    assert facts["mean_cents"] <= MEAN_CENTS, facts


def test_short_audio() -> None:
    """Shorter than a chunk, down to 60 ms: one pass, and every frame of it."""
    path = common.model_file("rmvpe.pt")
    for frames in (33, 64, 100):
        audio = _audio(frames)
        short = _estimate(path, audio, FULL_CHUNK)
        assert len(short) == frames, (frames, len(short))
        np.testing.assert_array_equal(short, _estimate(path, audio, 1 << 15))


def test_full_network_at_exact_multiple() -> None:
    """Two whole chunks."""
    _check(common.model_file("rmvpe.pt"), 2 * FULL_CHUNK, FULL_CHUNK)


def test_small_network_just_over_a_chunk() -> None:
    """A chunk and one frame."""
    _check(SMALL_MODEL, FULL_CHUNK + 1, FULL_CHUNK)


def test_32000_frames() -> None:
    """Five minutes in the product's chunks."""
    _check(SMALL_MODEL, 32_000, pitch.CHUNK_FRAMES)


CHECKS = (
    test_short_audio,
    test_full_network_at_exact_multiple,
    test_small_network_just_over_a_chunk,
    test_32000_frames,
)

if __name__ == "__main__":
    raise SystemExit(common.exit_code(lambda: common.run_checks(CHECKS)))
