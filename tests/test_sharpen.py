"""A voice with less noise and a wider latent: what is folded, and into what."""

import re
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from stand_ins import write_stand_ins

from recipes import bundle, sharpen
from recipes.average import SHARPENED, average
from recipes.sharpen import (
    BIAS,
    PRIOR,
    WEIGHT,
    Spread,
    audible,
    latents,
    main,
    spread_of,
)
from rvc_mlx import ConversionOptions, load
from rvc_mlx.checkpoint import hash_file, read_checkpoint, save_checkpoint
from rvc_mlx.engine import choose_engine
from rvc_mlx.loading import Asked, Voice, read_weights

FRAMES = 80


@pytest.fixture(scope="module")
def recordings(speech, tmp_path_factory):
    """A folder with two clips, one of them further below."""
    folder = tmp_path_factory.mktemp("recordings")
    (folder / "more").mkdir()
    for name, clip in (("a", speech[:16000]), ("more/b", speech[16000:40000])):
        soundfile.write(folder / f"{name}.wav", clip, 16000, "FLOAT")
    (folder / "notes.txt").write_text("no sound")
    return folder


@pytest.fixture(scope="module")
def make_voice(small_models, tmp_path_factory):
    """Writes the small voice with metadata; its weights of a type, others in place."""

    def make(dtype=np.float32, **tensors):
        read = read_checkpoint(small_models.voice)
        path = tmp_path_factory.mktemp("voice") / "voice.safetensors"
        told = {**read.metadata, "kind": "voice", "step": 7, "model_hash": "of a run"}
        values = {k: v.astype(dtype) for k, v in read.tensors.items()} | tensors
        kept = {name: value for name, value in values.items() if value is not None}
        save_checkpoint(path, kept, told)
        return path

    return make


@pytest.fixture
def run(small_models, recordings):
    """Runs the command on a voice; other values for some options may be given."""

    def call(voice, export, folder=recordings, **others):
        given = {"encoder": small_models.encoder, "rmvpe": small_models.rmvpe}
        given |= {"export": export, "device": "cpu", **others}
        options = [
            word for name, value in given.items() for word in (f"--{name}", value)
        ]
        return main(list(map(str, [voice, folder, *options])))

    return call


@pytest.fixture
def open_voice(small_models):
    """Loads a voice with the small networks, in float32 on the CPU."""
    networks = {"encoder": small_models.encoder, "rmvpe": small_models.rmvpe}
    return partial(load, **networks, device="cpu", precision="f32")


@pytest.fixture
def converter(open_voice, make_voice):
    return open_voice(make_voice())


