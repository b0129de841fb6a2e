"""Training networks, losses and step: against the PyTorch reference, and trap by trap."""

import dataclasses
import io
import json
import re
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import torch
from tiny_models import Kind, arrays, randomize

import rvc_reference.training as reference
from rvc_mlx import compiling
from rvc_mlx.models.layers import fold_weight_norm
from rvc_mlx.models.voice_config import SynthesizerConfig
from rvc_mlx.training import step as step_module
from rvc_mlx.training.convolutions import (
    Convolutions,
    batched_conv1d,
    batched_conv_transpose1d,
    tapped_conv1d,
    unfolded_conv1d,
    unfolded_conv_transpose1d,
    weight_slope,
    windowed_conv1d,
)
from rvc_mlx.training.discriminators import Discriminator
from rvc_mlx.training.forward import (
    bind,
    generate,
    oscillator,
    segments,
    spoken_items,
    step_inputs,
    training_network,
)
from rvc_mlx.training.losses import (
    adversarial_loss,
    discriminator_loss,
    feature_loss,
    kl_loss,
    log_mel,
    multiscale_mel_loss,
    slaney_filters,
    spectrogram,
)
from rvc_mlx.training.optimizer import AdamW, moments, update
from rvc_mlx.training.parametrization import (
    Packing,
    folded,
    from_torch,
    initial,
    shapes,
    to_torch,
)
from rvc_mlx.training.presets import MEL_SCALES, TrainingConfig, preset
from rvc_mlx.training.pretrained import load_pretrained
from rvc_mlx.training.step import TrainStep, draw
from rvc_reference.synthesizer import Synthesizer as TorchSynthesizer
from rvc_reference.vocoders import frame_phase

pytestmark = pytest.mark.usefixtures("_one_thread")

KINDS = {
    "nsf": (Kind(), "v2"),
    "nsf-odd": (Kind(rates=(5, 2, 3), kernels=(10, 4, 6)), "v1"),
    "plain": (Kind(f0=False), "v1"),
    "mrf": (Kind("MRF HiFi-GAN"), "v1"),
}
FRAMES, SEGMENT = 24, 16
N_FFT, WIN, MELS = 80, 64, 8  # a transform longer than its window, hop no divisor


