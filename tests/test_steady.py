"""A network that meets few lengths gives what it gives of each length alone."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import test_fused_encoder
import test_fused_prior
import test_fused_unet

from rvc_mlx import attention_kernel, fused_encoder, fused_prior, fused_unet
from rvc_mlx.models.contentvec import ContentVec
from rvc_mlx.steady import (
    OwnRows,
    Rows,
    Steady,
    few_lengths,
    own_rows,
    telling,
    within,
)
from rvc_mlx.windows import windows


@pytest.fixture(autouse=True)
def on_processor():
    with mx.stream(mx.cpu):
        yield


def test_lengths_are_few():
    lengths = [few_lengths(n) for n in range(1, 5000)]
    assert all(length >= n and length % 8 == 0 for n, length in enumerate(lengths, 1))
    assert sorted(set(lengths[1023:])) == [
        *(1024, 1280, 1536, 1792, 2048, 2560, 3072, 3584, 4096, 4608, 5120)
    ]


def test_what_is_behind_is_zero():
    x = mx.random.normal((2, 5, 3)).astype(mx.float16)
    found = within(x, mx.array([3, 1]))
    assert found.dtype == mx.float16
    np.testing.assert_array_equal(np.array(found[:, :3]), np.array(x[:, :3]))
    assert not np.array(found[:, 3:]).any()


def test_rows_are_told_for_a_while():
    rows = OwnRows(mx.array([3]), 8)

    def fail():
        with telling(rows):
            assert own_rows() is rows
            raise RuntimeError("stop")

    assert own_rows() is None
    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert own_rows() is None


class Smoothing:
    """Three rows make one; counts how often its graph is built."""

    def __init__(self):
        self.built = []

    def __call__(self, x):
        self.built.append(x.shape)
        seen = windows(x, 3, own=own_rows())
        return mx.unflatten(seen, -1, (3, -1)).sum(axis=2)


ROWS = Rows(
    lambda x: (x.shape[1],),
    lambda arrays, rows: [
        mx.concatenate([arrays[0], mx.ones((1, rows, 2))], axis=1)[:, :rows]
    ],
)


def smoothed(x):
    padded = np.pad(np.array(x), ((0, 0), (1, 1), (0, 0)))
    return padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]


def check(network, x):
    found = np.array(network(x))
    np.testing.assert_allclose(found, smoothed(x), atol=1e-6)


def test_a_new_length_meets_a_graph_that_is_kept():
    smoothing = Smoothing()
    network = Steady(smoothing, ROWS)
    for length in (40, 33, 34, 35, 36, 40, 37, 34):
        check(network, mx.random.normal((1, length, 2)))
    # The very first is not kept: it computes what the network holds.
    assert smoothing.built == 2 * [(1, 40, 2)]
    for length in (41, 42, 33, 48):
        check(network, mx.random.normal((1, length, 2)))
    assert smoothing.built[2:] == [(1, 48, 2)]


def test_few_lengths_are_kept_at_once_and_several_together_when_met_again():
    smoothing = Smoothing()
    network = Steady(smoothing, None)
    for length in (40, 41, 41, 40, 41):
        check(network, mx.random.normal((1, length, 2)))
    # The very first is not kept: it computes what the network holds.
    assert smoothing.built == [(1, 40, 2), (1, 41, 2), (1, 40, 2)]
    smoothing.built.clear()
    for _ in range(3):
        check(network, mx.random.normal((2, 41, 2)))
    assert smoothing.built == 2 * [(2, 41, 2)]


def test_several_together_are_computed_as_they_are():
    smoothing = Smoothing()
    network = Steady(smoothing, ROWS)
    for length in (40, 33, 34):
        check(network, mx.random.normal((2, length, 2)))
    assert smoothing.built == [(2, 40, 2), (2, 33, 2), (2, 34, 2)]


def attend(qkv, heads, own, recordings):
    """As the kernel."""
    parts = qkv.reshape(recordings, len(qkv) // recordings, 3, heads, -1)
    q, k, v = parts.transpose(2, 0, 3, 1, 4)
    scores = (q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5).astype(mx.float32)
    if own is not None:
        scores = mx.where(mx.arange(k.shape[2]) < own.count[0], scores, -mx.inf)
    y = mx.softmax(scores, axis=-1).astype(v.dtype) @ v
    return y.transpose(0, 2, 1, 3).reshape(len(qkv), -1)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_features_of_a_new_length_are_its_own(monkeypatch, version):
    monkeypatch.setattr(attention_kernel, "supports", lambda width: True)
    monkeypatch.setattr(attention_kernel, "self_attention", attend)
    mx.random.seed(0)
    encoder = ContentVec(test_fused_encoder.CONFIG)
    lengths = (16000, 400, 15000, 15001, 15123, 14999, 15000, 15756, 15759)
    # Louder at the end: what is behind it would change the mean, and the norm's scale.
    sounds = [mx.random.normal((1, n)) * mx.linspace(0.1, 1, n) + 0.05 for n in lengths]
    expected = [encoder(sound, version) for sound in sounds]
    fused_encoder.quicken(encoder)
    rows = fused_encoder.rows_of_features(encoder)
    network = Steady(lambda sound: encoder(sound, version), rows)
    for sound, features in zip(sounds, expected, strict=True):
        found = network(sound)
        assert found.shape == features.shape
        assert mx.abs(found - features).max() < 2e-3 * mx.abs(features).max()


def test_an_encoder_whose_attention_plans_is_left_as_it_is():
    encoder = ContentVec(test_fused_encoder.CONFIG)
    assert fused_encoder.rows_of_features(encoder) is None
    fused_encoder.quicken(encoder)
    assert fused_encoder.rows_of_features(encoder) is None


def test_a_mean_over_all_frames_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(attention_kernel, "supports", lambda width: True)
    config = test_fused_encoder.CONFIG.__dict__ | {
        "bottleneck_size": 8,
        "centred": True,
    }
    encoder = ContentVec(type(test_fused_encoder.CONFIG)(**config))
    fused_encoder.quicken(encoder)
    assert fused_encoder.rows_of_features(encoder) is None


def test_the_prior_of_a_new_length_is_its_own(monkeypatch):
    for name, plain in test_fused_prior.PLAIN.items():
        monkeypatch.setattr(fused_prior, name, plain)
    network = test_fused_prior.voice()
    assert fused_prior.rows_of_prior(network) is None
    given = [test_fused_prior.inputs(1, T) for T in (70, 65, 75, 50, 79, 75)]
    expected = [network.prior(*one) for one in given]
    fused_prior.quicken(network)
    prior = Steady(network.prior, fused_prior.rows_of_prior(network))
    for one, latent in zip(given, expected, strict=True):
        found = prior(*one)
        assert found.shape == latent.shape
        assert mx.abs(found - latent).max() < 2e-5 * mx.abs(latent).max()


def test_salience_of_a_new_length_is_its_own(monkeypatch):
    net = test_fused_unet.network(base_channels=16)
    # Above zero behind the end, too, as a norm leaves what is padded with zeros.
    mels = [3 + mx.random.normal((1, T, 16)) for T in (64, 52, 56, 40, 60, 56)]
    expected = [net(mel) for mel in mels]
    assert fused_unet.rows_of_salience(net) is None
    monkeypatch.setattr(fused_unet.conv_kernel, "supports", lambda *_: True)
    monkeypatch.setattr(fused_unet.plane_kernel, "supports", lambda: False)
    monkeypatch.setattr(fused_unet, "image_conv", test_fused_unet.plain_image_conv)
    monkeypatch.setattr(fused_unet, "pooled", nn.AvgPool2d(2, stride=2))
    fused_unet.quicken(net, short=True)

    def salience(mel):
        x, own = net.image_features(mel), own_rows()
        if own is None:
            return net.classify(net.fc[0](x))
        # The recurrent kernel ends with the own rows; what is behind is any number.
        rows = [net.fc[0](x[:, :n]) for n in range(1, own.of + 1)]
        rows = [mx.pad(r, [(0, 0), (0, own.of - r.shape[1]), (0, 0)]) for r in rows]
        return net.classify(mx.concatenate(rows)[own.count[0] - 1][None])

    network = Steady(salience, fused_unet.rows_of_salience(net))
    for mel, wanted in zip(mels, expected, strict=True):
        found = network(mel)
        assert found.shape == wanted.shape
        assert mx.abs(found - wanted).max() < 5e-3 * mx.abs(wanted).max()