def observed_latents(converter, audio):
    """What a conversion's prior gives, without the second of context at both ends."""
    prior, found = converter.voice.prior, []

    def start(*arrays):
        found.append(prior.start(*arrays))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(converter.voice, "prior", SimpleNamespace(start=start))
        converter.convert(audio, 16000)
    [z] = found
    return z[0, 100 : 100 + len(audio) // 160 + 1]


@pytest.mark.parametrize("asks", [Asked(), Asked(0.15, 3, 2)])
def test_latents_are_those_of_a_conversion(converter, speech, asks, monkeypatch):
    monkeypatch.setattr(converter.voice, "asks", asks)
    for audio in (speech[:16000], speech[:20077]):
        [[z]] = latents(converter, audio, [ConversionOptions()])
        assert np.array_equal(z, observed_latents(converter, audio))


def test_latents_of_a_long_recording_leave_its_context_out(converter, speech):
    options = ConversionOptions(x_max=2, x_center=2, x_query=1)
    parts = [z for [z] in latents(converter, speech[:64000], [options])]
    assert len(parts) > 1
    assert sum(map(len, parts)) == 64000 // 160 + 1


def test_signal_and_noise_are_told_apart(converter, recordings, rng, monkeypatch):
    mean, signal, noise = rng.random((3, 64)) + 0.5
    shape = 40000, 64
    same = mean + np.sqrt(signal) * rng.standard_normal(shape)

    def made(_, audio, options):
        drawn = [
            np.random.default_rng(one.seed).standard_normal(shape) for one in options
        ]
        yield from np.split(same + np.sqrt(noise) * np.stack(drawn), 2, axis=1)

    heard = rng.random(len(same)) < 0.8
    same[~heard] = 1000  # a silent frame's
    monkeypatch.setattr(sharpen, "latents", made)
    monkeypatch.setattr(sharpen, "audible", lambda audio: heard)
    found = spread_of(converter, sorted(recordings.rglob("*.wav")), seed=3)
    for value, expected in zip(found, (mean, signal, noise), strict=True):
        np.testing.assert_allclose(value, expected, rtol=0.06)


def test_frames_within_40_db_of_the_loudest_are_audible():
    levels = np.array([0, 0.5, 0.006, 0.004, 0])
    found = audible(np.repeat(levels, 160)[:-10].astype(np.float32))
    assert found.tolist() == [False, True, True, False, False]


def test_factors_grow_with_noise_up_to_what_there_was():
    spread = Spread(np.zeros(3), np.array([4.0, 1, 0.01]), np.array([1.0, 1, 1]))
    assert spread.factors(0.5, noise=0.25) == pytest.approx([1.125, 1.5, 4])
    assert spread.factors(0, noise=0.25) == pytest.approx([1, 1, 1])
    assert spread.factors(2, noise=1) == pytest.approx([1, 1, 1])


@pytest.mark.parametrize("strength", [0.3, 1])
def test_a_sharpened_voice_speaks_as_the_voice_with_a_sharper_latent(
    make_voice, converter, recordings, tmp_path, rng, strength
):
    before, after = make_voice(), tmp_path / "new" / "sharp.safetensors"
    files = sorted(recordings.rglob("*.wav"))
    spread = spread_of(converter, files, seed=0)
    sharpen.sharpen(read_checkpoint(before), spread, strength, 0.25, after)
    factors = spread.factors(strength, 0.25)
    assert factors.max() > factors.min() + 0.1
    clips = [soundfile.read(path, dtype="float32")[0] for path in files]
    observed = [observed_latents(converter, clip) for clip in clips]
    heard = [z[audible(clip)] for z, clip in zip(observed, clips, strict=True)]
    seen = np.concatenate(heard)
    # Its seed is one of the two.
    np.testing.assert_allclose(spread.mean, seen.mean(axis=0), rtol=0, atol=0.1)
    assert np.abs(spread.mean).max() > 0.1  # or the bias would hardly matter
    engine = choose_engine("mlx-cpu", "f32")
    one, other = (
        Voice(read_weights(path, "voice"), engine) for path in (before, after)
    )
    U, context = one.config.samples_per_frame, one.context
    source = 0.1 * rng.standard_normal((1, FRAMES * U, 1), np.float32)
    speaker, z = one.speakers[:1][None], seen[None, :FRAMES]
    sharper = (spread.mean + factors * (z - spread.mean)).astype(np.float32)
    inner = slice(context * U, (FRAMES - context) * U)
    expected = one.vocoder(sharper, speaker, source)[0, inner]
    found = other.vocoder(z, speaker, source)[0, inner]
    unchanged = one.vocoder(z, speaker, source)[0, inner]
    # Float32, through some thirty layers.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert np.abs(found - unchanged).max() > 1e-3


def test_no_strength_and_all_noise_change_nothing(run, make_voice, tmp_path):
    before, after = make_voice(np.float16), tmp_path / "same.safetensors"
    assert run(before, after, strength=0, noise=1) == 0
    old, new = (read_checkpoint(path).tensors for path in (before, after))
    assert old.keys() == new.keys()
    for name, value in new.items():
        assert value.dtype == np.float16
        assert np.array_equal(value, old[name])


def test_less_noise_moves_the_latent_less(
    run, make_voice, open_voice, speech, tmp_path
):
    before, after = make_voice(), tmp_path / "still.safetensors"
    assert run(before, after, strength=0, noise=0.25) == 0
    spreads = []
    for voice in (before, after):
        converter = open_voice(voice)
        both = [ConversionOptions(seed=seed) for seed in (0, 1)]
        one, other = next(latents(converter, speech[:16000], both))
        spreads.append(np.std(one - other))
    assert spreads[1] == pytest.approx(0.25 * spreads[0], rel=0.05)


def test_only_three_tensors_change_and_their_types_stay(run, make_voice, tmp_path):
    before, after = make_voice(np.float16), tmp_path / "sharp.safetensors"
    assert run(before, after) == 0
    old, new = (read_checkpoint(path).tensors for path in (before, after))
    changed = {name for name in old if not np.array_equal(old[name], new[name])}
    assert changed == {WEIGHT, BIAS, PRIOR}
    half = len(old[PRIOR]) // 2
    assert np.array_equal(new[PRIOR][:half], old[PRIOR][:half])
    wanted = old[PRIOR][half:].astype(float) + np.log(0.25)
    np.testing.assert_allclose(new[PRIOR][half:], wanted, rtol=2**-11, atol=2**-25)
    assert {value.dtype for value in new.values()} == {np.dtype(np.float16)}
    factors = (new[WEIGHT].astype(float) / old[WEIGHT]).mean(axis=(0, 2))
    assert 1 < factors.min() < factors.max() <= 4.001


def test_a_sharpened_voice_tells_what_it_was_made_from(
    run, make_voice, tmp_path, caplog
):
    before, after = make_voice(), tmp_path / "once.safetensors"
    assert run(before, after, strength=0.5) == 0
    known = read_checkpoint(before).metadata
    del known["model_hash"]
    line = f"voice.safetensors (sha256 {hash_file(before)}), strength 0.5, noise * 0.25"
    assert read_checkpoint(after).metadata == {**known, SHARPENED: line}
    caplog.clear()
    message = "once.safetensors is sharpened already; give the voice from before"
    refused(run, caplog, tmp_path / "twice.safetensors", message, after)
    with pytest.raises(ValueError, match=r"one is sharpened.*average first"):
        average(read_checkpoint(before), read_checkpoint(after), 0.5, tmp_path / "m")


def test_the_same_seed_gives_the_same_weights(run, make_voice, tmp_path):
    voice, biases = make_voice(), []
    for number, seed in enumerate((0, 0, 1)):
        path = tmp_path / f"{number}.safetensors"
        assert run(voice, path, seed=seed) == 0
        biases.append(read_checkpoint(path).tensors[BIAS])
    assert np.array_equal(biases[0], biases[1])
    assert not np.array_equal(biases[0], biases[2])


def test_recordings_are_chosen_evenly(tmp_path):
    for number in range(10):
        (tmp_path / f"{number}.ogg").touch()
    for limit, wanted in ((1, "0"), (4, "0369"), (40, "0123456789")):
        found = sharpen.recordings_of(tmp_path, limit)
        assert "".join(path.stem for path in found) == wanted


def refused(run, caplog, export, message, voice, **others):
    """Exit code 1, one line, and nothing written."""
    assert run(voice, export, **others) == 1
    [line] = [r.getMessage() for r in caplog.records if r.name == "recipes"]
    assert re.search(message, line)
    assert "\n" not in line
    assert not export.exists()


@pytest.mark.parametrize("strength", ["nan", "inf", "-0.1", "2.1"])
def test_a_strength_that_makes_no_sense_is_refused(
    run, make_voice, tmp_path, caplog, strength
):
    message = f"--strength {strength}; expected 0 to 2"
    export = tmp_path / "x.safetensors"
    refused(run, caplog, export, message, make_voice(), strength=strength)


def test_wrong_options_and_files_are_refused(
    run, make_voice, small_models, tmp_path, caplog
):
    voice, export = make_voice(), tmp_path / "x.safetensors"
    empty, short = tmp_path / "empty", tmp_path / "short"
    empty.mkdir()
    short.mkdir()
    soundfile.write(short / "click.wav", np.zeros(80), 16000)
    for message, others in (
        ("--limit 0; expected 1", {"limit": 0}),
        ("--noise 0; expected 0.01 to 1", {"noise": 0}),
        ("--noise nan; expected 0.01 to 1", {"noise": "nan"}),
        ("seed is -1; expected 0", {"seed": -1}),
        ("empty: no sound files", {"folder": empty}),
        (r"click\.wav: the recording is 5\.0 ms long", {"folder": short}),
        ("nowhere: no sound files", {"folder": tmp_path / "nowhere"}),
        ("this is an RVC voice; expected an RMVPE", {"rmvpe": voice}),
        ("there is no such file", {"voice": tmp_path / "none.safetensors"}),
        ("expected an RVC voice", {"voice": small_models.rmvpe}),
    ):
        caplog.clear()
        refused(run, caplog, export, message, **{"voice": voice, **others})
    caplog.clear()
    refused(run, caplog, tmp_path / "x.pth", r"x\.pth; expected a \.safe", voice)


def test_the_voice_itself_is_not_replaced(run, make_voice, caplog):
    voice = make_voice()
    before = voice.read_bytes()
    assert run(voice, voice.parent / "." / ".." / voice.parent.name / voice.name) == 1
    assert "is the voice itself" in caplog.text
    assert voice.read_bytes() == before


@pytest.mark.parametrize(
    "parts",
    [
        (f"{WEIGHT}_g", f"{WEIGHT}_v"),
        tuple(
            f"dec.conv_pre.parametrizations.weight.original{number}"
            for number in (0, 1)
        ),
    ],
)
def test_a_first_layer_in_two_parts_is_refused(
    run, make_voice, tmp_path, caplog, parts
):
    shapes = (64, 1, 1), (64, 64, 7)
    two = {name: np.ones(s, np.float32) for name, s in zip(parts, shapes, strict=True)}
    voice = make_voice(**{WEIGHT: None}, **two)
    message = "no dec.conv_pre.weight; .*extract the voice first"
    refused(run, caplog, tmp_path / "x.safetensors", message, voice)


def test_a_weight_beyond_its_type_is_refused(run, make_voice, tmp_path, caplog):
    read = read_checkpoint(make_voice(np.float16)).tensors[WEIGHT]
    large = read.copy()
    large[0, 0, 0] = 6.4e4
    voice = make_voice(np.float16, **{WEIGHT: large})
    message = r"dec.conv_pre.weight: [\d.]+e.04 does not fit float16"
    refused(run, caplog, tmp_path / "x.safetensors", message, voice, strength=2)


def test_a_sharpened_voice_is_bundled_from_its_run(run, recordings, tmp_path):
    made = write_stand_ins(tmp_path / "made")
    sharp = made.slt / "sharp.safetensors"
    networks = {"encoder": made.encoder, "rmvpe": made.rmvpe}
    assert run(made.slt / "slt.safetensors", sharp, **networks) == 0
    words = ["--voice", f"slt={sharp}", "--voice", f"rms={made.rms}"]
    for name in ("encoder", "rmvpe", "recordings"):
        words += [f"--{name}", str(getattr(made, name))]
    assert bundle.main([*words, "--into", str(tmp_path / "into")]) == 0
    bundled = read_checkpoint(tmp_path / "into" / "slt.safetensors")
    digest = hash_file(made.slt / "slt.safetensors")
    line = f"slt.safetensors (sha256 {digest}), strength 0.7, noise * 0.25"
    assert bundled.metadata[SHARPENED] == line
    tensors = read_checkpoint(sharp).tensors
    assert np.array_equal(bundled.tensors[WEIGHT], tensors[WEIGHT])
