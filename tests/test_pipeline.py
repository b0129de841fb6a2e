"""The whole conversion: lengths, agreement with the reference, repeatability, errors.

Everything runs on the small models (real networks, few channels, random weights).
"""

import copy

import mlx.core as mx
import numpy as np
import pytest
import soundfile

import rvc_mlx
from rvc_mlx import ConversionOptions, pitch
from rvc_mlx.arrays import steady_length
from rvc_mlx.audio import high_pass, high_pass_spool, high_pass_spools
from rvc_mlx.checkpoint import read_checkpoint, save_checkpoint
from rvc_mlx.engine import OpenVINOEngine, choose_engine
from rvc_mlx.loading import Encoder, PitchNet, Voice, read_weights
from rvc_mlx.noise import Noise
from rvc_mlx.pipeline import VoiceConverter, load
from rvc_mlx.retrieval import read_index
from rvc_mlx.segments import find_cuts, plan_segments
from rvc_mlx.spool import Spool
from rvc_mlx.steady import few_lengths
from rvc_reference import pipeline as reference_pipeline
from rvc_reference.noise import ZeroNoise
from tools import make_test_models as maker
from tools.random_weights import synthetic_speech

pytestmark = pytest.mark.usefixtures("_one_thread")

RATE = 32000  # of the small voice, Hz
SEGMENTS = {"x_query": 1, "x_center": 2, "x_max": 3}  # seconds: cuts about 2, 4, ... s


@pytest.fixture(scope="module")
def reference(small_models):
    return reference_pipeline.load_reference(
        small_models.voice, small_models.encoder, small_models.rmvpe, small_models.index
    )


@pytest.fixture(scope="module")
def talk():
    """``[80000]`` float32: 5 s of syllables, hisses and pauses."""
    audio = synthetic_speech(5.0, 11).audio
    audio.flags.writeable = False
    return audio


def write_voice(path, **kind):
    """A voice of the small one's size."""
    spec = maker.VoiceFile(**{"version": "v1", "khz": 32, "speakers": 4, **kind})
    maker.write_voice("test", spec, maker.SMALL_VOICE, path, 1)
    return path


@pytest.fixture(scope="module")
def plain_voice(tmp_path_factory):
    """A voice without F0."""
    return write_voice(tmp_path_factory.mktemp("plain") / "plain.pth", f0=False)


@pytest.fixture(scope="module")
def plain_converter(home, plain_voice, small_converter):
    engine = OpenVINOEngine("f32", home / "compiled")
    voice = Voice(read_weights(plain_voice, "voice"), engine)
    return VoiceConverter(
        voice, small_converter.encoder, None, small_converter.index, engine
    )


def spooled(audio, dtype=np.float64):
    spool = Spool(dtype)
    spool.append(audio)
    return spool


def rms(x):
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


# Length -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "samples", "output_rate"),
    [
        (1000, 10, 0),  # exactly 10 ms
        (1000, 333, 0),
        (8000, 80, 0),
        (8000, 4001, 0),
        (11025, 5000, 44100),
        (16000, 160, 0),
        (16000, 161, 0),
        (16000, 319, 0),
        (16000, 800, 0),  # 50 ms
        (16000, 801, 48000),
        (16000, 6399, 0),
        (16000, 6400, 22050),
        (16000, 6401, 8000),
        (16000, 16000, 0),
        (22050, 7777, 0),
        (44100, 441, 44100),
        (44100, 20001, 0),
        (44100, 20001, 44100),
        (48000, 480, 48000),
        (48000, 23999, 48000),
        (48000, 24001, 16000),
        (96000, 40001, 0),
        (192000, 1920, 192000),
        (192000, 60007, 0),
    ],
)
def test_output_has_exactly_the_rounded_length(
    small_converter, speech, rate, samples, output_rate
):
    audio = speech[5000 : 5000 + samples]
    result = small_converter.convert(
        audio, rate, ConversionOptions(output_rate=output_rate)
    )
    assert result.sample_rate == (output_rate or RATE)
    assert len(result.audio) == round(samples * result.sample_rate / rate)
    assert result.audio.dtype == np.float32
    assert np.isfinite(result.audio).all()
    assert result.audio[-2:].all()  # not filled up with zeros
    assert np.abs(result.audio).max() <= 0.99 + 1e-6


@pytest.mark.parametrize(
    ("samples", "output_rate", "x_center"),
    [(48001, 0, 2.0), (64159, 44100, 2.5), (73920, 48000, 2.333)],
)
def test_length_is_exact_with_several_segments(
    small_converter, speech, samples, output_rate, x_center
):
    options = ConversionOptions(
        output_rate=output_rate, x_query=0.5, x_center=x_center, x_max=2, x_pad=0.3
    )
    with spooled(speech[:samples]) as spool:
        assert len(plan_segments(spool, options)) >= 2
    result = small_converter.convert(speech[:samples], 16000, options)
    assert len(result.audio) == round(samples * result.sample_rate / 16000)