def make_config(name: str) -> TrainingConfig:
    kind, version = KINDS[name]
    listed = [N_FFT // 2 + 1, *kind.config[1:]]
    names = [field.name for field in dataclasses.fields(SynthesizerConfig)][:18]
    model = TrainingConfig.from_dict(
        {
            "model": {
                **dict(zip(names, listed, strict=True)),
                "feature_size": 256,
                "f0": kind.f0,
                "vocoder": kind.vocoder,
            },
            "n_fft": N_FFT,
            "hop": int(np.prod(kind.rates)),
            "win": WIN,
            "n_mels": MELS,
            "mel_fmin": 0.0,
            "mel_fmax": None,
            "segment_frames": SEGMENT,
            "discriminator": version,
            "discriminator_width": 2,
        }
    )
    return model


def make_reference(
    config: TrainingConfig,
) -> tuple[TorchSynthesizer, reference.Discriminator]:
    """Both networks in PyTorch; every tensor is active, every loss of moderate size."""
    model = config.model
    generator = TorchSynthesizer(
        model.as_list(), "v1", model.f0, model.vocoder, with_enc_q=True
    )
    discriminator = reference.Discriminator(
        config.discriminator, config.discriminator_width
    )
    with torch.no_grad():
        randomize(generator, 3)
        randomize(discriminator, 4)
        for part in (generator.enc_p.proj, generator.enc_q.proj):
            part.weight *= 0.1
    return generator, discriminator


def make_batch(
    config: TrainingConfig, seed: int = 0, frames: int = FRAMES
) -> SimpleNamespace:
    rng = np.random.default_rng(seed)
    lengths = np.array([frames, frames - 5], np.int32)
    B = len(lengths)
    wave = (0.3 * rng.standard_normal((B, frames * config.hop))).astype(np.float32)
    f0 = rng.uniform(80, 400, (B, frames)).astype(np.float32)
    f0[:, 5:9] = 0
    voiced = config.model.f0
    pitch = rng.integers(1, 256, (B, frames)).astype(np.int32)
    return SimpleNamespace(
        phone=rng.standard_normal((B, frames, 256)).astype(np.float32),
        lengths=lengths,
        pitch=pitch if voiced else None,
        pitchf=f0 if voiced else None,
        spec=np.array(spectrogram(mx.array(wave), config)),
        wave=wave,
        sid=np.array([0, 2], np.int32),
    )


def make_step(config: TrainingConfig, **options) -> TrainStep:
    networks = make_reference(config)
    return TrainStep(config, *(from_torch(arrays(n)) for n in networks), **options)


def run(step: TrainStep, batch, number: int = 0) -> dict[str, float]:
    losses = step(batch, draw(step._config, batch, 7, number))
    mx.eval(losses, step.state)
    return {name: value.item() for name, value in losses.items()}


def mel_config(config: TrainingConfig) -> reference.MelConfig:
    return reference.MelConfig(
        config.model.sample_rate, config.n_fft, config.hop, config.win, config.n_mels
    )


@pytest.fixture
def gradients(monkeypatch) -> list[dict[str, mx.array]]:
    """Every gradient that reaches the optimiser: discriminator, generator, ..."""
    seen: list[dict[str, mx.array]] = []

    def spy(optimizer, current, given, *rest):
        seen.append(given)
        return update(optimizer, current, given, *rest)

    monkeypatch.setattr(step_module, "update", spy)
    return seen


def is_idle(name: str) -> bool:
    """Softmax does not see a shift of all keys: this bias has no gradient but rounding."""
    return name.endswith("conv_k.bias")


@pytest.mark.parametrize("name", KINDS)
def test_steps_match_the_reference(name, gradients):
    config = make_config(name)
    networks = make_reference(config)
    before = [{k: v.copy() for k, v in arrays(network).items()} for network in networks]
    step = TrainStep(config, *map(from_torch, before))
    twin = reference.TrainStep(*networks, mel_config(config), config.segment_frames)
    batch = make_batch(config)
    for number in range(10 if name == "nsf-odd" else 1):
        draws = draw(config, batch, 7, number)
        losses = step(batch, draws)
        mx.eval(losses, step.state)
        inputs = {
            k: torch.from_numpy(np.array(v))
            for k, v in step_inputs(batch, draws).items()
        }
        for loss, expected in twin(inputs).items():
            # Rounding only: 1e-6 is what is seen.
            assert losses[loss].item() == pytest.approx(expected, rel=1e-4), loss
        if number == 0:
            for network, own in zip(networks, reversed(gradients), strict=True):
                [(part, vector)] = own.items()
                named = step._packings[part].unpack(vector)
                check_gradients(network, to_torch(named))
    for network, own, first in zip(
        networks, (step.generator, step.discriminator), before, strict=True
    ):
        check_weights(arrays(network), to_torch(own), first)


def check_gradients(network: torch.nn.Module, own: dict[str, np.ndarray]) -> None:
    """Largest difference within 1e-3 of the tensor's largest gradient (5e-5 is seen)."""
    parameters = dict(network.named_parameters())
    assert own.keys() == parameters.keys()
    largest = max(p.grad.abs().max().item() for p in parameters.values())
    for name, parameter in parameters.items():
        expected = parameter.grad.numpy()
        assert own[name].shape == expected.shape
        if is_idle(name):
            assert max(abs(own[name]).max(), abs(expected).max()) < 1e-6 * largest
        else:
            scale = np.abs(expected).max()
            assert scale > 0, f"{name} is idle"
            assert np.abs(own[name] - expected).max() <= 1e-3 * scale, name


def check_weights(
    expected: dict[str, np.ndarray],
    own: dict[str, np.ndarray],
    first: dict[str, np.ndarray],
) -> None:
    """Within 1e-3 everywhere, and within 5 % of each tensor's way from the start.

    Adam's first step has the same length for every element: where a gradient is nearly 0
    its rounding decides the sign.
    """
    assert own.keys() == expected.keys()
    for name, value in expected.items():
        difference = own[name] - value
        assert np.abs(difference).max() < 1e-3, name
        if not is_idle(name):
            way = np.linalg.norm(value - first[name])
            assert way > 0, name
            assert np.linalg.norm(difference) <= 5e-2 * way, name


def test_padding_does_not_matter():
    config = make_config("nsf")
    batch = make_batch(config)
    losses = run(make_step(config), batch)
    batch.phone[1, FRAMES - 5 :] = 9
    batch.spec[1, FRAMES - 5 :] = 9
    batch.pitch[1, FRAMES - 5 :] = 9
    assert run(make_step(config), batch) == pytest.approx(losses, rel=1e-5)


def test_generator_is_judged_by_the_updated_discriminator():
    config = make_config("nsf")
    batch = make_batch(config)
    still = run(make_step(config, optimizer=AdamW(learning_rate=0.0)), batch)
    step = make_step(config, optimizer=AdamW(learning_rate=1e-2))
    moved = run(step, batch)
    # Everything before the update is the same.
    for name in ("loss_d", "grad_norm_d", "loss_mel", "loss_kl"):
        assert moved[name] == still[name]
    assert abs(moved["loss_adv"] - still["loss_adv"]) > 1e-2
    # And it is the new discriminator's own judgement of the old generator's audio.
    network, judge = training_network(config), Discriminator(config)
    bind(network, folded(make_step(config).generator))
    bind(judge, folded(step.discriminator))
    inputs = step_inputs(batch, draw(config, batch, 7, 0))
    audio = generate(network, inputs, config, mx.float32).audio
    assert adversarial_loss(judge(audio)).item() == pytest.approx(
        moved["loss_adv"], rel=1e-5
    )


def test_the_discriminators_update_is_no_way_back_to_the_generator(monkeypatch):
    config = make_config("plain")
    batch = make_batch(config)
    expected = run(make_step(config, optimizer=AdamW(learning_rate=0.0)), batch)

    def leaky(optimizer, current, gradients, *rest):
        """Changes no value, but passes on whatever the gradients depend on."""
        parameters, mean, square = current
        moved = {
            name: value + 1e3 * (gradients[name] - mx.stop_gradient(gradients[name]))
            for name, value in parameters.items()
        }
        return moved, mean, square

    monkeypatch.setattr(step_module, "update", leaky)
    assert run(make_step(config), batch) == pytest.approx(expected, rel=1e-5)


def test_vocoder_decodes_the_posterior_and_not_its_flow():
    config = make_config("nsf")
    batch = make_batch(config)
    inputs = step_inputs(batch, draw(config, batch, 7, 0))

    def passed(prefix: str):
        weights = folded(make_step(config).generator)
        for name in weights:
            if name.startswith(prefix) and name.endswith("weight"):
                weights[name] = 2 * weights[name]
        network = training_network(config)
        bind(network, weights)
        return generate(network, inputs, config, mx.float32)

    plain, flow, posterior = passed("none"), passed("flow."), passed("enc_q.")
    assert mx.array_equal(plain.audio, flow.audio)
    assert not mx.allclose(plain.z_p, flow.z_p, atol=1e-2)
    assert not mx.allclose(plain.audio, posterior.audio, atol=1e-3)
    assert plain.audio.shape == (2, config.segment_samples)


@pytest.mark.parametrize("name", ["nsf", "plain"])
def test_shared_items_are_spoken_as_a_conversion_speaks(name):
    config = make_config(name)
    batch = make_batch(config)
    inputs = step_inputs(batch, draw(config, batch, 7, 0))
    network = training_network(config)
    bind(network, folded(make_step(config).generator))
    own = generate(network, inputs, config, mx.float32).audio
    shared = generate(network, inputs, config, mx.float32, from_prior=[0]).audio
    assert mx.allclose(own[1], shared[1], atol=1e-6)
    assert not mx.allclose(own[0], shared[0], atol=1e-3)
    # The first clip is whole: no mask is needed to speak it.
    g = network.emb_g(inputs["sid"][:1])[:, None]
    pitch = inputs["pitch"][:1] if config.model.f0 else None
    z = network.prior(inputs["phone"][:1], inputs["posterior"][:1], g, pitch)
    latent = segments(z, inputs["starts"][:1], SEGMENT)
    source = None
    if config.model.f0:
        f0 = segments(inputs["pitchf"][:1], inputs["starts"][:1], SEGMENT)
        heard = oscillator(f0, config.hop, config.model.sample_rate)
        drawn = inputs["phase"][:1], inputs["source"][:1]
        source = network.dec.m_source(*heard, *drawn)
    audio = network.dec(latent, g, source)
    assert mx.allclose(audio[0], shared[0], atol=1e-5)


def test_any_items_can_be_shared():
    config = make_config("nsf")
    inputs = step_inputs(make_batch(config), draw(config, make_batch(config), 7, 0))
    network = training_network(config)
    bind(network, folded(make_step(config).generator))
    none, first, second, both = (
        generate(network, inputs, config, mx.float32, from_prior=items).audio
        for items in ([], [0], [1], [0, 1])
    )
    for made, expected in ((second, (none, both)), (both, (first, second))):
        assert mx.allclose(made[0], expected[0][0], atol=1e-6)
        assert mx.allclose(made[1], expected[1][1], atol=1e-6)
    assert not mx.allclose(none[1], second[1], atol=1e-3)


def test_devices_share_as_one_would():
    assert spoken_items(0, 4) == []
    assert spoken_items(0.5, 4) == [0, 2]
    assert spoken_items(1, 3) == [0, 1, 2]
    assert spoken_items(0.01, 4) == [0]
    for share in (0.1, 0.3, 0.5, 0.8):
        joint = spoken_items(share, 12)
        halves = spoken_items(share, 6), spoken_items(share, 6, first=6)
        assert joint == halves[0] + [6 + item for item in halves[1]]


def test_prior_reaches_the_text_encoder_through_the_audio():
    config = dataclasses.replace(make_config("nsf"), kl_weight=0.0)
    batch = make_batch(config)

    def moved(share: float) -> bool:
        step = make_step(dataclasses.replace(config, prior_share=share))
        before = step.generator["enc_p.emb_phone.weight"]
        run(step, batch)
        return not mx.allclose(before, step.generator["enc_p.emb_phone.weight"])

    assert not moved(0.0)
    assert moved(0.5)
    with pytest.raises(ValueError, match="prior_share is 2; expected 0 to 1"):
        dataclasses.replace(config, prior_share=2)


def test_generator_learns_without_the_discriminator():
    config = make_config("nsf")
    batch = make_batch(config)
    step = make_step(config)
    first, judge = step.generator, step.discriminator
    draws = draw(config, batch, 7, 0)
    losses = step(batch, draws, judged=False)
    assert losses.keys() == {"loss_g", "loss_mel", "loss_kl", "grad_norm_g"}
    whole = 45 * losses["loss_mel"] + losses["loss_kl"]
    assert losses["loss_g"].item() == pytest.approx(whole.item(), rel=1e-6)
    for name, value in step.discriminator.items():
        assert mx.array_equal(value, judge[name])
    assert not mx.array_equal(
        step.generator["dec.conv_pre.weight"], first["dec.conv_pre.weight"]
    )
    # The losses are those of a whole step, which can follow.
    both = make_step(config)(batch, draws)
    for name in ("loss_mel", "loss_kl"):
        assert both[name].item() == pytest.approx(losses[name].item(), rel=1e-6)
    assert "loss_d" in run(step, batch, 1)
    assert step.state["counters.d_steps"].item() == 1
    assert step.state["counters.g_steps"].item() == 2


def test_starts_are_random_and_stay_inside_each_clip():
    config = make_config("nsf")
    batch = make_batch(config)
    starts = np.stack([draw(config, batch, 7, i).starts for i in range(200)])
    assert starts.dtype == np.int32
    assert set(starts[:, 0]) == set(range(FRAMES - SEGMENT + 1))
    assert set(starts[:, 1]) == set(range(FRAMES - 5 - SEGMENT + 1))
    assert np.any(starts[:, 0] != starts[:, 1])


def test_draws_repeat_and_can_be_split_over_devices():
    config = make_config("mrf")
    batch = make_batch(config)
    whole = vars(draw(config, batch, 7, 3))
    assert whole["posterior"].shape == (2, FRAMES, config.model.inter_channels)
    assert whole["source"].shape == (2, config.segment_samples, 9)
    assert np.all(whole["phase"][..., 0] == 0)
    assert np.all(whole["phase"][..., 1:] > 0)
    half = SimpleNamespace(lengths=batch.lengths[1:], phone=batch.phone[1:])
    for name, part in vars(draw(config, half, 7, 3, first=1)).items():
        assert np.array_equal(part, whole[name][1:]), name
    for other in (draw(config, batch, 8, 3), draw(config, batch, 7, 4)):
        assert not np.array_equal(other.posterior, whole["posterior"])


def test_clips_shorter_than_a_segment():
    config = make_config("plain")
    batch = make_batch(config)
    batch.lengths[1] = SEGMENT - 3
    draws = draw(config, batch, 7, 0)
    assert draws.starts[1] == 0
    assert draws.source is None
    batch.phone = batch.phone[:, : SEGMENT - 1]
    with pytest.raises(
        ValueError, match="15 frames; expected at least the segment's 16"
    ):
        draw(config, batch, 7, 0)


def test_segments():
    x = np.arange(2 * 10 * 3).reshape(2, 10, 3).astype(np.float32)
    cut = segments(mx.array(x), mx.array([4, 0]), 5)
    assert np.array_equal(np.array(cut), np.stack([x[0, 4:9], x[1, :5]]))


def test_oscillator_is_the_reference_phase(rng):
    f0 = rng.uniform(50, 1100, (2, 36)).astype(np.float32)
    f0[:, 10:14] = 0
    voiced, phase = oscillator(mx.array(f0), 480, 48000)
    expected = frame_phase(torch.from_numpy(f0).double()[..., None], 480, 48000)
    difference = np.array(phase).reshape(2, -1) - expected[..., 0].numpy()
    assert np.abs(difference - np.rint(difference)).max() < 2e-5
    assert np.array_equal(np.array(voiced)[..., 0], f0 > 0)


def test_adamw_corrects_its_bias(rng):
    start = rng.standard_normal(50).astype(np.float32)
    parameter = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = torch.optim.AdamW([parameter], 1e-2, betas=(0.8, 0.99), eps=1e-9)
    own = {"w": mx.array(start)}
    state = (own, *moments(own))
    numbers = AdamW(learning_rate=1e-2)
    for count in range(1, 6):
        gradient = rng.standard_normal(50).astype(np.float32)
        parameter.grad = torch.from_numpy(gradient)
        optimizer.step()
        given = {"w": mx.array(gradient)}
        state = update(
            numbers, state, given, mx.array(1e-2), mx.array(count), mx.array(True)
        )
        moved = np.array(state[0]["w"])
        assert np.abs(moved - parameter.detach().numpy()).max() < 1e-6
        if count == 1:  # not two or three times the rate
            length = np.abs(moved - start * (1 - 1e-4))
            assert length == pytest.approx(np.full(50, 1e-2), rel=1e-3)


def test_state_continues_bit_by_bit():
    config = make_config("plain")
    batch = make_batch(config)
    first = make_step(config)
    run(first, batch, 0)
    first.learning_rate = 5e-5
    saved = {name: np.array(value) for name, value in first.state.items()}
    second = TrainStep(config, *initial(config, 1))
    second.state = {name: mx.array(value) for name, value in saved.items()}
    assert second.learning_rate == pytest.approx(5e-5)
    assert run(first, batch, 1) == run(second, batch, 1)
    assert first.state.keys() == second.state.keys()
    for name, value in first.state.items():
        assert mx.array_equal(value, second.state[name]), name
    assert first.state["counters.g_steps"].item() == 2
    del saved["g.emb_g.weight"]
    with pytest.raises(ValueError, match=r"g\.emb_g\.weight: missing"):
        second.state = {name: mx.array(value) for name, value in saved.items()}


def test_half_precision_keeps_masters_and_losses_in_float32():
    config = make_config("nsf")
    batch = make_batch(config)
    exact = run(make_step(config), batch)
    for precision in ("bf16", "f16"):
        step = make_step(config, precision=precision)
        step.state = {**step.state, "counters.scale": mx.array(16.0)}
        losses = step(batch, draw(config, batch, 7, 0))
        assert {value.dtype for value in losses.values()} == {mx.float32}
        for name, value in step.state.items():
            kind = mx.int32 if "step" in name else mx.float32
            assert value.dtype == kind, name
        for name, value in losses.items():
            assert value.item() == pytest.approx(exact[name], rel=0.05), name
        moved = step.generator["enc_q.pre.weight"]
        assert not mx.array_equal(
            moved, make_step(config).generator["enc_q.pre.weight"]
        )


def test_losses_survive_what_float16_cannot_hold():
    large = [[mx.full((2, 5, 1), 300.0, mx.float16)]]  # its square is no float16
    assert discriminator_loss(large, large).item() == pytest.approx(299**2 + 300**2)
    assert adversarial_loss(large).item() == pytest.approx(299**2)
    opposite = [[mx.full((2, 5, 1), -60000.0, mx.float16)]]
    assert feature_loss(opposite, large).item() == pytest.approx(2 * 60300, rel=1e-3)
    z = mx.zeros((1, 2, 3), mx.float16)
    mask = mx.ones((1, 2, 1))
    kl = kl_loss(z + 1, z, z, z - 6, mask).item()
    assert kl == pytest.approx(3 * (-6.5 + 0.5 * np.exp(12)), rel=1e-4)


def test_overflow_skips_the_update_and_halves_the_scale():
    config = make_config("plain")
    batch = make_batch(config)
    step = make_step(config, precision="f16")
    assert step.state["counters.scale"].item() == 65536
    before = {**step.state, "counters.scale": mx.array(2.0**100)}
    step.state = before
    losses = run(step, batch)
    assert not np.isfinite(losses["grad_norm_g"])
    for name, value in step.state.items():
        if name != "counters.scale":
            assert mx.array_equal(value, before[name]), name
    assert step.state["counters.scale"].item() == 2.0**99
    step.state = {
        **before,
        "counters.scale": mx.array(8.0),
        "counters.good_steps": mx.array(1999),
    }
    run(step, batch)
    assert step.state["counters.scale"].item() == 16
    assert step.state["counters.good_steps"].item() == 0
    assert step.state["counters.g_steps"].item() == 1


def test_a_gradient_that_is_no_number_changes_nothing():
    config = make_config("plain")
    batch = make_batch(config)
    batch.phone[0, 0, 0] = np.nan
    step = make_step(config)
    before = step.state
    losses = run(step, batch)
    assert np.isnan(losses["grad_norm_g"])
    for name, value in before.items():
        if name.startswith(("g.", "g_")):
            assert mx.array_equal(value, step.state[name]), name


def test_unknown_precision_and_foreign_parameters_are_refused():
    config = make_config("plain")
    generator, discriminator = initial(config, 0)
    with pytest.raises(ValueError, match="precision 'int8'"):
        TrainStep(config, generator, discriminator, precision="int8")
    generator["stray"] = generator.pop("dec.conv_pre.bias")
    with pytest.raises(ValueError, match=r"dec\.conv_pre\.bias: missing; stray: unexp"):
        TrainStep(config, generator, discriminator)


def test_traced_steps_are_the_plain_steps_bit_for_bit():
    config = make_config("nsf")
    batch = make_batch(config)
    plain, traced = (make_step(config, compiled=way) for way in ("no", "traced"))
    for _ in range(3):
        assert run(plain, batch) == run(traced, batch)
    for name, value in plain.state.items():
        assert mx.array_equal(value, traced.state[name]), name


def test_traced_step_follows_the_batch():
    config = make_config("nsf")
    plain, traced = (make_step(config, compiled=way) for way in ("no", "traced"))
    for frames in (40, 56, 40):
        batch = make_batch(config, frames=frames)
        assert run(plain, batch) == run(traced, batch)


def test_tracing_without_fusing_is_refused_where_mlx_has_no_switch(monkeypatch):
    monkeypatch.setattr(compiling, "_SYMBOL", "no_such_symbol")
    compiling._switch.cache_clear()
    with pytest.raises(RuntimeError, match="pass --compile fused or --compile no"):
        compiling.compiled(abs, "traced")
    compiling._switch.cache_clear()


def test_unknown_way_to_compile_is_refused():
    with pytest.raises(ValueError, match="compile 'twice'; expected one of traced"):
        compiling.compiled(abs, "twice")


@pytest.mark.gpu
@pytest.mark.skipif(
    mx.default_device().type != mx.DeviceType.gpu,
    reason="on the CPU a C compiler takes minutes for it",
)
def test_fused_step_is_the_plain_step():
    config = make_config("nsf")
    batch = make_batch(config)
    plain = run(make_step(config, compiled="no"), batch)
    assert run(make_step(config, compiled="fused"), batch) == pytest.approx(
        plain, rel=1e-3
    )


# Losses and spectrograms


def test_real_feature_maps_are_targets_only():
    def loss(real, fake):
        return feature_loss([[real]], [[fake]])

    real, fake = mx.ones((2, 3, 4)), mx.zeros((2, 3, 4))
    to_real, to_fake = mx.grad(loss, argnums=(0, 1))(real, fake)
    assert mx.all(to_real == 0)
    assert mx.allclose(to_fake, mx.full((2, 3, 4), -2 / 24))


def test_kl_is_a_mean_over_real_frames(rng):
    z_p, logs_q, m_p, logs_p = rng.standard_normal((4, 2, 5, 3)).astype(np.float32)
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], np.float32)[..., None]
    terms = logs_p - logs_q - 0.5 + 0.5 * (z_p - m_p) ** 2 * np.exp(-2 * logs_p)
    expected = (terms[0].sum() + terms[1, :2].sum()) / 7
    given = map(mx.array, (z_p, logs_q, m_p, logs_p, mask))
    assert kl_loss(*given).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["32k", "40k", "48k"])
