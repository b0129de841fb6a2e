"""Recordings that go through the networks together are what each is alone."""

import threading
import time
from contextlib import closing, suppress
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import soundfile
from tiny_models import narrow_refinegan

from rvc_mlx import ConversionOptions, file_run, job, machine
from rvc_mlx.audio import high_pass_spools
from rvc_mlx.audio_io import AudioWriter
from rvc_mlx.device_high_pass import DeviceSpool
from rvc_mlx.device_mel import device_log_mel
from rvc_mlx.engine import MLXEngine, choose_engine
from rvc_mlx.job import Job
from rvc_mlx.loading import Encoder, PitchNet, Voice, read_weights
from rvc_mlx.loudness import SilenceGate
from rvc_mlx.noise import Noise
from rvc_mlx.pipeline import VoiceConverter
from rvc_mlx.retrieval import read_index
from rvc_mlx.spool import Spool
from tools import make_test_models as maker

OPTIONS = {"x_pad": 0.25, "index_rate": 0.0}
LENGTHS = [0.3, 0.5, 0.3, 0.3, 0.505]  # seconds; 0.5 and 0.505 have one mel length


class Watched:
    """A seam that remembers the shape of the first array of every call."""

    def __init__(self, run):
        self.run, self.shapes = run, []

    def __call__(self, *arrays):
        self.shapes.append(arrays[0].shape)
        return self.run(*arrays)

    def start(self, *arrays):
        self.shapes.append(arrays[0].shape)
        return self.run.start(*arrays)


def batching_converter(
    small_models, batch_bytes, voice=None, index=False, index_bytes=0
):
    """The small models on MLX's CPU back end, with a GPU's habits."""
    engine = choose_engine("mlx-cpu", "f32")
    assert isinstance(engine, MLXEngine)
    engine.batch_bytes, engine._index_bytes = batch_bytes, index_bytes
    engine.window_frames, engine.window_step = 32, 16
    converter = VoiceConverter(
        Voice(read_weights(voice or small_models.voice, "voice"), engine),
        Encoder(read_weights(small_models.encoder, "contentvec"), engine),
        PitchNet(read_weights(small_models.rmvpe, "rmvpe"), engine),
        read_index(small_models.index if index is True else index) if index else None,
        engine,
    )
    converter.voice.prior = Watched(converter.voice.prior)
    converter.voice.vocoder = Watched(converter.voice.vocoder)
    if converter.pitch_net:
        converter.pitch_net.salience = Watched(converter.pitch_net.salience)
    version = converter.voice.config.version
    run = converter.encoder._run(version)
    converter.encoder._runs[version] = Watched(run)
    return converter


def batches(converter):
    """Largest batch of each network."""
    seams = {
        "encode": converter.encoder._run(converter.voice.config.version),
        "prior": converter.voice.prior,
        "vocoder": converter.voice.vocoder,
    }
    if converter.pitch_net:
        seams["salience"] = converter.pitch_net.salience
    return {name: max(shape[0] for shape in s.shapes) for name, s in seams.items()}


@pytest.fixture(scope="module")
def clips(speech):
    """Speech of ``LENGTHS``, each from another place."""
    starts = [4000 + 9000 * i for i in range(len(LENGTHS))]
    return [
        speech[start : start + round(16000 * seconds)]
        for start, seconds in zip(starts, LENGTHS, strict=True)
    ]