def test_every_frame_of_a_plan_is_kept_once(speech):
    options = ConversionOptions(x_query=0.5, x_center=2, x_max=2)
    for samples in (160, 16000, 40159, 73921):
        with spooled(np.tile(speech, 2)[:samples]) as spool:
            segments = plan_segments(spool, options)
        kept = sum(segment.last - segment.first for segment in segments)
        assert kept == samples // 160 + 1  # one more, for the rounding of rates
        for segment in segments:
            assert segment.first == 100
            assert segment.last <= segment.frames
            assert segment.start % 160 == 0


# Agreement with the reference -------------------------------------------------------


def compare(converter, reference, audio, **options):
    """Convert with both; assert that they agree; return the audio."""
    names = {"volume_envelope": "rms_mix_rate", "speaker": "sid"}
    names |= {"mel_padding": "pad_mode"}
    expected = reference.convert(
        audio,
        noise=Noise(5),
        **{names.get(name, name): value for name, value in options.items()},
    )
    found = converter.convert(
        audio,
        16000,
        ConversionOptions(reference_lengths=True, **options),
        noise=Noise(5),
    )
    assert found.audio.shape == expected.shape
    difference = np.abs(found.audio - expected)
    # Measured 3e-6 and 2e-7: float32 sums in another order, some thirty layers deep.
    assert difference.max() < 1e-4
    assert difference.mean() < 1e-5
    assert rms(expected) > 0.05
    return found.audio


@pytest.mark.parametrize(
    ("samples", "options"),
    [
        (16000, {"index_rate": 0.0}),
        (16001, {"index_rate": 0.5, "protect": 0.33, "pitch": 7.5}),
        (16250, {"index_rate": 1.0, "protect": 0.0, "volume_envelope": 0.0}),
        (16100, {"index_rate": 1.0, "protect": 0.5, "volume_envelope": 0.25}),
        (9000, {"index_rate": 0.0, "speaker": 3, "mel_padding": "constant"}),
        (400, {"index_rate": 0.0}),  # the shortest that the reference takes
        (3000, {"index_rate": 0.5}),  # shorter than the padding
        (9000, {"index_rate": 0.75, "x_pad": 2}),
    ],
)
def test_one_segment_equals_the_reference(
    small_converter, reference, talk, samples, options
):
    compare(small_converter, reference, talk[8000 : 8000 + samples], **options)


@pytest.mark.parametrize("parity", [0, 1])
def test_segments_equal_the_reference(small_converter, reference, talk, parity):
    """An odd number of frames between cuts makes the reference 10 ms shorter."""
    settings = reference_pipeline.ReferenceOptions(**SEGMENTS)
    for offset in range(0, 16000, 160):
        audio = talk[offset : offset + 50000]
        [cut] = reference_pipeline.find_cuts(
            reference_pipeline.prepare(audio), settings
        )
        if cut // 160 % 2 == parity:
            break
    output = compare(small_converter, reference, audio, index_rate=0.5, **SEGMENTS)
    lost = len(audio) / 160 - len(output) / 320  # frames
    assert parity < lost < parity + 3


def test_reference_lengths_of_ten_milliseconds_are_refused(small_converter, speech):
    options = ConversionOptions(reference_lengths=True)
    with pytest.raises(ValueError, match="25 ms or more with reference_lengths"):
        small_converter.convert(speech[:160], 16000, options)


def test_voice_without_f0_equals_the_reference(
    plain_converter, plain_voice, small_models, talk
):
    reference = reference_pipeline.load_reference(
        plain_voice, small_models.encoder, None, small_models.index
    )
    compare(plain_converter, reference, talk[:20000], index_rate=0.5)


def test_given_f0_equals_the_reference(small_converter, reference, talk):
    audio = talk[:16000]
    f0 = np.where(np.arange(300) % 50 < 35, np.linspace(90, 400, 300), 0)
    expected = reference.convert(audio, noise=Noise(1), f0=f0, pitch=3)
    options = ConversionOptions(reference_lengths=True, index_rate=0, pitch=3)
    found = small_converter.convert(audio, 16000, options, noise=Noise(1), f0=f0)
    difference = np.abs(found.audio - expected)
    assert difference.max() < 1e-4  # as in compare
    assert difference.mean() < 1e-5


