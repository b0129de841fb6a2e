"""The vocoder's residual blocks through the CUDA convolution are the blocks."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from rvc_mlx import conv_kernel, fused_blocks
from rvc_mlx.models.layers import ResBlock, leaky_relu
from rvc_mlx.models.nsf_hifigan import MRFBlock, average_blocks

needs_gpu = pytest.mark.skipif(
    not conv_kernel.supports(32, 3, mx.float32), reason="needs a CUDA GPU like an H100"
)


class Stage:
    """A vocoder's one stage."""

    def __init__(self, blocks: Sequence):
        self._blocks = blocks

    def stages(self):
        return [(None, None, self._blocks)]


def stage(channels, kind=ResBlock, dtype=mx.float32):
    mx.random.seed(1)
    blocks = [kind(channels, k, d) for k, d in ((3, (1, 3)), (7, (1, 5)), (11, (3,)))]
    scale = 0.5 * channels**-0.5
    for block in blocks:
        block.update(
            tree_map(lambda a: scale * mx.random.normal(a.shape), block.parameters())
        )
        block.set_dtype(dtype)
    return blocks


def plain_conv(
    x, weight, bias, *, dilation, slope, residual=None, accumulate=None, scale=1
):
    kernel, output = weight
    pad = (kernel.shape[1] - 1) // 2 * dilation
    y = mx.conv1d(leaky_relu(x, slope), kernel, padding=pad, dilation=dilation) + bias
    added = [a for a in (residual, accumulate) if a is not None]
    return leaky_relu(sum(added, y) * scale, output.slope)


def plain_step(x, step, accumulate=None, scale=1.0):
    (first, second), (bias, last), _, dilation, slope = step
    plain, rectified = conv_kernel.Output(x.dtype), conv_kernel.Output(x.dtype, slope)
    y = plain_conv(x, (first, rectified), bias, dilation=dilation, slope=slope)
    added = {"residual": x, "accumulate": accumulate, "scale": scale}
    return plain_conv(y, (second, plain), last, dilation=1, slope=1, **added)


@pytest.mark.parametrize("kind", [ResBlock, MRFBlock])
@pytest.mark.parametrize(("channels", "steps"), [(32, 5), (256, 0)])
def test_blocks_are_put_together_as_the_model_has_them(
    monkeypatch, channels, steps, kind
):
    made = []
    monkeypatch.setattr(fused_blocks, "supports", lambda *_: True)
    monkeypatch.setattr(
        fused_blocks, "pack_weight", lambda w, *_, output, products=None: (w, output)
    )
    monkeypatch.setattr(conv_kernel, "pack_step", lambda *a: made.append(a) or a)
    monkeypatch.setattr(fused_blocks, "fused_conv", plain_conv)
    monkeypatch.setattr(conv_kernel, "fused_step", plain_step)
    blocks = stage(channels, kind)
    x = mx.random.normal((2, 50, channels))
    expected = np.array(average_blocks(x, blocks))
    found = np.array(fused_blocks.FusedBlocks(Stage(blocks))(x, blocks))
    assert len(made) == steps
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_what_a_hopper_takes_at_once(monkeypatch):
    asked = []
    monkeypatch.setattr(fused_blocks, "supports", lambda *_: True)
    monkeypatch.setattr(
        fused_blocks.step_kernel, "supports", lambda *told: asked.append(told) or True
    )
    monkeypatch.setattr(fused_blocks.step_kernel, "pack_step", lambda *a: a)
    monkeypatch.setattr(fused_blocks.step_kernel, "fused_step", plain_step)
    blocks = stage(256)
    x = mx.random.normal((2, 50, 256))
    expected = np.array(average_blocks(x, blocks))
    found = np.array(fused_blocks.FusedBlocks(Stage(blocks))(x, blocks))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    dilated = [(3, 1), (3, 3), (7, 1), (7, 5), (11, 3)]
    assert asked == [(256, taps, d, mx.float32) for taps, d in dilated]


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", conv_kernel.DTYPES)
@pytest.mark.parametrize("channels", [32, 128, 256])
def test_blocks_on_a_gpu_are_the_models(channels, dtype):
    blocks = stage(channels, dtype=dtype)
    x = mx.random.normal((2, 777, channels)).astype(dtype)
    fused = fused_blocks.FusedBlocks(Stage(blocks))(x, blocks)
    expected = average_blocks(x, blocks).astype(mx.float32)
    difference = mx.abs(fused.astype(mx.float32) - expected).max()
    error = (difference / mx.abs(expected).max()).item()
    assert error < (2e-2 if dtype == mx.bfloat16 else 5e-3)
