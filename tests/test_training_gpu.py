"""What training does only on an NVIDIA GPU, against the same through plain operations."""

from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from rvc_mlx.models.layers import gated
from rvc_mlx.training import forward, fused
from rvc_mlx.training.convolutions import Convolutions
from rvc_mlx.training.forward import draw
from rvc_mlx.training.losses import spectrogram
from rvc_mlx.training.parametrization import Packing, folded, initial, shapes
from rvc_mlx.training.presets import preset
from rvc_mlx.training.step import TrainStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not mx.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
CONFIG = preset("small", "v2", True, 1, feature_size=64)
FRAMES = 60


def make_batch():
    rng = np.random.default_rng(0)
    wave = 0.1 * rng.standard_normal((2, FRAMES * CONFIG.hop)).astype(np.float32)
    return SimpleNamespace(
        phone=rng.standard_normal((2, FRAMES, 64)).astype(np.float32),
        lengths=np.array([FRAMES, FRAMES - 7], np.int32),
        pitch=rng.integers(1, 256, (2, FRAMES)).astype(np.int32),
        pitchf=rng.uniform(80, 400, (2, FRAMES)).astype(np.float32),
        spec=np.array(spectrogram(mx.array(wave), CONFIG)),
        wave=wave,
        sid=np.zeros(2, np.int32),
    )


@pytest.mark.parametrize("network", [0, 1])
def test_weight_norm_and_its_slope_are_those_of_plain_operations(network):
    parameters = initial(CONFIG, 0)[network]
    packing = Packing(shapes(CONFIG)[network])
    vector = packing.pack(parameters)
    weights = folded(parameters)
    kernel = packing.plain(vector, "none.", mx.float32)
    assert kernel.keys() == weights.keys()
    for name, value in weights.items():
        assert mx.allclose(kernel[name], value, rtol=1e-5, atol=1e-7), name

    factors = {
        name: mx.random.normal(value.shape, key=mx.random.key(number))
        for number, (name, value) in enumerate(weights.items())
    }

    def plain(vector):
        made = folded(packing.unpack(vector))
        return sum(mx.sum(made[name] * factors[name]) for name in made)

    wanted, got = mx.grad(plain)(vector), packing.slope(vector, factors)
    error = mx.linalg.norm(got - wanted) / mx.linalg.norm(wanted)
    assert error.item() < 1e-5


@pytest.mark.parametrize("compiled", ["no", "traced"])
@pytest.mark.parametrize("grouped", ["native", "unfolded", "windowed"])
def test_quick_step_is_the_native_step(grouped, compiled, monkeypatch):
    batch = make_batch()
    draws = draw(CONFIG, batch, 0, 0)

    def losses(convolutions, compiled):
        step = TrainStep(
            CONFIG,
            *initial(CONFIG, 0),
            convolutions=convolutions,
            compiled=compiled,
        )
        return {name: value.item() for name, value in step(batch, draws).items()}

    with monkeypatch.context() as plain:
        plain.setattr(forward, "quicken_blocks", lambda vocoder: None)
        native = losses(Convolutions(), "no")
    quick = losses(Convolutions("batched", "batched", grouped), compiled)
    # Products in TF32, ten bits of fraction, through a whole network and back.
    assert quick == pytest.approx(native, rel=5e-3)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("shape", [(2, 100, 32), (3, 7, 16), (5, 7)])
def test_rectifier_and_its_slope(shape, dtype):
    x = mx.random.normal(shape, key=mx.random.key(0)).astype(dtype)
    back = mx.random.normal(shape, key=mx.random.key(1)).astype(dtype)
    [y], [slope] = mx.vjp(fused.leaky_relu, [x], [back])
    rtol = 1e-6 if dtype == mx.float32 else 1e-2  # plain operations round the slope
    assert mx.allclose(y, mx.maximum(x, 0.1 * x), rtol)
    assert mx.allclose(slope, mx.where(x > 0, back, 0.1 * back), rtol)
    columns = fused.leaky_relu(x.swapaxes(0, 1))  # values that do not lie in order
    assert mx.array_equal(columns, y.swapaxes(0, 1))


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(mx.float32, 2e-6), (mx.float16, 2e-3), (mx.bfloat16, 1.6e-2)],
)
@pytest.mark.parametrize(
    ("quick", "plain"), [(fused.gelu, nn.gelu), (fused.gate, gated)]
)
@pytest.mark.parametrize("shape", [(9, 64, 32), (3, 7, 6)])  # in whole packs, and not
def test_element_wise_functions_and_their_slopes(quick, plain, shape, dtype, tolerance):
    x = mx.random.normal(shape).astype(dtype)
    cotangent = mx.random.normal(plain(x).shape).astype(dtype)
    with mx.stream(mx.cpu):
        given = x.astype(mx.float32), cotangent.astype(mx.float32)
        wanted = [
            part[0] for part in mx.vjp(lambda v: plain(v), [given[0]], [given[1]])
        ]
        mx.eval(wanted)
    found = [part[0] for part in mx.vjp(quick, [x], [cotangent])]
    for ours, exact in zip(found, wanted, strict=True):
        assert ours.dtype == dtype
        assert mx.abs(ours.astype(mx.float32) - exact).max().item() < tolerance