def test_default_mode_is_the_reference_but_for_the_ends(
    small_converter, talk, record_property
):
    """Both hear the same; only the padding's last frames differ."""
    outputs = [
        small_converter.convert(
            talk[:40000],
            16000,
            ConversionOptions(index_rate=0, reference_lengths=lengths),
            noise=ZeroNoise(),
        ).audio
        for lengths in (False, True)
    ]
    shorter = len(outputs[1])
    assert 0 < len(outputs[0]) - shorter <= 0.025 * RATE
    a, b = (output[: shorter - RATE // 10] for output in outputs)
    snr = 20 * np.log10(rms(b) / rms(a - b))
    record_property("snr_db", float(snr))
    print(f"\ndefault against reference lengths: {snr:.1f} dB")
    # The encoder normalises over time and attends to all of it, so that a few frames
    # more of context change every feature a little.
    assert snr > 25


@pytest.mark.parametrize("offset", [0, 777, 16000])
def test_cuts_are_the_reference_s(talk, offset):
    audio = high_pass(np.tile(talk, 5)[offset:])
    options = {"x_query": 1, "x_center": 3, "x_max": 5}
    expected = reference_pipeline.find_cuts(
        audio, reference_pipeline.ReferenceOptions(**options)
    )
    assert len(expected) >= 7
    with spooled(audio) as spool:
        assert find_cuts(spool, ConversionOptions(**options)) == expected


def test_up_to_x_max_there_is_no_cut(talk):
    options = ConversionOptions(x_query=1, x_center=2, x_max=3)
    with spooled(talk[: 48000 - 160]) as spool:
        assert find_cuts(spool, options) == []
    with spooled(talk[: 48000 - 159]) as spool:
        assert len(find_cuts(spool, options)) == 1


# Repeatability ----------------------------------------------------------------------


def test_same_seed_same_bits(small_converter, speech):
    first, again, other = (
        small_converter.convert(speech[:24000], 16000, ConversionOptions(seed=seed))
        for seed in (7, 7, 8)
    )
    assert np.array_equal(first.audio, again.audio)
    assert rms(first.audio - other.audio) > 1e-3


def test_vocoder_window_does_not_matter(small_converter, small_models, speech):
    engine = OpenVINOEngine("f32", None)
    engine.window_frames = 37
    voice = Voice(read_weights(small_models.voice, "voice"), engine)
    assert voice.window != small_converter.voice.window
    other = copy.copy(small_converter)
    other.voice = voice
    found, expected = (
        each.convert(speech[:24000], 16000).audio for each in (other, small_converter)
    )
    # The context covers the receptive field; float32 sums differ by kernel.
    assert np.abs(found - expected).max() < 1e-5


def test_noise_does_not_depend_on_the_split():
    noise = Noise(3)
    whole = noise.normal("source", 2, 0, 200, 3, 2)
    parts = [
        noise.normal("source", 2, a, b, 3, 2) for a, b in ((0, 1), (1, 77), (77, 200))
    ]
    assert np.array_equal(np.concatenate(parts), whole)
    assert not np.array_equal(noise.normal("source", 3, 0, 200, 3, 2), whole)
    assert not np.array_equal(noise.normal("prior", 2, 0, 200, 3, 2), whole)
    assert noise.normal("source", 2, 5, 5, 3, 2).shape == (0, 2)


@pytest.mark.parametrize("rate", [16000, 44100])
def test_file_equals_array(small_converter, talk, tmp_path, rate):
    """The streamed conversion of a file, cut into segments, is that of the array."""
    options = ConversionOptions(index_rate=0.5, volume_envelope=0.5, **SEGMENTS)
    audio = talk[: 70000 if rate == 16000 else 44100]
    soundfile.write(tmp_path / "in.wav", audio, rate, subtype="FLOAT")
    report = small_converter.convert_file(
        tmp_path / "in.wav", tmp_path / "out.wav", options, subtype="FLOAT"
    )
    found, found_rate = soundfile.read(tmp_path / "out.wav", dtype="float32")
    expected = small_converter.convert(audio, rate, options)
    assert np.array_equal(found, expected.audio)
    assert report.samples == len(found)
    assert report.sample_rate == found_rate == RATE
    assert report.seconds == len(audio) / rate
    assert [path.name for path in tmp_path.glob("*.part")] == []


def test_stereo_is_its_mean(small_converter, speech, tmp_path):
    left, right = speech[:16000], speech[16000:32000]
    mono = ((left + right) / 2).astype(np.float32)
    both = np.stack([left, right], axis=1)
    expected = small_converter.convert(mono, 16000).audio
    found = small_converter.convert(both, 16000).audio
    assert np.array_equal(found, expected)
    soundfile.write(tmp_path / "in.wav", both, 16000, subtype="FLOAT")
    small_converter.convert_file(
        tmp_path / "in.wav", tmp_path / "out.wav", subtype="FLOAT"
    )
    assert np.array_equal(load_raw(tmp_path / "out.wav"), expected)


def load_raw(path):
    return soundfile.read(path, dtype="float32")[0]


# Silence ----------------------------------------------------------------------------


def test_silence_stays_silence(small_converter):
    result = small_converter.convert(np.zeros(20000, np.float32), 16000)
    assert result.audio.shape == (40000,)
    assert not result.audio.any()


def test_silence_in_the_middle_stays_silence(small_converter, talk, tmp_path):
    audio = talk[:48000].copy()
    audio[16000:32000] = 0
    soundfile.write(tmp_path / "in.flac", audio, 16000, subtype="PCM_24")
    small_converter.convert_file(tmp_path / "in.flac", tmp_path / "out.wav")
    output = load_raw(tmp_path / "out.wav")
    assert len(output) == 96000
    fade = RATE // 100
    assert not output[32000 + fade : 64000 - fade].any()
    assert rms(output[:32000]) > 1e-2
    assert rms(output[64000:]) > 1e-2


def test_reference_lengths_leave_silence_as_the_voice_fills_it(small_converter):
    options = ConversionOptions(reference_lengths=True)
    result = small_converter.convert(np.zeros(16000, np.float32), 16000, options)
    assert result.audio.any()


# Options ----------------------------------------------------------------------------


def flat_f0(hertz, seconds=1.0):
    """F0 for ``seconds`` of audio and its padding, with an unvoiced stretch."""
    f0 = np.full(round(seconds * 100) + 200, float(hertz))
    f0[130:140] = 0
    return f0


def convert_with_f0(converter, speech, f0, **options):
    return converter.convert(
        speech[:16000], 16000, ConversionOptions(index_rate=0, **options), f0=f0
    ).audio


def test_pitch_shifts_the_f0(small_converter, speech):
    up = convert_with_f0(small_converter, speech, flat_f0(110), pitch=12)
    same = convert_with_f0(small_converter, speech, flat_f0(220))
    assert np.array_equal(up, same)
    assert not np.array_equal(
        up, convert_with_f0(small_converter, speech, flat_f0(110))
    )


def test_autotune_pulls_to_the_note_then_shifts(small_converter, speech):
    tuned = convert_with_f0(
        small_converter, speech, flat_f0(224), f0_autotune=True, pitch=12
    )
    assert np.array_equal(tuned, convert_with_f0(small_converter, speech, flat_f0(440)))
    half = convert_with_f0(
        small_converter,
        speech,
        flat_f0(224),
        f0_autotune=True,
        f0_autotune_strength=0.5,
    )
    assert np.array_equal(half, convert_with_f0(small_converter, speech, flat_f0(222)))


@pytest.mark.parametrize(
    ("hertz", "target", "semitones"), [(310, 155, -12), (155, 255, 9), (1000, 155, -12)]
)
def test_proposed_pitch_moves_the_median(
    small_converter, speech, hertz, target, semitones
):
    proposed = convert_with_f0(
        small_converter,
        speech,
        flat_f0(hertz),
        proposed_pitch=True,
        proposed_pitch_threshold=target,
        pitch=1,
    )
    shifted = convert_with_f0(
        small_converter, speech, flat_f0(hertz), pitch=semitones + 1
    )
    assert np.array_equal(proposed, shifted)


def test_f0_file_is_written_over_the_shifted_f0(small_converter, speech, tmp_path):
    path = tmp_path / "curve.csv"
    path.write_text("0.2,150\n\n0.6,350\n")
    found = convert_with_f0(
        small_converter, speech, flat_f0(110), f0_file=str(path), pitch=12
    )
    f0 = flat_f0(220)
    f0[120:161] = np.interp(np.arange(41), [0, 40], [150, 350])
    expected = convert_with_f0(small_converter, speech, f0)
    assert np.abs(found - expected).max() < 1e-5  # the grid in float64, rounded


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no lines"),
        ("0.1;200", "line 1"),
        ("0,200\n1,nan", "line 2"),
        ("-1,200", "line 1"),
    ],
)
def test_bad_f0_file_is_refused(small_converter, speech, tmp_path, text, message):
    path = tmp_path / "curve.csv"
    path.write_text(text)
    options = ConversionOptions(f0_file=str(path))
    with pytest.raises(ValueError, match=message):
        small_converter.convert(speech[:4000], 16000, options)


