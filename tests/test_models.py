"""The MLX networks on the CPU: shapes, loading, and parity with the PyTorch reference.

Parity is float32 against float32: the two sum in other orders, which leaves a few 1e-7
of the result's scale per layer; 1e-5 is a margin of ten on the deepest net here.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten, tree_map
from tiny_models import (
    VOICES,
    arrays,
    make_contentvec,
    make_rmvpe,
    make_voice,
    narrow_refinegan,
    randomize,
)

from rvc_mlx import pitch
from rvc_mlx.models import contentvec, rmvpe, synthesizer, vits
from rvc_mlx.models.layers import (
    fold_weight_norm,
    load_strictly,
    to_channels_last,
)
from rvc_reference.modules import PosteriorEncoder as TorchPosteriorEncoder
from rvc_reference.vocoders import VocoderNoise

TOLERANCE = 1e-5  # of the largest value
DTYPES = [mx.float32, mx.float16, mx.bfloat16]
SIZED = ["contentvec", "rmvpe", *(n for n in VOICES if n != "refinegan-wide")]


@pytest.fixture(autouse=True)
def small_and_plain(request, monkeypatch):
    """MLX's CPU back end would start a C compiler for each fused activation."""
    if "refinegan-wide" not in request.node.name:
        narrow_refinegan(monkeypatch)
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    mx.disable_compile()
    yield
    mx.enable_compile()
    mx.set_default_device(device)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_close(actual, expected, tolerance=TOLERANCE):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    difference = np.abs(actual - expected) / np.abs(expected).max()
    assert difference.max() <= tolerance
    assert difference.mean() <= tolerance / 5


def channels_first(x):
    return torch.from_numpy(np.ascontiguousarray(np.swapaxes(x, 1, 2)))


def run_torch(function, *inputs):
    """Call the reference with numpy arrays; tuples come back as lists of numpy."""
    with torch.inference_mode():
        result = function(*(torch.from_numpy(x) for x in inputs))
    if isinstance(result, torch.Tensor):
        return result.numpy()
    return [r.numpy() for r in result]


@cache
def pair(name):
    """The reference and its twin; both stay unchanged."""
    if name == "contentvec":
        return make_contentvec()
    return make_rmvpe() if name == "rmvpe" else make_voice(name)


def posterior_encoder():
    reference = TorchPosteriorEncoder(33, 12, 16, 8)
    randomize(reference, 4)
    twin = vits.PosteriorEncoder(33, 12, 16, 8)
    load_strictly(twin, arrays(reference))
    return reference, twin


def fresh(name):
    """The twin's class and configuration again, not loaded, and its torch tensors."""
    reference, twin = pair(name)
    sanitize = {"contentvec": contentvec, "rmvpe": rmvpe}.get(name, synthesizer)
    return type(twin)(twin.config), sanitize.sanitize(arrays(reference))


# One case per network: what goes in, what must come out -------------------------------

F = 5  # frames


@dataclass(frozen=True)
class Case:
    """A call of a network: which, how, its float inputs, integer ones, output shapes."""

    name: str
    call: Callable
    floats: Callable[[], list]
    shapes: tuple
    integers: tuple = ()


def vocoder_inputs(name, frames=F, batch=2):
    _, twin = pair(name)
    config = twin.config
    inputs = [normal(batch, frames, 12), normal(batch, 1, 8, seed=1)]
    if config.f0:
        inputs.append(normal(batch, frames * config.samples_per_frame, 1, seed=2))
    if config.vocoder == "RefineGAN":
        inputs += [
            normal(batch, frames * n, 6 * channels, seed=3)
            for n, channels in twin.dec.noise_shapes()
        ]
    return inputs


def prior_inputs():
    return [normal(2, F, 256), normal(2, F, 12, seed=1), normal(2, 1, 8, seed=2)]


def posterior_inputs():
    return [normal(2, F, 33), normal(2, 1, 8, seed=1), normal(2, F, 12, seed=2)]


def audio_inputs():
    return [normal(2, 2000)]


