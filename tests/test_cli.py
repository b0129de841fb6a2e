"""The command line, from its words to exit codes, files and single lines of error."""

import hashlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

import rvc_mlx
from rvc_mlx import ConversionOptions, file_run
from rvc_mlx.checkpoint import read_checkpoint
from rvc_mlx.cli import main
from rvc_mlx.download import PUBLIC_WEIGHTS, WeightFile, Weights
from rvc_mlx.report import Report
from tools import make_test_models as maker
from tools.random_weights import random_voice

ROOT = Path(__file__).parents[1]
RATE = 32000  # of the small voice, Hz
COMMANDS = ("convert", "info", "convert-model", "download", "doctor", "bench", "demo")


@pytest.fixture(autouse=True)
def _signals():
    """``main`` sets a handler."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def run(capsys):
    """Run a command line in this process: exit code, lines of stdout and of stderr."""

    def run(*words):
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:  # argparse
            code = stop.code
        out, err = capsys.readouterr()
        return SimpleNamespace(
            code=code, out=out.splitlines(), err=err.splitlines(), text=out
        )

    return run


@pytest.fixture(scope="session")
def models(small_models):
    """Words that name the small models."""
    return [
        *("--voice", small_models.voice, "--index", small_models.index),
        *("--encoder", small_models.encoder, "--rmvpe", small_models.rmvpe),
        *("--device", "cpu", "--precision", "f32"),
    ]


@pytest.fixture(autouse=True)
def _loaded_once(monkeypatch, models, small_converter):
    """The small models are not read again by every command."""
    words = list(map(str, models))

    def load(voice, index, **others):
        given = {"voice": voice, "index": index, **others}
        if all(str(given[name]) == words[i + 1] for i, name in enumerate_names(words)):
            return small_converter
        return read_and_load(voice, index, **others)

    read_and_load = rvc_mlx.load
    monkeypatch.setattr("rvc_mlx.pipeline.load", load)


def enumerate_names(words):
    """Place and name of each option among the words."""
    return [(i, word[2:]) for i, word in enumerate(words) if word.startswith("--")]


@pytest.fixture
def clip(speech, tmp_path):
    """0.4 s of speech in a file."""
    path = tmp_path / "clip.wav"
    soundfile.write(path, speech[8000:14400], 16000, subtype="FLOAT")
    return path


def with_option(words, name, value):
    """The words with another value of one option."""
    words = list(words)
    words[words.index(name) + 1] = value
    return words


def names(folder):
    """Everything in a folder, hidden files too."""
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()
    )


def refused(result, message, code=1):
    """One line on stderr that says ``message``."""
    assert result.code == code
    [line] = result.err
    assert line.startswith("rvc-mlx: ")
    assert message in line, line
    assert "Traceback" not in result.text


# One file ---------------------------------------------------------------------------


def test_file_is_converted(run, models, clip, tmp_path, small_converter, speech):
    result = run("convert", clip, "-o", tmp_path / "new" / "out.wav", *models)
    assert (result.code, result.err) == (0, [])
    assert "voice.pth (v1, 32000 Hz) on CPU" in result.out[0]
    assert "0.4 s of audio in" in result.out[1]
    assert "x realtime" in result.out[1]
    audio, rate = soundfile.read(tmp_path / "new" / "out.wav", dtype="float32")
    expected = small_converter.convert(speech[8000:14400], 16000).audio
    assert (len(audio), rate) == (12800, RATE)
    assert np.abs(audio - expected).max() <= 1 / 32768  # 16 bits
    assert names(tmp_path) == ["clip.wav", "new/out.wav"]


@pytest.mark.parametrize(
    ("name", "words", "subtype"),
    [
        ("out.wav", ["--bits", "24"], "PCM_24"),
        ("out.wav", ["--bits", "float", "--output-rate", "44100"], "FLOAT"),
        ("out.flac", [], "PCM_16"),
        ("out.mp3", [], "MPEG_LAYER_III"),
        ("out.ogg", [], "VORBIS"),
    ],
)
def test_formats(run, models, clip, tmp_path, name, words, subtype):
    assert run("convert", clip, "-o", tmp_path / name, *words, *models).code == 0
    info = soundfile.info(tmp_path / name)
    assert info.subtype == subtype
    assert info.samplerate == (44100 if words[2:] else RATE)


def test_existing_file_is_kept_without_force(run, models, clip, tmp_path):
    target = tmp_path / "out.wav"
    target.write_bytes(b"old")
    refused(run("convert", clip, "-o", target, *models), "pass --force to overwrite")
    assert target.read_bytes() == b"old"
    assert run("convert", clip, "-o", target, "--force", *models).code == 0
    assert soundfile.info(target).frames == 12800


def test_input_is_never_replaced(run, models, clip):
    before = clip.read_bytes()
    result = run("convert", clip, "-o", clip, "--force", *models)
    refused(result, "the output would replace the input")
    assert clip.read_bytes() == before


def test_any_bytes_may_name_a_file(models, clip, tmp_path):
    """Names that are no UTF-8 are printed somehow; the conversion is not lost."""
    source = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.wav"))
    clip.rename(source)
    words = ["convert", str(source), "-o", str(tmp_path / "out.wav")]
    done = subprocess.run(
        [sys.executable, "-m", "rvc_mlx", *words, *map(str, models)],
        cwd=ROOT, capture_output=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"caf\udce9.wav" in done.stdout


# Input of every kind ----------------------------------------------------------------


def tone(samples, rate):
    return (0.3 * np.sin(2 * np.pi * 220 * np.arange(samples) / rate)).astype("f4")


def write_input(path, kind):
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "header only":
        soundfile.write(path, np.zeros(0), 16000)
    elif kind == "text":
        path.write_text("Dear diary, this is no sound.\n" * 50)
    elif kind == "cut off":
        soundfile.write(path, tone(48000, 16000), 16000)
        path.write_bytes(path.read_bytes()[:20000])
    elif kind == "NaN":
        audio = tone(8000, 16000)
        audio[4000] = np.nan
        soundfile.write(path, audio, 16000, subtype="FLOAT")
    elif kind == "9 ms":
        soundfile.write(path, tone(144, 16000), 16000)
    elif kind == "folder":
        path.mkdir()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", "the file is empty (0 bytes)"),
        ("header only", "the file holds no audio"),
        ("text", "not a readable audio file"),
        ("cut off", "cut off after"),
        ("NaN", "a sample at 0.250 s is not a finite number"),
        ("9 ms", "9.0 ms long; expected 10 ms or more"),
        ("missing", "no such file; check the path"),
        ("folder", "no sound files in this folder"),
    ],
)
def test_bad_input_is_refused_in_one_line(run, models, tmp_path, kind, message):
    source = tmp_path / "in.wav"
    write_input(source, kind)
    before = names(tmp_path)
    result = run("convert", source, "-o", tmp_path / "out" / "out.wav", *models)
    refused(result, message)
    assert names(tmp_path) == before


@pytest.mark.parametrize(
    ("rate", "samples", "channels"),
    [
        (16000, 160, 1),  # 10 ms
        (8000, 4000, 1),
        (192000, 48000, 1),
        (44100, 11025, 2),
        (48000, 12000, 8),
    ],
)
def test_unusual_input_is_converted(run, models, tmp_path, rate, samples, channels):
    audio = np.repeat(tone(samples, rate)[:, None], channels, axis=1)
    soundfile.write(tmp_path / "in.wav", audio, rate)
    result = run("convert", tmp_path / "in.wav", "-o", tmp_path / "out.wav", *models)
    assert (result.code, result.err) == (0, [])
    info = soundfile.info(tmp_path / "out.wav")
    assert (info.frames, info.channels) == (round(samples * RATE / rate), 1)


def test_silence_is_converted_to_silence(run, models, tmp_path):
    soundfile.write(tmp_path / "in.wav", np.zeros(8000), 16000)
    result = run("convert", tmp_path / "in.wav", "-o", tmp_path / "out.wav", *models)
    assert (result.code, result.err) == (0, [])
    audio, _ = soundfile.read(tmp_path / "out.wav", dtype="int16")
    assert audio.shape == (16000,)
    assert not audio.any()


# Models that do not fit, places that cannot be written --------------------------------


def write_voice(path, **kind):
    spec = maker.VoiceFile(**{"version": "v1", "khz": 32, "speakers": 4, **kind})
    maker.write_voice("test", spec, maker.SMALL_VOICE, path, 1)
    return path


def test_missing_index(run, models, clip, tmp_path):
    words = with_option(models, "--index", tmp_path / "no.index")
    result = run("convert", clip, "-o", tmp_path / "out.wav", *words)
    refused(result, "no.index: there is no such file")
    assert names(tmp_path) == ["clip.wav"]


def test_index_of_the_wrong_width(run, models, clip, tmp_path, rng):
    features = rng.standard_normal((200, 768)).astype(np.float32)
    maker.write_index(features, tmp_path / "v2.index", 0)
    words = with_option(models, "--index", tmp_path / "v2.index")
    result = run("convert", clip, "-o", tmp_path / "out.wav", *words)
    refused(result, "holds 768-wide features, the voice uses 256")
    assert names(tmp_path) == ["clip.wav", "v2.index"]


def test_index_that_is_a_voice(run, models, clip, small_models, tmp_path):
    words = with_option(models, "--index", small_models.voice)
    result = run("convert", clip, "-o", tmp_path / "out.wav", *words)
    assert result.code == 1
    assert len(result.err) == 1


def test_voice_without_f0_and_pitch_options(run, models, clip, tmp_path):
    voice = write_voice(tmp_path / "plain.pth", f0=False)
    words = with_option(models, "--voice", voice)
    result = run("convert", clip, "-o", tmp_path / "out.wav", "--pitch", 2, *words)
    refused(result, "this voice has no pitch input, so pitch cannot work; leave it out")
    assert names(tmp_path) == ["clip.wav", "plain.pth"]
    assert run("convert", clip, "-o", tmp_path / "out.wav", *words).code == 0


def test_speaker_that_the_voice_does_not_have(run, models, clip, tmp_path):
    result = run("convert", clip, "-o", tmp_path / "out.wav", "--sid", 9, *models)
    refused(result, "has speakers 0 to 3")


def test_encoder_is_needed(run, clip, small_models, tmp_path):
    result = run("convert", clip, "-o", tmp_path / "out.wav", "-v", small_models.voice)
    refused(result, "rvc-mlx download contentvec")


@pytest.mark.parametrize("place", ["inside a file", "proc"])
@pytest.mark.parametrize("many", [False, True])
def test_unwritable_output(run, models, clip, tmp_path, place, many):
    if place == "proc" and not Path("/proc/self").exists():
        pytest.skip("no /proc here")
    folder = clip / "sub" if place == "inside a file" else Path("/proc/rvc-mlx")
    output = folder if many else folder / "out.wav"
    result = run("convert", clip, "-o", output, *models)
    refused(result, "this folder cannot be made")
    assert names(tmp_path) == ["clip.wav"]


def test_output_folder_that_takes_no_files(run, models, clip, tmp_path):
    if not Path("/proc/self").exists():
        pytest.skip("no /proc here")
    result = run("convert", clip, "-o", "/proc/self/out.wav", *models)
    refused(result, "the folder cannot be written")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-o", "out.xyz"], "cannot write the format .xyz"),
        (["-o", "out.mp3", "--output-rate", "96000"], "mp3 cannot hold 96000 Hz"),
        (["-o", "out.flac", "--bits", "float"], "flac cannot hold FLOAT"),
    ],
)
def test_impossible_format(run, models, clip, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    refused(run("convert", clip, *words, *models), message)
    assert names(tmp_path) == ["clip.wav"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--protect", "0.7"], "protect is 0.7; expected 0 to 0.5"),
        (["--x-query", "30"], "expected at most half of x_center"),
        (["--pitch", "nan"], "pitch is nan"),
    ],
)
def test_option_out_of_range_is_misuse(run, models, clip, tmp_path, words, message):
    result = run("convert", clip, "-o", tmp_path / "out.wav", *words, *models)
    refused(result, message, code=2)


def test_misuse_exits_with_2(run, models, tmp_path):
    refused(run("convert", "-o", "out.wav", *models), "no input was given", code=2)
    assert run().code == 2
    assert run("sing").code == 2
    assert run("convert", "in.wav", "--pitch", "high", "-o", "x", *models).code == 2
    assert run("convert", "in.wav", "--device", "abacus", "-o", "x", *models).code == 2


def test_gpu_that_is_not_there(run, models, clip, tmp_path):
    from rvc_mlx.engine import gpu_available

    if gpu_available():
        pytest.skip("there is one")
    words = with_option(models, "--device", "gpu")
    result = run("convert", clip, "-o", tmp_path / "out.wav", *words)
    refused(result, "MLX has no GPU here")


# Folders ----------------------------------------------------------------------------


@pytest.fixture
def recordings(tmp_path, speech):
    """Three clips in a folder, one of them deeper."""
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    for i, name in enumerate(("a.wav", "b.flac", "deep/c.wav")):
        soundfile.write(folder / name, speech[8000 * i :][:1600], 16000)
    (folder / "notes.txt").write_text("not sound")
    return folder


def manifest_of(folder):
    files = json.loads((folder / "manifest.json").read_text())["files"]
    return {name: entry["status"] for name, entry in files.items()}


def test_folder_is_converted_once(run, models, recordings, tmp_path):
    out = tmp_path / "out"
    result = run("convert", recordings, "-o", out, "--format", "FLAC", *models)
    assert (result.code, result.err) == (0, [])
    converted = ["a.flac", "b.flac", "deep/c.flac"]
    assert names(out) == [*converted, "manifest.json"]
    assert manifest_of(out) == dict.fromkeys(converted, "done")

    result = run("convert", recordings, "-o", out, "--format", "flac", *models)
    assert (result.code, result.err) == (0, [])
    assert result.out[1:] == ["3 of 3 were done before"]

    # A recording that changed would overwrite what is there: only with --force.
    soundfile.write(recordings / "a.wav", np.zeros(1600), 16000)
    result = run("convert", recordings, "-o", out, "--format", "flac", *models)
    assert result.code == 1
    assert "a.flac exists and is not from this run; pass --force" in result.err[0]
    assert result.err[1] == "rvc-mlx: 1 of 3 failed"
    assert len(result.err) == 2


def test_other_settings_are_refused_without_force(run, models, recordings, tmp_path):
    words = ["convert", recordings / "a.wav", recordings / "b.flac"]
    words += ["-o", tmp_path / "out", *models]
    assert run(*words).code == 0
    before = (tmp_path / "out" / "a.wav").read_bytes()
    result = run(*words, "--seed", 5)
    assert result.code == 1
    assert len(result.err) == 3
    assert (tmp_path / "out" / "a.wav").read_bytes() == before
    assert run(*words).out[1:] == ["2 of 2 were done before"]  # nothing was forgotten
    assert run(*words, "--seed", 5, "--force").code == 0
    assert (tmp_path / "out" / "a.wav").read_bytes() != before
    assert run(*words, "--seed", 5).out[1:] == ["2 of 2 were done before"]


def test_interrupted_folder_goes_on(run, models, recordings, tmp_path, monkeypatch):
    """The second run converts what is left and nothing else."""
    writer, seen = file_run.AudioWriter, []

    def interrupted(target, *rest):
        seen.append(target.name)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return writer(target, *rest)

    monkeypatch.setattr(file_run, "AudioWriter", interrupted)
    out = tmp_path / "out"
    result = run("convert", recordings, "-o", out, *models)
    refused(result, "interrupted; nothing half-written was left", code=130)
    assert names(out) == ["a.wav", "manifest.json"]
    result = run("convert", recordings, "-o", out, *models)
    assert (result.code, result.err) == (0, [])
    assert result.out[1] == "1 of 3 were done before"
    assert seen[-2:] == ["b.wav", "c.wav"]
    assert seen.count("a.wav") == 1
    assert set(manifest_of(out).values()) == {"done"}


def test_bad_file_does_not_stop_the_others(run, models, recordings, tmp_path):
    (recordings / "bad.wav").write_text("no sound")
    (recordings / "empty.wav").touch()
    out = tmp_path / "out"
    result = run("convert", recordings, "-o", out, *models)
    assert result.code == 1
    assert [line.split(": ")[0] for line in result.err] == ["rvc-mlx"] * 3
    assert "bad.wav: not a readable audio file" in result.err[0]
    assert "empty.wav: the file is empty" in result.err[1]
    assert result.err[2] == "rvc-mlx: 2 of 5 failed"
    assert names(out) == ["a.wav", "b.wav", "deep/c.wav", "manifest.json"]
    statuses = manifest_of(out)
    assert statuses["bad.wav"] == statuses["empty.wav"] == "failed"
    assert list(statuses.values()).count("done") == 3

    soundfile.write(recordings / "bad.wav", np.zeros(1600), 16000)
    (recordings / "empty.wav").unlink()
    result = run("convert", recordings, "-o", out, *models)
    assert (result.code, result.err) == (0, [])
    assert result.out[1] == "3 of 4 were done before"


def test_two_inputs_of_one_name(run, models, recordings, tmp_path):
    soundfile.write(recordings / "a.flac", np.zeros(1600), 16000)
    result = run("convert", recordings, "-o", tmp_path / "out", *models)
    refused(result, "would both become")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("inputs", [["a.wav", "b.flac"], [""]])
def test_output_of_several_is_a_folder(run, models, recordings, tmp_path, inputs):
    paths = [recordings / name for name in inputs]
    result = run("convert", *paths, "-o", tmp_path / "out.wav", *models)
    refused(result, "out.wav: the name of a file, but")
    assert not (tmp_path / "out.wav").exists()


@pytest.mark.parametrize("text", ["{", '{"files": []}', '{"files": {"a.wav": 3}}'])
def test_foreign_manifest_is_refused(run, models, recordings, tmp_path, text):
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").write_text(text)
    result = run("convert", recordings, "-o", out, *models)
    refused(result, "not a manifest of rvc-mlx; move it away")
    assert (out / "manifest.json").read_text() == text


# Ctrl-C -----------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_leaves_nothing(models, speech, tmp_path, number):
    soundfile.write(tmp_path / "long.wav", np.tile(speech, 40), 16000)
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.wav").write_bytes(b"old")
    words = ["convert", tmp_path / "long.wav", "-o", out / "old.wav", "--force"]
    # A shell that starts a program in the background lets it ignore SIGINT.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from rvc_mlx.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, [*words, *models])],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(out.glob(".rvc-mlx-*.part")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err == "rvc-mlx: interrupted; nothing half-written was left\n"
    assert names(tmp_path) == ["long.wav", "out/old.wav"]
    assert (out / "old.wav").read_bytes() == b"old"


def test_interrupt_a_library_turns_into_an_error(
    models, small_models, tmp_path, monkeypatch, capsys
):
    def convert(*arguments, **options):
        try:
            signal.getsignal(signal.SIGTERM)(signal.SIGTERM, None)
        except KeyboardInterrupt as error:
            raise RuntimeError("the callback failed") from error

    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr("rvc_mlx.pipeline.load", convert)
    try:
        words = ["convert", small_models.speech, "-o", tmp_path / "b.wav", *models]
        assert main([str(word) for word in words]) == 130
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert "interrupted" in capsys.readouterr().err


# Options by any name ----------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch):
    """What ``load`` and ``convert_file`` are given, in place of converting."""
    given = {}

    def load(voice, index, **others):
        given.update(voice=voice, index=index, **others)

        def convert_file(source, target, options, **rest):
            given.update(source=source, target=target, options=options, **rest)
            return Report(seconds=1.0)

        config = SimpleNamespace(version="v1")
        return SimpleNamespace(
            voice=SimpleNamespace(path=Path(voice), config=config),
            convert_file=convert_file,
            sample_rate=RATE,
            device="none",
            precision="f32",
        )

    monkeypatch.setattr("rvc_mlx.pipeline.load", load)
    return given


APPLIO = """infer --input-path {clip} --output-path {out} --pth-path v.pth
    --index-path v.index --pitch 3 --index-rate 0.4 --volume-envelope 0.5
    --protect 0.2 --f0-method rmvpe --f0-autotune --f0-autotune-strength 0.7
    --proposed-pitch --proposed-pitch-threshold 255 --export-format WAV --sid 2
    --embedder-model-custom enc"""
WEBUI = """convert --input_path {clip} --opt_path {out} --model_name v.pth
    --index_path v.index --f0up_key 3 --index_rate=0.4 --rms_mix_rate 0.5
    --protect 0.2 --f0method rmvpe --resample_sr 48000 --sid 2 --device cpu"""


def test_applio_s_words(run, seen, clip, tmp_path):
    out = tmp_path / "out.wav"
    for words in (APPLIO, APPLIO.replace("-", "_").replace("__", "--")):
        assert run(*words.format(clip=clip, out=out).split()).code == 0
        assert seen["options"] == ConversionOptions(
            pitch=3.0,
            index_rate=0.4,
            volume_envelope=0.5,
            protect=0.2,
            f0_autotune=True,
            f0_autotune_strength=0.7,
            proposed_pitch=True,
            proposed_pitch_threshold=255.0,
            speaker=2,
        )
        assert (seen["source"], seen["target"]) == (clip, out)
        assert (seen["voice"], seen["index"]) == ("v.pth", "v.index")
        assert (seen["encoder"], seen["rmvpe"]) == ("enc", None)
        seen.clear()


def test_webui_s_words(run, seen, clip, tmp_path):
    out = tmp_path / "out.wav"
    assert run(*WEBUI.format(clip=clip, out=out).split()).code == 0
    assert seen["options"] == ConversionOptions(
        pitch=3.0,
        index_rate=0.4,
        volume_envelope=0.5,
        protect=0.2,
        output_rate=48000,
        speaker=2,
    )
    assert (seen["source"], seen["target"]) == (clip, out)
    assert (seen["voice"], seen["index"]) == ("v.pth", "v.index")
    assert (seen["device"], seen["precision"]) == ("cpu", "auto")


def test_applio_s_batch(run, models, recordings, tmp_path):
    words = ["batch_infer", "--input_folder", recordings]
    words += ["--output_folder", tmp_path / "out", "--export_format", "FLAC"]
    assert run(*words, *models).code == 0
    assert set(manifest_of(tmp_path / "out")) == {"a.flac", "b.flac", "deep/c.flac"}


def test_negative_numbers_and_booleans(run, seen, clip, tmp_path):
    words = ["convert", clip, "-o", tmp_path / "out.wav", "-v", "v.pth", "--pitch", -5]
    words += ["--index-exact", "true", "--f0_autotune=False", "--reference_lengths"]
    assert run(*words).code == 0
    assert seen["options"] == ConversionOptions(
        pitch=-5.0, index_exact=True, reference_lengths=True
    )


def test_without_options_the_defaults_hold(run, seen, clip, tmp_path):
    words = ["convert", clip, "-o", tmp_path / "out.wav", "-v", "v.pth"]
    assert run(*words, "--index-path", "").code == 0
    assert seen["options"] == ConversionOptions()
    assert (seen["device"], seen["precision"]) == ("auto", "auto")
    assert (seen["index"], seen["subtype"]) == ("", None)


# Help -------------------------------------------------------------------------------


def test_help_is_light():
    """Help of every command, without importing anything heavy."""
    code = f"""if True:
        import contextlib, io, json, sys
        from rvc_mlx.cli import main
        texts = {{}}
        for command in ("", *{COMMANDS}):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                try:
                    main([*command.split(), "--help"])
                except SystemExit as stop:
                    assert stop.code == 0
            texts[command] = out.getvalue()
        print(json.dumps([texts, sorted(sys.modules)]))
    """
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    texts, modules = json.loads(done.stdout)
    heavy = {"mlx", "numpy", "torch", "openvino", "scipy", "soundfile", "rich"}
    assert heavy.isdisjoint(modules)
    assert all(command in texts[""] for command in COMMANDS)
    assert all(texts[command].startswith("usage: rvc-mlx") for command in COMMANDS)
    for name in ("--pitch", "--f0up-key", "--protect", "--reference-lengths", "--seed"):
        assert name in texts["convert"]


def test_version(run):
    assert run("--version").out == [rvc_mlx.__version__]


# info -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """A small training checkpoint, and the voice that is in it."""
    folder = tmp_path_factory.mktemp("training")
    model = random_voice(
        maker.SMALL_VOICE,
        3,
        version="v1",
        f0=True,
        vocoder="HiFi-GAN",
        speakers=4,
        with_enc_q=True,
    )
    state = dict(model.state_dict())
    torch.save(
        {"model": state, "iteration": 20, "optimizer": {}, "learning_rate": 1e-4},
        folder / "G_20.pth",
    )
    kept = {k: v for k, v in state.items() if not k.startswith("enc_q.")}
    torch.save({"weight": kept, "config": maker.SMALL_VOICE}, folder / "voice.pth")
    return folder


def test_info_of_every_kind(run, small_models, training):
    expected = {
        small_models.voice: {
            "kind": "voice",
            "version": "v1 (256-wide features)",
            "sample rate": "32000 Hz",
            "pitch": "yes",
            "vocoder": "HiFi-GAN",
            "speakers": 4,
            "types": "float16",
        },
        small_models.encoder: {"kind": "contentvec", "tensors": 213},
        small_models.encoder / "pytorch_model.bin": {
            "kind": "contentvec",
            "tensors": 213,
        },
        small_models.rmvpe: {"kind": "rmvpe"},
        small_models.index: {"kind": "retrieval index", "width": 256, "vectors": 125},
        training / "G_20.pth": {
            "kind": "training checkpoint of a voice",
            "sample rate": "32000 Hz",
            "speakers": 4,
            "types": "float32",
        },
    }
    for path, facts in expected.items():
        result = run("info", path, "--json")
        assert (result.code, result.err) == (0, [])
        found = json.loads(result.text)
        assert found.items() >= facts.items()
        if path.is_file():
            assert found["bytes"] == path.stat().st_size
            assert found["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        plain = run("info", path)
        assert plain.code == 0
        assert len(plain.out) == len(found)
        assert any(str(facts["kind"]) in line for line in plain.out)


@pytest.mark.parametrize("name", ["speech.flac", "", "no.pth", "no.index"])
def test_info_of_no_model(run, small_models, name):
    result = run("info", small_models.folder / name)
    assert result.code == 1
    assert len(result.err) == 1


# convert-model ----------------------------------------------------------------------


def load_parts(small_models, **parts):
    named = {"encoder": small_models.encoder, "rmvpe": small_models.rmvpe, **parts}
    voice = named.pop("voice", small_models.voice)
    return rvc_mlx.load(
        voice, small_models.index, device="cpu", precision="f32", **named
    )


@pytest.mark.parametrize(
    ("suffix", "words"), [(".npz", []), (".safetensors", ["--half"])]
)
def test_converted_models_give_the_same_audio(
    run, small_models, small_converter, speech, tmp_path, suffix, words
):
    parts = {}
    for name, kind in (("voice", "voice"), ("encoder", "contentvec"), ("rmvpe",) * 2):
        source = getattr(small_models, name)
        parts[name] = tmp_path / f"{name}{suffix}"
        result = run("convert-model", source, parts[name], *words)
        assert (result.code, result.err) == (0, [])
        assert result.out == [f"{source} -> {parts[name]} ({kind})"]
        facts = json.loads(run("info", parts[name], "--json").text)
        assert facts["kind"] == kind
        assert len(facts["says source_sha256"]) == 64
        assert ("float16" in facts["types"]) == bool(words)
        assert ("float32" in facts["types"]) != bool(words)
    audio = speech[8000:16000]
    found = load_parts(small_models, **parts).convert(audio, 16000).audio
    expected = small_converter.convert(audio, 16000).audio
    if words:  # folded weights, rounded to 11 bits: measured 69 dB
        assert np.square(found - expected).mean() < 1e-5 * np.square(expected).mean()
    else:  # the same float32 weights
        assert np.abs(found - expected).max() < 1e-6


def test_both_formats_hold_the_same(run, small_models, tmp_path):
    for kind in ("voice", "encoder", "rmvpe"):
        paths = [tmp_path / f"{kind}{suffix}" for suffix in (".npz", ".safetensors")]
        for path in paths:
            assert run("convert-model", getattr(small_models, kind), path).code == 0
        one, other = map(read_checkpoint, paths)
        assert one.metadata == other.metadata
        assert one.tensors.keys() == other.tensors.keys()
        for name, value in one.tensors.items():
            assert np.array_equal(value, other.tensors[name])
            assert value.dtype == other.tensors[name].dtype


def test_training_checkpoint_is_extracted(
    run, models, training, small_models, clip, speech
):
    target = clip.with_name("voice.npz")
    words = with_option(models, "--voice", training / "G_20.pth")
    result = run("convert", clip, "-o", clip.with_name("out.wav"), *words)
    refused(result, "rvc-mlx convert-model G_20.pth voice.safetensors")
    assert run("convert-model", training / "G_20.pth", target).code == 0
    facts = json.loads(run("info", target, "--json").text)
    assert facts["kind"] == "voice"
    assert facts["speakers"] == 4
    found, expected = (
        load_parts(small_models, voice=voice).convert(speech[8000:14400], 16000).audio
        for voice in (target, training / "voice.pth")
    )
    assert np.abs(found - expected).max() < 1e-6


def test_convert_model_refuses(run, small_models, tmp_path):
    target = tmp_path / "out.npz"
    refused(
        run("convert-model", small_models.index, target), "this is a retrieval index"
    )
    refused(run("convert-model", small_models.folder, target), "a folder was given")
    refused(run("convert-model", tmp_path / "no.pth", target), "there is no such file")
    wrong = tmp_path / "out.txt"
    refused(
        run("convert-model", small_models.voice, wrong), ".safetensors or .npz, not"
    )
    nowhere = tmp_path / "no" / "out.npz"
    assert run("convert-model", small_models.voice, nowhere).code == 1
    assert names(tmp_path) == []
    target.write_bytes(b"old")
    refused(run("convert-model", small_models.voice, target), "pass --force")
    assert target.read_bytes() == b"old"
    assert run("convert-model", small_models.voice, target, "--force").code == 0
    assert names(tmp_path) == ["out.npz"]


@pytest.mark.parametrize(
    ("tool", "kind"),
    [("rvc_model", "voice"), ("hubert", "encoder"), ("rmvpe", "rmvpe")],
)
def test_tools(small_models, tmp_path, monkeypatch, capsys, tool, kind):
    script = ROOT / "tools" / f"convert_{tool}.py"

    def run_tool(source, target):
        monkeypatch.setattr(sys, "argv", [str(script), str(source), str(target)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(script), run_name="__main__")
        return stop.value.code, *capsys.readouterr()

    target = tmp_path / "out.safetensors"
    code, out, err = run_tool(getattr(small_models, kind), target)
    assert (code, err) == (0, "")
    assert str(target) in out
    other = small_models.rmvpe if kind == "voice" else small_models.voice
    code, out, err = run_tool(other, tmp_path / "other.safetensors")
    assert code == 1
    assert err.startswith(f"convert_{tool}.py: {other}: this is")
    assert err.count("\n") == 1
    assert names(tmp_path) == ["out.safetensors"]


# doctor, download ---------------------------------------------------------------------


def test_doctor(run):
    words = ["doctor", "--device", "cpu", "--precision", "f32"]
    result = run(*words, "--json")
    assert (result.code, result.err) == (0, [])
    facts = json.loads(result.text)
    sections = {"versions", "device", "bundled models", "weights", "self-test"}
    assert set(facts) == sections
    assert facts["device"]["precision"] == "f32"
    assert facts["device"]["used"].startswith("CPU")
    assert set(facts["weights"]) == {"folder", *PUBLIC_WEIGHTS}
    assert all("sha256" in told for told in facts["bundled models"].values())
    checks = ("length", "finite", "audible", "repeatable")
    assert all(facts["self-test"][name] == "ok" for name in checks)
    plain = run(*words)
    assert plain.code == 0
    assert sections <= set(plain.out)


def test_download_from_a_folder(run, small_models, models, clip, home, monkeypatch):
    content = small_models.rmvpe.read_bytes()
    file = WeightFile("rmvpe.pt", len(content), hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(PUBLIC_WEIGHTS, "rmvpe", Weights("nobody/nothing", (file,)))
    new_home = clip.with_name("home")
    new_home.mkdir()
    (new_home / "compiled").symlink_to(home / "compiled")
    monkeypatch.setenv("RVC_MLX_HOME", str(new_home))
    copies = clip.with_name("copies")
    copies.mkdir()
    result = run("download", "--from-dir", copies)
    refused(result, "has no pytorch_model.bin")
    shutil.copytree(small_models.encoder, copies / "contentvec")
    shutil.copy(small_models.rmvpe, copies)
    result = run("download", "--from-dir", copies)
    assert (result.code, result.err) == (0, [])
    assert result.out == [
        f"contentvec: {new_home / 'contentvec' / 'pytorch_model.bin'}",
        f"rmvpe: {new_home / 'rmvpe' / 'rmvpe.pt'}",
    ]
    words = ["-v", small_models.voice, "--device", "cpu", "--precision", "f32"]
    assert run("convert", clip, "-o", clip.with_name("out.wav"), *words).code == 0


def test_download_refuses(run, small_models, tmp_path, monkeypatch):
    monkeypatch.setenv("RVC_MLX_HOME", str(tmp_path))
    refused(run("download", "whisper"), "no weights are named 'whisper'")
    result = run("download", "rmvpe", "--from-dir", small_models.folder)
    refused(result, "781007 bytes but rmvpe.pt has 181184272")
    assert names(tmp_path) == []
