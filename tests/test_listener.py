"""The content loss: what the encoder hears of a generated segment against the recording."""

import dataclasses
import math

import mlx.core as mx
import numpy as np
import pytest
from scipy.signal import firwin, resample_poly
from test_front_end import CONFIG as ENCODER
from test_training_step import make_batch, make_config, make_reference, run
from tiny_models import arrays

from rvc_mlx.models.contentvec import ContentVec
from rvc_mlx.training import listener as module
from rvc_mlx.training.listener import MARGIN, Listener, resampled
from rvc_mlx.training.parametrization import from_torch
from rvc_mlx.training.presets import preset
from rvc_mlx.training.step import TrainStep


@pytest.fixture(autouse=True)
def _on_cpu():
    with mx.stream(mx.cpu):
        yield


@pytest.fixture
def encoder():
    mx.random.seed(0)
    return ContentVec(ENCODER)


def listening(encoder, config):
    return Listener(lambda audio: encoder(audio, "v2"), config)


@pytest.mark.parametrize("rate", [3200, 24000, 32000, 40000, 48000])
def test_audio_is_resampled_as_scipy_does(rng, rate):
    wave = rng.standard_normal((2, rate // 10)).astype(np.float32)
    up, down = 16000 // np.gcd(16000, rate), rate // np.gcd(16000, rate)
    half = module._ZERO_CROSSINGS * max(up, down)
    taps = firwin(2 * half + 1, 1 / max(up, down), window=("kaiser", module._KAISER))
    expected = resample_poly(wave.astype(np.float64), up, down, axis=1, window=taps)
    found = np.array(resampled(mx.array(wave), rate, 16000))
    assert found.shape == (2, 1600)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def recordings(rng, config, frames=90):
    wave = rng.standard_normal((2, frames, config.hop)).astype(np.float32) / 10
    return mx.array(wave), mx.array([0, frames - config.segment_frames])


def segment_of(wave, starts, config):
    flat = np.array(wave).reshape(len(wave), -1)
    return np.stack(
        [
            row[s * config.hop : (s + config.segment_frames) * config.hop]
            for row, s in zip(flat, starts.tolist(), strict=True)
        ]
    )


def test_the_recording_itself_is_no_distance_and_noise_is_one(rng, encoder):
    config = preset("small", "v2", True, 1)
    listener = listening(encoder, config)
    wave, starts = recordings(rng, config)
    same = segment_of(wave, starts, config)
    assert abs(listener(wave, starts, mx.array(same)).item()) < 1e-5
    other = rng.standard_normal(same.shape).astype(np.float32)
    assert listener(wave, starts, mx.array(other)).item() > 1e-3


def test_only_frames_of_the_segment_are_heard(rng, encoder, monkeypatch):
    """Of 40 frames of 10 ms the 20 whose middle lies between margins of 0.4 s."""
    config = preset("small", "v2", True, 1)
    seen = []

    def numbered(audio):
        seen.append(audio.shape)
        frames = (audio.shape[1] - 400) // 320 + 1
        places = mx.arange(frames, dtype=mx.float32)[None, :, None]
        return mx.broadcast_to(places, (audio.shape[0], frames, 1))

    listener = Listener(numbered, config)
    features = np.array(listener._hear(mx.zeros((1, (40 + 2 * MARGIN) * config.hop))))
    middles = (features.ravel() * 320 + 200) / 16000
    assert seen == [(1, 19200)]
    assert len(middles) == 20
    assert middles[0] >= 0.4 > middles[0] - 0.02
    assert middles[-1] < 0.8 <= middles[-1] + 0.02


def test_where_it_is_silent_nothing_is_heard(rng, encoder):
    config = preset("small", "v2", True, 1)
    listener = listening(encoder, config)
    wave, starts = recordings(rng, config)
    wave[1] = 0
    made = mx.array(1e-4 * rng.standard_normal((2, config.segment_samples)), mx.float32)
    loss, slope = mx.value_and_grad(lambda a: listener(wave, starts, a))(made)
    assert loss.item() > 0
    slope = np.array(slope)
    assert np.isfinite(slope).all()
    assert slope[0].any()
    assert not slope[1].any()


def test_the_loss_pulls_towards_the_recording(rng, encoder):
    config = preset("small", "v2", True, 1)
    listener = listening(encoder, config)
    wave, starts = recordings(rng, config)
    made = mx.array(rng.standard_normal((2, config.segment_samples)) / 10, mx.float32)
    slope = mx.grad(lambda a: listener(wave, starts, a))
    before = listener(wave, starts, made).item()
    for _ in range(10):
        step = slope(made)
        made = made - 0.02 * step / mx.sqrt(mx.mean(mx.square(step)))
    assert listener(wave, starts, made).item() < 0.9 * before


def test_a_step_has_the_loss(encoder):
    config = dataclasses.replace(make_config("nsf"), content_weight=7.0)
    weights = [from_torch(arrays(n)) for n in make_reference(config)]
    step = TrainStep(config, *weights, listener=listening(encoder, config))
    losses = run(step, make_batch(config))
    parts = config.mel_weight * losses["loss_mel"] + losses["loss_kl"]
    parts += losses["loss_adv"] + losses["loss_fm"] + 7 * losses["loss_content"]
    assert losses["loss_content"] > 0
    assert losses["loss_g"] == pytest.approx(parts, rel=1e-5)


def test_weight_and_listener_go_together(encoder):
    config = make_config("nsf")
    weights = [from_torch(arrays(n)) for n in make_reference(config)]
    heard = dataclasses.replace(config, content_weight=1.0)
    for one, listener in ((heard, None), (config, listening(encoder, config))):
        with pytest.raises(ValueError, match="one goes with the other"):
            TrainStep(one, *weights, listener=listener)


@pytest.mark.parametrize("weight", [-1, math.inf, math.nan])
def test_the_weight_is_checked(weight):
    with pytest.raises(ValueError, match=f"content_weight is {weight}; expected 0 or"):
        dataclasses.replace(make_config("nsf"), content_weight=weight)