COARSE = np.arange(2 * F).reshape(2, F) * 7 + 1
LATENT = (2, F, 12)
CASES = {
    "contentvec-v2": Case("contentvec", lambda n, x: n(x), audio_inputs, ((2, 6, 24),)),
    "contentvec-v1": Case(
        "contentvec", lambda n, x: n(x, "v1"), audio_inputs, ((2, 6, 12),)
    ),
    "rmvpe": Case(
        "rmvpe", lambda n, x: n(x), lambda: [normal(2, 16, 32)], ((2, 16, 360),)
    ),
    "prior": Case("nsf", lambda n, *i: n.prior(*i), prior_inputs, (LATENT,), (COARSE,)),
    "prior-plain": Case("plain", lambda n, *i: n.prior(*i), prior_inputs, (LATENT,)),
    "posterior": Case(
        "posterior", lambda n, *i: n(*i), posterior_inputs, (LATENT,) * 3
    ),
} | {
    name: Case(
        name,
        lambda n, *i: n.dec(*i),
        partial(vocoder_inputs, name),
        ((2, F * int(np.prod(kind.rates))),),
    )
    for name, kind in VOICES.items()
    if name != "refinegan-wide"
}


def cast(name, dtype):
    """The twin with its weights in another type."""
    if name == "posterior":
        network = posterior_encoder()[1]
        network.set_dtype(dtype)
        return network
    _, twin = pair(name)
    network = type(twin)(twin.config)
    network.update(tree_map(lambda p: p.astype(dtype), twin.parameters()))
    network.eval()
    return network


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(CASES))
def test_output_shape_and_dtype(name, dtype):
    # A step of half precision is 5e-4 (11 bits) or 4e-3 (8 bits) of a value; some ten
    # to fifty layers add theirs, and residual paths carry the sum.
    tolerance = {mx.float32: 0, mx.float16: 0.02, mx.bfloat16: 0.15}[dtype]
    case, results = CASES[name], []
    for kind in (mx.float32, dtype):
        inputs = [mx.array(x).astype(kind) for x in case.floats()]
        inputs += map(mx.array, case.integers)
        outputs = case.call(cast(case.name, kind), *inputs)
        results.append(outputs if isinstance(outputs, tuple) else (outputs,))
    for exact, output, shape in zip(*results, case.shapes, strict=True):
        assert output.dtype == dtype
        assert output.shape == shape
        exact, output = (np.array(x.astype(mx.float32)) for x in (exact, output))
        assert np.isfinite(output).all()
        assert np.abs(output - exact).max() <= tolerance * np.abs(exact).max()


# Names, shapes, loading ---------------------------------------------------------------


@pytest.mark.parametrize("name", SIZED)
def test_names_and_shapes_are_the_checkpoint_s(name):
    network, tensors = fresh(name)
    before = {key: value.shape for key, value in tree_flatten(network.parameters())}
    folded = fold_weight_norm(tensors)
    assert set(before) == set(folded)
    arranged = to_channels_last(network, folded)
    assert before == {key: value.shape for key, value in arranged.items()}
    for key, shape in before.items():
        assert sorted(shape) == sorted(folded[key].shape)


def test_posterior_encoder_has_the_checkpoint_s_names():
    reference = TorchPosteriorEncoder(33, 12, 16, 8)
    network = vits.PosteriorEncoder(33, 12, 16, 8)
    names = {key for key, _ in tree_flatten(network.parameters())}
    assert names == set(fold_weight_norm(arrays(reference)))


@pytest.mark.parametrize("name", SIZED)
def test_missing_and_unexpected_tensors_are_named(name):
    network, tensors = fresh(name)
    lost = next(k for k in tensors if k.endswith(".bias"))
    without = {key: value for key, value in tensors.items() if key != lost}
    with pytest.raises(ValueError, match=lost):
        load_strictly(network, without)
    with pytest.raises(ValueError, match=r"dec\.surplus\.weight"):
        load_strictly(network, tensors | {"dec.surplus.weight": np.zeros(3)})


