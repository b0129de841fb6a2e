"""The vocoder's convolutions as products are the convolutions."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from test_fused_joints import CONFIG, plain, vocoder

from rvc_mlx import conv_kernel, fused_waveform, product_convs
from rvc_mlx.fused_joints import Joints, quicken_joints
from rvc_mlx.models import nsf_hifigan
from rvc_mlx.models.nsf_hifigan import Generator, MRFGenerator, NSFGenerator
from rvc_mlx.product_convs import ProductConv, ProductUp, quicken_convs

needs_gpu = pytest.mark.skipif(
    not conv_kernel.supports(32, 7, mx.float32), reason="needs a CUDA GPU like an H100"
)


def filled(layer, bias):
    mx.random.seed(0)
    layer.weight = mx.random.normal(layer.weight.shape)
    if bias:
        layer.bias = mx.random.normal((len(layer.weight),))
    return layer


def check(found, expected, tolerance=1e-5):
    found, expected = (np.array(a.astype(mx.float32)) for a in (found, expected))
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("inputs", "taps", "stride", "padding"),
    [(24, 7, 1, 3), (1, 80, 40, 20), (1, 8, 4, 2), (1, 5, 3, 1), (1, 1, 1, 0)],
)
@pytest.mark.parametrize("length", [80, 121, 240])
def test_a_convolution_is_a_product(inputs, taps, stride, padding, length, bias):
    layer = nn.Conv1d(inputs, 16, taps, stride, padding, bias=bias)
    x = mx.random.normal((2, length, inputs))
    check(ProductConv(filled(layer, bias))(x), layer(x))


@pytest.mark.parametrize("most", [0, 1 << 16])
@pytest.mark.parametrize("length", [41, 56, 121])
def test_a_recording_alone_meets_few_shapes(monkeypatch, length, most):
    monkeypatch.setattr(product_convs, "_FEW_ROWS", most)
    met = []
    real = product_convs.windows

    def watched(x, taps, **options):
        met.append(options["frames"])
        return real(x, taps, **options)

    monkeypatch.setattr(product_convs, "windows", watched)
    conv = filled(nn.Conv1d(24, 16, 7, padding=3), True)
    up = filled(nn.ConvTranspose1d(24, 16, 4, 2, 1), True)
    for x in mx.random.normal((1, length, 24)), mx.random.normal((2, length, 24)):
        check(ProductConv(conv)(x), conv(x))
        check(ProductUp(up)(x), up(x))
    alone = {41: 48, 56: 56, 121: 128}[length] if most else length
    assert met == 2 * [alone] + 2 * [length]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("taps", "stride", "padding", "behind"),
    [
        *((24, 12, 6, 0), (20, 10, 5, 0), (4, 2, 1, 0), (16, 10, 3, 0)),
        *((10, 5, 3, 1), (16, 8, 4, 0), (6, 3, 2, 1), (9, 4, 0, 0), (2, 4, 0, 3)),
    ],
)
@pytest.mark.parametrize("length", [1, 2, 17])
def test_a_transposed_convolution_is_a_product(
    taps, stride, padding, behind, length, bias
):
    layer = nn.ConvTranspose1d(
        8, 16, taps, stride, padding, output_padding=behind, bias=bias
    )
    x = mx.random.normal((2, length, 8))
    check(ProductUp(filled(layer, bias))(x), layer(x))


@pytest.mark.parametrize("kind", [Generator, NSFGenerator, MRFGenerator])
def test_a_vocoder_decodes_as_it_did(monkeypatch, kind):
    """Up to the last layer, which has a kernel."""

    lasts = []

    def last(x, conv_post):
        lasts.append(conv_post)
        return nsf_hifigan.waveform(x, conv_post)

    monkeypatch.setattr(product_convs, "supports", lambda *given: True)
    monkeypatch.setattr(fused_waveform, "waveform", last)
    network = vocoder(kind)
    z = mx.random.normal((2, 12, CONFIG.inter_channels))
    g = mx.random.normal((2, 1, CONFIG.gin_channels))
    samples = 12 * int(np.prod(CONFIG.upsample_rates))
    source = [] if kind is Generator else [mx.random.normal((2, samples, 1))]
    expected = network(z, g, *source)
    for _ in range(2):  # the second time changes nothing
        quicken_convs(network)
    assert isinstance(network.conv_pre, ProductConv)
    assert all(isinstance(up, ProductUp) for up, _, _ in network.stages())
    check(network(z, g, *source), expected, 3e-4)
    assert lasts == [network.conv_post]
    monkeypatch.setattr("rvc_mlx.fused_joints.joined", plain)
    quicken_joints(network)
    assert isinstance(network._upsampled, Joints)
    check(network(z, g, *source), expected, 3e-4)


def test_elsewhere_it_stays_as_it_is(monkeypatch):
    monkeypatch.setattr(product_convs, "supports", lambda *given: False)
    network = vocoder(Generator)
    quicken_convs(network)
    assert isinstance(network.conv_pre, nn.Conv1d)
    assert network._waveform is nsf_hifigan.waveform
    assert isinstance(network.ups[0], nn.ConvTranspose1d)


@pytest.mark.parametrize("width", [64, 128, 256])
def test_a_vocoder_is_served_if_its_last_layer_is(monkeypatch, width):
    def supports(channels, taps, dtype):
        return channels in conv_kernel.CHANNELS and taps == 7

    monkeypatch.setattr(product_convs, "supports", supports)
    network = vocoder(Generator, replace(CONFIG, upsample_initial_channel=width))
    quicken_convs(network)
    assert product_convs.serves(network) == (width == 256)
    assert isinstance(network.conv_pre, ProductConv) == (width == 256)
    assert not product_convs.serves(nn.Linear(3, 4))


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("kind", [Generator, NSFGenerator, MRFGenerator])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_a_quick_vocoder_decodes_alike(dtype, kind):
    config = replace(CONFIG, upsample_initial_channel=256)
    network, other = (vocoder(kind, config) for _ in range(2))
    z = mx.random.normal((2, 12, CONFIG.inter_channels))
    g = mx.random.normal((2, 1, CONFIG.gin_channels))
    samples = 12 * int(np.prod(CONFIG.upsample_rates))
    source = [] if kind is Generator else [mx.random.normal((2, samples, 1))]
    with mx.stream(mx.cpu):
        expected = np.array(other(z, g, *source))
    assert 0.05 < np.sqrt(np.mean(expected**2)) < 0.97
    network.set_dtype(dtype)
    quicken_convs(network)
    quicken_joints(network)
    assert network._waveform is fused_waveform.waveform
    assert isinstance(network._upsampled, Joints)
    found = network(*(a.astype(dtype) for a in (z, g, *source)))
    assert found.dtype == mx.float32
    error = np.array(found) - expected
    tolerance = 0.1 if dtype == mx.bfloat16 else 0.02
    assert np.sqrt(np.mean(error**2)) < tolerance * np.sqrt(np.mean(expected**2))