@pytest.fixture(scope="module")
def plain_voice(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / "plain.pth"
    spec = maker.VoiceFile(version="v1", khz=32, speakers=4, f0=False)
    maker.write_voice("test", spec, maker.SMALL_VOICE, path, 1)
    return path


def check_like_alone(converter, clips, options, tolerance):
    found = converter.convert_many(clips, 16000, options)
    assert len(found) == len(clips)
    largest = batches(converter)
    for clip, (audio, rate) in zip(clips, found, strict=True):
        alone = converter.convert(clip, 16000, options)
        assert rate == alone.sample_rate
        assert audio.shape == alone.audio.shape
        assert np.abs(alone.audio).max() > 0.01
        assert np.abs(audio - alone.audio).max() <= tolerance
    return largest


@pytest.mark.parametrize("index", [False, True])
def test_together_is_as_alone(small_models, clips, index):
    converter = batching_converter(small_models, 1 << 30, index=index)
    options = ConversionOptions(**OPTIONS | {"index_rate": 0.5 * index, "protect": 0.2})
    largest = check_like_alone(converter, clips, options, 1e-5)
    assert largest["encode"] == largest["prior"] == 3
    assert largest["salience"] == 3
    assert largest["vocoder"] >= 3


@pytest.mark.parametrize("protect", [0.2, 0.5])
def test_an_index_is_searched_on_the_device_as_on_the_host(
    small_models, clips, protect
):
    options = ConversionOptions(**OPTIONS | {"index_rate": 0.7, "protect": protect})
    host = batching_converter(small_models, 1 << 30, index=True)
    device = batching_converter(small_models, 1 << 30, index=True, index_bytes=1 << 30)
    fed = []
    start = device.voice.prior.start
    device.voice.prior.start = lambda *given: fed.append(given[0]) or start(*given)
    found = device.convert_many(clips[:2], 16000, options)
    assert {type(features) for features in fed} == {mx.array}
    expected = host.convert_many(clips[:2], 16000, options)
    without = host.convert(clips[0], 16000, ConversionOptions(**OPTIONS))
    for ours, theirs in zip(found, expected, strict=True):
        assert np.abs(ours.audio - theirs.audio).max() <= 1e-4
    assert np.abs(found[0].audio - without.audio).max() > 1e-2


@pytest.mark.parametrize("on_device", [False, True])
def test_the_host_never_waits_for_what_it_could_launch_beside(
    small_models, clips, on_device
):
    converter = batching_converter(small_models, 1 << 30)
    expected = converter.convert(clips[0], 16000, ConversionOptions(**OPTIONS)).audio
    net, version = converter.pitch_net, converter.voice.config.version
    assert not net.on_device
    net.on_device, launched = on_device, []
    for name, seam in (
        ("encode", converter.encoder._run(version)),
        ("salience", net.salience),
    ):
        run = seam.run.start
        seam.run = SimpleNamespace(
            start=lambda *given, name=name, run=run: (
                launched.append(name) or run(*given)
            )
        )
    found = converter.convert(clips[0], 16000, ConversionOptions(**OPTIONS)).audio
    assert launched == (["salience", "encode"] if on_device else ["encode", "salience"])
    np.testing.assert_array_equal(found, expected)


def test_a_device_has_the_next_wave_to_do_while_the_host_waits(small_models, clips):
    plain = batching_converter(small_models, 0)
    frame_bytes = 4 * 32 * plain.encoder.config.conv_dim
    converter = batching_converter(small_models, 110 * frame_bytes)  # a clip a wave
    done: list[str] = []
    version = converter.voice.config.version
    seams = {
        "heard": converter.encoder._run(version),
        "prior": converter.voice.prior,
    }
    for name, seam in seams.items():
        seam.run = SimpleNamespace(
            start=lambda *given, name=name, run=seam.run.start: (
                done.append(name) or run(*given)
            )
        )
    found = converter.convert_many(clips[::2], 16000, ConversionOptions(**OPTIONS))
    assert done == ["heard", "prior", "heard", "heard", "prior", "prior"]
    for clip, conversion in zip(clips[::2], found, strict=True):
        alone = plain.convert(clip, 16000, ConversionOptions(**OPTIONS))
        assert np.abs(conversion.audio - alone.audio).max() <= 1e-5


@pytest.mark.parametrize("batch_bytes", [0, 1 << 30])
def test_noise_waits_for_no_pitch_and_the_source_for_no_latent(
    small_models, clips, monkeypatch, batch_bytes
):
    converter = batching_converter(small_models, batch_bytes)
    options, done = ConversionOptions(**OPTIONS), []
    expected = converter.convert(clips[0], 16000, options, noise=Noise(3)).audio

    class Watched(Noise):
        def normal(self, name, *shape):
            done.append(f"draw {name}")
            return super().normal(name, *shape)

    def watched(name, function):
        return lambda *given: done.append(name) or function(*given)

    monkeypatch.setattr(job.Job, "take_f0", watched("pitch", job.Job.take_f0))
    voice = converter.voice
    monkeypatch.setattr(
        voice.prior,
        "run",
        SimpleNamespace(start=watched("prior", voice.prior.run.start)),
    )
    monkeypatch.setattr(
        voice, "source", SimpleNamespace(start=watched("source", voice.source.start))
    )
    found = converter.convert(clips[0], 16000, options, noise=Watched(3)).audio
    np.testing.assert_array_equal(found, expected)
    early = ["draw prior", "draw source", "pitch", "source", "prior"]
    late = ["pitch", "draw source", "source", "draw prior", "prior"]
    assert done == (early if batch_bytes else late)


def test_a_pitch_net_knows_where_its_spectrograms_are_made(small_models):
    engine = choose_engine("mlx-cpu", "f32")
    weights = read_weights(small_models.rmvpe, "rmvpe")
    assert not PitchNet(weights, engine).on_device
    engine.log_mel = engine._log_mel
    assert PitchNet(weights, engine).on_device


def test_what_is_filtered_on_the_device_stays_there(small_models, clips):
    host = batching_converter(small_models, 1 << 30)
    net = host.pitch_net
    net.on_device, net.log_mel = True, device_log_mel
    options = ConversionOptions(**OPTIONS)
    expected = host.convert_many(clips, 16000, options)
    device = batching_converter(small_models, 1 << 30)
    device.pitch_net.on_device, device.pitch_net.log_mel = True, device_log_mel
    heard = []

    class Unread(DeviceSpool):
        def read(self, start, stop):
            raise AssertionError("the host reads what the networks hear")

    def on_device(sources, gains):
        made = []
        for filtered in high_pass_spools(sources, gains):
            with filtered:
                made.append(Unread(mx.array(filtered.read(0, len(filtered)))))
        heard.extend(made)
        return made

    device._high_pass = on_device
    found = device.convert_many(clips, 16000, options)
    assert len(heard) == len(clips)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours.audio, theirs.audio)