@pytest.mark.parametrize("name", SIZED)
def test_a_tensor_of_another_shape_is_named(name):
    network, tensors = fresh(name)
    wrong = next(k for k in tensors if k.endswith(".bias"))
    with pytest.raises(ValueError, match=wrong):
        load_strictly(network, tensors | {wrong: np.zeros(1000, np.float32)})


def test_loaded_networks_are_in_evaluation_mode():
    for name in SIZED:
        network, tensors = fresh(name)
        load_strictly(network, tensors)
        assert not any(module.training for module in network.modules())


# Weight norm --------------------------------------------------------------------------


def old_weight_norm(layer, dim):
    with pytest.warns(FutureWarning, match="weight_norm"):
        return torch.nn.utils.weight_norm(layer, dim=dim)


def new_weight_norm(layer, dim):
    return torch.nn.utils.parametrizations.weight_norm(layer, dim=dim)


@pytest.mark.parametrize("normed", [old_weight_norm, new_weight_norm])
@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.nn.Conv1d(6, 4, 3),
        lambda: torch.nn.Conv1d(6, 4, 4, groups=2),
        lambda: torch.nn.Conv1d(1, 4, 7),
        lambda: torch.nn.Conv1d(6, 1, 7, bias=False),
        lambda: torch.nn.Conv1d(6, 4, 1),
        lambda: torch.nn.ConvTranspose1d(6, 4, 4, stride=2),
    ],
)
def test_folding_equals_torch(normed, dim, make):
    torch.manual_seed(dim)
    layer = normed(make(), dim)
    with torch.no_grad():
        for name, tensor in layer.named_parameters():
            if name.endswith(("_g", "original0")):
                tensor.uniform_(0.5, 2)
    probe = torch.randn(1, 6 if layer.in_channels == 6 else 1, 20)
    layer(probe)  # the old spelling renews its weight here
    folded = fold_weight_norm({f"a.b.{k}": v for k, v in arrays(layer).items()})
    names = ["weight"] if layer.bias is None else ["bias", "weight"]
    assert sorted(folded) == [f"a.b.{name}" for name in names]
    expected = layer.weight.detach().numpy()
    np.testing.assert_allclose(folded["a.b.weight"], expected, rtol=1e-6, atol=1e-7)


def test_folding_is_done_in_float32_and_leaves_integers():
    v, g = normal(4, 3, 5), normal(4, 1, 1, seed=1)
    half = fold_weight_norm(
        {
            "x.weight_g": g.astype(np.float16),
            "x.weight_v": v.astype(np.float16),
            "x.bias": np.ones(4, np.float16),
            "count": np.array(7),
        }
    )
    assert half["x.weight"].dtype == half["x.bias"].dtype == np.float32
    assert half["count"].dtype == np.int64
    v, g = v.astype(np.float16).astype(float), g.astype(np.float16).astype(float)
    exact = v * g / np.sqrt((v**2).sum((1, 2), keepdims=True))
    np.testing.assert_allclose(half["x.weight"], exact, rtol=1e-6)


def test_what_is_float32_is_not_copied_unless_it_lies_askew():
    value = normal(3, 4)
    value.flags.writeable = False
    askew = np.zeros(17, np.uint8)[1:].view(np.float32)
    turned = normal(3, 4).T[::-1]
    found = fold_weight_norm({"a": value, "b": askew, "c": turned})
    assert found["a"] is value
    assert found["b"].flags.aligned
    assert mx.array_equal(mx.array(found["c"]), mx.array(turned.copy()))
    assert mx.array_equal(mx.array(found["a"]), mx.array(value.copy()))


@pytest.mark.parametrize(
    ("given", "lost"),
    [
        ("up.weight_g", "weight_v"),
        ("up.weight_v", "weight_g"),
        ("up.parametrizations.weight.original0", "original1"),
        ("up.parametrizations.weight.original1", "original0"),
    ],
)
def test_half_a_pair_is_refused(given, lost):
    with pytest.raises(ValueError, match=f"{given} has no .*{lost}"):
        fold_weight_norm({given: normal(3, 1, 1)})


