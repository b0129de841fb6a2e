"""The bundled models: as documented, found by name, and speaking."""

import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

import rvc_mlx
from recipes.neural import NEURAL
from recipes.speakers import TRAINING
from rvc_mlx import bundled_models
from rvc_mlx.audio import resample
from rvc_mlx.audio_io import load_audio
from rvc_mlx.bundled_models import FOLDER, NETWORKS, SPEECH, VOICES, choose_voice
from rvc_mlx.checkpoint import hash_file, read_checkpoint, save_checkpoint
from rvc_mlx.cli import main
from rvc_mlx.loading import find_weights
from rvc_mlx.pitch import VOICING_THRESHOLD
from rvc_mlx.training.features import estimate_clip_f0
from tools import render_models

DOCUMENT = Path(__file__).parents[1] / "docs" / "MODELS.md"
AUDIO = DOCUMENT.parent / "audio"
EXAMPLES = {"slt": 0, "rms": -9}  # semitones, as in docs/EVALUATION.md
KINDS = {"contentvec": "contentvec", "rmvpe": "rmvpe"} | dict.fromkeys(VOICES, "voice")
MOST_BYTES = 60_000_000


def told(name):
    return read_checkpoint(FOLDER / f"{name}.safetensors").metadata


def steps(name):
    """As it is told: of a run that the clock ended, ``"3600 or more"``."""
    metadata = told(name)
    return str(metadata.get("steps", metadata.get("step")))


# the files ----------------------------------------------------------------------------


def test_files_are_those_of_the_document():
    rows = re.findall(
        r"^\| `([^`]+)` \| [^|]+ \| (\d+) \| ([0-9a-f]{64}) \|$",
        DOCUMENT.read_text("utf-8"),
        re.MULTILINE,
    )
    found = {
        path.name: (path.stat().st_size, hash_file(path)) for path in FOLDER.iterdir()
    }
    assert {name: (int(size), digest) for name, size, digest in rows} == found
    weights = [f"{name}.safetensors" for name in KINDS]
    indexes = [f"{name}.index" for name in VOICES]
    assert sorted(found) == sorted([*weights, *indexes, "speech.flac"])
    assert sum(size for size, _ in found.values()) <= MOST_BYTES


def test_document_is_what_the_files_say(tmp_path, capsys):
    assert render_models.main(["--check"]) == 0
    changed = tmp_path / "MODELS.md"
    changed.write_text(DOCUMENT.read_text("utf-8").replace("seed", "seeds"))
    assert render_models.main(["--check", "--output", str(changed)]) == 1
    assert "render_models" in capsys.readouterr().out
    assert render_models.main(["--output", str(changed)]) == 0
    assert changed.read_bytes() == DOCUMENT.read_bytes()


@pytest.mark.parametrize("name", KINDS)
def test_metadata_is_complete(name):
    metadata = told(name)
    assert metadata["kind"] == KINDS[name]
    for key in ("speakers", "licences_of_voices", "packages", "corpus", "trained_by"):
        assert isinstance(metadata[key], str), key
        assert metadata[key], key
    assert int(metadata["seed"]) >= 0
    assert "synthetic speech only" in metadata["limits"]
    assert isinstance(metadata["metrics"], dict)
    tensors = read_checkpoint(FOLDER / f"{name}.safetensors").tensors
    assert {str(value.dtype) for value in tensors.values()} == {"float16"}


def section(name):
    """The document's part about a network."""
    [found] = re.findall(
        rf"^## {name}\.safetensors\n(.*?)^## ",
        DOCUMENT.read_text("utf-8") + "## ",
        re.MULTILINE | re.DOTALL,
    )
    return found


@pytest.mark.parametrize("name", KINDS)
def test_networks_are_trained_and_judged(name):
    assert int(steps(name).split()[0]) > 0
    assert told(name)["metrics"]
    assert f"| steps | {steps(name)} |" in section(name)
    assert str(told(name)["packages"]) in section(name)
    assert "Not judged" not in section(name)


@pytest.mark.parametrize("voice", VOICES)
def test_voices_that_are_not_understood_are_called_so(voice):
    wrong = told(voice)["metrics"]["natural"]["words"]["word_error_output"]
    assert ("mostly not intelligible" in section(voice)) == (wrong >= 50)


def test_a_verdict_tells_goals_and_words():
    words = {"word_error_source": 10.0, "word_error_output": 49.9}
    judged = {
        "words": {**words, "character_gap": 12.0},
        "f0": {"rpa": 94.99},
        "speaker": {"similarity_target": 0.8, "nearer_target": None},
    }
    line, goals = render_models.verdict(judged)
    assert line == (
        "**Meets 2 of 4 goals; a recogniser gets 50 % of the words wrong, in the source "
        "10 %.**\n"
    )
    assert "| F0 within 50 cents, % | >= 95 | 94.99 | missed |" in goals
    assert "| nearer target than source, % | >= 95 | - | not measured |" in goals
    judged["words"]["word_error_output"] = 50.0
    assert "10 %: mostly not intelligible.**" in render_models.verdict(judged)[0]
    assert render_models.verdict({"content": {}}) == []