@pytest.mark.parametrize("padding", ["reflect", "constant"])
@pytest.mark.parametrize(
    ("frames", "counts"), [(190, [1] * 5), (200, [2, 2, 1]), (10**6, [4, 1])]
)
def test_mels_of_a_wave_are_made_together_on_the_device(
    small_models, speech, clips, padding, frames, counts
):
    """The last but one is padded to the length of the three before, in another way.

    Two of 81 frames are 192 for the pitch net.
    """
    clips = [clips[0], clips[2], clips[3], speech[9000:13850], clips[4]]
    bytes_of_frame = (
        4 * 32 * batching_converter(small_models, 0).encoder.config.conv_dim
    )
    converter = batching_converter(small_models, frames * bytes_of_frame)
    made = []

    def watched(samples, n_mels):
        made.append(samples.shape)
        return device_log_mel(samples, n_mels)

    def on_device(sources, gains):
        return [
            DeviceSpool(mx.array(filtered.take()))
            for filtered in high_pass_spools(sources, gains)
        ]

    net = converter.pitch_net
    net.on_device, net.log_mel = True, watched
    net.batch_frames = frames
    converter._high_pass = on_device
    options = ConversionOptions(mel_padding=padding, **OPTIONS)
    check_like_alone(converter, clips, options, 1e-5)
    assert [count for count, _ in made[: -len(clips)]] == counts


def test_an_empty_index_is_refused(small_models, clips, tmp_path):
    faiss = pytest.importorskip("faiss")
    faiss.write_index(faiss.IndexFlatL2(256), str(tmp_path / "trained.index"))
    for index_bytes in (0, 1 << 30):
        converter = batching_converter(
            small_models, 0, index=tmp_path / "trained.index", index_bytes=index_bytes
        )
        options = ConversionOptions(**OPTIONS | {"index_rate": 0.5})
        with pytest.raises(ValueError, match="holds no vectors"):
            converter.convert(clips[0], 16000, options)


def test_voices_without_pitch_go_together(small_models, clips, plain_voice):
    converter = batching_converter(small_models, 1 << 30, plain_voice)
    largest = check_like_alone(converter, clips, ConversionOptions(**OPTIONS), 1e-5)
    assert largest["prior"] == 3