# Layouts ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "shape"),
    [
        ("Conv1d", {"padding": 2, "dilation": 2}, (2, 6, 11)),
        ("Conv1d", {"stride": 3}, (2, 6, 11)),
        ("Conv1d", {"groups": 2, "padding": 1}, (2, 6, 11)),
        ("Conv1d", {"groups": 6, "bias": False}, (2, 6, 11)),
        ("ConvTranspose1d", {"stride": 2, "padding": 1}, (2, 6, 11)),
        (
            "ConvTranspose1d",
            {"stride": 3, "padding": 1, "output_padding": 1},
            (2, 6, 11),
        ),
        ("Conv2d", {"padding": 1}, (2, 6, 7, 8)),
        ("Conv2d", {"stride": 2, "bias": False}, (2, 6, 7, 8)),
        ("ConvTranspose2d", {"stride": 2, "padding": 1}, (2, 6, 7, 8)),
        (
            "ConvTranspose2d",
            {"stride": 2, "padding": 1, "output_padding": 1, "bias": False},
            (2, 6, 7, 8),
        ),
    ],
)
def test_channels_last_equals_torch(kind, options, shape):
    torch.manual_seed(0)
    width = 12 if options.get("groups") == 6 else 4
    reference = getattr(torch.nn, kind)(6, width, 3, **options)
    network = nn.Module()
    network.holder = [getattr(nn, kind)(6, width, 3, **options)]
    load_strictly(network, {f"holder.0.{k}": v for k, v in arrays(reference).items()})
    x = normal(*shape)
    expected = np.moveaxis(run_torch(reference, x), 1, -1)
    last = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    assert_close(network.holder[0](mx.array(last)), expected)


# Parity with the reference ------------------------------------------------------------


@pytest.mark.parametrize("samples", [400, 2567])
def test_contentvec_hidden_states(samples):
    reference, twin = pair("contentvec")
    audio = normal(2, samples)
    states = run_torch(reference, audio)
    assert len(states) == 13
    for depth in (0, 1, 9, 12):
        assert_close(twin.hidden_state(mx.array(audio), depth), states[depth])


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_contentvec_features(version):
    reference, twin = pair("contentvec")
    audio = normal(1, 3000)
    expected = run_torch(lambda x: reference.extract(x, version), audio)
    features = twin(mx.array(audio), version)
    assert features.shape[-1] == twin.config.feature_size(version)
    assert_close(features, expected)


@pytest.mark.parametrize("frames", [8, 24])
def test_rmvpe_salience(frames):
    reference, twin = pair("rmvpe")
    mel = normal(2, frames, 32)
    expected = run_torch(lambda x: reference(x.transpose(1, 2)), mel)
    assert_close(twin(mx.array(mel)), expected)


@pytest.mark.parametrize("frames", [1, 2, 19])
def test_gru(frames):
    reference = torch.nn.GRU(5, 7, batch_first=True, bidirectional=True)
    randomize(reference)
    twin = rmvpe.GRU(5, 7)
    load_strictly(twin, arrays(reference))
    x = normal(2, frames, 5)
    assert twin.hidden_size == 7
    assert_close(twin(mx.array(x)), run_torch(lambda x: reference(x)[0], x))


@pytest.mark.parametrize("frames", [1, 7, 11, 30])
@pytest.mark.parametrize("name", ["nsf", "plain"])
def test_text_encoder(name, frames):
    reference, twin = pair(name)
    features = normal(2, frames, 256)
    coarse = np.random.default_rng(1).integers(1, 256, (2, frames))
    pitches = (coarse,) if twin.config.f0 else ()
    expected = run_torch(
        lambda x, *p: reference.encode_text(x, *(p or (None,))), features, *pitches
    )
    result = twin.enc_p(mx.array(features), *map(mx.array, pitches))
    for mine, theirs in zip(result, expected, strict=True):
        assert_close(mine, theirs)


def frame_mask(frames, *lengths):
    return (np.arange(frames)[None, :, None] < np.array(lengths)[:, None, None]) * (
        np.float32(1)
    )


