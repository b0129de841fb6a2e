"""Whole conversions on a GPU: the second and later ones replay what the first ones built."""

from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest

import rvc_mlx
from rvc_mlx.compiling import Replayed
from rvc_mlx.engine import choose_engine
from rvc_mlx.options import ConversionOptions
from rvc_mlx.pipeline import load_on

RATE = 16000

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not mx.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(params=["auto", "f16"])
def engine(request, monkeypatch):
    monkeypatch.setenv("MLX_ENABLE_TF32", "1")  # is put back after the test
    return choose_engine("gpu", request.param)


def load(engine, models):
    return load_on(engine, models.voice, encoder=models.encoder, rmvpe=models.rmvpe)


def recording(seconds):
    t = np.arange(round(seconds * RATE)) / RATE
    tone = np.sin(2 * np.pi * (150 * t + 8 * np.sin(3 * t)))
    return (0.4 * tone * (np.sin(5 * t) > -0.7)).astype(np.float32)


def test_a_conversion_is_the_same_again(engine, small_models, monkeypatch):
    options = ConversionOptions()
    recordings = [recording(seconds) for seconds in (2.0, 1.3, 4.1)]
    plain = load(engine, small_models)
    with monkeypatch.context() as patch:
        # Each call builds its graph anew.
        patch.setattr(Replayed, "__call__", lambda self, *a: self._function(*a))
        expected = [plain.convert(x, RATE, options).audio for x in recordings]
    converter = load(engine, small_models)
    traced = mx.compile
    made = []
    monkeypatch.setattr(mx, "compile", lambda f: made.append(f) or traced(f))

    def check(numbers):
        for i in numbers:
            found = converter.convert(recordings[i], RATE, options).audio
            assert np.abs(found).max() > 0.01
            # A GELU that MLX fuses in one is five steps in the other: TF32 may round its
            # results up in one and down in the other.
            np.testing.assert_allclose(found, expected[i], rtol=0, atol=2e-4)

    check((0, 0, 0, 1, 2, 1, 0, 2, 1))
    with ThreadPoolExecutor(1) as pool:  # which has a stream of its own
        pool.submit(check, (0, 1, 0, 0)).result()
    check((0, 1))
    assert made
    together = converter.convert_many(3 * recordings, RATE, options)
    for found, wanted in zip(together, 3 * expected, strict=True):
        # To rounding, which a batch has of its own.
        assert found.audio.shape == wanted.shape
        assert np.abs(found.audio - wanted).mean() < 0.02


def test_public_names_convert_on_the_gpu(small_models):
    voice = rvc_mlx.load(
        small_models.voice,
        encoder=small_models.encoder,
        rmvpe=small_models.rmvpe,
        device="gpu",
        precision="f16",
    )
    result = voice.convert(recording(1.0), RATE)
    assert len(result.audio) == result.sample_rate
    assert np.isfinite(result.audio).all()