def test_voices_with_noise_at_every_stage_go_together(
    small_models, clips, tmp_path, monkeypatch
):
    narrow_refinegan(monkeypatch)
    spec = maker.VoiceFile("v1", 32, vocoder="RefineGAN", speakers=4)
    config = [*maker.SMALL_VOICE]
    config[12], config[14] = [10, 4, 4, 2], [16, 16, 4, 4]  # as many stages as narrowed
    maker.write_voice("test", spec, config, tmp_path / "voice.pth", 1)
    converter = batching_converter(small_models, 1 << 30, tmp_path / "voice.pth")
    assert converter.voice.noise_shapes
    options = ConversionOptions(**OPTIONS | {"x_pad": 1.0})
    two = [clips[0][:1600], clips[1][:1600]]
    assert check_like_alone(converter, two, options, 1e-5)["vocoder"] == 2


def test_what_is_heard_is_made_beside_what_is_queued(small_models, clips, monkeypatch):
    """On the encoder's stream: elsewhere it would wait for the pitch net."""
    converter = batching_converter(small_models, 1 << 30)
    engine, made = converter.encoder._engine, []
    engine._two_streams = True
    heard = job.Job.heard

    def watched(self, start, stop):
        made.append(str(mx.default_stream(mx.default_device())))
        return heard(self, start, stop)

    monkeypatch.setattr(job.Job, "heard", watched)
    converter.convert(clips[0], 16000, ConversionOptions(**OPTIONS))
    with engine.beside():
        beside = str(mx.default_stream(mx.default_device()))
    assert made == [beside]
    with mx.stream(mx.cpu):
        assert beside != str(mx.default_stream(mx.default_device()))


def test_a_window_of_a_new_length_is_one_of_few(small_models, speech):
    plain = batching_converter(small_models, 1 << 30)
    few = batching_converter(small_models, 1 << 30)
    for converter, wanted in ((plain, False), (few, True)):
        converter.voice.few_windows = wanted
        converter.voice.window = 640 + 2 * converter.voice.context
    options = ConversionOptions(**OPTIONS)
    for seconds in (3.0, 3.1, 2.6, 3.1, 3.0, 4.6):
        clip = speech[: round(16000 * seconds)]
        expected, found = (c.convert(clip, 16000, options) for c in (plain, few))
        assert np.abs(found.audio - expected.audio).max() <= 1e-5
    context = 2 * plain.voice.context
    for converter, lengths in (
        (plain, [304, 320, 272, 320, 304, 464]),
        (few, [336, 336, 272, 336, 336, 464]),
    ):
        assert [s[1] - context for s in converter.voice.vocoder.shapes] == lengths
    several = few.convert_many([speech[:40000], speech[9000:49000]], 16000, options)
    assert few.voice.vocoder.shapes[-1][:2] == (2, 256 + context)
    assert len(several) == 2


@pytest.mark.parametrize(
    ("waiting", "envelope", "beside"),
    [(0, 1.0, 0), (50_000, 1.0, 3), (1 << 30, 1.0, 5), (1 << 30, 0.5, 0)],
)
def test_one_at_a_time_is_exactly_as_alone(
    small_converter, clips, monkeypatch, waiting, envelope, beside
):
    options, threads = ConversionOptions(volume_envelope=envelope), []
    whole = Job.whole

    def told(job, *arguments):
        threads.append(threading.current_thread())
        return whole(job, *arguments)

    monkeypatch.setattr(machine, "processors", lambda: 2)
    monkeypatch.setattr(job, "_WAITING", waiting)
    monkeypatch.setattr(Job, "whole", told)
    found = small_converter.convert_many(clips, 16000, options)
    assert len(threads) == len(clips)
    assert sum(t is not threading.main_thread() for t in threads) == beside
    monkeypatch.undo()
    for clip, (audio, _) in zip(clips, found, strict=True):
        alone = small_converter.convert(clip, 16000, options)
        np.testing.assert_array_equal(audio, alone.audio)