LENGTHS = (30, 13)


def rows(function, *inputs):
    """The reference of one row at a time, cut to its real frames."""
    return [
        run_torch(function, *(x[i : i + 1, :n] for x in inputs))
        for i, n in enumerate(LENGTHS)
    ]


def assert_rows(result, expected):
    for mine, theirs, n in zip(np.array(result), expected, LENGTHS, strict=True):
        assert not mine[n:].any()
        assert_close(mine[:n], theirs[0])


def test_text_encoder_with_mask():
    reference, twin = pair("nsf")
    features = normal(2, 30, 256)
    coarse = np.random.default_rng(1).integers(1, 256, (2, 30))
    mask = frame_mask(30, *LENGTHS)
    results = twin.enc_p(*map(mx.array, (features, coarse, mask)))
    expected = rows(reference.encode_text, features, coarse)
    for k, result in enumerate(results):
        assert_rows(result, [row[k] for row in expected])


def torch_flow(reference, inverse):
    def run(z, g):
        flow = reference.flow.inverse if inverse else reference.flow
        return flow(z.transpose(1, 2), g.transpose(1, 2)).transpose(1, 2)

    return run


@pytest.mark.parametrize("reverse", [False, True])
def test_flow(reverse):
    reference, twin = pair("nsf")
    z, g = normal(2, 30, 12), normal(2, 1, 8, seed=1)
    expected = run_torch(torch_flow(reference, reverse), z, g)
    assert_close(twin.flow(mx.array(z), mx.array(g), reverse=reverse), expected)


@pytest.mark.parametrize("reverse", [False, True])
def test_flow_with_mask(reverse):
    reference, twin = pair("nsf")
    mask = frame_mask(30, *LENGTHS)
    z, g = normal(2, 30, 12) * mask, normal(2, 1, 8, seed=1)
    expected = rows(torch_flow(reference, reverse), z, g)
    result = twin.flow(mx.array(z), mx.array(g), mx.array(mask), reverse)
    assert_rows(result, expected)


def test_flow_undoes_itself():
    _, twin = pair("nsf")
    z, g = mx.array(normal(1, 30, 12)), mx.array(normal(1, 1, 8, seed=1))
    assert_close(twin.flow(twin.flow(z, g), g, reverse=True), z)


def test_prior():
    reference, twin = pair("nsf")
    features, noise = normal(1, 20, 256), normal(1, 20, 12, seed=1)
    coarse = np.random.default_rng(1).integers(1, 256, (1, 20))
    g = arrays(reference)["emb_g.weight"][1][None]
    expected = run_torch(
        lambda f, c, g, n: reference.prior(*reference.encode_text(f, c), g, n),
        *(features, coarse, g, noise),
    )
    result = twin.prior(*map(mx.array, (features, noise, g[:, None], coarse)))
    assert_close(result, expected)


@pytest.mark.parametrize("masked", [False, True])
def test_posterior_encoder(masked):
    reference, twin = posterior_encoder()
    spec, noise = np.abs(normal(2, 30, 33)), normal(2, 30, 12, seed=1)
    g = normal(2, 1, 8, seed=2)

    def run(spec, g, noise):
        results = reference(*(x.transpose(1, 2) for x in (spec, g, noise)))
        return [r.transpose(1, 2) for r in results]

    mask = mx.array(frame_mask(30, *LENGTHS)) if masked else None
    results = twin(*map(mx.array, (spec, g, noise)), mask)
    if masked:
        expected = rows(run, spec, g, noise)
        for k, result in enumerate(results):
            assert_rows(result, [row[k] for row in expected])
    else:
        for result, theirs in zip(results, run_torch(run, spec, g, noise), strict=True):
            assert_close(result, theirs)


def pitch_curve(frames):
    """Gliding voice with pauses, one of a single frame."""
    f0 = 220 * 2 ** np.sin(np.arange(frames) / 5)
    f0[3:6] = 0
    f0[-3] = 0
    return f0