@pytest.mark.parametrize("voice", VOICES)
def test_voices_were_trained_with_the_bundled_networks(voice):
    metadata = told(voice)
    assert metadata["embedder_model"] == metadata["pitch_model"] == NETWORKS
    for kind, key in (("contentvec", "embedder_sha256"), ("rmvpe", "pitch_sha256")):
        assert metadata[key] == hash_file(find_weights(kind, NETWORKS))


def test_no_training_hears_the_speaker_of_the_clip():
    with soundfile.SoundFile(SPEECH) as file:
        tags = file.copy_metadata()
    speaker = tags["artist"].split()[0]
    assert speaker in NEURAL
    assert speaker not in {one.name for one in TRAINING}
    assert all(speaker not in told(name)["speakers"].split() for name in KINDS)
    for part in (tags["title"], tags["license"], tags["comment"]):
        assert part in DOCUMENT.read_text("utf-8")


def test_figures_become_tables():
    report = {
        "clips": 40,
        "speakers": ["rms", "ph"],
        "goals": [{"goal": "CER", "reached": None}, {"goal": "RPA", "clips": ["a|b"]}],
        "trackers": {"ours": {"0 dB": {"rpa": 0.98765}}, "other": {"0 dB": {"rpa": 1}}},
        "empty": {},
    }
    lines = [x for x in "\n".join(render_models.figures("f0", report)).split("\n") if x]
    assert lines == [
        *("**f0**", "| figure | value |", "| --- | --- |", "| clips | 40 |"),
        "| speakers | rms, ph |",
        *("**f0, goals**", "| goal | reached | clips |", "| --- | --- | --- |"),
        *("| CER | - | - |", "| RPA | - | a\\|b |"),
        *("**f0, trackers**", "**f0, trackers, ours**", "|  | rpa |", "| --- | --- |"),
        *("| 0 dB | 0.9877 |", "**f0, trackers, other**", "|  | rpa |"),
        *("| --- | --- |", "| 0 dB | 1 |"),
    ]


# names --------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, *words):
    """Exit code, stdout and stderr of a command."""
    try:
        code = main([str(word) for word in words])
    except SystemExit as stop:  # argparse
        code = stop.code
    return code, *capsys.readouterr()


@pytest.mark.parametrize("name", VOICES)
def test_a_name_gives_the_voice_and_its_index_if_that_is_asked_for(
    folder, caplog, name
):
    voice, index = FOLDER / f"{name}.safetensors", FOLDER / f"{name}.index"
    assert choose_voice(name) == choose_voice(name, "") == (voice, None)
    assert choose_voice(name, name) == (voice, index)
    assert choose_voice(name, "my.index") == (voice, Path("my.index"))
    assert not caplog.records


def test_a_file_of_that_name_is_meant_and_said_so(folder, caplog):
    Path("slt").write_bytes(b"a file")
    assert choose_voice("slt") == (Path("slt"), None)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "slt: the file of this name that is here is meant" in record.getMessage()
    assert choose_voice("rms")[0].parent == FOLDER


def test_a_folder_of_that_name_is_not_meant_and_said_so(folder, caplog):
    Path("rms").mkdir()
    assert choose_voice("rms") == (FOLDER / "rms.safetensors", None)
    [record] = caplog.records
    assert "not the folder of this name" in record.getMessage()


@pytest.mark.parametrize("command", ["convert", "info", "bench"])
def test_an_unknown_name_is_told_the_known_ones(folder, capsys, command):
    soundfile.write("clip.wav", np.zeros(8000), 16000)
    words = {
        "convert": ("clip.wav", "-o", "out.wav", "--voice", "bob"),
        "info": ("bob",),
        "bench": ("--voice", "bob", "--seconds", "1"),
    }[command]
    code, _, error = run(capsys, command, *words)
    assert code == 1
    assert error.count("\n") == 1
    assert "bob: there is no such file" in error
    assert "the name of a bundled one: slt, rms" in error
    assert [path.name for path in folder.iterdir()] == ["clip.wav"]