def test_what_is_raised_beside_the_networks_ends_all(
    small_converter, clips, monkeypatch
):
    closed, whole, close = [], Job.whole, Job.close

    def failing(job, *arguments):
        if len(job.source) == len(clips[1]):
            raise OSError("no space left")
        return whole(job, *arguments)

    def told(job):
        closed.append(job)
        close(job)

    monkeypatch.setattr(machine, "processors", lambda: 2)
    monkeypatch.setattr(Job, "whole", failing)
    monkeypatch.setattr(Job, "close", told)
    with pytest.raises(OSError, match="no space left"):
        small_converter.convert_many(clips, 16000)
    assert len(set(closed)) == len(clips)


def test_a_recording_that_cannot_be_filtered_fails_alone(small_models, clips):
    nets = batching_converter(small_models, 1 << 30)._nets()
    options = ConversionOptions(**OPTIONS)
    jobs = [job.Job(nets, Spool.around(x), len(x), 16000, options) for x in clips[:3]]
    together = []

    def filtered(sources, gains):
        together.append(len(sources))
        if jobs[1].source in sources:
            raise OSError("no space left")
        return high_pass_spools(sources, gains)

    job.prepare_all(replace(nets, high_pass=filtered), jobs)
    assert together == [3, 1, 1, 1]
    assert [str(j.failure) for j in jobs] == ["None", "no space left", "None"]
    assert all(j.segments for j in (jobs[0], jobs[2]))
    for j in jobs:
        j.close()


def test_the_budget_of_the_engine_is_kept(small_models, clips):
    converter = batching_converter(small_models, 0)
    frame_bytes = 4 * 32 * converter.encoder.config.conv_dim  # of the encoder's
    limited = batching_converter(small_models, 190 * frame_bytes)
    assert limited.encoder.batch_frames == 190
    limited.convert_many(clips, 16000, ConversionOptions(**OPTIONS))
    # 0.3 s and twice 0.25 s of context are about 80 frames: two fit, three do not.
    assert batches(limited)["encode"] == 2
    converter.convert_many(clips, 16000, ConversionOptions(**OPTIONS))
    assert set(batches(converter).values()) == {1}


def test_segments_of_one_recording_keep_their_order(small_models, speech):
    cuts = {"x_query": 0.1, "x_center": 2, "x_max": 2}
    options = ConversionOptions(**OPTIONS | cuts)
    one = batching_converter(small_models, 0).convert(speech, 16000, options).audio
    converter = batching_converter(small_models, 1 << 30)
    many = converter.convert(speech, 16000, options).audio
    assert np.abs(one - many).max() <= 1e-5
    assert batches(converter)["vocoder"] > 1


def test_noise_and_rates_are_each_recording_s_own(small_converter, clips):
    rates = [16000, 22050, 16000, 8000, 48000]
    found = small_converter.convert_many(clips, rates, noise=Noise(7))
    for clip, rate, (audio, _) in zip(clips, rates, found, strict=True):
        alone = small_converter.convert(clip, rate, noise=Noise(7))
        np.testing.assert_array_equal(audio, alone.audio)


def test_nothing_and_bad_recordings(small_converter, clips):
    assert small_converter.convert_many([], 16000) == []
    with pytest.raises(ValueError, match=r"2 recordings and 1 sample rates"):
        small_converter.convert_many(clips[:2], [16000])
    with pytest.raises(ValueError, match=r"recording 1: the recording is 5\.0 ms long"):
        small_converter.convert_many([clips[0], clips[1][:80]], 16000)
    options = ConversionOptions(reference_lengths=True)
    with pytest.raises(ValueError, match="recording 0: the recording is so short"):
        small_converter.convert_many([clips[0][:200], clips[1]], 16000, options)


# Files ------------------------------------------------------------------------------


@pytest.fixture
def files(clips, tmp_path):
    pairs = []
    for i, clip in enumerate(clips):
        soundfile.write(tmp_path / f"{i}.wav", clip, 16000, subtype="FLOAT")
        pairs.append((tmp_path / f"{i}.wav", tmp_path / f"out{i}.wav"))
    return pairs


