"""The PyTorch reference against the specification, transformers and plain formulas."""

import json
import pickle

import numpy as np
import pytest
import torch

from rvc_reference import loading, pipeline
from rvc_reference.contentvec import ContentVec, ContentVecConfig, fairseq_to_hf
from rvc_reference.modules import WINDOW, Flow, RelativeAttention
from rvc_reference.noise import SeededNoise
from rvc_reference.refinegan import resample
from rvc_reference.rmvpe import RMVPE, RMVPEConfig, decode, mel_filters, pad_frames
from rvc_reference.synthesizer import Synthesizer
from rvc_reference.vocoders import frame_phase
from rvc_reference.weight_norm import WNConv1d, WNConvTranspose1d
from tools import make_test_models as maker

TINY_HUBERT = ContentVecConfig(
    conv_dim=(16,) * 7,
    hidden_size=24,
    num_hidden_layers=10,
    num_attention_heads=3,
    intermediate_size=40,
    num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=3,
    classifier_proj_size=12,
)


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(scope="module", autouse=True)
def two_threads():
    torch.set_num_threads(2)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    return maker.make_test_models(folder, small=True)


@pytest.fixture(scope="module")
def converter(small):
    return pipeline.load_reference(
        small["voice.pth"], small["contentvec"], small["rmvpe.pt"], small["voice.index"]
    )


# Sizes and names --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "khz", "training", "inference", "without_f0", "stages"),
    [
        ("v1", 32, 36_294_338, 27_471_170, 27_402_432, 5),
        ("v1", 40, 36_360_514, 27_439_042, 27_367_616, 4),
        ("v1", 48, 36_400_834, 27_479_362, 27_402_432, 5),
        ("v2", 24, 36_745_538, 27_922_370, 27_859_136, 4),
        ("v2", 32, 36_880_706, 28_057_538, 27_990_208, 4),
        ("v2", 40, 36_458_818, 27_537_346, 27_465_920, 4),
        ("v2", 48, 37_638_466, 28_716_994, 28_645_568, 4),
    ],
)
def test_synthesizer_size(version, khz, training, inference, without_f0, stages):
    config = maker.voice_config(version, khz)
    with torch.device("meta"):
        models = [
            Synthesizer(config, version, with_enc_q=True),
            Synthesizer(config, version),
            Synthesizer(config, version, f0=False),
        ]
    assert [count(model) for model in models] == [training, inference, without_f0]
    keys = {4: [560, 457, 446], 5: [619, 516, 503]}[stages]
    assert [len(model.state_dict()) for model in models] == keys


@pytest.mark.parametrize(
    ("vocoder", "khz", "size", "keys"),
    [
        ("MRF HiFi-GAN", 24, 14_876_428, 460),
        ("MRF HiFi-GAN", 32, 15_011_596, 460),
        ("MRF HiFi-GAN", 40, 14_491_404, 460),
        ("MRF HiFi-GAN", 48, 15_671_052, 460),
        ("RefineGAN", 32, 13_227_218, 485),
        ("RefineGAN", 48, 13_227_218, 485),
    ],
)
def test_other_vocoders_size(vocoder, khz, size, keys):
    with torch.device("meta"):
        model = Synthesizer(maker.voice_config("v2", khz), vocoder=vocoder)
    assert count(model.dec) == size
    assert len(model.state_dict()) == keys


def test_encoder_sizes():
    with torch.device("meta"):
        rmvpe, hubert = RMVPE(), ContentVec()
    parts = [
        rmvpe.unet.encoder,
        rmvpe.unet.intermediate,
        rmvpe.unet.decoder,
        rmvpe.cnn,
        rmvpe.fc,
    ]
    assert [count(p) for p in parts] == [
        5_943_442,
        74_482_176,
        8_826_320,
        435,
        1_170_792,
    ]
    assert len(rmvpe.state_dict()) == 741
    assert count(hubert) == 94_568_576
    assert len(hubert.state_dict()) == 213


def weight_normed(name, *shape, bias=True):
    pair = {f"{name}.weight_g": (shape[0], 1, 1), f"{name}.weight_v": shape}
    return pair | ({f"{name}.bias": shape[:1]} if bias else {})