@pytest.mark.parametrize("command", ["convert", "bench"])
def test_help_lists_the_names(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    listed = "slt, rms" if command == "convert" else "slt, bundled"
    assert listed in " ".join(out.split())


def test_info_of_a_bundled_voice(folder, capsys):
    code, out, error = run(capsys, "info", "rms")
    assert (code, error) == (0, "")
    assert f"says embedder_model  {NETWORKS}" in re.sub(" {2,}", "  ", out)
    assert "64-wide features" in out
    assert "32000 Hz" in out


def test_networks_are_found_by_what_the_voice_names():
    assert find_weights("contentvec", NETWORKS).parent == FOLDER
    assert find_weights("rmvpe", NETWORKS).name == "rmvpe.safetensors"
    with pytest.raises(FileNotFoundError, match="rvc-mlx download contentvec"):
        find_weights("contentvec", "contentvec")
    with pytest.raises(ValueError, match="trained with the encoder 'spin'"):
        find_weights("contentvec", "spin")
    with pytest.raises(ValueError, match="trained with the pitch network 'crepe'"):
        find_weights("rmvpe", "crepe")


def test_a_voice_with_another_pitch_network_is_refused(tmp_path):
    checkpoint = read_checkpoint(FOLDER / "slt.safetensors")
    path = tmp_path / "voice.safetensors"
    metadata = {**checkpoint.metadata, "pitch_model": "crepe"}
    save_checkpoint(path, checkpoint.tensors, metadata)
    with pytest.raises(ValueError, match="trained with the pitch network 'crepe'"):
        rvc_mlx.load(path, device="cpu", precision="f32")


def test_public_voices_do_not_get_the_bundled_networks(small_models):
    with pytest.raises(FileNotFoundError, match="rvc-mlx download"):
        rvc_mlx.load(small_models.voice, device="cpu", precision="f32")


def test_a_bundled_voice_refuses_another_encoder(small_models):
    with pytest.raises(ValueError, match="this voice wants 64-wide features"):
        rvc_mlx.load("slt", encoder=small_models.encoder, device="cpu", precision="f32")


def test_a_missing_file_is_an_error(tmp_path, monkeypatch):
    shutil.copytree(FOLDER, tmp_path / "models")
    (tmp_path / "models" / "rmvpe.safetensors").unlink()
    monkeypatch.setattr(bundled_models, "FOLDER", tmp_path / "models")
    with pytest.raises(
        FileNotFoundError, match=r"rmvpe\.safetensors: there is no such"
    ):
        rvc_mlx.load("slt", device="cpu", precision="f32")


# speech -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source():
    return load_audio(SPEECH)


@pytest.fixture(scope="module")
def converters(home):
    return {name: rvc_mlx.load(name, device="cpu", precision="f32") for name in VOICES}


@pytest.fixture(scope="module")
def conversions(converters, source):
    return {
        name: converter.convert(source, 16000) for name, converter in converters.items()
    }


@pytest.mark.parametrize("name", VOICES)
def test_a_conversion_is_whole_and_heard(converters, conversions, source, name):
    audio, rate = conversions[name]
    assert rate == converters[name].sample_rate == 32000
    assert len(audio) == 2 * len(source)
    assert np.isfinite(audio).all()
    assert np.abs(audio).max() < 1
    blocks = audio[: len(audio) // rate * rate].reshape(-1, rate)
    assert (np.sqrt(np.square(blocks).mean(axis=1)) > 3e-3).all()  # in every second
    assert converters[name].index is None


def test_voices_differ(conversions):
    one, other = (conversions[name].audio for name in VOICES)
    assert np.square(one - other).mean() > 0.1 * np.square(one).mean()


@pytest.mark.parametrize("name", VOICES)
def test_pitch_follows_the_clip(converters, conversions, source, name):
    net = converters[name].pitch_net
    heard = resample(conversions[name].audio, 32000, 16000)
    before, after = (
        estimate_clip_f0(net, audio, VOICING_THRESHOLD) for audio in (source, heard)
    )
    count = min(len(before), len(after))
    before, after = before[:count], after[:count]
    both = (before > 0) & (after > 0)
    assert both.sum() > 0.8 * (before > 0).sum() > 100
    cents = np.abs(1200 * np.log2(after[both] / before[both]))
    assert np.median(cents) < 50
    assert (cents < 100).mean() > 0.8


@pytest.mark.parametrize(("name", "pitch"), EXAMPLES.items())
def test_examples_are_conversions_of_the_clip(converters, source, name, pitch):
    """Vorbis keeps the wave to half a percent; other weights share nothing with it."""
    heard, rate = soundfile.read(AUDIO / f"{name}.ogg", dtype="float32")
    options = rvc_mlx.ConversionOptions(pitch=pitch)
    audio = converters[name].convert(source, 16000, options).audio
    assert (rate, len(heard)) == (32000, len(audio))
    assert np.square(heard - audio).mean() < 0.05 * np.square(audio).mean()


def test_the_demo_needs_no_network_and_no_file(folder, capsys):
    Path("slt").write_bytes(b"not a voice")  # the demo means the bundled one
    code, out, error = run(capsys, "demo", "--device", "cpu", "--precision", "f32")
    assert (code, error) == (0, "")
    assert "synthetic speech alone" in out.splitlines()[0]
    words = told("slt")["metrics"]["natural"]["words"]
    assert f"{words['word_error_output']:.0f} % of a stranger's words" in out
    info = soundfile.info("demo.wav")
    assert (info.samplerate, info.duration) == (32000, soundfile.info(SPEECH).duration)
    code, _, error = run(capsys, "demo")
    assert code == 1
    assert "--force" in error


def test_a_voice_by_name_converts_a_file(folder, capsys, source):
    soundfile.write("song.wav", source[:16000], 16000)
    words = ("convert", "song.wav", "-o", "out.wav", "--voice", "rms")
    code, out, error = run(capsys, *words, "--device", "cpu", "--precision", "f32")
    assert (code, error) == (0, "")
    assert out.startswith("voice rms.safetensors (v2, 32000 Hz)")
    assert soundfile.info("out.wav").frames == 32000