@pytest.mark.parametrize("batch_bytes", [0, 1 << 30])
def test_files_together_are_as_alone(small_models, files, batch_bytes):
    converter = batching_converter(small_models, batch_bytes)
    options, calls = ConversionOptions(**OPTIONS), []
    results = converter.convert_files(
        files, options, subtype="FLOAT", progress=lambda *call: calls.append(call)
    )
    assert [number for number, _ in results] == list(range(len(files)))
    assert {call[0] for call in calls} == set(range(len(files)))
    assert calls[-1] == (4, pytest.approx(0.505), pytest.approx(0.505))
    for source, target in files:
        audio, rate = soundfile.read(source, dtype="float32")
        found, _ = soundfile.read(target, dtype="float32")
        alone = converter.convert(audio, rate, options).audio
        assert found.shape == alone.shape
        assert np.abs(found - alone).max() <= (1e-5 if batch_bytes else 0)


@pytest.mark.parametrize("alone", [False, True])
def test_files_are_written_beside_the_networks(
    small_converter, files, monkeypatch, alone
):
    threads, told = [], []

    class Writer(AudioWriter):
        def write(self, block):
            threads.append(threading.current_thread())
            super().write(block)

    monkeypatch.setattr(machine, "processors", lambda: 2)
    monkeypatch.setattr(file_run, "AudioWriter", Writer)
    asked = files[:1] if alone else files

    def progress(*given):
        told.append((*given, threading.current_thread()))

    results = dict(small_converter.convert_files(asked, progress=progress))
    assert all(result.stages["write"] > 0 for result in results.values())
    assert (threading.main_thread() in threads) == alone
    assert {number for number, *_ in told} == set(results)
    for number, done, total, thread in told:
        assert 0 < done <= total == pytest.approx(results[number].seconds, abs=0.01)
        assert thread is threading.main_thread()


@pytest.mark.parametrize("interrupted", ["networks", "taking"])
def test_files_that_nobody_was_told_of_are_not_left(
    small_converter, files, tmp_path, monkeypatch, interrupted
):
    """So that a folder goes on where it was interrupted, and overwrites nothing."""
    convert_all = file_run.convert_all

    def until_interrupted(*arguments):
        for count, job_and_raw in enumerate(convert_all(*arguments), 1):
            yield job_and_raw
            time.sleep(0.5)  # meanwhile it is written
            if count == 2 and interrupted == "networks":
                raise KeyboardInterrupt

    monkeypatch.setattr(machine, "processors", lambda: 4)
    monkeypatch.setattr(file_run, "convert_all", until_interrupted)
    told = []
    with (
        suppress(KeyboardInterrupt),
        closing(small_converter.convert_files(files)) as results,
    ):
        for number, report in results:
            assert not isinstance(report, Exception)
            told.append(number)
            if interrupted == "taking":
                break
    assert told == [0]
    written = {path.name for path in tmp_path.iterdir()} - {s.name for s, _ in files}
    assert written == {"out0.wav"}


def test_joins_are_each_recording_s_own(small_models, files, speech):
    converter = batching_converter(small_models, 1 << 30)

    def joins(pairs, **cuts):
        options = ConversionOptions(**OPTIONS | cuts)
        return [r.joins for _, r in converter.convert_files(pairs, options)]

    # The five end at 0.3, 0.5, 0.3, 0.3 and 0.505 s, windows after 0.32 s.
    assert joins(files) == [[], [pytest.approx(0.32)], [], [], [pytest.approx(0.32)]]
    soundfile.write(files[0][0], speech[:33000], 16000)
    soundfile.write(files[2][0], speech[20000:53000], 16000)
    cuts = {"x_query": 0.1, "x_center": 2, "x_max": 2}
    together = joins(files[:3], **cuts)
    assert batches(converter)["vocoder"] > 2
    assert together == [joins([pair], **cuts)[0] for pair in files[:3]]
    windows = np.arange(0.32, 33000 / 16000, 0.32)
    for places in together[::2]:
        [segment] = set(np.round(places, 2)) - set(np.round(windows, 2))
        assert 1.9 <= segment < 33000 / 16000
    assert together[0] != together[2]