def plain(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def expected_front():
    keys = plain("enc_p.emb_phone", 192, 768) | {"enc_p.emb_pitch.weight": (256, 192)}
    keys |= plain("enc_p.proj", 384, 192, 1) | {"emb_g.weight": (109, 256)}
    for i in range(6):
        attention = f"enc_p.encoder.attn_layers.{i}"
        for part in "qkvo":
            keys |= plain(f"{attention}.conv_{part}", 192, 192, 1)
        keys |= {f"{attention}.emb_rel_{part}": (1, 21, 96) for part in "kv"}
        keys |= plain(f"enc_p.encoder.ffn_layers.{i}.conv_1", 768, 192, 3)
        keys |= plain(f"enc_p.encoder.ffn_layers.{i}.conv_2", 192, 768, 3)
        for name in ("gamma", "beta"):
            keys |= {
                f"enc_p.encoder.norm_layers_{n}.{i}.{name}": (192,) for n in (1, 2)
            }
    for i in (0, 2, 4, 6):
        flow = f"flow.flows.{i}"
        keys |= plain(f"{flow}.pre", 192, 96, 1) | plain(f"{flow}.post", 96, 192, 1)
        keys |= weight_normed(f"{flow}.enc.cond_layer", 1152, 256, 1)
        for layer in range(3):
            keys |= weight_normed(f"{flow}.enc.in_layers.{layer}", 384, 192, 5)
            width = 384 if layer < 2 else 192
            keys |= weight_normed(f"{flow}.enc.res_skip_layers.{layer}", width, 192, 1)
    return keys


def transposed(name, cin, cout, kernel):
    keys = weight_normed(name, cin, cout, kernel)
    return keys | {f"{name}.bias": (cout,)}


def expected_hifigan():
    keys = plain("dec.m_source.l_linear", 1, 1) | {"dec.conv_post.weight": (1, 32, 7)}
    keys |= plain("dec.conv_pre", 512, 192, 7) | plain("dec.cond", 512, 256, 1)
    for i, (kernel, source) in enumerate(
        zip((16, 16, 4, 4), (80, 8, 4, 1), strict=True)
    ):
        width = 256 >> i
        keys |= transposed(f"dec.ups.{i}", 2 * width, width, kernel)
        keys |= plain(f"dec.noise_convs.{i}", width, 1, source)
        for j, taps in enumerate((3, 7, 11)):
            for part in ("convs1", "convs2"):
                for k in range(3):
                    name = f"dec.resblocks.{3 * i + j}.{part}.{k}"
                    keys |= weight_normed(name, width, width, taps)
    return keys


def expected_mrf_32k():
    keys = plain("dec.m_source.l_linear", 1, 9) | plain("dec.cond", 512, 256, 1)
    keys |= weight_normed("dec.conv_pre", 512, 192, 7)
    keys |= weight_normed("dec.conv_post", 1, 32, 7)
    for i, (kernel, source) in enumerate(
        zip((20, 16, 4, 4), (64, 8, 4, 1), strict=True)
    ):
        width = 256 >> i
        keys |= transposed(f"dec.upsamples.{i}", 2 * width, width, kernel)
        keys |= plain(f"dec.noise_convs.{i}", width, 1, source)
        for j, taps in enumerate((3, 7, 11)):
            for k in range(3):
                for part in ("conv1", "conv2"):
                    name = f"dec.mrfs.{i}.{j}.layers.{k}.{part}"
                    keys |= weight_normed(name, width, width, taps)
    return keys


def expected_refinegan():
    keys = {"dec.m_source.merge.0.weight": (1, 1)} | plain("dec.cond", 256, 256, 1)
    keys |= weight_normed("dec.pre_conv", 16, 1, 7)
    keys |= weight_normed("dec.mel_conv", 256, 192, 7)
    keys |= weight_normed("dec.conv_post", 1, 32, 7, bias=False)
    for i in range(4):
        keys |= weight_normed(f"dec.downsample_blocks.{i}", 32 << i, 16 << i, 7)
        up, width = f"dec.upsample_conv_blocks.{i}", 256 >> i
        keys |= plain(f"{up}.input_conv", width, 2 * width + width // 2, 7)
        for j, taps in enumerate((3, 7, 11)):
            keys |= {f"{up}.blocks.{j}.{place}.weight": (width,) for place in (0, 2)}
            for part in ("convs1", "convs2"):
                for k in range(3):
                    keys |= weight_normed(
                        f"{up}.blocks.{j}.1.{part}.{k}", width, width, taps
                    )
    return keys


@pytest.mark.parametrize(
    ("khz", "vocoder", "expected"),
    [
        (40, "HiFi-GAN", expected_hifigan),
        (32, "MRF HiFi-GAN", expected_mrf_32k),
        (32, "RefineGAN", expected_refinegan),
    ],
)
def test_keys_and_shapes(khz, vocoder, expected):
    with torch.device("meta"):
        model = Synthesizer(maker.voice_config("v2", khz), vocoder=vocoder)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert shapes == expected_front() | expected()


# Weight norm ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [WNConv1d, WNConvTranspose1d])
def test_weight_norm_is_over_all_axes_but_the_first(kind):
    layer = kind(4, 6, 5)
    layer.weight_g.data.uniform_(0.5, 2)
    v = layer.weight_v.detach().double()
    norms = torch.stack([row.norm() for row in v])
    expected = v * (layer.weight_g.double().flatten() / norms)[:, None, None]
    torch.testing.assert_close(layer.weight(), expected.float(), rtol=1e-6, atol=1e-7)


def test_positional_weight_norm_is_one_scalar_per_tap():
    layer = WNConv1d(6, 6, 8, norm_dim=2, groups=3)
    layer.weight_g.data.uniform_(0.5, 2)
    assert layer.weight_g.shape == (1, 1, 8)
    got = layer.weight().flatten(0, 1).norm(dim=0)
    torch.testing.assert_close(got, layer.weight_g.flatten())


def test_fusing_keeps_output_and_state():
    layer = WNConv1d(3, 3, 3)
    x = torch.randn(1, 3, 9)
    before, keys = layer(x), set(layer.state_dict())
    layer.fuse()
    assert torch.equal(layer(x), before)
    assert set(layer.state_dict()) == keys
    layer.load_state_dict({k: 2 * v for k, v in layer.state_dict().items()})
    assert not torch.equal(layer(x), before)  # a load makes the fused weight stale


# ContentVec -------------------------------------------------------------------------


def compare_with_transformers(config, samples):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    mine = ContentVec(config).eval()
    mine.encoder.pos_conv_embed.conv.weight_g.data.uniform_(0.5, 1.5)
    values = {k: v for k, v in vars(config).items() if k != "classifier_proj_size"}
    theirs = transformers.HubertModel(transformers.HubertConfig(**values)).eval()
    state = {
        k: v for k, v in mine.state_dict().items() if not k.startswith("final_proj")
    }
    pair = {"weight_g": "original0", "weight_v": "original1"}
    for old, new in pair.items():
        name = "encoder.pos_conv_embed.conv."
        state[f"{name}parametrizations.weight.{new}"] = state.pop(name + old)
    theirs.load_state_dict(state)
    audio = 0.1 * torch.randn(2, samples)
    with torch.inference_mode():
        expected = theirs(audio, output_hidden_states=True).hidden_states
        got = mine(audio)
    assert len(got) == len(expected) == config.num_hidden_layers + 1
    for a, b in zip(got, expected, strict=True):
        difference = (a - b).abs()
        # float32 rounding through the layers; attention sums in another order
        assert difference.max() < 2e-5
        assert difference.mean() < 2e-6


def test_hidden_states_equal_transformers():
    compare_with_transformers(TINY_HUBERT, 4000)


@pytest.mark.slow
def test_hidden_states_equal_transformers_full_size():
    compare_with_transformers(ContentVecConfig(), 16000)


def test_features_of_both_versions():
    model = ContentVec(TINY_HUBERT).eval()
    audio = torch.randn(1, 400 + 320 * 4)
    with torch.inference_mode():
        states = model(audio)
        assert states[0].shape == (1, 5, 24)
        torch.testing.assert_close(model.extract(audio, "v2"), states[10])
        torch.testing.assert_close(
            model.extract(audio, "v1"), model.final_proj(states[9])
        )
    with pytest.raises(ValueError, match="'v3'"):
        model.extract(audio, "v3")


def test_other_hubert_variants_are_refused():
    with pytest.raises(ValueError, match="feat_extract_norm"):
        ContentVecConfig.from_dict({"feat_extract_norm": "layer"})


def test_fairseq_names_map_back():
    state = ContentVec(TINY_HUBERT).state_dict()
    fairseq = maker.to_fairseq(state)
    assert {"mask_emb", "layer_norm.weight", "encoder.pos_conv.0.weight_g"} <= set(
        fairseq
    )
    assert {
        "encoder.layers.3.self_attn_layer_norm.bias",
        "encoder.layers.9.fc2.weight",
    } <= set(fairseq)
    assert set(fairseq_to_hf({**fairseq, "label_embs_concat": None})) == set(state)


def test_fairseq_pickle_needs_the_inert_class(tmp_path):
    model = ContentVec(TINY_HUBERT)
    maker.write_hubert(model, tmp_path / "hubert.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "hubert.pt", weights_only=True)
    state = loading.read_pickle(tmp_path / "hubert.pt")["model"]
    assert state["final_proj.weight"].dtype == torch.float16
    model.load_state_dict(state)


@pytest.mark.parametrize("old_names", [True, False])
def test_both_weight_norm_spellings_load(tmp_path, old_names):
    model = ContentVec(TINY_HUBERT).eval()
    maker.write_contentvec(model, tmp_path, old_names=old_names)
    loaded = loading.load_contentvec(tmp_path)
    audio = torch.randn(1, 2000)
    with torch.inference_mode():
        assert torch.equal(loaded(audio)[-1], model(audio)[-1])


# RMVPE ------------------------------------------------------------------------------


def test_mel_filters_have_slaney_area():
    filters = mel_filters()
    assert filters.shape == (128, 513)
    # area 1 in Hz is 1 / (8000 / 512) in bins; the lowest triangles are sampled coarsely
    np.testing.assert_allclose(filters[40:].sum(1), 0.064, rtol=0.05)


def test_rmvpe_sizes_are_read_off_the_tensors():
    config = RMVPEConfig(
        channels=2, levels=3, inter_layers=2, blocks=1, gru_hidden=8, n_mels=16
    )
    model = RMVPE(config).eval()
    assert RMVPEConfig.from_state_dict(model.state_dict()) == config
    with torch.inference_mode():
        assert model(torch.zeros(1, 16, 24)).shape == (1, 24, 360)


def test_decode_of_single_peaks_and_silence():
    salience = np.zeros((5, 360), np.float32)
    salience[0, 100] = 0.9
    salience[1, 0] = 0.9
    salience[2, 359] = 0.9
    salience[3, 50] = 0.0299
    expected = [10 * 2 ** ((20 * b + 1997.3794084376191) / 1200) for b in (100, 0, 359)]
    np.testing.assert_allclose(decode(salience), [*expected, 0, 0], rtol=1e-12)


def test_decode_weighs_nine_bins():
    salience = np.zeros((1, 360))
    salience[0, 96:105] = [1, 2, 3, 4, 5, 4, 4, 2, 1]
    salience[0, 105] = 4.9  # outside the window
    cents = 20 * np.arange(96, 105) + 1997.3794084376191
    mean = (salience[0, 96:105] * cents).sum() / 26
    np.testing.assert_allclose(decode(salience), 10 * 2 ** (mean / 1200), rtol=1e-12)


def test_pad_modes():
    mel = torch.arange(40.0).reshape(1, 1, 40)
    assert pad_frames(mel, 32, "reflect")[0, 0, 40] == 38
    assert pad_frames(mel, 32, "constant")[0, 0, 40] == 0
    with pytest.raises(ValueError, match="reflected"):
        pad_frames(mel[..., :10], 32, "reflect")
    with pytest.raises(ValueError, match="'edge'"):
        pad_frames(mel, 32, "edge")


# Synthesizer ------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 5, 30])
def test_relative_attention_equals_its_closed_form(frames):
    torch.manual_seed(0)
    layer = RelativeAttention(12, 2).double()
    x = torch.randn(1, 12, frames, dtype=torch.float64)
    parts = [
        c(x)[0].reshape(2, 6, frames)
        for c in (layer.conv_q, layer.conv_k, layer.conv_v)
    ]
    q, k, v = (part.transpose(1, 2) for part in parts)
    out = torch.zeros(2, frames, 6, dtype=torch.float64)
    for i in range(frames):
        near = [(j, j - i + WINDOW) for j in range(frames) if abs(j - i) <= WINDOW]
        score = q[:, i, None] @ k.transpose(1, 2) / 6**0.5
        for j, row in near:
            score[:, 0, j] += q[:, i] @ layer.emb_rel_k[0, row] / 6**0.5
        share = score.softmax(-1)
        out[:, i] = (share @ v)[:, 0]
        for j, row in near:
            out[:, i] += share[:, 0, j, None] * layer.emb_rel_v[0, row]
    expected = layer.conv_o(out.transpose(1, 2).reshape(1, 12, frames))
    torch.testing.assert_close(layer(x), expected)


def test_inverse_flow_undoes_the_flow():
    torch.manual_seed(0)
    flow = Flow(8, 12, 5).double()
    z, g = torch.randn(1, 8, 20).double(), torch.randn(1, 5, 1).double()
    moved = flow(z, g)
    assert (moved - z.flip(1)).abs().max() > 1e-2
    torch.testing.assert_close(flow.inverse(moved, g), z)


def test_frame_phase_is_the_cumulative_sum_of_held_f0():
    f0 = torch.tensor([[[220.0], [0.0], [233.7], [1100.0]]], dtype=torch.float64)
    expected = torch.cumsum(f0.repeat_interleave(320, dim=1) / 32000, dim=1)
    difference = torch.remainder(frame_phase(f0, 320, 32000) - expected + 0.5, 1) - 0.5
    assert difference.abs().max() < 1e-12


@pytest.mark.parametrize("rate", [2, 5, 10])
def test_resampler_keeps_slow_sines(rate):
    time = torch.arange(4000, dtype=torch.float64)
    slow = torch.sin(2 * torch.pi * time * 0.15 / rate).float()[None, None]
    got = resample(slow, rate, 1)[0, 0]
    assert got.shape == (4000 // rate,)
    middle = slice(100, -100)
    assert (got - slow[0, 0, ::rate])[middle].abs().max() < 1e-4


def test_resampler_length_is_rounded_up():
    assert resample(torch.zeros(1, 3, 101), 4, 2).shape == (1, 3, 51)


@pytest.mark.parametrize("vocoder", ["HiFi-GAN", "MRF HiFi-GAN", "RefineGAN"])
def test_stages_compose_and_noise_matters(vocoder):
    torch.manual_seed(0)
    config = [*maker.SMALL_VOICE]
    config[12], config[13], config[14] = [10, 8, 2, 2], 64, [20, 16, 4, 4]
    model = Synthesizer(config, "v1", vocoder=vocoder).eval()
    model.fuse()
    phone, f0 = (
        torch.randn(1, 6, 256),
        torch.tensor([[0.0, 0.0, 200.0, 210.0, 220.0, 0.0]]),
    )
    pitch = torch.tensor([[1, 1, 55, 58, 60, 1]])
    prior, noise = model.draw(SeededNoise(1), 0, 6)
    with torch.inference_mode():
        whole = model.infer(phone, pitch, f0, 1, prior, noise)
        m, logs = model.encode_text(phone, pitch)
        z = model.prior(m, logs, model.speaker(1), prior)
        staged = model.decode(
            z, f0, model.speaker(1), noise.source, noise.phase, noise.adain
        )
        quiet = model.decode(z, f0, model.speaker(1))
    assert m.shape == logs.shape == z.shape == prior.shape == (1, 6, 64)
    assert whole.shape == (1, 6 * 320)
    assert torch.equal(whole, staged)
    assert not torch.equal(whole, quiet)


def test_config_errors_are_told():
    with pytest.raises(ValueError, match="17 entries"):
        Synthesizer(maker.SMALL_VOICE[1:], "v1")
    with pytest.raises(ValueError, match="f0=False"):
        Synthesizer(maker.SMALL_VOICE, "v1", f0=False, vocoder="RefineGAN")


# Pipeline ---------------------------------------------------------------------------


def test_coarse_pitch_table():
    hertz = [0, 60, 80, 110, 220, 440, 880, 1100, 2000]
    assert pipeline.quantize_f0(hertz).tolist() == [
        1,
        5,
        12,
        23,
        60,
        122,
        217,
        255,
        255,
    ]


def test_cuts_take_the_smallest_signed_sum():
    options = pipeline.ReferenceOptions(x_query=1, x_center=3, x_max=4)
    audio = np.ones(16000 * 5)
    assert pipeline.find_cuts(audio[: 16000 * 4 - 160], options) == []
    audio[40000:41000:2] = -1  # loud, but its signed sum is zero
    assert pipeline.find_cuts(audio, options) == [40080 // 160 * 160]


def test_loudness_is_imposed_or_kept():
    source = 0.1 * np.sin(np.arange(48000))
    output = 0.5 * np.sin(np.arange(96000))
    assert np.array_equal(pipeline.match_loudness(source, output, 32000, 1.0), output)
    imposed = pipeline.match_loudness(source, output, 32000, 0.0)
    np.testing.assert_allclose(imposed, 0.2 * output, atol=2e-3)


def test_exact_index_hit_is_the_vector(converter):
    vector = converter.vectors[3:4]
    blended = converter.blend(vector, 1.0)
    np.testing.assert_allclose(blended, vector, atol=1e-4)


@pytest.mark.parametrize(
    ("samples", "lost_frames"), [(16000, 2), (16000 + 100, 0), (16000 + 250, 1)]
)
def test_conversion_is_short_by_the_known_frames(converter, samples, lost_frames):
    audio = maker.synthetic_speech(2.0, 5).audio[:samples]
    output = converter.convert(audio, index_rate=0.5, rms_mix_rate=0.5)
    assert output.dtype == np.float32
    assert len(output) == 320 * (samples // 160 - lost_frames)
    assert 1e-3 < np.sqrt(np.mean(output**2)) < 0.5


def test_conversion_is_repeatable_and_cut_into_segments(converter):
    audio = maker.synthetic_speech(5.0, 6).audio
    options = {"x_query": 1, "x_center": 2, "x_max": 3}
    first = converter.convert(audio, noise=SeededNoise(3), **options)
    cuts = pipeline.find_cuts(
        pipeline.prepare(audio), pipeline.ReferenceOptions(**options)
    )
    assert len(cuts) == 2
    lengths = np.diff([0, *cuts]) // 160
    assert len(first) == 320 * (500 - 2 * (cuts[1] % 320 == 0) - (lengths % 2).sum())
    assert np.array_equal(
        first, converter.convert(audio, noise=SeededNoise(3), **options)
    )
    assert not np.array_equal(
        first, converter.convert(audio, noise=SeededNoise(4), **options)
    )


def test_protect_and_pitch_change_the_result(converter):
    audio = maker.synthetic_speech(1.5, 7).audio
    base = converter.convert(audio, index_rate=1.0, protect=0.5)
    assert not np.array_equal(
        base, converter.convert(audio, index_rate=1.0, protect=0.1)
    )
    assert not np.array_equal(base, converter.convert(audio, index_rate=1.0, pitch=12))


def test_short_f0_is_refused(converter):
    with pytest.raises(ValueError, match="f0 has 10 frames"):
        converter.convert(np.zeros(16000), f0=np.zeros(10))


def test_voice_without_f0(converter):
    torch.manual_seed(0)
    voice = Synthesizer(maker.SMALL_VOICE, "v1", f0=False)
    plain_voice = pipeline.ReferencePipeline(converter.contentvec, None, voice)
    audio = maker.synthetic_speech(1.0, 8).audio
    assert len(plain_voice.convert(audio)) == 320 * 98


def test_files_are_converted(converter, tmp_path):
    import soundfile

    audio = maker.synthetic_speech(1.0, 9).audio
    stereo = np.stack([audio, 0 * audio], axis=1).repeat(3, axis=0)
    soundfile.write(tmp_path / "in.wav", stereo, 48000)
    assert pipeline.load_audio(tmp_path / "in.wav").shape == (16000,)
    converter.convert_file(tmp_path / "in.wav", tmp_path / "out.wav")
    assert soundfile.info(tmp_path / "out.wav").samplerate == 32000


# Test models ------------------------------------------------------------------------


def test_small_set_is_small_and_repeatable(small, tmp_path):
    files = [
        f
        for path in small.values()
        for f in ([path] if path.is_file() else path.iterdir())
    ]
    assert sum(f.stat().st_size for f in files) < 4e6
    again = maker.make_test_models(tmp_path, ["voice", "contentvec"], small=True)
    assert again["voice.pth"].read_bytes() == small["voice.pth"].read_bytes()
    config = json.loads((small["contentvec"] / "config.json").read_text())
    assert config["classifier_proj_size"] == 256


def test_f0_network_finds_voice_and_pauses(converter):
    from rvc_reference.rmvpe import estimate_f0

    speech = maker.synthetic_speech(6.0, 1234)
    f0 = estimate_f0(converter.rmvpe, speech.audio)
    both = (f0 > 0) & (speech.f0 > 0)
    assert f0.shape == speech.f0.shape
    assert 0.2 < np.mean(f0 > 0) < 0.9
    assert np.median(np.abs(np.log2(f0[both] / speech.f0[both]))) < 0.1


def test_unknown_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'v3_96k'"):
        maker.make_test_models(tmp_path, ["v3_96k"])