def torch_noise(samples, harmonics):
    """Noise and starting phases as the reference takes them."""
    return VocoderNoise(
        torch.from_numpy(normal(1, samples, harmonics)),
        torch.linspace(0, 0.9, harmonics)[None],
    )


@pytest.mark.parametrize("name", ["nsf", "mrf", "refinegan"])
def test_source(name):
    reference, twin = pair(name)
    T, U, H = 200, twin.config.samples_per_frame, twin.dec.HARMONICS
    f0, noise = pitch_curve(T), torch_noise(200 * U, H)
    cycles = pitch.sample_cycles(f0, U, linear=twin.config.vocoder == "RefineGAN")
    result = twin.dec.m_source(
        mx.array((cycles > 0).astype(np.float32))[None],
        mx.array(pitch.sample_phases(cycles))[None],
        mx.array(noise.phase.numpy())[None],
        mx.array(noise.source.numpy()),
    )
    expected = run_torch(lambda f0: reference.dec.m_source(f0, noise), f0[None])
    assert_close(result, np.swapaxes(expected, 1, 2), TOLERANCE)


@pytest.mark.parametrize("name", list(VOICES))
def test_vocoder(name):
    """Both decode the reference's source."""
    reference, twin = pair(name)
    config, T = twin.config, 12
    z, g = normal(1, T, 12), normal(1, 1, 8, seed=1)
    inputs, noise, f0 = [], VocoderNoise(), None
    if config.f0:
        noise = torch_noise(T * config.samples_per_frame, twin.dec.HARMONICS)
        f0 = torch.from_numpy(pitch_curve(T))[None]
        with torch.inference_mode():
            source = reference.dec.m_source(f0, noise)
        inputs.append(np.swapaxes(source.numpy(), 1, 2))
    if config.vocoder == "RefineGAN":
        shapes = reference.dec.adain_shapes()
        for stage in range(len(config.upsample_rates)):
            own = [key for key in shapes if key.startswith(f"adain.{stage}.")]
            values = [
                normal(1, T * n, C, seed=zlib.crc32(key.encode()))
                for key, (n, C) in ((key, shapes[key]) for key in own)
            ]
            noise.adain |= dict(zip(own, map(torch.from_numpy, values), strict=True))
            inputs.append(np.concatenate(values, axis=-1))
    expected = run_torch(
        lambda z, g: reference.decode(
            z, f0, g[:, 0], noise.source, noise.phase, noise.adain
        ),
        *(z, g),
    )
    assert 0.01 < np.abs(expected).mean() < 0.9  # neither idle nor saturated
    assert_close(twin.dec(*map(mx.array, (z, g, *inputs))), expected)


# Receptive fields ---------------------------------------------------------------------


def changed_frames(run, x, frame, least=1e-6):
    """Which output frames move by more than ``least`` when ``x`` moves at one frame."""
    moved = x.copy()
    moved[:, frame] += 1
    difference = np.abs(np.array(run(mx.array(moved))) - np.array(run(mx.array(x))))
    difference = difference.reshape(x.shape[1], -1).max(axis=1)
    return np.flatnonzero(difference > least)


def test_flow_reaches_its_receptive_field_and_no_further():
    flow = vits.ResidualCouplingFlow(4, 8, 2)
    assert flow.receptive_field == 24
    rng = np.random.default_rng(0)
    # Positive weights on silence: nothing cancels, and the rest stays exactly 0.
    flow.update(
        tree_map(
            lambda p: (
                mx.array(rng.uniform(0.05, 0.1, p.shape).astype(np.float32))
                if p.ndim > 1
                else mx.zeros_like(p)
            ),
            flow.parameters(),
        )
    )
    silence, g = np.zeros((1, 72, 4), np.float32), mx.zeros((1, 1, 2))
    for place in (0, 24, 40, 71):
        touched = changed_frames(
            lambda z: flow(z, g, reverse=True), silence, place, least=0
        )
        assert touched.min() == max(place - 24, 0)
        assert touched.max() == min(place + 24, 71)