def test_spectrogram_and_mel(name, rng):
    config = preset(name, "v2", True, 1)
    wave = (0.3 * rng.standard_normal((2, 5 * config.hop + 100))).astype(np.float32)
    wave[1] *= 1e-4
    spectra = spectrogram(mx.array(wave), config)
    assert spectra.shape == (2, 5, config.n_fft // 2 + 1)
    expected = reference.spectrogram(torch.from_numpy(wave), mel_config(config))
    difference = np.array(spectra) - expected.mT.numpy()
    assert np.abs(difference).max() < 1e-4  # of values up to 40
    mels = reference.log_mel(expected, mel_config(config)).mT.numpy()
    assert np.abs(np.array(log_mel(spectra, config)) - mels).max() < 1e-4


def multiscale_reference(real, fake, config):
    """As Applio's, by other means: centred STFTs of torch, decimal logarithms."""
    total = 0.0
    for bands, size in config.mel_scales:
        filters = slaney_filters(config.model.sample_rate, size, bands, 0, None)
        window = torch.hann_window(size, dtype=torch.float64)
        mels = []
        for wave in (real, fake):
            spectrum = torch.stft(
                torch.from_numpy(wave).double(), size, size // 4, window=window,
                center=True, pad_mode="reflect", return_complex=True,
            )  # fmt: skip
            power = spectrum.abs().square() + config.spectrum_epsilon
            mel = torch.from_numpy(filters).double().mT @ power.sqrt()
            mels.append(mel.clamp(min=config.log_floor).log10())
        total += (mels[0] - mels[1]).abs().mean().item()
    return total / 3


def applio_preset(name: str) -> TrainingConfig:
    return dataclasses.replace(preset(name, "v2", True, 1), mel_scales=MEL_SCALES)


@pytest.mark.parametrize("name", ["32k", "48k"])
def test_multiscale_mel_loss(name, rng):
    config = applio_preset(name)
    real, fake = (0.3 * rng.standard_normal((2, 2, 6400))).astype(np.float32)
    fake[1, 2000:] *= 1e-3
    loss = multiscale_mel_loss(mx.array(real), mx.array(fake), config).item()
    assert loss == pytest.approx(multiscale_reference(real, fake, config), rel=1e-4)


def test_multiscale_mel_loss_hears_what_moved_within_a_long_window():
    config = applio_preset("32k")
    clicks = np.zeros((3, 1, 6400), np.float32)
    for row, place in zip(clicks, (3200, 3500, 3201), strict=True):
        row[0, place] = 1
    real, later, near = map(mx.array, clicks)
    far = multiscale_mel_loss(real, later, config).item()
    assert far > 2 * multiscale_mel_loss(real, near, config).item() > 0
    assert multiscale_mel_loss(real, real, config).item() == 0


def test_one_long_scale_weighs_as_much_as_seven(rng):
    config = dataclasses.replace(applio_preset("32k"), mel_scales=((320, 2048),))
    real, fake = (0.3 * rng.standard_normal((2, 2, 6400))).astype(np.float32)
    loss = multiscale_mel_loss(mx.array(real), mx.array(fake), config).item()
    alone = multiscale_reference(real, fake, config)
    assert loss == pytest.approx(7 * alone, rel=1e-4)


def test_training_by_the_multiscale_mel_loss():
    config = make_config("nsf")
    frames = 1100 // config.hop
    for scales, told in (
        (MEL_SCALES, f"a segment has {config.segment_samples} samples; a mel loss"),
        (((80, 1022),), "expected pairs of bands and window, the window a multiple"),
        (((80,),), "mel_scales has"),
        ((1024,), "mel_scales has 1024"),
    ):
        with pytest.raises(ValueError, match=told):
            dataclasses.replace(config, mel_scales=scales)
    config = dataclasses.replace(config, mel_scales=MEL_SCALES, segment_frames=frames)
    kept = json.loads(json.dumps(dataclasses.asdict(config)))
    assert TrainingConfig.from_dict(kept) == config
    batch, step = make_batch(config, frames=frames + 8), make_step(config)
    losses = [run(step, batch)["loss_mel"] for _ in range(12)]
    assert np.isfinite(losses).all()
    assert np.mean(losses[-3:]) < np.mean(losses[:3])


def test_spectrogram_of_silence_is_the_root_of_epsilon():
    config = preset("32k", "v2", True, 1)
    spectra = np.array(spectrogram(mx.zeros((1, 3200)), config))
    assert spectra == pytest.approx(np.full_like(spectra, 1e-3), rel=1e-4)
    mels = np.array(log_mel(mx.zeros((1, 1, 513)), config))
    assert mels == pytest.approx(np.full_like(mels, np.log(1e-5)), rel=1e-6)


def test_spectrogram_reflects_the_ends_and_does_not_centre(rng):
    config = preset("32k", "v2", True, 1)
    wave = rng.standard_normal(3200).astype(np.float32)
    padded = np.pad(wave, (352, 352), mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
    spectra = np.array(spectrogram(mx.array(wave)[None], config))[0]
    assert len(spectra) == 10
    for t in (0, 9):
        frame = np.fft.rfft(padded[320 * t : 320 * t + 1024] * window)
        assert np.abs(spectra[t] - np.sqrt(np.abs(frame) ** 2 + 1e-6)).max() < 1e-4


@pytest.mark.parametrize(
    "sizes", [(32000, 1024, 80), (40000, 2048, 125), (48000, 2048, 128)]
)
def test_slaney_filters_are_those_of_a_third_party(sizes):
    from transformers.audio_utils import mel_filter_bank

    rate, n_fft, n_mels = sizes
    expected = mel_filter_bank(
        n_fft // 2 + 1, n_mels, 0.0, rate / 2, rate, norm="slaney", mel_scale="slaney"
    )
    filters = slaney_filters(rate, n_fft, n_mels, 0.0, None)
    assert np.abs(filters - expected).max() < 1e-6 * expected.max()


# Discriminators


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(
    ("taps", "stride", "dilation"),
    [(5, 3, 1), (5, 1, 1), (41, 4, 1), (1, 1, 1), (4, 2, 1), (7, 1, 3)],
)
@pytest.mark.parametrize("length", [50, 51, 53])
def test_ways_of_convolution_agree(taps, stride, dilation, groups, length, rng):
    x = mx.array(rng.standard_normal((2, length, 6)).astype(np.float32))
    w = mx.array(rng.standard_normal((9, taps, 6 // groups)).astype(np.float32))
    pad = taps // 2 * dilation

    def native(x, w):
        return mx.conv1d(x, w, stride, pad, dilation, groups)

    def unfolded(x, w):
        return unfolded_conv1d(x, w, stride, pad, dilation, groups)

    def batched(x, w):
        return batched_conv1d(x, w, stride, pad, dilation)

    def windowed(x, w):
        return windowed_conv1d(x, w, stride, pad, dilation, groups)

    y = native(x, w)
    back = mx.array(rng.standard_normal(y.shape).astype(np.float32))
    ways = mx.vjp(native, [x, w], [back])[1]

    def tapped(x, w):
        return tapped_conv1d(x, w, stride, pad, dilation)

    others = [unfolded] + [tapped, batched] * (groups == 1)
    others += [windowed] * (dilation == 1)
    for other in others:
        assert mx.allclose(other(x, w), y, atol=1e-4)
        for own, expected in zip(mx.vjp(other, [x, w], [back])[1], ways, strict=True):
            assert mx.allclose(own, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("taps", "stride", "pad", "more"),
    [(20, 10, 5, 0), (4, 2, 1, 0), (3, 3, 2, 1), (5, 2, 2, 1), (11, 4, 3, 0)],
)
def test_ways_of_transposed_convolution_agree(taps, stride, pad, more, rng):
    x = mx.array(rng.standard_normal((2, 13, 6)).astype(np.float32))
    w = mx.array(rng.standard_normal((4, taps, 6)).astype(np.float32))

    def native(x, w):
        return mx.conv_transpose1d(x, w, stride, pad, 1, more)

    def unfolded(x, w):
        return unfolded_conv_transpose1d(x, w, stride, pad, more)

    def batched(x, w):
        return batched_conv_transpose1d(x, w, stride, pad, more)

    y = native(x, w)
    back = mx.array(rng.standard_normal(y.shape).astype(np.float32))
    ways = mx.vjp(native, [x, w], [back])[1]
    for other in (batched, unfolded):
        assert mx.allclose(other(x, w), y, atol=1e-4)
        for own, expected in zip(mx.vjp(other, [x, w], [back])[1], ways, strict=True):
            assert mx.allclose(own, expected, atol=1e-4)


@pytest.mark.parametrize("plain", ["native", "batched", "unfolded", "tapped"])
@pytest.mark.parametrize("grouped", ["native", "unfolded", "windowed"])
def test_discriminator_is_the_reference(plain, grouped, rng):
    config = dataclasses.replace(make_config("nsf"), discriminator_width=4)
    network = reference.Discriminator("v2", 4)
    with torch.no_grad():
        randomize(network, 1)
    own = Discriminator(config, Convolutions("native", plain, grouped))
    bind(own, folded(from_torch(arrays(network))))
    audio = rng.uniform(-1, 1, (2, 1000)).astype(np.float32)  # no multiple of most
    with torch.no_grad():
        expected = network(torch.from_numpy(audio))
    maps = own(mx.array(audio))
    assert len(maps) == len(expected) == 9
    for period, (ours, theirs) in enumerate(zip(maps, expected, strict=True)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            b = b.numpy()
            if period:  # [B, C, L, p] to [B * p, L, C]
                b = b.transpose(0, 3, 2, 1).reshape(-1, b.shape[2], b.shape[1])
            else:
                b = b.transpose(0, 2, 1)
            assert a.shape == b.shape
            assert np.abs(np.array(a) - b).max() < 1e-5 * max(1, np.abs(b).max())


@pytest.mark.parametrize("name", ["nsf", "plain", "mrf"])
def test_unfolded_generator_is_the_generator(name):
    config = make_config(name)
    batch = make_batch(config)
    inputs = step_inputs(batch, draw(config, batch, 7, 0))
    weights = folded(make_step(config).generator)
    made = []
    for way in ("native", "batched", "unfolded", "tapped"):
        network = training_network(config, way)
        kinds = {type(layer).__name__ for _, layer in network.named_modules()}
        assert ("Conv1d" in kinds) == (way == "native")
        bind(network, weights)
        made.append(generate(network, inputs, config, mx.float32))
    for other in made[1:]:
        assert mx.allclose(made[0].audio, other.audio, atol=1e-5)
        assert mx.allclose(made[0].z_p, other.z_p, atol=1e-4)


@pytest.mark.parametrize("items", [1, 7, 60, 592])
def test_the_weight_slope_is_the_same_however_items_are_joined(items, rng):
    x = mx.array(rng.standard_normal((items, 23, 3)).astype(np.float32))
    w = mx.zeros((5, 4, 3))
    back = mx.array(rng.standard_normal((items, 8, 5)).astype(np.float32))
    expected = mx.vjp(lambda w: mx.conv1d(x, w, 3, 2), [w], [back])[1][0]
    own = weight_slope(x, back, 4, 3, 2)
    assert mx.abs(own - expected).max() < 1e-5 * mx.abs(expected).max()


def test_the_weight_slope_from_one_channel_to_one(rng):
    x = mx.array(rng.standard_normal((2, 128, 1)).astype(np.float32))
    w = mx.zeros((1, 15, 1))
    back = mx.array(rng.standard_normal((2, 128, 1)).astype(np.float32))
    expected = mx.vjp(lambda w: mx.conv1d(x, w, 1, 7), [w], [back])[1][0]
    own = weight_slope(x, back, 15, 1, 7)
    assert own.shape == w.shape
    assert mx.abs(own - expected).max() < 1e-5 * mx.abs(expected).max()


def test_unknown_formulations_are_refused():
    with pytest.raises(ValueError, match="plain convolutions 'windowed'"):
        Convolutions(plain="windowed")
    with pytest.raises(ValueError, match="2 groups given"):
        tapped_conv1d(mx.zeros((1, 9, 4)), mx.zeros((4, 3, 2)), groups=2)


# Parameters


@pytest.mark.parametrize("name", KINDS)
def test_layout_and_weight_norm(name):
    config = make_config(name)
    for network, wanted in zip(make_reference(config), shapes(config), strict=True):
        tensors = arrays(network)
        parameters = from_torch(tensors)
        assert {k: v.shape for k, v in parameters.items()} == wanted
        back = to_torch(parameters)
        assert back.keys() == tensors.keys()
        assert all(np.array_equal(back[k], tensors[k]) for k in tensors)
        plain, expected = to_torch(folded(parameters)), fold_weight_norm(tensors)
        assert plain.keys() == expected.keys()
        for key, value in expected.items():
            assert np.abs(plain[key] - value).max() <= 1e-6 * np.abs(value).max(), key


def test_the_slope_of_a_packed_network_is_put_together_once(rng):
    sizes = {f"part{i}": (3, i + 1) for i in range(200)}
    packing = Packing(sizes)
    vector = packing.pack(
        {name: mx.array(rng.standard_normal(shape)) for name, shape in sizes.items()}
    )

    def squares(parts):
        return sum(mx.sum(mx.square(part)) for part in parts.values())

    parts = packing.plain(vector, "none.", mx.float32)
    slope = packing.slope(vector, mx.grad(squares)(parts))
    graph = io.StringIO()
    mx.export_to_dot(graph, slope)
    # MLX's own adds up one vector of zeros for each part.
    assert "SliceUpdate" not in graph.getvalue()
    assert mx.allclose(slope, 2 * vector)


def test_every_part_of_a_packed_network_is_aligned(rng):
    sizes = {f"part{i}": (i % 5 + 1, i + 1) for i in range(30)}
    packing = Packing(sizes)
    arrays = {n: rng.standard_normal(shape, np.float32) for n, shape in sizes.items()}
    vector = packing.pack({name: mx.array(array) for name, array in arrays.items()})
    found = packing.unpack(vector)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert np.array_equal(found[name], array)
    order = np.array(vector).tolist()
    starts = [order.index(array.flat[0]) for array in arrays.values()]
    assert all(start % 8 == 0 for start in starts)
    assert len(vector) - np.count_nonzero(vector) == sum(
        -array.size % 8 for array in arrays.values()
    )


@pytest.mark.parametrize("name", KINDS)
def test_the_rows_of_a_packed_network_give_its_folded_weights(name):
    config = make_config(name)
    for parameters, names in zip(initial(config, 0), shapes(config), strict=True):
        packing = Packing(names)
        vector = np.array(packing.pack(parameters))
        plain = np.full_like(vector, np.nan)
        for first, count, step, place in packing.rows():
            own = first + step * np.arange(count)
            assert np.isnan(plain[own]).all()  # no value is in two rows
            factor = 1.0
            if place >= 0:
                factor = vector[place] / np.linalg.norm(vector[own])
                plain[place] = 0
            plain[own] = factor * vector[own]
        assert not np.isnan(plain).any()
        found = packing.unpack(mx.array(plain))
        for key, value in folded(parameters).items():
            assert mx.allclose(found.get(key, found.get(f"{key}_v")), value, atol=1e-6)


def test_transposed_convolutions_keep_the_norm_of_each_input():
    generator, _ = initial(make_config("nsf"), 0)
    v, g = generator["dec.ups.0.weight_v"], generator["dec.ups.0.weight_g"]
    assert v.shape == (16, 8, 32)  # out, taps, in
    assert g.shape == (1, 1, 32)
    assert mx.allclose(g[0, 0], mx.sqrt(mx.sum(mx.square(v), axis=(0, 1))))
    assert mx.allclose(folded(generator)["dec.ups.0.weight"], v, atol=1e-6)


def test_both_spellings_of_weight_norm():
    _, discriminator = make_reference(make_config("nsf"))
    tensors = arrays(discriminator)
    new = {
        name.replace("weight_g", "parametrizations.weight.original0").replace(
            "weight_v", "parametrizations.weight.original1"
        ): value
        for name, value in tensors.items()
    }
    first, second = from_torch(tensors), from_torch(new)
    assert first.keys() == second.keys()
    assert all(mx.array_equal(first[k], second[k]) for k in first)


def count(names: dict) -> tuple[int, int]:
    return len(names), sum(int(np.prod(shape)) for shape in names.values())


@pytest.mark.parametrize(
    ("name", "version", "f0", "generator", "segment"),
    [
        ("32k", "v1", True, (619, 36_294_338), 12800),
        ("40k", "v1", True, (560, 36_360_514), 12800),
        ("48k", "v1", True, (619, 36_400_834), 11520),
        ("32k", "v2", True, (560, 36_880_706), 12800),
        ("40k", "v2", True, (560, 36_458_818), 12800),
        ("48k", "v2", True, (560, 37_638_466), 17280),
        ("40k", "v2", False, (549, 36_458_818 - 71_426), 12800),
    ],
)
def test_presets_are_the_public_networks(name, version, f0, generator, segment):
    config = preset(name, version, f0, 109)
    first, second = shapes(config)
    assert count(first) == generator
    public = {"v1": (129, 54_968_286), "v2": (165, 71_410_594)}
    assert count(second) == public[version]
    assert config.segment_samples == segment


def test_small_preset_is_small_and_survives_json():
    config = preset("small", "v2", True, 2, feature_size=192)
    assert 3e6 < count(shapes(config)[0])[1] < 10e6
    assert config.model.sample_rate == 32000
    again = TrainingConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config))))
    assert again == config


def test_impossible_configurations_are_refused():
    with pytest.raises(ValueError, match="preset '44k'"):
        preset("44k", "v2", True, 1)
    with pytest.raises(ValueError, match="0 speakers"):
        preset("40k", "v2", True, 0)
    with pytest.raises(ValueError, match="RefineGAN voice cannot be trained"):
        preset("40k", "v2", True, 1, vocoder="RefineGAN")
    with pytest.raises(ValueError, match="vocoder 'MRF HiFi-GAN' with f0=False"):
        preset("40k", "v2", False, 1, vocoder="MRF HiFi-GAN")
    config = preset("40k", "v2", True, 1)
    for change in ({"hop": 320}, {"n_fft": 1024}, {"discriminator": "v3"}):
        with pytest.raises(ValueError, match=r"hop 320|n_fft 1024|'v3'"):
            dataclasses.replace(config, **change)


def test_initial_parameters_are_torch_defaults():
    config = dataclasses.replace(make_config("nsf"), discriminator_width=8)
    generator, discriminator = initial(config, 5)
    tensors = to_torch(generator | discriminator)
    for name, value in tensors.items():
        if re.search(r"flows\.\d+\.post\.|\.beta$", name):
            assert np.all(value == 0), name
        elif name.endswith("weight_g"):
            v = tensors[f"{name[:-1]}v"]
            norm = np.sqrt(np.square(v).sum(tuple(range(1, v.ndim)), keepdims=True))
            assert value == pytest.approx(norm, rel=1e-5), name
        elif name.endswith("weight_v"):
            bound = np.prod(value.shape[1:]) ** -0.5
            assert np.abs(value).max() <= bound, name
            assert value.size < 200 or value.std() > 0.5 * bound, name
    assert tensors["emb_g.weight"].std() == pytest.approx(1, abs=0.3)
    # The harmonic source is heard from the start, whatever the seed.
    assert tensors["dec.m_source.l_linear.weight"] == 1
    assert tensors["dec.m_source.l_linear.bias"] == 0
    # Of several harmonics some always are.
    mrf, _ = initial(make_config("mrf"), 5)
    assert len(np.unique(to_torch(mrf)["dec.m_source.l_linear.weight"])) > 1
    again, other = initial(config, 5)[0], initial(config, 6)[0]
    assert all(mx.array_equal(generator[k], again[k]) for k in generator)
    assert not mx.array_equal(generator["emb_g.weight"], other["emb_g.weight"])


# Fine-tuning


@pytest.fixture
def pretrained_files(tmp_path):
    """Training checkpoints as the WebUI and Applio write them, and their tensors."""
    config = make_config("nsf")
    paths, networks = (
        (tmp_path / "f0G.pth", tmp_path / "f0D.pth"),
        make_reference(config),
    )
    for path, network in zip(paths, networks, strict=True):
        values = {"model": network.state_dict(), "iteration": 3, "optimizer": {}}
        torch.save({**values, "learning_rate": 1e-4}, path)
    return config, paths, [arrays(network) for network in networks]


def test_every_pretrained_tensor_is_loaded(pretrained_files):
    config, paths, tensors = pretrained_files
    loaded = load_pretrained(*paths, config, 0)
    for own, expected in zip(
        (loaded.generator, loaded.discriminator), tensors, strict=True
    ):
        back = to_torch(own)
        assert back.keys() == expected.keys()
        assert all(np.array_equal(back[k], expected[k]) for k in expected)
    assert loaded.notes == (
        f"f0G.pth: all {len(tensors[0])} tensors loaded",
        f"f0D.pth: all {len(tensors[1])} tensors loaded",
    )
    TrainStep(config, loaded.generator, loaded.discriminator)


@pytest.mark.parametrize(
    ("speakers", "fate"),
    [(1, "rows 1 to 2 are left out"), (5, "rows 3 to 4 start random")],
)
def test_another_number_of_speakers_is_reported(pretrained_files, speakers, fate):
    config, paths, tensors = pretrained_files
    model = dataclasses.replace(config.model, spk_embed_dim=speakers)
    config = dataclasses.replace(config, model=model)
    loaded = load_pretrained(paths[0], None, config, 0)
    rows = np.array(loaded.generator["emb_g.weight"])
    kept = min(speakers, 3)
    assert rows.shape == (speakers, 8)
    assert np.array_equal(rows[:kept], tensors[0]["emb_g.weight"][:kept])
    assert len(np.unique(rows, axis=0)) == speakers
    assert (
        loaded.notes[0]
        == f"f0G.pth: emb_g.weight has 3 speakers, this run {speakers}: {fate}"
    )
    fresh = initial(config, 0)[1]
    assert all(mx.array_equal(loaded.discriminator[k], fresh[k]) for k in fresh)


def test_tensors_that_do_not_fit_are_named(pretrained_files, tmp_path):
    config, (generator, discriminator), tensors = pretrained_files
    with pytest.raises(ValueError, match="may be swapped"):
        load_pretrained(discriminator, None, config, 0)
    v1 = dataclasses.replace(config, discriminator="v1")
    with pytest.raises(
        ValueError,
        match=r"36 tensors.*v1 has 7 discriminators.*discriminators\.8\.conv_post\.weight_v is not known",
    ):
        load_pretrained(None, discriminator, v1, 0)
    model = dataclasses.replace(config.model, f0=False)
    plain = dataclasses.replace(config, model=model)
    unknown = r"without, G\*\.pth.*enc_p\.emb_pitch\.weight is not known"
    with pytest.raises(ValueError, match=unknown):
        load_pretrained(generator, None, plain, 0)
    changed = {k: torch.from_numpy(v) for k, v in tensors[0].items()}
    changed["enc_p.proj.weight"] = torch.zeros(7, 16, 1)
    del changed["dec.conv_pre.bias"]
    torch.save({"model": changed}, tmp_path / "other.pth")
    with pytest.raises(
        ValueError,
        match=r"2 tensors.*dec\.conv_pre\.bias is missing; enc_p\.proj\.weight is \(7, 16, 1\), this run wants \(24, 16, 1\)",
    ):
        load_pretrained(tmp_path / "other.pth", None, config, 0)


def test_a_finished_voice_is_taken_and_its_posterior_encoder_starts_random(
    pretrained_files, tmp_path
):
    config, _, (tensors, _) = pretrained_files
    kept = {k: v for k, v in tensors.items() if not k.startswith("enc_q")}
    path = tmp_path / "voice.pth"
    torch.save({"weight": {k: torch.from_numpy(v) for k, v in kept.items()}}, path)
    loaded = load_pretrained(path, None, config, 0)
    back = to_torch(loaded.generator)
    fresh = to_torch(initial(config, 0)[0])
    assert back.keys() == tensors.keys()
    for name, value in back.items():
        assert np.array_equal(value, kept.get(name, fresh[name])), name
    assert loaded.notes[1] == (
        f"voice.pth: a finished voice, without posterior encoder: the "
        f"{len(tensors) - len(kept)} tensors of enc_q. start random"
    )
