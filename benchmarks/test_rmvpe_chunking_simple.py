"""The chunking of F0 estimation without a network: what it is given and what it keeps.

    python benchmarks/test_rmvpe_chunking_simple.py

A stand-in for the network reads its pitch off the 129 mel frames around a frame, so
any frame that is dropped, doubled, moved or taken from a chunk's edge shows. Also runs
under ``pytest benchmarks``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cache

import common
import numpy as np

from rvc_mlx import pitch
from rvc_mlx.spectral import HOP_LENGTH, N_FFT, log_mel

REACH = 64  # frames that the stand-in looks to each side
CHUNK = 2 * pitch.CHUNK_CONTEXT + 256  # frames; small, to have many borders
BINS = 360
VOICED_LEVEL = -3.0  # mean log-mel of a frame; about half of the frames reach it
TOLERANCE = 1e-6  # cents


def stand_in(mel: np.ndarray) -> np.ndarray:
    """Log-mel ``[1, T, M]`` to a salience ``[1, T, 360]`` that tells nearby frames."""
    level = np.pad(mel[0].mean(axis=1).astype(np.float64), REACH, mode="edge")
    near = np.lib.stride_tricks.sliding_window_view(level, 2 * REACH + 1)
    weights = 1 + np.arange(2 * REACH + 1)  # not symmetric: a shift shows
    place = 180 + 40 * np.tanh(near @ weights / weights.sum() + 6)
    bins = np.exp(-0.5 * ((np.arange(BINS) - place[:, None]) / 1.5) ** 2)
    voiced = mel[0].mean(axis=1) > VOICED_LEVEL
    return (bins * np.where(voiced, 0.9, 0.01)[:, None])[None]


@cache
def signal(frames: int) -> np.ndarray:
    """Samples ``[(frames - 1) * 160]`` whose level changes all the time."""
    rng = np.random.default_rng(frames)
    count = (frames - 1) * HOP_LENGTH
    level = np.interp(np.arange(count), np.arange(0, count + 4001, 4000), _knots(count))
    return (rng.standard_normal(count) * level).astype(np.float32)


def _knots(count: int) -> np.ndarray:
    return 10 ** np.random.default_rng(0).uniform(-3, -0.5, count // 4000 + 2)


def whole_mel(audio: np.ndarray) -> np.ndarray:
    """Log-mel ``[T, 128]`` of the whole signal at once."""
    return log_mel(np.pad(audio, N_FFT // 2, mode="reflect"), 128)


def estimate(
    audio: np.ndarray, chunk: int, salience: Callable = stand_in, **options: str
) -> np.ndarray:
    """F0 by the product's own function."""
    return pitch.estimate_f0(
        salience,
        lambda start, stop: audio[start:stop],
        len(audio),
        chunk_frames=chunk,
        **options,
    )


def chunks_given(audio: np.ndarray, chunk: int, **options: str) -> list[np.ndarray]:
    """The mel images ``[T, 128]`` that the network is given."""
    given = []

    def salience(mel: np.ndarray) -> np.ndarray:
        given.append(mel[0].copy())
        return stand_in(mel)

    estimate(audio, chunk, salience, **options)
    return given


def check_equal(chunked: np.ndarray, whole: np.ndarray) -> None:
    """Every frame: the same voicing, and the same F0 to ``TOLERANCE``."""
    assert chunked.shape == whole.shape, (chunked.shape, whole.shape)
    wrong = np.flatnonzero((chunked > 0) != (whole > 0))
    assert not len(wrong), f"voicing differs at frames {wrong[:5]}"
    both = whole > 0
    assert both.any(), "nothing is voiced"
    assert not both.all(), "nothing is unvoiced"
    cents = np.abs(1200 * np.log2(chunked[both] / whole[both]))
    worst = np.flatnonzero(both)[cents.argmax()]
    assert cents.max() <= TOLERANCE, f"frame {worst}: {cents.max()} cents"


def test_short_audio_is_one_chunk() -> None:
    for frames in (5, 20, 31, 32, 33, CHUNK - 1, CHUNK):
        audio = signal(frames)
        [given] = chunks_given(audio, CHUNK, mel_padding="constant")
        assert len(given) == -(-frames // 32) * 32, (frames, len(given))
        np.testing.assert_allclose(given[:frames], whole_mel(audio), atol=1e-6)
        assert len(estimate(audio, CHUNK, mel_padding="constant")) == frames


def test_padding_reflects_or_is_zero() -> None:
    audio = signal(100)
    mel = whole_mel(audio)
    [reflected] = chunks_given(audio, CHUNK)
    np.testing.assert_array_equal(reflected[100:], mel[98:70:-1])
    [zeros] = chunks_given(audio, CHUNK, mel_padding="constant")
    assert not zeros[100:].any()


def test_chunks_are_aligned_and_overlap() -> None:
    audio = signal(4 * CHUNK + 77)
    mel = whole_mel(audio)
    place = {row.tobytes(): i for i, row in enumerate(mel)}
    assert len(place) == len(mel), "two frames are alike"
    end = 0
    for given in chunks_given(audio, CHUNK):
        nearest = np.abs(mel - given[0]).max(axis=1)
        start = int(nearest.argmin())
        assert start % 32 == 0, f"a chunk starts at frame {start}"
        assert len(given) % 32 == 0, f"a chunk has {len(given)} frames"
        assert len(given) <= CHUNK, f"a chunk has {len(given)} frames"
        held = mel[start : start + len(given)]
        np.testing.assert_allclose(given[: len(held)], held, atol=1e-6)
        if end:
            overlap = end - start
            assert overlap >= 2 * pitch.CHUNK_CONTEXT, f"an overlap of {overlap}"
        end = start + len(held)
    assert end == len(mel), f"the last chunk ends at {end} of {len(mel)} frames"


def test_chunked_equals_whole() -> None:
    kept = CHUNK - pitch.CHUNK_CONTEXT  # of the first chunk
    inner = CHUNK - 2 * pitch.CHUNK_CONTEXT  # of each further one
    lengths = [CHUNK + 1, 2 * CHUNK, 3 * CHUNK]
    lengths += [kept + k * inner + rest for k in (1, 2, 5) for rest in (-1, 0, 1, 17)]
    for frames in lengths:
        audio = signal(frames)
        whole = estimate(audio, max(32 * (frames // 32 + 1), CHUNK))
        check_equal(estimate(audio, CHUNK), whole)


def test_default_chunks_of_32000_frames() -> None:
    assert pitch.CHUNK_FRAMES % 32 == 0
    assert pitch.CHUNK_FRAMES > 2 * pitch.CHUNK_CONTEXT
    for frames in (32_000, 32_001, 5 * pitch.CHUNK_FRAMES):
        audio = signal(frames)
        assert len(chunks_given(audio, pitch.CHUNK_FRAMES)) > 1
        whole = estimate(audio, 32 * (frames // 32 + 1))
        check_equal(estimate(audio, pitch.CHUNK_FRAMES), whole)


CHECKS = (
    test_short_audio_is_one_chunk,
    test_padding_reflects_or_is_zero,
    test_chunks_are_aligned_and_overlap,
    test_chunked_equals_whole,
    test_default_chunks_of_32000_frames,
)

if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.split("\n", 1)[0]).parse_args()
    raise SystemExit(common.run_checks(CHECKS))