@pytest.mark.parametrize("batch_bytes", [0, 1 << 30])
def test_a_bad_file_fails_alone(small_models, files, tmp_path, batch_bytes):
    files[1][0].write_text("no sound")
    files[3] = (files[3][0], tmp_path / "nowhere" / "x.wav")
    soundfile.write(files[2][0], np.zeros(200), 16000)
    converter = batching_converter(small_models, batch_bytes)
    options = ConversionOptions(reference_lengths=True, **OPTIONS)
    results = dict(converter.convert_files(files, options))
    assert sorted(results) == list(range(len(files)))
    failed = {n: str(r) for n, r in results.items() if isinstance(r, Exception)}
    assert sorted(failed) == [1, 2, 3]
    assert "1.wav" in failed[1]
    assert "so short" in failed[2]
    assert "nowhere" in failed[3]
    assert files[0][1].exists()
    assert files[4][1].exists()
    assert not files[2][1].exists()


@pytest.mark.parametrize("batch_bytes", [0, 1 << 30])
def test_a_recording_that_cannot_be_read_again_fails_alone(
    small_models, files, monkeypatch, batch_bytes
):
    """Its silence is looked for while the networks are under way, or when it is finished."""
    lengths = [len(soundfile.read(source)[0]) for source, _ in files]
    assert lengths.count(lengths[1]) == 1

    class Gate(SilenceGate):
        def __init__(self, source):
            if len(source) == lengths[1]:
                raise OSError("the temporary audio file became shorter")
            super().__init__(source)

    monkeypatch.setattr(job, "SilenceGate", Gate)
    converter = batching_converter(small_models, batch_bytes)
    results = dict(converter.convert_files(files, ConversionOptions(**OPTIONS)))
    failed = {n: str(r) for n, r in results.items() if isinstance(r, Exception)}
    assert list(failed) == [1]
    assert "became shorter" in failed[1]
    assert [target.exists() for _, target in files] == [True, False, True, True, True]


@pytest.mark.parametrize("frames", [0, 110])  # that go together: a file a wave
@pytest.mark.parametrize("network", ["encoder", "prior", "vocoder"])
@pytest.mark.parametrize("call", [1, 2, 4])
def test_what_a_network_raises_ends_its_wave_and_no_more(
    small_models, files, frames, network, call
):
    converter = batching_converter(small_models, 0)
    frame_bytes = 4 * 32 * converter.encoder.config.conv_dim
    converter = batching_converter(small_models, frames * frame_bytes)
    seams = {
        "encoder": converter.encoder._run(converter.voice.config.version),
        "prior": converter.voice.prior,
        "vocoder": converter.voice.vocoder,
    }
    run, calls = seams[network].run, []

    def start(*arrays):
        calls.append(network)
        if len(calls) == call:
            raise ValueError("weights are damaged")
        return run.start(*arrays)

    seams[network].run = SimpleNamespace(start=start)
    results = dict(converter.convert_files(files, ConversionOptions(**OPTIONS)))
    failed = {n: str(r) for n, r in results.items() if isinstance(r, Exception)}
    # The second file has two windows, which alone do not go together.
    fourth = 2 if network == "vocoder" and not frames else 3
    number = {1: 0, 2: 1, 4: fourth}[call]
    assert failed == {number: "weights are damaged"}
    assert sorted(results) == list(range(len(files)))
    assert [target.exists() for _, target in files] == [
        n != number for n in range(len(files))
    ]


def test_a_file_that_cannot_be_written_fails_alone(
    small_models, files, speech, monkeypatch
):
    soundfile.write(files[0][0], speech[:33000], 16000)
    converter = batching_converter(small_models, 1 << 30)

    class Writer(AudioWriter):
        def __init__(self, path, *given):
            if path == files[0][1]:
                raise OSError("the disk is full")
            super().__init__(path, *given)

    monkeypatch.setattr(file_run, "AudioWriter", Writer)
    cuts = {"x_query": 0.1, "x_center": 2, "x_max": 2}
    results = dict(converter.convert_files(files, ConversionOptions(**OPTIONS | cuts)))
    failed = {n: str(r) for n, r in results.items() if isinstance(r, Exception)}
    assert failed == {0: "the disk is full"}
    assert len(results) == len(files)


def test_files_are_opened_when_their_turn_comes(small_models, files):
    converter = batching_converter(small_models, 0)
    results = converter.convert_files(files, ConversionOptions(**OPTIONS))
    next(results)
    files[4][0].unlink()  # not opened so far
    assert isinstance(dict(results)[4], FileNotFoundError)