def test_estimate_is_what_injection_replaces(small_converter, speech):
    """Injecting the estimate gives the conversion without injection."""
    net = small_converter.pitch_net
    with spooled(speech, np.float32) as source, high_pass_spool(source) as filtered:
        [segment] = plan_segments(filtered, ConversionOptions())
        f0 = pitch.estimate_f0(
            net.salience,
            lambda a, b: filtered.read_reflected(a - 16000, b - 16000),
            segment.samples,
            net.config.n_mels,
            frames_multiple=net.frames_multiple,
        )
    assert (f0[100:-100] > 0).any()
    expected = small_converter.convert(speech, 16000).audio
    assert np.array_equal(small_converter.convert(speech, 16000, f0=f0).audio, expected)


@pytest.fixture(scope="module")
def asking_voice(small_models, tmp_path_factory):
    """Writes the small voice with more metadata."""

    def write(**asked):
        read = read_checkpoint(small_models.voice)
        path = tmp_path_factory.mktemp("asking") / "voice.safetensors"
        save_checkpoint(path, read.tensors, {**read.metadata, **asked})
        return path

    return write


def test_a_voice_is_given_what_it_asks_for(
    home, small_models, small_converter, speech, asking_voice
):
    given = {"f0_threshold": 0.12, "f0_onset": 3, "f0_offset": 2}
    converter = load(
        asking_voice(**given),
        encoder=small_models.encoder,
        rmvpe=small_models.rmvpe,
        device="cpu",
        precision="f32",
    )

    def convert(converter, **options):
        chosen = ConversionOptions(index_rate=0, **options)
        return converter.convert(speech[:16000], 16000, chosen).audio

    plain = convert(small_converter)
    asked = convert(small_converter, **given)
    assert not np.array_equal(asked, plain)
    assert np.array_equal(convert(converter), asked)
    rvc = {"f0_threshold": 0.03, "f0_onset": 0, "f0_offset": 0}
    assert np.array_equal(convert(converter, **rvc), plain)
    assert np.array_equal(convert(small_converter, **rvc), plain)
    for name, value in given.items():
        alone = convert(small_converter, **{name: value})
        assert not np.array_equal(alone, plain)
        assert np.array_equal(convert(converter, **(rvc | {name: value})), alone)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"f0_threshold": 2}, "voice.safetensors: .* f0_threshold 2; expected 0 to 1"),
        ({"f0_threshold": -1}, "f0_threshold -1; expected 0 to 1"),
        ({"f0_threshold": float("nan")}, "f0_threshold nan; expected 0 to 1"),
        ({"f0_onset": 11}, "f0_onset 11; expected 0 to 10 frames"),
        ({"f0_offset": -1}, "f0_offset -1; expected 0 to 10 frames"),
        ({"f0_onset": 1.5}, "f0_onset 1.5; expected 0 to 10 frames"),
        ({"f0_onset": "soon"}, "f0_onset 'soon'; expected 0 to 10 frames"),
    ],
)
def test_a_voice_that_asks_for_what_cannot_be_is_refused(
    small_models, asking_voice, asked, message
):
    with pytest.raises(ValueError, match=message):
        load(asking_voice(**asked), encoder=small_models.encoder, device="cpu")


