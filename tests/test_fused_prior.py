"""The prior as it is computed on CUDA equals the model."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from rvc_mlx import fused_prior
from rvc_mlx.models.layers import gated
from rvc_mlx.models.synthesizer import Synthesizer
from rvc_mlx.models.vits import RELATIVE_WINDOW, Encoder, RelativeAttention
from rvc_mlx.steady import OwnRows
from rvc_mlx.training.presets import preset

W = RELATIVE_WINDOW
on_cuda = pytest.mark.skipif(not mx.cuda.is_available(), reason="needs a CUDA GPU")
DTYPES = [mx.float32, mx.float16, mx.bfloat16]


def split_heads(qkv, heads, B):
    rows = qkv.reshape(B, len(qkv) // B, 3, heads, -1)
    parts = rows.transpose(2, 0, 3, 1, 4)
    pads = [(0, 0), (0, 0), (W, W), (0, 0)]
    return [parts[0], mx.pad(parts[1], pads), mx.pad(parts[2], pads)]


def relative_softmax(scores, offsets, own=None):
    T, keys = scores.shape[-2:]
    near = (mx.arange(T)[:, None] + mx.arange(2 * W + 1))[None, None]
    near = mx.broadcast_to(near, offsets.shape)
    last = T if own is None else own.count[0]
    padding = (mx.arange(keys) < W) | (mx.arange(keys) >= last + W)
    exact = scores.astype(mx.float32) - 1e4 * padding
    moved = mx.take_along_axis(exact, near, axis=-1) + offsets.astype(mx.float32)
    exact = mx.put_along_axis(exact, near, moved, axis=-1)
    weights = mx.softmax(exact, axis=-1).astype(scores.dtype)
    return [weights, mx.take_along_axis(weights, near, axis=-1)]


def add_halves(x, total, made):
    residual, skip = mx.split(made, 2, axis=-1)
    return [x + residual, skip if total is None else total + skip]


PLAIN = {
    "split_heads": split_heads,
    "relative_softmax": relative_softmax,
    "gated": gated,
    "add_halves": add_halves,
}


def voice(dtype=mx.float32):
    mx.random.seed(0)
    network = Synthesizer(preset("small", "v2", True, 3).model)
    network.update(
        tree_map(lambda a: 0.1 * mx.random.normal(a.shape), network.parameters())
    )
    network.set_dtype(dtype)
    mx.eval(network.parameters())
    return network


def inputs(B, T=70, dtype=mx.float32):
    return (
        mx.random.normal((B, T, 768)).astype(dtype),
        mx.random.normal((B, T, 64)).astype(dtype),
        mx.random.normal((B, 1, 128)).astype(dtype),
        mx.random.randint(1, 256, (B, T)),
    )


@pytest.mark.parametrize("B", [1, 2])
def test_the_prior_is_put_together_as_the_model_has_it(B, monkeypatch):
    for name, plain in PLAIN.items():
        monkeypatch.setattr(fused_prior, name, plain)
    network, given = voice(), inputs(B)
    expected = network.prior(*given)
    fused_prior.quicken(network)
    fused_prior.quicken(network)  # once more changes nothing
    assert isinstance(network.flow, fused_prior.InvertedFlow)
    found = np.array(network.prior(*given))
    scale = np.abs(np.array(expected)).max()
    np.testing.assert_allclose(found / scale, np.array(expected) / scale, atol=2e-5)


def test_one_speaker_serves_several_recordings(monkeypatch):
    for name, plain in PLAIN.items():
        monkeypatch.setattr(fused_prior, name, plain)
    network = voice()
    x, g = mx.random.normal((3, 20, 64)), mx.random.normal((1, 1, 128))
    expected = network.flow(x, g, mx.ones((3, 20, 1)), reverse=True)
    fused_prior.quicken(network)
    found = network.flow(x, g, reverse=True)
    assert mx.abs(found - expected).max() < 2e-5 * mx.abs(expected).max()


def test_a_width_that_is_no_multiple_of_8_stays_as_it_is():
    network = voice()
    network.enc_p.encoder = Encoder(64, 100, 2, 1, 3)
    fused_prior.quicken(network)
    assert isinstance(network.enc_p.encoder.attn_layers[0], RelativeAttention)


def test_rows_of_scores_are_kept_only_where_every_card_can(monkeypatch):
    asked = []

    def launch(inputs, outputs, grid, *, scalars, constants):
        asked.append((grid.shared_memory, constants["KEPT"]))
        return [mx.zeros(shape, dtype) for shape, dtype in outputs]

    monkeypatch.setattr(fused_prior, "_SOFTMAX", launch)
    for T in (100, 3198, 12268, 12269, 67_000):
        fused_prior.relative_softmax(
            mx.zeros((1, 1, T, T + 2 * W))[:, :, :1], mx.zeros((1, 1, 1, 2 * W + 1))
        )
    kib = 1024
    assert asked == [
        *((16 * kib, True), (16 * kib, True), (48 * kib, True)),
        *((0, False), (0, False)),
    ]


def test_what_it_does_not_serve_is_refused():
    network = voice()
    fused_prior.quicken(network)
    x, g = mx.zeros((1, 20, 64)), mx.zeros((1, 1, 128))
    with pytest.raises(ValueError, match="runs backwards only"):
        network.flow(x, g)
    with pytest.raises(ValueError, match="there is no mask here"):
        network.flow(x, g, mx.ones((1, 20, 1)), reverse=True)
    with pytest.raises(ValueError, match="there is no mask here"):
        network.enc_p.encoder(x, mx.ones((1, 20, 1)))


CASES = {
    "split_heads": lambda d: (mx.random.normal((2 * 37, 96)).astype(d), 2, 2),
    "relative_softmax": lambda d: (
        (4 * mx.random.normal((2, 2, 333, 333 + 2 * W))).astype(d),
        mx.random.normal((2, 2, 333, 2 * W + 1)).astype(d),
    ),
    "limited relative_softmax": lambda d: (
        *CASES["relative_softmax"](d),
        OwnRows(mx.array([200]), 333),
    ),
    "gated": lambda d: (mx.random.normal((2, 37, 48)).astype(d),),
    "add_halves": lambda d: tuple(
        mx.random.normal((2, 37, n)).astype(d) for n in (24, 24, 48)
    ),
}


@pytest.mark.gpu
@on_cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_a_kernel_equals_plain_operations(name, dtype):
    given = CASES[name](dtype)
    name = name.split()[-1]
    found, expected = (f(*given) for f in (getattr(fused_prior, name), PLAIN[name]))
    tolerance = 1e-6 if dtype == mx.float32 else 1e-2
    pairs = (
        zip(found, expected, strict=True)
        if isinstance(found, list)
        else [(found, expected)]
    )
    for one, other in pairs:
        assert one.dtype == dtype
        assert one.shape == other.shape
        close = mx.allclose(
            one.astype(mx.float32), other.astype(mx.float32), tolerance, tolerance
        )
        assert close


@pytest.mark.gpu
@on_cuda
def test_rows_that_no_block_can_keep(monkeypatch):
    scores, offsets = CASES["relative_softmax"](mx.float32)
    kept = fused_prior.relative_softmax(scores, offsets)
    monkeypatch.setattr(fused_prior, "_LONGEST_ROW", 0)
    for one, other in zip(
        fused_prior.relative_softmax(scores, offsets), kept, strict=True
    ):
        assert mx.allclose(one, other, 1e-6, 1e-6)


@pytest.mark.gpu
@on_cuda
@pytest.mark.parametrize("B", [1, 2])
def test_the_prior_on_the_gpu(B):
    network, given = voice(), inputs(B, 3198)
    expected = np.array(network.prior(*given))
    fused_prior.quicken(network)
    scale = np.abs(expected).max()
    assert np.abs(np.array(network.prior(*given)) - expected).max() < 5e-3 * scale
