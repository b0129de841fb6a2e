"""The encoder's front end in training equals the model's, forward and backward."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from rvc_mlx import normed_conv
from rvc_mlx.models.contentvec import ContentVec, ContentVecConfig
from rvc_mlx.training.front_end import quicken

CONFIG = ContentVecConfig(
    conv_dim=16,
    hidden_size=32,
    num_layers=1,
    num_heads=2,
    intermediate_size=32,
    pos_conv_kernel=16,
    pos_conv_groups=2,
    final_proj_size=0,
    bottleneck_size=8,
)


def test_features_and_gradients_are_the_models():
    mx.random.seed(0)
    encoder = ContentVec(CONFIG)
    # An offset and unlike levels: the norm's mean and variance count.
    audio = mx.random.normal((2, 16080)) * mx.array([[0.1], [0.4]]) + 0.05
    weights = encoder.trainable_parameters()

    def loss(weights):
        encoder.update(weights)
        return mx.sin(3 * encoder(audio)).sum()

    layers = encoder.feature_extractor(audio)
    value, slopes = mx.value_and_grad(loss)(weights)
    quicken(encoder)
    assert encoder.parameters().keys() == weights.keys()
    assert np.allclose(encoder.feature_extractor(audio), layers, rtol=1e-4, atol=1e-7)
    again, found = mx.value_and_grad(loss)(weights)
    assert again.item() == pytest.approx(value.item(), rel=1e-5)
    expected = dict(tree_flatten(slopes))
    largest = max(mx.abs(slope).max().item() for slope in expected.values())
    for name, slope in tree_flatten(found):
        size = max(mx.abs(expected[name]).max().item(), 1e-4 * largest)
        assert mx.abs(slope - expected[name]).max().item() < 1e-3 * size, name


def test_no_kernel_without_a_slope_is_asked(monkeypatch):
    monkeypatch.setattr(normed_conv, "on_cuda", lambda: True)
    monkeypatch.setattr(normed_conv, "_on_cuda", None)
    encoder = ContentVec(CONFIG)
    quicken(encoder)
    mx.eval(encoder(mx.zeros((1, 16080))))


@pytest.mark.gpu
@pytest.mark.skipif(not mx.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_gradients_on_a_gpu_are_the_models():
    mx.random.seed(0)
    encoder = ContentVec(CONFIG)
    audio = 0.3 * mx.random.normal((2, 16080)) + 0.05
    weights = encoder.trainable_parameters()

    def loss(weights):
        encoder.update(weights)
        return mx.square(encoder(audio)).sum()

    def slopes():
        found = tree_flatten(mx.grad(loss)(weights))
        return mx.concatenate([slope.flatten() for _, slope in sorted(found)])

    expected = slopes()
    quicken(encoder)
    distance = mx.linalg.norm(slopes() - expected) / mx.linalg.norm(expected)
    assert distance.item() < 2e-2  # products in TF32, ten bits of fraction


def test_audio_that_does_not_fit_the_stride_is_refused():
    encoder = ContentVec(CONFIG)
    quicken(encoder)
    with pytest.raises(ValueError, match="16081 samples"):
        encoder(mx.zeros((1, 16081)))