def test_a_recording_is_filtered_as_the_engine_does_it(
    home, small_converter, monkeypatch, speech
):
    engine, gains = OpenVINOEngine("f32", home / "compiled"), []

    def filtered(sources, asked):
        gains.extend(asked)
        return high_pass_spools(sources, asked)

    monkeypatch.setattr(engine, "high_pass", filtered)
    nets = (
        getattr(small_converter, name) for name in ("voice", "encoder", "pitch_net")
    )
    converter = VoiceConverter(*nets, small_converter.index, engine)
    loud = speech[:8000] / np.abs(speech[:8000]).max()
    found = converter.convert(loud, 16000).audio
    assert gains == [pytest.approx(0.95)]
    assert np.array_equal(found, small_converter.convert(loud, 16000).audio)


def test_fractional_padding_keeps_sound_and_pitch_together(small_converter, speech):
    """x_pad that is no multiple of a frame acts as the nearest one that is."""
    outputs = [
        small_converter.convert(speech[:16000], 16000, ConversionOptions(x_pad=x)).audio
        for x in (0.5, 0.5031)
    ]
    assert np.array_equal(*outputs)


def test_loudness_of_the_source_is_imposed(small_converter, talk):
    quiet = talk[:32000] * np.linspace(0.02, 1, 32000, dtype=np.float32)
    kept, imposed = (
        small_converter.convert(
            quiet, 16000, ConversionOptions(volume_envelope=mix)
        ).audio
        for mix in (1.0, 0.0)
    )

    def rise(audio):
        return rms(audio[-len(audio) // 4 :]) / rms(audio[: len(audio) // 4])

    assert rise(imposed) > 3 * rise(kept)


# Progress and reports ---------------------------------------------------------------


@pytest.mark.parametrize("lengths", [False, True])
def test_progress_rises_to_the_total(small_converter, talk, tmp_path, lengths):
    soundfile.write(tmp_path / "in.wav", talk[:56000], 16000)
    calls = []
    report = small_converter.convert_file(
        tmp_path / "in.wav",
        tmp_path / "out.wav",
        ConversionOptions(reference_lengths=lengths, **SEGMENTS),
        progress=lambda done, total: calls.append((done, total)),
    )
    done, totals = np.array(calls).T
    assert len(calls) > 3
    assert (totals == 3.5).all()
    assert (np.diff(done) >= 0).all()
    assert done[0] > 0
    assert done[-1] == 3.5
    stages = {"load", "prepare", "pitch", "content", "index", "prior", "source"}
    assert set(report.stages) == stages | {"vocoder", "finish", "write"}
    assert all(seconds >= 0 for seconds in report.stages.values())


def test_joins_of_windows_and_segments_are_reported(small_converter, talk, tmp_path):
    soundfile.write(tmp_path / "in.wav", talk[:56000], 16000)
    voice = small_converter.voice
    window = (voice.window - 2 * voice.context) / 100

    def joins(**options):
        wanted = ConversionOptions(**options)
        files = tmp_path / "in.wav", tmp_path / "out.wav"
        return small_converter.convert_file(*files, wanted).joins

    whole = [i * window for i in range(1, int(3.5 / window) + 1)]
    assert joins() == pytest.approx(whole)
    cut = joins(**SEGMENTS)
    assert set(np.round(cut, 2)) - set(np.round(whole, 2))
    assert (np.diff([0, *cut, 3.5]) > 0).all()
    assert (np.diff([0, *cut, 3.5]) < window + 0.005).all()


# Errors -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("audio", "rate", "message"),
    [
        (np.zeros(0), 16000, r"0\.0 ms long; expected 10 ms"),
        (np.zeros(0), 44100, r"0\.0 ms long"),
        (np.zeros(159), 16000, r"9\.9 ms long"),
        (np.zeros(9), 1000, r"9\.0 ms long"),
        (np.full(2000, np.nan), 16000, "NaN or infinite"),
        (np.array([0.0] * 999 + [np.inf]), 16000, "NaN or infinite"),
        (np.zeros((2, 3, 4)), 16000, r"shape \(2, 3, 4\)"),
    ],
)
def test_bad_audio_is_refused(small_converter, audio, rate, message):
    with pytest.raises(ValueError, match=message):
        small_converter.convert(audio, rate)


def test_speaker_out_of_range_is_refused(small_converter, speech):
    first, last = (
        small_converter.convert(speech[:8000], 16000, ConversionOptions(speaker=i))
        for i in (0, 3)
    )
    assert not np.array_equal(first.audio, last.audio)
    with pytest.raises(ValueError, match=r"speaker 4 .* has speakers 0 to 3"):
        small_converter.convert(speech, 16000, ConversionOptions(speaker=4))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"pitch": 2}, "pitch"),
        ({"f0_file": "curve.csv"}, "f0_file"),
        ({"f0_autotune": True}, "f0_autotune"),
        ({"proposed_pitch": True}, "proposed_pitch"),
    ],
)
def test_pitch_options_of_a_voice_without_f0_are_refused(
    plain_converter, speech, options, name
):
    with pytest.raises(ValueError, match=f"no pitch input, so {name} cannot work"):
        plain_converter.convert(speech, 16000, ConversionOptions(**options))


