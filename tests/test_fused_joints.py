"""What lies between a vocoder's stages on CUDA is what the model has there."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from rvc_mlx import fused_joints
from rvc_mlx.models.nsf_hifigan import Generator, MRFGenerator, NSFGenerator
from rvc_mlx.training.presets import preset

on_cuda = pytest.mark.skipif(not mx.cuda.is_available(), reason="needs a CUDA GPU")
CONFIG = replace(preset("small", "v2", True, 3).model, upsample_initial_channel=128)


def vocoder(kind, config=CONFIG):
    """A vocoder whose audio is not cut at 1."""
    mx.random.seed(0)
    network = kind(config)

    def drawn(a):
        seen = a[0].size if a.ndim == 3 else 100
        return seen**-0.5 * mx.random.normal(a.shape)

    network.update(tree_map(drawn, network.parameters()))
    return network


def plain(x, beside=None, bias=None, slope=1.0):
    exact = x.astype(mx.float32)
    for added in (beside, bias):
        exact = exact if added is None else exact + added.astype(mx.float32)
    return mx.maximum(exact, slope * exact).astype(x.dtype)


@pytest.mark.parametrize("kind", [Generator, NSFGenerator, MRFGenerator])
def test_stages_are_joined_as_the_model_has_them(monkeypatch, kind):
    monkeypatch.setattr(fused_joints, "joined", plain)
    network = vocoder(kind)
    z = mx.random.normal((2, 12, CONFIG.inter_channels))
    g = mx.random.normal((2, 1, CONFIG.gin_channels))
    samples = 12 * np.prod(CONFIG.upsample_rates)
    source = [] if kind is Generator else [mx.random.normal((2, int(samples), 1))]
    expected = np.array(network(z, g, *source))
    fused_joints.quicken_joints(network)
    fused_joints.quicken_joints(network)  # once more changes nothing
    assert not any("bias" in upsample for upsample, _, _ in network.stages())
    found = np.array(network(z, g, *source))
    # Sums in another order, in a network whose weights are large.
    np.testing.assert_allclose(found, expected, atol=3e-4 * np.abs(expected).max())


def test_a_width_that_is_no_multiple_of_8_stays_as_it_is():
    network = vocoder(Generator, replace(CONFIG, upsample_initial_channel=80))
    fused_joints.quicken_joints(network)
    assert not isinstance(network._upsampled, fused_joints.Joints)


@pytest.mark.gpu
@on_cuda
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_the_kernel_equals_plain_operations(dtype):
    x, beside = (mx.random.normal((2, 37, 24)).astype(dtype) for _ in range(2))
    bias = mx.random.normal((24,))
    tolerance = 1e-6 if dtype == mx.float32 else 1e-2
    for given in ((x, beside, bias), (x, None, bias, 0.1), (x, beside), (x,)):
        found, expected = fused_joints.joined(*given), plain(*given)
        assert found.dtype == dtype
        assert mx.allclose(found, expected, tolerance, tolerance)