@pytest.mark.parametrize("name", [n for n in VOICES if "refinegan" not in n])
def test_hifigan_context_suffices(name):
    _, twin = pair(name)
    T = 4 * twin.dec.context
    z, g, *source = vocoder_inputs(name, T, batch=1)
    source = [mx.array(x) for x in source]
    place = T // 2
    touched = changed_frames(lambda z: twin.dec(z, mx.array(g), *source), z, place)
    assert place in touched
    assert place - touched.min() <= twin.dec.context
    assert touched.max() - place <= twin.dec.context
    # Not wasteful either: at most twice what is needed.
    assert touched.max() - touched.min() >= twin.dec.context


@pytest.mark.parametrize("name", ["nsf", "mrf", "nsf-odd"])
def test_hifigan_source_needs_no_further_context(name):
    _, twin = pair(name)
    T = 4 * twin.dec.context
    z, g, source = vocoder_inputs(name, T, batch=1)
    by_frame = source.reshape(1, T, -1)
    place = T // 2
    touched = changed_frames(
        lambda s: twin.dec(mx.array(z), mx.array(g), s.reshape(1, -1, 1)),
        *(by_frame, place),
    )
    assert place in touched
    assert max(place - touched.min(), touched.max() - place) <= twin.dec.context


@pytest.mark.parametrize("name", ["nsf", "plain", "mrf-odd"])
def test_windowed_decode_equals_the_whole(name):
    _, twin = pair(name)
    margin, U = twin.dec.context, twin.config.samples_per_frame
    T = 4 * margin
    z, g, *source = vocoder_inputs(name, T, batch=1)
    whole = np.array(twin.dec(*map(mx.array, (z, g, *source))))
    first, last = margin + 2, T - margin - 2
    window = slice(first - margin, last + margin)
    cut = [s[:, window.start * U : window.stop * U] for s in source]
    part = np.array(twin.dec(*map(mx.array, (z[:, window], g, *cut))))
    assert_close(
        part[:, margin * U : -margin * U], whole[:, first * U : last * U], 1e-6
    )


def refinegan_inputs(network, T, U):
    shapes = network.noise_shapes()
    return (
        normal(1, T, 12),
        normal(1, 1, 8, seed=1),
        normal(1, T * U, 1, seed=2),
        [normal(1, T * n, 6 * C, seed=3) for n, C in shapes],
    )


def test_refinegan_windows_equal_the_whole():
    network = pair("refinegan")[1].dec
    rates = network._rates
    U, c, e = int(np.prod(rates)), network.context, network.source_context
    kept = 5
    T = kept + 2 * (c + e) + 6
    z, g, source, noises = refinegan_inputs(network, T, U)
    whole = np.array(network(*map(mx.array, (z, g, source, *noises))))
    a = c + e + 3
    b = a + kept
    per_frame = np.cumprod(rates)
    part = network(
        mx.array(z[:, a - c : b + c]),
        mx.array(g),
        mx.array(source[:, (a - c - e) * U : (b + c + e) * U]),
        *(
            mx.array(x[:, (a - c) * n : (b + c) * n])
            for x, n in zip(noises, per_frame, strict=True)
        ),
    )
    assert part.shape == (1, (kept + 2 * c) * U)
    inner = np.array(part)[:, c * U : (c + kept) * U]
    assert_close(inner, whole[:, a * U : b * U], 1e-6)


def test_refinegan_contexts_suffice():
    network = pair("refinegan")[1].dec
    rates = network._rates
    U, c, e = int(np.prod(rates)), network.context, network.source_context
    T = 2 * (c + e) + 9
    z, g, source, noises = refinegan_inputs(network, T, U)
    g, noises = mx.array(g), [mx.array(x) for x in noises]
    place = T // 2
    touched = changed_frames(
        lambda z: network(z, g, mx.array(source), *noises), z, place
    )
    assert place in touched
    assert max(place - touched.min(), touched.max() - place) <= c
    touched = changed_frames(
        lambda s: network(mx.array(z), g, s.reshape(1, -1, 1), *noises),
        *(source.reshape(1, T, U), place),
    )
    assert place in touched
    assert max(place - touched.min(), touched.max() - place) <= c + e