def test_given_f0_is_checked(small_converter, plain_converter, speech):
    audio, f0 = speech[:16000], flat_f0(200)
    with pytest.raises(ValueError, match="leave out f0"):
        plain_converter.convert(audio, 16000, f0=f0)
    with pytest.raises(ValueError, match=r"shape \(299,\); expected \[300\]"):
        small_converter.convert(audio, 16000, f0=f0[:299])
    with pytest.raises(ValueError, match="not 0 Hz"):
        small_converter.convert(audio, 16000, f0=-f0)
    with pytest.raises(ValueError, match="not 0 Hz"):
        small_converter.convert(audio, 16000, f0=f0 * np.nan)


def test_too_little_context_is_refused(small_converter, speech):
    hungry = copy.copy(small_converter)
    hungry.voice = copy.copy(small_converter.voice)
    hungry.voice.context = 30
    with pytest.raises(ValueError, match=r"x_pad is 0\.2 s; .* needs 0\.3 s or more"):
        hungry.convert(speech, 16000, ConversionOptions(x_pad=0.2))
    small_converter.convert(speech[:8000], 16000, ConversionOptions(x_pad=0.2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x_pad": 0.1}, r"x_pad is 0\.1; expected 0\.2 to 10"),
        ({"x_query": 3, "x_center": 4}, "x_query is 3 s; expected at most half"),
        ({"pitch": float("nan")}, "pitch is nan"),
        ({"protect": 0.6}, r"protect is 0\.6; expected 0 to 0\.5"),
        ({"speaker": -1}, "speaker is -1"),
        ({"output_rate": 4000}, "expected 0, or 8000 and more"),
        ({"f0_method": "crepe"}, "expected one of rmvpe"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        ConversionOptions(**options)


def test_parts_that_do_not_fit_are_refused(
    home, small_models, small_converter, tmp_path, plain_voice
):
    engine = OpenVINOEngine("f32", home / "compiled")
    wide = Voice(
        read_weights(write_voice(tmp_path / "v2.pth", version="v2"), "voice"), engine
    )
    encoder, net = small_converter.encoder, small_converter.pitch_net
    with pytest.raises(ValueError, match=r"wants 768-wide .*\(v2\), but .* gives 48"):
        VoiceConverter(wide, encoder, net, engine=engine)
    with pytest.raises(ValueError, match="needs pitch; pass an RMVPE"):
        VoiceConverter(small_converter.voice, encoder, None, engine=engine)
    maker.write_index(
        np.random.default_rng(0).standard_normal((200, 768)).astype(np.float32),
        tmp_path / "v2.index",
        0,
    )
    index = read_index(tmp_path / "v2.index")
    with pytest.raises(ValueError, match="holds 768-wide features, the voice uses 256"):
        VoiceConverter(small_converter.voice, encoder, net, index, engine)


def test_wrong_kinds_of_files_are_told_apart(small_models):
    pieces = {
        "encoder": small_models.encoder,
        "rmvpe": small_models.rmvpe,
        "device": "cpu",
    }
    with pytest.raises(ValueError, match="this is an RMVPE pitch network; expected an"):
        rvc_mlx.load(small_models.rmvpe, **pieces)
    with pytest.raises(ValueError, match="expected an RMVPE pitch network"):
        rvc_mlx.load(small_models.voice, **{**pieces, "rmvpe": small_models.voice})
    with pytest.raises(ValueError, match="expected a HuBERT / ContentVec encoder"):
        rvc_mlx.load(small_models.voice, **{**pieces, "encoder": small_models.rmvpe})
    with pytest.raises(IsADirectoryError, match="a folder was given"):
        rvc_mlx.load(small_models.voice, **{**pieces, "rmvpe": small_models.encoder})


def test_missing_weights_say_how_to_get_them(small_models):
    with pytest.raises(FileNotFoundError, match="rvc-mlx download contentvec"):
        rvc_mlx.load(small_models.voice, rmvpe=small_models.rmvpe, device="cpu")
    with pytest.raises(FileNotFoundError, match="rvc-mlx download rmvpe"):
        rvc_mlx.load(small_models.voice, encoder=small_models.encoder, device="cpu")


def test_failed_conversion_leaves_the_old_file(small_converter, speech, tmp_path):
    soundfile.write(tmp_path / "in.wav", speech[:8000], 16000)
    target = tmp_path / "out.wav"
    target.write_bytes(b"old")

    def fail(done, total):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        small_converter.convert_file(tmp_path / "in.wav", target, progress=fail)
    assert target.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.wav", "out.wav"]


@pytest.mark.parametrize("content", [b"", b"\0" * 5000, None])
def test_damaged_compiled_model_is_made_again(
    small_models, tmp_path, rng, caplog, content
):
    mel = rng.standard_normal((1, 64, 128)).astype(np.float32)

    def salience():
        engine = OpenVINOEngine("f32", tmp_path)
        return PitchNet(read_weights(small_models.rmvpe, "rmvpe"), engine).salience(mel)

    expected = salience()
    [blob] = tmp_path.iterdir()
    whole = blob.read_bytes()
    blob.write_bytes(whole[:1000] if content is None else content)
    assert np.array_equal(salience(), expected)
    assert f"{blob} is damaged; compiling again" in caplog.text
    assert blob.stat().st_size > len(whole) // 2
    caplog.clear()
    assert np.array_equal(salience(), expected)
    assert not caplog.text


def test_mlx_engine_equals_openvino(small_converter, small_models, speech):
    """MLX's own CPU back end, slow as it is, computes what OpenVINO computes."""
    engine = choose_engine("mlx-cpu", "f32")
    engine.window_frames = 32
    converter = VoiceConverter(
        Voice(read_weights(small_models.voice, "voice"), engine),
        Encoder(read_weights(small_models.encoder, "contentvec"), engine),
        PitchNet(read_weights(small_models.rmvpe, "rmvpe"), engine),
        small_converter.index,
        engine,
    )
    options = ConversionOptions(x_pad=0.2)
    found, expected = (
        each.convert(speech[8000:10000], 16000, options).audio
        for each in (converter, small_converter)
    )
    assert "MLX" in converter.device
    assert converter.precision == "f32"
    # Measured 1e-6: float32 sums in another order.
    assert np.abs(found - expected).max() < 1e-4


# Warm-up ------------------------------------------------------------------------------


def test_a_warm_up_on_a_cpu_is_one_short_conversion(
    small_converter, speech, monkeypatch
):
    expected = small_converter.convert(speech[:20000], 16000).audio
    asked, convert = [], type(small_converter).convert

    def counted(self, audio, rate, options):
        asked.append((len(audio), rate))
        return convert(self, audio, rate, options)

    with monkeypatch.context() as patch:
        patch.setattr(type(small_converter), "convert", counted)
        small_converter.warm_up(30)
    assert asked == [(1600, 16000)]
    found = small_converter.convert(speech[:20000], 16000).audio
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("pad", [0.5, 1, 3, 10])
@pytest.mark.parametrize("seconds", [0.1, 0.11, 4, 18, 25, 30, 37, 90])
def test_a_warm_up_on_a_gpu_meets_every_length_twice(
    small_converter, monkeypatch, seconds, pad
):
    asked = []
    options = ConversionOptions(x_pad=pad)
    other = copy.copy(small_converter)
    other.encoder = copy.copy(other.encoder)
    other.encoder.batch_frames = 1000
    monkeypatch.setattr(
        type(other), "convert", lambda self, audio, *given: asked.append(len(audio))
    )
    other.warm_up(seconds, options)
    assert asked == sorted(asked)
    assert asked[-1] == round(seconds * 16000)
    assert asked[::2] == asked[1::2]
    assert len(asked) < 210
    padded = 2 * round(options.x_pad * 16000)
    voice = copy.copy(other.voice)
    voice.few_windows, voice.window_step = True, 8
    voice.window = 4608 + 2 * voice.context

    def shapes(samples):
        """Of networks, and windows of the vocoder, with few lengths and without."""
        frames, own = (samples + padded) // 160, samples // 160
        planned = steady_length(frames // 2, 8, 1 << 20), -(-own // 256)
        few = few_lengths(frames), few_lengths(frames // 2)
        return *planned, *few, voice.plan_window(own, frames - own)

    met = list(map(shapes, asked))
    lengths = range(1600, min(round(seconds * 16000), 46 * 16000) + 1, 1600)
    for kind in range(5):
        wanted = {shapes(n)[kind] for n in lengths}
        assert wanted <= {found[kind] for found in met}


@pytest.mark.parametrize("around", [198, 200, 201])
def test_the_vocoder_meets_a_new_length_with_the_others(small_converter, around):
    voice = copy.copy(small_converter.voice)
    voice.few_windows, voice.window_step = True, 8
    voice.window = 4608 + 2 * voice.context
    met = {
        (few_lengths(own + around), voice.plan_window(own, around))
        for own in range(300, 3000)
    }
    others, windows = map(set, zip(*met, strict=True))
    assert len(met) == len(others) == len(windows)
    assert voice.plan_window(9000, around) == voice.window
    voice.few_windows = False
    assert voice.plan_window(300, around) == voice.window_frames(300)


def test_a_source_of_another_type_leaves_the_first_as_it_is(small_converter):
    seam = small_converter.voice.source_seam()
    [first], [other] = seam.build(mx.float32), seam.build(mx.bfloat16)
    kinds = [step.__self__.merge_layer.weight.dtype for step in (first, other)]
    assert kinds == [mx.float32, mx.bfloat16]


def test_too_short_a_warm_up_is_refused(small_converter):
    for seconds in (0.05, -1, float("nan")):
        with pytest.raises(ValueError, match=r"expected 0\.1 s or more"):
            small_converter.warm_up(seconds)


def test_a_voice_can_be_loaded_warm(home, small_models, monkeypatch):
    asked = []
    monkeypatch.setattr(VoiceConverter, "warm_up", lambda self, s: asked.append(s))
    for more in ({}, {"warm_up": 0}, {"warm_up": 2.5}):
        load(
            small_models.voice, encoder=small_models.encoder, rmvpe=small_models.rmvpe,
            device="cpu", precision="f32", **more,
        )  # fmt: skip
    assert asked == [2.5]
