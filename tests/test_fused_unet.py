"""The pitch net as it is computed on CUDA equals the model."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from rvc_mlx import fused_unet, image_conv, plane_kernel
from rvc_mlx.models.layers import fold_batch_norm
from rvc_mlx.models.rmvpe import RMVPE, RMVPEConfig
from rvc_mlx.steady import within

CONFIG = RMVPEConfig(
    base_channels=8, blocks=2, levels=2, inter_layers=1, n_mels=16, gru_size=8
)


def network(dtype=mx.float32, **sizes):
    """A network with random batch norms, folded."""
    mx.random.seed(0)
    net = RMVPE(replace(CONFIG, **sizes))
    moved = [
        (name, mx.random.uniform(0.5, 1.5, value.shape) if value.ndim == 1 else value)
        for name, value in tree_flatten(net.parameters())
    ]
    net.load_weights(moved)
    net.eval()
    fold_batch_norm(net)
    net.set_dtype(dtype)
    mx.eval(net.parameters())
    return net


def plain(x, bias, shortcut=None, offset=None, own=None):
    """The kernel in plain operations."""
    y = mx.maximum(x.astype(mx.float32) + bias, 0)
    if shortcut is not None:
        y = y + shortcut.astype(mx.float32) + offset
    if own is not None:
        y[:, own:] = 0
    return y.astype(x.dtype)


def test_the_blocks_are_put_together_as_the_model_has_them(monkeypatch):
    monkeypatch.setattr(fused_unet, "rectified", plain)
    monkeypatch.setattr(fused_unet, "pooled", nn.AvgPool2d(2, stride=2))
    net, mel = network(), mx.random.normal((2, 32, 16))
    expected = net.image_features(mel)
    fused_unet.quicken(net)
    fused_unet.quicken(net)  # once more changes nothing
    kinds = {type(module).__name__ for module in net.modules()}
    assert {"FusedBlock", "Rectified"} <= kinds
    assert "ConvBlockRes" not in kinds
    np.testing.assert_allclose(net.image_features(mel), expected, rtol=1e-5, atol=1e-5)


def unpacked(weight):
    """``[C_out, side, side, C_in]`` as it was before it was packed."""
    taps, padded, inputs = weight.array.shape
    w = weight.array.reshape(taps, padded // 16, 2, 4, 2, inputs)
    w = w.transpose(1, 3, 2, 4, 0, 5).reshape(padded, weight.side, weight.side, inputs)
    return w[: weight.outputs].astype(mx.float32)


def plain_image_conv(x, weight, bias, *, shortcut=None, rectify=True, own=None):
    """``image_conv`` in plain operations."""
    image_conv.check_arrays(x, weight, bias, shortcut)
    assert x.shape[2] in (4, 8) or x.shape[2] % 16 == 0
    if own is not None:
        x = within(x, own.count * x.shape[1] // own.of)
    around = ((weight.side - 1) // 2, weight.side // 2)
    wide = mx.pad(x.astype(mx.float32), [(0, 0), around, around, (0, 0)])
    y = mx.conv2d(wide, unpacked(weight)) + bias
    y = mx.maximum(y, 0) if rectify else y
    return (y if shortcut is None else y + shortcut).astype(x.dtype)


@pytest.mark.parametrize("rows", [4, 132])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_images_go_through_kernels_alone(monkeypatch, rows, dtype):
    def refuse(*_):
        raise AssertionError("a convolution is left to the library")

    net = network(dtype, base_channels=16)
    mel = (3 + mx.random.normal((2, rows, 16))).astype(dtype)
    expected = net.image_features(mel).astype(mx.float32)
    monkeypatch.setattr(fused_unet.conv_kernel, "supports", lambda *_: True)
    monkeypatch.setattr(fused_unet.plane_kernel, "supports", lambda: False)
    monkeypatch.setattr(fused_unet, "image_conv", plain_image_conv)
    monkeypatch.setattr(fused_unet, "pooled", nn.AvgPool2d(2, stride=2))
    fused_unet.quicken(net, short=True)
    for layer in (nn.Conv2d, nn.ConvTranspose2d):
        monkeypatch.setattr(layer, "__call__", refuse)
    found = net.image_features(mel)
    assert (found.shape, found.dtype) == (expected.shape, dtype)
    scale = mx.abs(expected).max().item()
    # float32 is cut to float16's ten bits of fraction.
    tolerance = 5e-2 if dtype == mx.bfloat16 else 5e-3
    np.testing.assert_allclose(
        found.astype(mx.float32) / scale, expected / scale, atol=tolerance
    )


@pytest.mark.parametrize("rows", [4, 132, 260, 276])
def test_what_lies_behind_an_image_changes_nothing(monkeypatch, rows):
    monkeypatch.setattr(fused_unet, "rectified", plain)
    monkeypatch.setattr(fused_unet, "pooled", nn.AvgPool2d(2, stride=2))
    net, mel = network(), 3 + mx.random.normal((2, rows, 16))
    expected = net.image_features(mel)
    fused_unet.quicken(net)
    seen = set()
    first = net.unet.encoder.layers[0].conv[0].first
    layer = first.layer
    first.layer = lambda x: seen.add(x.shape[1]) or layer(x)
    found = net.image_features(mel)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert seen == {{4: 4, 132: 144, 260: 288, 276: 288}[rows]}


def test_threads_do_not_mistake_anothers_image_for_their_own():
    extent = fused_unet.Extent()
    extent.own, extent.steady = 132, 144
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(extent.of, 72).result() == 72
    assert extent.of(72) == 66


def test_a_network_whose_norms_are_not_folded_stays_as_it_is():
    net = RMVPE(CONFIG)
    net.eval()
    fused_unet.quicken(net)
    assert not any(isinstance(m, fused_unet.FusedBlock) for m in net.modules())


@pytest.mark.gpu
@pytest.mark.skipif(not mx.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("beside", [False, True])
def test_the_kernel_equals_plain_operations(dtype, beside):
    x, shortcut = (mx.random.normal((2, 9, 5, 24)).astype(dtype) for _ in range(2))
    bias, offset = (mx.random.normal((24,)) for _ in range(2))
    more = (shortcut, offset) if beside else ()
    found = fused_unet.rectified(x, bias, *more)
    assert found.dtype == dtype
    # Sums in another order; in half precision rounded once.
    tolerance = 1e-6 if dtype == mx.float32 else 1e-2
    expected = plain(x, bias, *more).astype(mx.float32)
    assert mx.allclose(found.astype(mx.float32), expected, tolerance, tolerance)
    found = fused_unet.rectified(x, bias, *(more or (None, None)), own=4)
    expected[:, 4:] = 0
    assert mx.allclose(found.astype(mx.float32), expected, tolerance, tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not mx.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_the_pooling_kernel_is_a_mean(dtype):
    x = mx.random.normal((2, 8, 6, 24)).astype(dtype)
    found = fused_unet.pooled(x)
    assert found.dtype == dtype
    expected = nn.AvgPool2d(2, stride=2)(x.astype(mx.float32))
    tolerance = 1e-6 if dtype == mx.float32 else 1e-2
    assert mx.allclose(found.astype(mx.float32), expected, tolerance, tolerance)


@pytest.mark.parametrize("hopper", [False, True])
def test_a_weight_is_packed_for_the_kernel_that_takes_it(monkeypatch, hopper):
    calls = []
    for kernel in (plane_kernel, image_conv):
        name = kernel.__name__
        monkeypatch.setattr(kernel, "image_conv", lambda *_, n=name: calls.append(n))
    monkeypatch.setattr(plane_kernel, "supports", lambda: hopper)
    weight = fused_unet.pack_image_weight(mx.zeros((16, 3, 3, 16)), mx.float16)
    fused_unet.image_conv(mx.zeros((1, 4, 4, 16)), weight, mx.zeros((16,)))
    assert calls == [(plane_kernel if hopper else image_conv).__name__]
