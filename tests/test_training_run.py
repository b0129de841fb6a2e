"""The run: what it writes, that it continues bit by bit, and what it says when it cannot.

Runs are of a tiny voice at 3200 Hz on clips and features made here; child processes are
real ``rvc-mlx train`` commands.
"""

import dataclasses
import json
import logging
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import soundfile
import torch
from processes import PATHS, launch

from rvc_mlx.checkpoint import hash_file, read_checkpoint, save_checkpoint
from rvc_mlx.cli import main
from rvc_mlx.formats.torch_writer import write_torch
from rvc_mlx.loading import file_in_folder
from rvc_mlx.models.layers import load_strictly
from rvc_mlx.models.synthesizer import Synthesizer, sanitize
from rvc_mlx.models.voice_config import SynthesizerConfig
from rvc_mlx.noise import Noise
from rvc_mlx.pitch import quantize_f0
from rvc_mlx.training import filelist
from rvc_mlx.training.dataset import TrainingSet
from rvc_mlx.training.distributed import agree, frame_share, mean_gradients
from rvc_mlx.training.monitor import Monitor, draw_mel
from rvc_mlx.training.parametrization import from_torch, initial, to_torch
from rvc_mlx.training.plan import RUN
from rvc_mlx.training.presets import MEL_SCALES, TrainingConfig
from rvc_mlx.training.state import (
    Progress,
    read_state,
    replacing,
    sweep,
    write_state,
)
from rvc_mlx.training.step import TrainStep, draw
from rvc_mlx.training.trainer import STATE
from rvc_mlx.training.validation import SCORE, Scores, Validator
from rvc_mlx.training.voice_export import (
    VoiceFacts,
    extract_voice,
    voice_tensors,
    write_training_checkpoint,
    write_voice,
)
from rvc_reference.loading import load_voice
from rvc_reference.synthesizer import Synthesizer as TorchSynthesizer

ROOT = Path(__file__).parents[1]
KILLS = int(os.environ.get("RVC_MLX_KILLS", "3"))  # of the test that kills a run
RATE, HOP, WIDTH = 3200, 32, 256
EPOCHS = 3

MODEL = SynthesizerConfig(
    spec_channels=33,
    segment_size=8,
    inter_channels=12,
    hidden_channels=16,
    filter_channels=24,
    n_heads=2,
    n_layers=2,
    kernel_size=3,
    p_dropout=0,
    resblock="1",
    resblock_kernel_sizes=(3, 5),
    resblock_dilation_sizes=((1, 3),) * 2,
    upsample_rates=(4, 2, 2, 2),
    upsample_initial_channel=32,
    upsample_kernel_sizes=(8, 4, 4, 4),
    spk_embed_dim=2,
    gin_channels=8,
    sample_rate=RATE,
    feature_size=WIDTH,
)
CONFIG = TrainingConfig(
    MODEL, 64, HOP, 64, 16, 0.0, None, 8, discriminator="v1", discriminator_width=2
)

WIDE = dataclasses.replace(
    CONFIG,
    model=dataclasses.replace(
        MODEL, inter_channels=16, filter_channels=32, upsample_initial_channel=128
    ),
    discriminator_width=16,
)


@pytest.fixture(autouse=True)
def _globals():
    """``main`` sets a signal handler, a device and a log level."""
    handler, device = signal.getsignal(signal.SIGTERM), mx.default_device()
    yield
    signal.signal(signal.SIGTERM, handler)
    mx.set_default_device(device)
    logging.getLogger("rvc_mlx").setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A prepared folder: five clips of a gliding tone, with invented features."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("sliced_audios", "extracted", "f0", "f0_voiced"):
        (folder / name).mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for i in range(5):
        frames = 70 + 4 * i
        t = np.arange(frames * HOP) / RATE
        hertz = 150 + 50 * np.sin(2 * np.pi * t + i)
        wave = 0.5 * np.sin(2 * np.pi * np.cumsum(hertz) / RATE)
        wave += 0.01 * rng.standard_normal(len(t))
        f0 = hertz[::HOP] * (rng.random(frames) > 0.2)
        features = rng.standard_normal((frames // 2, WIDTH), np.float32)
        name = f"0_{i}_0"
        paths = [
            folder / "sliced_audios" / f"{name}.wav",
            folder / "extracted" / f"{name}.npy",
            folder / "f0" / f"{name}.wav.npy",
            folder / "f0_voiced" / f"{name}.wav.npy",
        ]
        soundfile.write(paths[0], wave.astype(np.float32), RATE, subtype="FLOAT")
        for path, array in zip(paths[1:], (features, quantize_f0(f0), f0), strict=True):
            np.save(path, array)
        lines.append(
            "|".join([*(p.relative_to(folder).as_posix() for p in paths), "0"])
        )
    (folder / filelist.FILELIST).write_text("\n".join(lines) + "\n")
    (folder / "sizes.json").write_text(json.dumps(dataclasses.asdict(CONFIG)))
    return folder


@pytest.fixture
def folder(data, tmp_path):
    """A copy of the prepared folder, for one run."""
    return Path(shutil.copytree(data, tmp_path / "run"))


def words(folder, *more, epochs=EPOCHS):
    """A command line of ``rvc-mlx train`` without its program."""
    return [
        *("train", "-o", str(folder), "--config", str(folder / "sizes.json")),
        *("--name", "v", "--epochs", str(epochs), "--batch-size", "1"),
        *("--save-steps", "1", "--save-every", "2", "--hold-out", "0.2"),
        *("--version", "v1", "--device", "cpu", "--log-steps", "2"),
        *("--tensorboard", "no", "--similarity", "no", "--index", "no"),
        *map(str, more),
    ]


def spawn(folder, *more, epochs=EPOCHS, **options):
    """``rvc-mlx train`` as a child process."""
    command = [sys.executable, "-m", "rvc_mlx", *words(folder, *more, epochs=epochs)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, **options,
    )  # fmt: skip


def results(folder):
    """Bytes of everything that a finished run leaves behind, by name."""
    found = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    for name in (".lock", "run.json", "metrics.jsonl"):
        found.pop(name, None)
    return found


def rows(folder):
    """The log without what depends on the clock."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith("time/")}
        for line in lines
    ]


@pytest.fixture(scope="session")
def uninterrupted(data, tmp_path_factory):
    """A run from start to end: its folder, seconds to its first save and in all."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(data, folder)
    start = time.monotonic()
    child = spawn(folder, epochs=max(EPOCHS, KILLS))
    while not (folder / STATE).exists() and child.poll() is None:
        time.sleep(0.01)
    first = time.monotonic() - start
    _, err = child.communicate()
    assert child.returncode == 0, err
    return folder, first, time.monotonic() - start


def tiny_generator(seed=0, config=CONFIG):
    """A generator whose every tensor is lively: flat parameters in MLX's layout."""
    rng = np.random.default_rng(seed)
    generator, _ = initial(config, seed)
    return {
        name: value + mx.array(0.05 * rng.standard_normal(value.shape), mx.float32)
        for name, value in generator.items()
    }


# Files of torch ---------------------------------------------------------------------

VALUES = {
    "weight": {
        "half": np.arange(6, dtype=np.float16).reshape(1, 2, 3),
        "scalar": np.array(3.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
        "transposed": np.arange(6.0).reshape(2, 3).T,
        "flags": np.array([True, False]),
        "big-endian": np.array([1, 2], ">i4"),
    },
    "config": [1, "1", [3, 7], [[1, 3, 5]], -5, 70000, 2**40, -(2**70), 256, 255],
    "text": "ü\n\0",
    "none": None,
    "yes": True,
    "fraction": 1.5,
    "inner": {"tuple": (1, "a"), "empty": {}, "list": []},
}


@pytest.mark.parametrize("how", [{}, {"mmap": True}, {"weights_only": False}])
def test_torch_reads_what_is_written(tmp_path, how):
    path = tmp_path / "voice.pth"
    write_torch(path, VALUES)
    found = torch.load(path, **{"weights_only": True, **how})
    assert list(found) == list(VALUES)
    for name, array in VALUES["weight"].items():
        tensor = found["weight"][name]
        assert tensor.is_contiguous()
        assert tensor.shape == array.shape
        assert tensor.numpy().dtype == array.dtype.newbyteorder("=")
        np.testing.assert_array_equal(tensor.numpy(), array)
    assert {k: v for k, v in found.items() if k != "weight"} == {
        k: v for k, v in VALUES.items() if k != "weight"
    }


def test_written_file_is_read_here_and_is_the_same_each_time(tmp_path):
    first, second = tmp_path / "a" / "v.pth", tmp_path / "b" / "v.pth"
    for path in (first, second):
        path.parent.mkdir()
        write_torch(path, VALUES)
    assert first.read_bytes() == second.read_bytes()
    checkpoint = read_checkpoint(first)
    assert checkpoint.container == "weight"
    assert checkpoint.metadata["config"] == VALUES["config"]
    for name, array in VALUES["weight"].items():
        np.testing.assert_array_equal(checkpoint.tensors[name], array)


@pytest.mark.parametrize(
    "value",
    [{"a": {1, 2}}, {"a": np.array([1j])}, {1.5: "a"}, object(), np.float32(1)],
    ids=["set", "complex", "float key", "object", "numpy scalar"],
)
def test_what_a_torch_file_cannot_hold_is_refused(tmp_path, value):
    with pytest.raises(ValueError, match=r"written|no place|neither"):
        write_torch(tmp_path / "x.pth", value)
    assert not (tmp_path / "x.pth").exists()


# Voices -----------------------------------------------------------------------------


@pytest.fixture
def voice(tmp_path):
    """A generator's state dict and the voice written from it in both formats."""
    tensors = to_torch(tiny_generator())
    facts = VoiceFacts("v", 7, 70, "me", seconds=3725.4)
    paths = [tmp_path / "v.pth", tmp_path / "v.safetensors"]
    for path in paths:
        write_voice(path, tensors, MODEL, facts)
    return tensors, *paths


def test_voice_has_the_public_layout(voice):
    tensors, pth, _ = voice
    found = torch.load(pth, weights_only=True)
    reference = TorchSynthesizer(MODEL.as_list(), "v1")
    assert set(found["weight"]) == set(reference.state_dict())
    assert {value.dtype for value in found["weight"].values()} == {torch.float16}
    listed = [33, 32, *MODEL.as_list()[2:]]
    assert found["config"] == listed
    assert [type(value) for value in found["config"]] == [type(v) for v in listed]
    assert found["config"][9:12] == ["1", [3, 5], [[1, 3], [1, 3]]]
    assert (found["version"], found["f0"], found["sr"]) == ("v1", 1, "3200")
    assert type(found["f0"]) is int
    assert (found["info"], found["epoch"], found["step"]) == ("7epoch", 7, 70)
    assert (found["vocoder"], found["author"]) == ("HiFi-GAN", "me")
    assert found["dataset_length"] == "01:02:05"
    assert re.fullmatch("[0-9a-f]{64}", found["model_hash"])
    for name, value in found["weight"].items():
        half = tensors[name].astype(np.float16)
        np.testing.assert_array_equal(value.numpy(), half)


def test_both_formats_hold_the_same(voice):
    pth, safetensors = map(read_checkpoint, voice[1:])
    assert pth.tensors.keys() == safetensors.tensors.keys()
    for name, value in pth.tensors.items():
        np.testing.assert_array_equal(value, safetensors.tensors[name])
    assert safetensors.metadata == {"kind": "voice", **pth.metadata}


def batches_of(data, size=1):
    return TrainingSet(data, CONFIG, size, 0).batches(0)


def test_exported_voice_speaks_in_the_reference(voice, data):
    """Strictly loaded there, it gives the audio that the run itself validates."""
    tensors, pth, safetensors = voice
    halves = {k: v.astype(np.float16).astype(np.float32) for k, v in tensors.items()}
    validator = Validator(CONFIG, batches_of(data), 1, seed=5, similarity=False)
    [spoken] = validator(from_torch(halves)).clips
    batch = next(iter(batches_of(data)))
    T = int(batch.lengths[0])
    reference = load_voice(pth)
    prior, noise = reference.draw(Noise(5), 0, T)
    if noise.phase is not None:
        noise.phase[:, 0] = 0
    with torch.inference_mode():
        wave = reference.infer(
            torch.from_numpy(batch.phone[:, :T]),
            torch.from_numpy(batch.pitch[:, :T]).long(),
            torch.from_numpy(batch.pitchf[:, :T]),
            0,
            prior,
            noise,
        )[0].numpy()
    assert np.sqrt(np.mean(wave**2)) > 1e-3
    difference = np.abs(wave - spoken.output)
    # The original adds up the phase in float32, so the two drift apart along the clip.
    assert difference[: 5 * HOP].max() < 1e-6
    assert difference.max() < 2e-4
    assert difference.mean() < 5e-5
    network = Synthesizer(MODEL)
    load_strictly(network, sanitize(read_checkpoint(safetensors).tensors))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e5])
def test_diverged_generator_is_not_exported(tmp_path, value):
    tensors = to_torch(tiny_generator())
    tensors["dec.conv_pre.bias"] = np.full_like(tensors["dec.conv_pre.bias"], value)
    path = tmp_path / "v.pth"
    path.write_text("the earlier voice")
    with pytest.raises(ValueError, match=r"dec\.conv_pre\.bias.*diverged"):
        write_voice(path, tensors, MODEL, VoiceFacts())
    assert path.read_text() == "the earlier voice"
    assert len(list(tmp_path.iterdir())) == 1


def test_voice_is_written_under_known_suffixes_only(tmp_path):
    with pytest.raises(ValueError, match=r"\.pth or \.safetensors"):
        write_voice(tmp_path / "v.onnx", {}, MODEL, VoiceFacts())


# Extraction -------------------------------------------------------------------------


def test_extract_command_gives_the_same_voice(voice, tmp_path, capsys):
    tensors, pth, safetensors = voice
    write_training_checkpoint(tmp_path / "G_70.pth", tensors, 7, 1e-4, MODEL)
    out = [tmp_path / "e.pth", tmp_path / "e.safetensors"]
    command = ["extract", tmp_path / "G_70.pth", "-o", out[0], "-o", out[1]]
    assert main([str(word) for word in command]) == 0
    assert "v1, 3200 Hz" in capsys.readouterr().out
    for extracted, written in zip(out, (pth, safetensors), strict=True):
        found, wanted = read_checkpoint(extracted), read_checkpoint(written)
        assert found.metadata["config"] == wanted.metadata["config"]
        assert found.metadata["info"] == "7epoch"
        for name, value in wanted.tensors.items():
            np.testing.assert_array_equal(found.tensors[name], value)
    assert main([str(word) for word in command]) == 1
    assert "--force" in capsys.readouterr().err


def test_extract_gives_the_voice_of_a_run_as_it_is_now(uninterrupted, tmp_path):
    run, state, voice = uninterrupted[0], tmp_path / "s.safetensors", tmp_path / "o.pth"
    shutil.copy(run / STATE, state)
    told = json.loads((run / RUN).read_text())
    told |= {"embedder": "other", "author": "somebody"}
    (tmp_path / RUN).write_text(json.dumps(told))
    best = read_checkpoint(run / "v.safetensors")
    named = {k: v for k, v in best.metadata.items() if k != "kind"}
    save_checkpoint(
        tmp_path / "v.safetensors", best.tensors, {**named, "speakers_id": 3}
    )
    assert main(["extract", str(state), "-o", str(voice), "--info", "now"]) == 0
    found, saved = read_checkpoint(voice), read_checkpoint(state)
    progress = saved.metadata["progress"]
    expected = {
        "model_name": "o",
        "info": "now",
        "embedder_model": "other",
        "author": "somebody",
        "speakers_id": 3,
        "dataset_length": best.metadata["dataset_length"],
        "config": best.metadata["config"],
        "epoch": progress["epoch"],
        "step": progress["step"],
    }
    assert {name: found.metadata[name] for name in expected} == expected
    assert expected["dataset_length"]
    now = {k[2:]: mx.array(v) for k, v in saved.tensors.items() if k[:2] == "g."}
    for name, value in voice_tensors(to_torch(now)).items():
        np.testing.assert_array_equal(found.tensors[name], value)


@pytest.mark.parametrize("damage", ["config", "progress", "settings", "elsewhere"])
def test_extract_says_what_is_wrong_with_a_run(damage, uninterrupted, tmp_path, capsys):
    saved = read_checkpoint(uninterrupted[0] / STATE)
    metadata = dict(saved.metadata)
    if damage == "config":
        metadata["identity"] = {**metadata["identity"], "config": {}}
    if damage == "progress":
        metadata["progress"] = 7
    save_checkpoint(tmp_path / "s.safetensors", saved.tensors, metadata)
    if damage != "elsewhere":
        (tmp_path / RUN).write_text("{}")
    voice = tmp_path / "o.pth"
    assert main(["extract", str(tmp_path / "s.safetensors"), "-o", str(voice)]) == 1
    said = capsys.readouterr().err
    expected = {"settings": "no settings of a run", "elsewhere": "in its run's folder"}
    assert expected.get(damage, "no saved run") in said
    assert said.count("\n") == 1
    assert not voice.exists()


def test_training_checkpoint_has_the_public_layout(tmp_path):
    tensors = to_torch(tiny_generator())
    write_training_checkpoint(tmp_path / "G.pth", tensors, 3, 1e-4, MODEL)
    found = torch.load(tmp_path / "G.pth", weights_only=True)
    assert (found["iteration"], found["learning_rate"]) == (3, 1e-4)
    reference = TorchSynthesizer(MODEL.as_list(), "v1", with_enc_q=True)
    reference.load_state_dict(found["model"])
    assert {value.dtype for value in found["model"].values()} == {torch.float32}


def test_extract_reads_the_original_s_checkpoints(tmp_path):
    """As Applio saves them: new names of weight norm, an optimiser, no config."""
    listed = [
        *(1025, 32, 8, 8, 16, 2, 1, 3, 0, "1", [3, 7, 11], [[1, 3, 5]] * 3),
        *([10, 10, 2, 2], 16, [16, 16, 4, 4], 109, 4, 40000),
    ]
    reference = TorchSynthesizer(listed, "v2", with_enc_q=True, speakers=5)
    optimizer = torch.optim.AdamW(reference.parameters())
    sum(p.sum() for p in reference.parameters()).backward()
    optimizer.step()
    names = {"weight_g": "parametrizations.weight.original0"}
    names["weight_v"] = "parametrizations.weight.original1"
    model = {}
    for name, value in reference.state_dict().items():
        stem, _, leaf = name.rpartition(".")
        model[f"{stem}.{names.get(leaf, leaf)}" if stem else leaf] = value
    content = {"model": model, "iteration": 12, "learning_rate": 1e-4}
    torch.save({**content, "optimizer": optimizer.state_dict()}, tmp_path / "G_9.pth")
    config = extract_voice(tmp_path / "G_9.pth", [tmp_path / "v.pth"], VoiceFacts("v"))
    assert config.as_list() == [*listed[:15], 5, *listed[16:]]
    found = torch.load(tmp_path / "v.pth", weights_only=True)
    assert (found["sr"], found["info"], found["version"]) == ("40k", "12epoch", "v2")
    voice = load_voice(tmp_path / "v.pth")
    assert voice.sample_rate == 40000
    wanted = {k for k in reference.state_dict() if not k.startswith("enc_q.")}
    assert set(found["weight"]) == wanted


def test_extract_says_what_it_was_given(tmp_path):
    _, discriminator = initial(CONFIG, 0)
    write_training_checkpoint(tmp_path / "D_1.pth", to_torch(discriminator), 1, 1e-4)
    with pytest.raises(ValueError, match=r"discriminator; give the G_"):
        extract_voice(tmp_path / "D_1.pth", [tmp_path / "v.pth"], VoiceFacts())
    write_torch(tmp_path / "x.pth", {"model": {"a": np.zeros(1, np.float32)}})
    with pytest.raises(ValueError, match="no generator"):
        extract_voice(tmp_path / "x.pth", [tmp_path / "v.pth"], VoiceFacts())
    tensors = to_torch(tiny_generator())
    write_training_checkpoint(tmp_path / "G.pth", tensors, 1, 1e-4)
    with pytest.raises(ValueError, match="none of RVC's configurations"):
        extract_voice(tmp_path / "G.pth", [tmp_path / "v.pth"], VoiceFacts())


# State ------------------------------------------------------------------------------

TENSORS = {
    "g.a": mx.array([[1.5, -0.0], [3e-45, float("inf")]]),
    "counters.steps": mx.array(7, mx.int32),
    "counters.scale": mx.array(65536.0),
    "empty": mx.zeros((0, 3)),
}


def test_state_comes_back_bit_for_bit(tmp_path):
    progress = Progress(3, 5, 41, best=1 / 3, best_epoch=2, stale=1)
    write_state(tmp_path / STATE, TENSORS, progress, {"seed": 1})
    found, where = read_state(tmp_path / STATE, {"seed": 1})
    assert where == progress
    assert found.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        wanted = np.array(value)
        assert found[name].dtype == wanted.dtype
        assert found[name].shape == wanted.shape
        assert found[name].tobytes() == wanted.tobytes()
    assert [p.name for p in tmp_path.iterdir()] == [STATE]


def test_state_of_another_run_is_refused_by_name(tmp_path):
    write_state(tmp_path / STATE, TENSORS, Progress(), {"seed": 1, "batch_size": 4})
    with pytest.raises(ValueError, match=r"batch_size: saved 4, given 8\)"):
        read_state(tmp_path / STATE, {"seed": 1, "batch_size": 8})
    with pytest.raises(ValueError, match=r"more: saved null, given 2\)"):
        read_state(tmp_path / STATE, {"seed": 1, "batch_size": 4, "more": 2})


def test_refused_state_names_all_that_differs_and_no_more(tmp_path):
    saved = {"config": dataclasses.asdict(CONFIG), "seed": 1}
    write_state(tmp_path / STATE, TENSORS, Progress(), saved)
    model = dataclasses.replace(MODEL, upsample_rates=(2, 4, 2, 2))
    other = dataclasses.asdict(dataclasses.replace(CONFIG, model=model))
    with pytest.raises(ValueError, match="other settings") as told:
        read_state(tmp_path / STATE, {"config": other, "seed": 2})
    wanted = "config.model.upsample_rates: saved [4, 2, 2, 2], given [2, 4, 2, 2]"
    assert f"({wanted}; seed: saved 1, given 2)" in str(told.value)
    read_state(tmp_path / STATE, saved)
    write_voice(
        tmp_path / "v.safetensors", to_torch(tiny_generator()), MODEL, VoiceFacts()
    )
    with pytest.raises(ValueError, match="no saved run"):
        read_state(tmp_path / "v.safetensors", {})


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")

    def fail():
        with replacing(path) as partial:
            partial.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert path.read_text() == "old"


def test_sweep_removes_what_killed_writers_left(tmp_path):
    with replacing(tmp_path / "x.pth") as partial:
        partial.write_text("new")
        name = partial.name
    (tmp_path / name).write_text("left by a killed process")
    sweep(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["x.pth"]


# Monitor ----------------------------------------------------------------------------


def read_events(folder):
    """Summary values in a folder of TensorBoard files."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.iterdir()):
        data, place = path.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack_from("<Q", data, place)
            event = Event.FromString(data[place + 12 : place + 12 + length])
            found += [(event.step, value) for value in event.summary.value]
            place += 16 + length
    return found


def test_monitor_writes_scalars_audio_and_pictures(tmp_path):
    pytest.importorskip("tensorboardX")
    mel = np.random.default_rng(0).standard_normal((20, 16))
    with Monitor(tmp_path, 0, 0, tensorboard=True) as monitor:
        monitor.scalars(3, 0, {"train/loss_g": 1.5})
        monitor.clip(3, "voice/0", np.sin(np.arange(800) / 9), RATE)
        monitor.picture(3, "mel/0", [mel, mel])
    events = {
        value.tag: (step, value) for step, value in read_events(tmp_path / "events")
    }
    step, scalar = events["train/loss_g"]
    assert (step, scalar.simple_value) == (3, 1.5)
    audio = events["voice/0"][1].audio
    assert (audio.sample_rate, audio.length_frames) == (RATE, 800)
    image = events["mel/0"][1].image
    assert (image.height, image.width, image.colorspace) == (32, 20, 3)
    assert rows(tmp_path) == [{"step": 3, "epoch": 0, "train/loss_g": 1.5}]


def test_monitor_takes_back_what_was_not_saved(tmp_path):
    with Monitor(tmp_path, 0, 0, tensorboard=False) as monitor:
        for step, epoch in ((1, 0), (2, 0), (2, 1), (3, 1)):
            monitor.scalars(step, epoch, {"x": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "ep')  # cut by a kill
    with Monitor(tmp_path, 2, 0, tensorboard=False):
        pass
    assert [(r["step"], r["epoch"]) for r in rows(tmp_path)] == [(1, 0), (2, 0)]


def test_monitor_without_tensorboard_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"rvc-mlx\[train\]"):
        Monitor(tmp_path, 0, 0, tensorboard=True)
    with Monitor(tmp_path, 0, 0) as monitor:
        monitor.clip(1, "voice/0", np.zeros(10), RATE)
    assert not (tmp_path / "events").exists()


def test_picture_has_low_bands_at_the_bottom():
    mel = np.full((3, 4), -20.0)
    mel[1, 0] = 0.0  # the lowest band of the middle frame
    image = draw_mel(mel)
    assert image.shape == (4, 3, 3)
    assert image[3, 1].sum() > 600
    assert image.sum() == image[3, 1].sum() + 11 * image[0, 0].sum()


# Validation -------------------------------------------------------------------------


def test_validation_depends_on_the_weights_alone(data):
    validator = Validator(CONFIG, batches_of(data), 3, similarity=False)
    assert len(validator) == 3
    first, again = validator(tiny_generator()), validator(tiny_generator())
    other = validator(tiny_generator(1))
    assert first.values == again.values
    assert first.values[SCORE] != other.values[SCORE]
    clip = first.clips[0]
    assert clip.output.shape == clip.target.shape
    assert (
        clip.output_mel.shape == clip.target_mel.shape == (len(clip.output) // HOP, 16)
    )
    distances = [np.abs(c.output_mel - c.target_mel).mean() for c in first.clips]
    np.testing.assert_allclose(first.values[SCORE], np.mean(distances), rtol=1e-6)


def test_validation_takes_each_recording_once(data):
    twice = TrainingSet(data, CONFIG, 4, 0).batches(0)  # topped up to 8 of 5
    assert len(Validator(CONFIG, twice, 100, similarity=False)) == 5


def test_validation_compares_pitch(data, monkeypatch):
    """Scores are 0 for the recording's own pitch, and right for another one's."""
    batch = next(iter(batches_of(data)))
    wanted = batch.pitchf[0, : batch.lengths[0]].astype(np.float64)
    heard = wanted.copy()
    monkeypatch.setattr(
        "rvc_mlx.training.validation.estimate_clip_f0", lambda *_: heard
    )
    validator = Validator(CONFIG, batches_of(data), 1, object(), similarity=False)
    generator = tiny_generator()
    values = validator(generator).values
    assert values["validation/f0_cents"] == 0
    assert values["validation/f0_voicing_error"] == 0
    heard[:] = wanted * 2 ** (30 / 1200)
    heard[np.flatnonzero(wanted > 0)[:7]] = 0
    values = validator(generator).values
    np.testing.assert_allclose(values["validation/f0_cents"], 30)
    np.testing.assert_allclose(values["validation/f0_voicing_error"], 7 / len(wanted))


def test_validation_compares_speakers_where_it_can(data, monkeypatch):
    class Encoder:
        def __init__(self, device, verbose):
            assert device == "cpu"

        def embed_utterance(self, wave):
            level = np.sqrt(np.mean(wave**2))  # outputs are quiet, recordings loud
            return np.array([1.0, 0.0]) if level > 0.2 else np.array([0.6, 0.8])

    module = type(sys)("resemblyzer")
    module.VoiceEncoder = Encoder
    module.preprocess_wav = lambda wave, rate: wave
    module.__spec__ = object()
    monkeypatch.setitem(sys.modules, "resemblyzer", module)
    quiet = tiny_generator()
    quiet["dec.conv_post.weight"] = 0.1 * quiet["dec.conv_post.weight"]
    values = Validator(CONFIG, batches_of(data), 2)(quiet).values
    np.testing.assert_allclose(values["validation/similarity"], 0.6)


# The run ----------------------------------------------------------------------------


def test_run_logs_and_keeps_what_it_says(uninterrupted):
    folder, _, _ = uninterrupted
    epochs, steps = max(EPOCHS, KILLS), 4
    log = rows(folder)
    assert [r["step"] for r in log if "train/loss_g" in r] == list(
        range(2, epochs * steps + 1, 2)
    )
    ends = [r for r in log if SCORE in r]
    assert [r["epoch"] for r in ends] == list(range(1, epochs + 1))
    rates = [r["learning_rate"] for r in ends]
    np.testing.assert_allclose(rates, 1e-4 * 0.999875 ** np.arange(epochs), rtol=1e-12)
    losses = [r["train/loss_mel"] for r in log if "train/loss_mel" in r]
    assert np.isfinite(losses).all()
    names = {path.name for path in folder.iterdir()}
    kept = {e * steps for e in range(1, epochs + 1) if e % 2 == 0 or e == epochs}
    for step in kept:
        assert {f"G_{step}.pth", f"D_{step}.pth"} <= names
        assert f"v_{step // steps}e_{step}s.safetensors" in names
    assert sum(re.fullmatch(r"G_\d+\.pth", name) is not None for name in names) == len(
        kept
    )
    best = 1 + int(np.argmin([r[SCORE] for r in ends]))
    voice = read_checkpoint(folder / "v.pth")
    assert voice.metadata["epoch"] == best
    assert not [name for name in names if "partial" in name]


def test_killed_runs_end_in_the_same_bits(uninterrupted, folder):
    """``kill -9`` at random moments, every other one while the state is written."""
    whole, first, spent = uninterrupted
    epochs = max(EPOCHS, KILLS)
    rng = np.random.default_rng(int(os.environ.get("RVC_MLX_KILLS_SEED", "0")))
    killed = 0
    for kill in range(KILLS):
        child = spawn(folder, "--resume", epochs=epochs)
        wait = rng.uniform(0.2 * first, first + 1.5 * (spent - first) / KILLS)
        deadline = time.monotonic() + wait
        writing = kill % 2 == 1
        while child.poll() is None and time.monotonic() < deadline + 60 * writing:
            if writing and any(folder.glob(f".{Path(STATE).stem}.*.partial*")):
                break
            time.sleep(0.001)
        if child.poll() is None:
            child.kill()
            killed += 1
        child.communicate()
    assert killed > 0
    child = spawn(folder, "--resume", epochs=epochs)
    _, err = child.communicate()
    assert child.returncode == 0, err
    expected, found = results(whole), results(folder)
    assert found.keys() == expected.keys()
    different = [name for name in expected if found[name] != expected[name]]
    assert different == []
    assert rows(folder) == rows(whole)


def test_stopped_run_saves_and_goes_on(uninterrupted, folder):
    whole, _, _ = uninterrupted
    epochs = max(EPOCHS, KILLS)
    child = spawn(folder, "--save-steps", "0", epochs=epochs)
    log = folder / "metrics.jsonl"
    while child.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.01)
    assert not (folder / STATE).exists()
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "interrupted" in err.splitlines()[-1]
    assert read_checkpoint(folder / STATE).metadata["progress"]["step"] > 0
    child = spawn(folder, "--resume", epochs=epochs)
    _, err = child.communicate()
    assert child.returncode == 0, err
    assert (folder / STATE).read_bytes() == (whole / STATE).read_bytes()


def test_full_disk_is_one_line_and_loses_nothing(uninterrupted, folder):
    whole, _, _ = uninterrupted
    epochs = max(EPOCHS, KILLS)
    assert main(words(folder, epochs=1)) == 0
    before = (folder / STATE).read_bytes()
    limit = len(before) // 2  # the networks' own files are smaller
    child = spawn(
        folder, "--resume", epochs=epochs,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    _, err = child.communicate()
    assert child.returncode == 1
    lines = err.splitlines()
    assert "Traceback" not in err
    assert re.match(r"rvc-mlx: .*state\.safetensors: .*unchanged; make room", lines[-1])
    assert (folder / STATE).read_bytes() == before
    assert not list(folder.glob(".*partial*"))
    child = spawn(folder, "--resume", epochs=epochs)
    _, err = child.communicate()
    assert child.returncode == 0, err
    assert (folder / STATE).read_bytes() == (whole / STATE).read_bytes()


@pytest.mark.parametrize("name", ["loss_kl", "grad_norm_g"])
def test_diverged_run_is_one_line_and_keeps_the_last_good_state(
    folder, monkeypatch, capsys, name
):
    assert main(words(folder, epochs=1)) == 0
    before = (folder / STATE).read_bytes()
    step = TrainStep.advance

    def poisoned(*arguments):
        return step(*arguments) | {name: mx.array(float("nan"))}

    monkeypatch.setattr(TrainStep, "advance", poisoned)
    capsys.readouterr()
    assert main(words(folder, "--resume", epochs=2)) == 1
    [line] = [x for x in capsys.readouterr().err.splitlines() if "rvc-mlx:" in x]
    assert f"{name} nan" in line
    assert "epoch 2, step 5" in line
    assert (folder / STATE).read_bytes() == before


@pytest.mark.parametrize(("late", "size"), [(False, 1), (True, 2)])
def test_a_device_that_fails_is_told_with_the_step(
    folder, monkeypatch, capsys, late, size
):
    more = ("--batch-size", size)
    assert main(words(folder, *more, epochs=1)) == 0
    before = (folder / STATE).read_bytes()

    class Failing:
        def __array__(self, *_, **__):
            raise RuntimeError("CUDNN_STATUS_EXECUTION_FAILED")

    def failing(*_):
        return {"loss_g": Failing()} if late else np.array(Failing())

    monkeypatch.setattr(TrainStep, "advance", failing)
    capsys.readouterr()
    assert main(words(folder, *more, "--resume", epochs=2)) == 1
    [line] = [x for x in capsys.readouterr().err.splitlines() if "rvc-mlx:" in x]
    first = {1: 5, 2: 3}[size]
    assert f"epoch 2, step {first} or the one before: the device failed (CUD" in line
    assert ("; a --batch-size below 2 may do" in line) == (size == 2)
    assert (folder / STATE).read_bytes() == before


def test_networks_that_are_not_finite_are_not_saved(folder, monkeypatch, capsys):
    monkeypatch.setattr(
        TrainStep,
        "state",
        property(lambda self: {"g.a": mx.array([1.0, float("inf")])}),
    )
    assert main(words(folder, epochs=1)) == 1
    assert "not finite; nothing was saved yet" in capsys.readouterr().err
    assert not (folder / STATE).exists()


def idle_steps(monkeypatch):
    """Steps that change nothing, for what is not about them."""
    losses = {"loss_g": mx.array(1.0), "grad_norm_g": mx.array(1.0)}
    monkeypatch.setattr(TrainStep, "advance", lambda *_: losses)


def scripted_scores(monkeypatch, scores):
    """Validation results in this order, whatever is validated."""
    idle_steps(monkeypatch)
    left = iter(scores)
    monkeypatch.setattr(Validator, "__call__", lambda *_: Scores({SCORE: next(left)}))


def test_early_stop_keeps_the_best_epoch(folder, monkeypatch, capsys):
    scripted_scores(monkeypatch, [3.0, 1.0, 2.0, 1.0])
    assert main(words(folder, "--patience", 2, epochs=10)) == 0
    assert "4 epochs, 16 steps, best epoch 2, stopped early" in capsys.readouterr().out
    assert read_checkpoint(folder / "v.pth").metadata["epoch"] == 2
    assert read_checkpoint(folder / "G_best.pth").metadata["iteration"] == 2
    state = (folder / STATE).read_bytes()
    assert main(words(folder, "--resume", "--patience", 2, epochs=10)) == 0
    assert (folder / STATE).read_bytes() == state


def test_patience_is_counted_across_a_continued_run(folder, monkeypatch, capsys):
    scripted_scores(monkeypatch, [1.0, 2.0, 2.0])
    assert main(words(folder, "--patience", 2, epochs=2)) == 0
    assert main(words(folder, "--resume", "--patience", 2, epochs=10)) == 0
    assert "3 epochs, 12 steps, best epoch 1, stopped" in capsys.readouterr().out


def test_without_hold_out_the_voice_is_the_latest(folder, monkeypatch):
    idle_steps(monkeypatch)
    more = ("--hold-out", 0, "--save-only-latest")
    assert main(words(folder, *more, epochs=1)) == 0
    names = {path.name for path in folder.iterdir()}
    assert {"v.pth", "v.safetensors", STATE} <= names
    assert not [n for n in names if n.startswith(("G_", "D_", "v_"))]
    assert all(SCORE not in row for row in rows(folder))


def test_run_that_is_there_is_neither_lost_nor_mixed_up(folder, monkeypatch, capsys):
    idle_steps(monkeypatch)
    assert main(words(folder, epochs=1)) == 0
    state = (folder / STATE).read_bytes()

    def fails(*more):
        capsys.readouterr()
        assert main(words(folder, *more, epochs=2)) == 1
        assert (folder / STATE).read_bytes() == state
        [line] = [x for x in capsys.readouterr().err.splitlines() if "rvc-mlx:" in x]
        return line

    assert "--resume" in fails()
    assert "(seed: saved 1234, given 7)" in fails("--resume", "--seed", 7)
    assert json.loads((folder / "run.json").read_text())["options"]["seed"] == 1234
    assert "missing.pth" in fails("--force", "-pg", folder / "missing.pth")
    lines = (folder / filelist.FILELIST).read_text()
    (folder / filelist.FILELIST).write_text(lines.splitlines()[0] + "\n" + lines)
    assert "(data: saved " in fails("--resume")
    (folder / filelist.FILELIST).write_text(lines)
    assert main(words(folder, "--force", "--seed", 7, epochs=1)) == 0
    assert (folder / STATE).read_bytes() != state


def test_continued_run_keeps_what_it_was_started_with(folder, monkeypatch):
    """Only the folder has to be named again."""
    idle_steps(monkeypatch)
    assert main(words(folder, "--learning-rate", "0.0002", epochs=1)) == 0
    again = ["train", "-o", folder, "--resume", "--device", "cpu", "--index", "no"]
    again += ["--epochs", "2", "--similarity", "no", "--tensorboard", "no"]
    assert main([str(word) for word in again]) == 0
    assert [r["learning_rate"] for r in rows(folder) if SCORE in r] == pytest.approx(
        [2e-4, 2e-4 * 0.999875]
    )
    assert (folder / "v_2e_8s.pth").exists()


def test_run_from_before_there_was_an_option_goes_on_without_it(
    folder, monkeypatch, capsys
):
    idle_steps(monkeypatch)
    assert main(words(folder, epochs=1)) == 0
    plan = json.loads((folder / "run.json").read_text())
    state = read_checkpoint(folder / STATE)
    identity = state.metadata["identity"]
    for options, config in (
        (plan["options"], plan["config"]),
        (identity, identity["config"]),
    ):
        del options["adversarial_from"], config["prior_share"], config["mel_scales"]
        del config["content_weight"]
    (folder / "run.json").write_text(json.dumps(plan))
    progress = dict(state.metadata["progress"])
    del progress["format"]
    tensors = {name: np.array(value) for name, value in state.tensors.items()}
    write_state(folder / STATE, tensors, Progress(**progress), identity)
    again = words(folder, "--resume", epochs=2)
    assert main([*again, "--adversarial-from", "4", "--prior-share", "0.5"]) == 1
    told = capsys.readouterr().err
    assert "(adversarial_from: saved 0, given 4; config.prior_share: saved 0.0" in told
    assert main(again) == 0


def test_missing_pretrained_file_says_what_is_expected(folder, capsys):
    assert main(words(folder, "-pg", "nowhere.pth", epochs=1)) == 1
    told = capsys.readouterr().err
    assert "nowhere.pth: there is no such file; expected a voice or model file" in told


def test_learning_rate_falls_as_it_is_told(folder, monkeypatch):
    idle_steps(monkeypatch)
    assert main(words(folder, "--decay", "0.5", epochs=2)) == 0
    assert [r["learning_rate"] for r in rows(folder) if SCORE in r] == pytest.approx(
        [1e-4, 5e-5]
    )


def test_discriminator_joins_in_when_it_is_told(folder, monkeypatch):
    judged = []
    losses = {"loss_g": mx.array(1.0), "grad_norm_g": mx.array(1.0)}

    def idle(step, inputs, now):
        judged.append(now)
        return losses

    left = iter([1.0, 3.0, 2.0])
    monkeypatch.setattr(Validator, "__call__", lambda *_: Scores({SCORE: next(left)}))
    monkeypatch.setattr(TrainStep, "advance", idle)
    assert main(words(folder, "--adversarial-from", 6, epochs=2)) == 0
    assert main(words(folder, "--resume", epochs=3)) == 0
    assert judged == 6 * [False] + 6 * [True]
    # The first epoch's score is the best, but of another kind.
    assert read_checkpoint(folder / "v.pth").metadata["epoch"] == 3


def test_nothing_stops_before_the_discriminator_joins_in(folder, monkeypatch, capsys):
    scripted_scores(monkeypatch, [1.0, 2.0, 2.0, 3.0, 4.0, 4.0, 4.0])
    more = ("--adversarial-from", 12, "--patience", 2)
    assert main(words(folder, *more, epochs=10)) == 0
    told = capsys.readouterr().out
    assert "6 epochs, 24 steps, best epoch 4, stopped early" in told


def test_prior_share_is_kept(folder, monkeypatch, capsys):
    idle_steps(monkeypatch)
    assert main(words(folder, "--prior-share", 0.5, epochs=1)) == 0
    assert main(words(folder, "--resume", epochs=2)) == 0
    kept = json.loads((folder / "run.json").read_text())
    assert kept["config"]["prior_share"] == 0.5
    assert main(words(folder, "--resume", "--prior-share", 2, epochs=3)) == 1
    assert "prior_share is 2.0; expected 0 to 1" in capsys.readouterr().err


def test_multiscale_mel_is_kept(folder, monkeypatch, capsys):
    idle_steps(monkeypatch)
    assert main(words(folder, "--multiscale-mel", epochs=1)) == 1
    assert "a segment has 256 samples; a mel loss" in capsys.readouterr().err
    sizes = json.loads((folder / "sizes.json").read_text())
    sizes["segment_frames"] *= 5
    (folder / "sizes.json").write_text(json.dumps(sizes))
    assert main(words(folder, "--multiscale-mel", epochs=1)) == 0
    assert main(words(folder, "--resume", epochs=2)) == 0
    kept = json.loads((folder / "run.json").read_text())
    assert kept["config"]["mel_scales"] == [list(scale) for scale in MEL_SCALES]
    assert main(words(folder, "--resume", "--multiscale-mel", "no", epochs=3)) == 1
    assert "config.mel_scales: saved [[5, 32], " in capsys.readouterr().err


def test_content_weight_takes_the_encoder_that_made_the_features(
    folder, small_models, capsys
):
    more = ("--content-weight", 3, "--encoder", small_models.encoder)
    assert main(words(folder, *more, epochs=1)) == 0
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    heard = [row["train/loss_content"] for row in rows if "train/loss_content" in row]
    assert heard
    assert np.isfinite(heard).all()
    kept = json.loads((folder / "run.json").read_text())
    assert kept["config"]["content_weight"] == 3
    unknown = "does not tell which encoder made its features"
    assert unknown in capsys.readouterr().out

    encoder = file_in_folder(small_models.encoder)
    made_by = {"encoder_sha256": hash_file(encoder), "version": "v1"}
    (folder / "features.json").write_text(json.dumps({"features": made_by}))
    assert main(words(folder, "--force", *more, epochs=1)) == 0
    assert unknown not in capsys.readouterr().out
    made_by["encoder_sha256"] = "0" * 64
    (folder / "features.json").write_text(json.dumps({"features": made_by}))
    assert main(words(folder, "--resume", *more[2:], epochs=2)) == 1
    told = capsys.readouterr().err
    assert "another encoder made the features" in told
    assert "pass it with --encoder" in told


def test_folder_without_data_is_one_line(tmp_path, capsys):
    assert main(["train", "-o", str(tmp_path / "new"), "--index", "no"]) == 1
    assert "no prepared data" in capsys.readouterr().err


def test_missing_faiss_is_told_before_the_training(folder, monkeypatch, capsys):
    monkeypatch.setattr(
        "rvc_mlx.training.assembly.importlib.util.find_spec", lambda name: None
    )
    assert main(words(folder, "--index", "yes")) == 1
    assert "rvc-mlx[train]" in capsys.readouterr().err
    assert not (folder / STATE).exists()


def test_voice_starts_from_public_checkpoints(folder, tmp_path):
    generator, discriminator = initial(CONFIG, 99)
    paths = tmp_path / "G.pth", tmp_path / "D.pth"
    write_training_checkpoint(paths[0], to_torch(generator), 1, 1e-4, MODEL)
    write_training_checkpoint(paths[1], to_torch(discriminator), 1, 1e-4)
    more = ("--learning-rate", 0, "-pg", paths[0], "-pd", paths[1])
    assert main(words(folder, *more, epochs=1)) == 0
    state = read_checkpoint(folder / STATE).tensors
    for part, network in (("g", generator), ("d", discriminator)):
        for name, value in network.items():
            np.testing.assert_array_equal(state[f"{part}.{name}"], np.array(value))
    told = json.loads((folder / "run.json").read_text())["started_from"]
    assert told == [f"{path.name} (sha256 {hash_file(path)})" for path in paths]
    again = ["train", "-o", folder, "--resume", "--index", "no", "--device", "cpu"]
    again += ["--epochs", 1, "--similarity", "no", "--tensorboard", "no"]
    assert main([str(word) for word in again]) == 0
    assert json.loads((folder / "run.json").read_text())["started_from"] == told


def test_run_that_saved_nothing_begins_again_from_the_same_weights(
    folder, tmp_path, monkeypatch, capsys
):
    def stop(*_):
        raise KeyboardInterrupt

    idle_steps(monkeypatch)
    path = tmp_path / "G.pth"
    generator, _ = initial(CONFIG, 99)
    write_training_checkpoint(path, to_torch(generator), 1, 1e-4, MODEL)
    again = ("--resume", "-pg", path)
    with monkeypatch.context() as killed:
        killed.setattr(TrainStep, "advance", stop)
        for more in (again, again):  # a first start may be with --resume too
            assert main(words(folder, *more, epochs=1)) == 130
    before = (folder / "run.json").read_bytes()
    capsys.readouterr()
    assert main(words(folder, "--resume", epochs=1)) == 1
    told = capsys.readouterr().err
    assert "was started from G.pth (sha256 " in told
    assert "not random weights, and has saved nothing yet; give the same" in told
    assert (folder / "run.json").read_bytes() == before
    assert main(words(folder, *again, epochs=1)) == 0
    assert (folder / "run.json").read_bytes() == before
    assert main(words(folder, "--resume", epochs=2)) == 0  # from its state


def test_train_command_from_recordings_to_a_voice_that_converts(
    tmp_path, small_models, speech, home, capsys
):
    """Recordings in, voice and index out, and both load for a conversion."""
    pytest.importorskip("faiss")
    import rvc_mlx

    source = tmp_path / "recordings"
    source.mkdir()
    for i in range(2):
        soundfile.write(source / f"{i}.wav", speech[i * 8000 : i * 8000 + 14400], 16000)
    (source / "broken.wav").write_bytes(b"RIFF")
    rate = 8000  # the lowest that recordings are prepared for
    model = dataclasses.replace(
        MODEL,
        spec_channels=81,
        upsample_rates=(10, 2, 2, 2),
        upsample_kernel_sizes=(20, 4, 4, 4),
        sample_rate=rate,
        feature_size=48,
    )
    sizes = dataclasses.replace(CONFIG, model=model, n_fft=160, hop=80, win=160)
    (tmp_path / "sizes.json").write_text(json.dumps(dataclasses.asdict(sizes)))
    out = tmp_path / "run"
    command = [
        *("train", source, "-o", out, "--config", tmp_path / "sizes.json"),
        *(
            "--encoder",
            small_models.encoder,
            "--rmvpe",
            small_models.rmvpe,
            "--cpu-cores",
            1,
        ),
        *("--total-epoch", 1, "-bs", 2, "--device", "cpu", "--similarity", "no"),
        *("--hold_out", 0.5, "--model-author", "me", "--index-algorithm", "Auto"),
    ]
    assert main([str(word) for word in command]) == 0
    assert f"voice {out / 'run.pth'}: 1 epochs" in capsys.readouterr().out
    log = rows(out)
    assert "validation/f0_voicing_error" in log[-1]
    assert "broken.wav" in (out / "report.txt").read_text()
    assert read_checkpoint(out / "run.pth").metadata["author"] == "me"
    assert (out / "events").exists()
    converter = rvc_mlx.load(
        out / "run.safetensors", out / "run.index",
        encoder=small_models.encoder, rmvpe=small_models.rmvpe, device="cpu", precision="f32",
    )  # fmt: skip
    result = converter.convert(speech[:8000], 16000)
    assert len(result.audio) == rate // 2
    assert np.isfinite(result.audio).all()
    assert main(["index", str(out), "-o", str(tmp_path / "again.index")]) == 0
    assert (tmp_path / "again.index").read_bytes() == (out / "run.index").read_bytes()


@pytest.mark.parametrize(
    "more",
    [("-sr", "44k"), ("--epochs", "0"), ("--epochs", "x"), ("--precision", "f8")],
)
def test_misuse_ends_with_code_2(tmp_path, more, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "-o", str(tmp_path), *more])
    assert stop.value.code == 2


# Several processes ------------------------------------------------------------------


def test_alone_nothing_is_averaged():
    gradients = {"b": mx.array([1.0]), "a": mx.array([[2.0]])}
    assert mean_gradients(gradients, None) == gradients
    assert frame_share(mx.array(3), None).item() == 1
    assert agree([1.5], None) == [1.5]


class Fake:
    """A group of two ranks with equal gradients, for the layout of the messages."""

    def size(self):
        return 2


@pytest.mark.parametrize("bucket", [1, 100, 10**9])
def test_buckets_give_every_gradient_back(monkeypatch, bucket):
    messages = []

    def all_sum(x, group):
        messages.append(x.nbytes)
        return 2 * x

    monkeypatch.setattr(mx.distributed, "all_sum", all_sum)
    rng = np.random.default_rng(0)
    shapes = {"c": (3, 2), "a": (5,), "d": (), "b": (2, 2, 2), "half": (4,)}
    gradients = {
        name: mx.array(rng.standard_normal(shape), mx.float32)
        for name, shape in shapes.items()
    }
    gradients["half"] = gradients["half"].astype(mx.float16)
    means = mean_gradients(gradients, Fake(), bucket)
    assert list(means) == list(gradients)
    for name, value in gradients.items():
        assert means[name].dtype == value.dtype
        np.testing.assert_array_equal(np.array(means[name]), np.array(value))
    assert len(messages) == {1: 5, 100: 2, 10**9: 2}[bucket]
    assert sum(messages) == sum(value.nbytes for value in gradients.values())


RANK = """
import sys
import mlx.core as mx, numpy as np
from test_training_run import one_step
from rvc_mlx.training.distributed import connect
mx.set_default_device(getattr(mx, sys.argv[3]))
group = connect()
assert group.size() == 2
state = one_step(sys.argv[1], 2, group, float(sys.argv[4]))
np.savez(f"{sys.argv[2]}/{group.rank()}.npz", **state)
"""


def one_step(folder, batch_size, group=None, prior_share=0.0):
    """State after a step without learning rate; moments are then the gradients."""
    from rvc_mlx.training.step import AdamW

    # cuBLAS wants rows of 16 bytes, which every public voice has.
    config = WIDE if mx.default_device() == mx.Device(mx.gpu) else CONFIG
    config = dataclasses.replace(config, prior_share=prior_share)
    rank, world = (group.rank(), group.size()) if group else (0, 1)
    batches = TrainingSet(folder, config, batch_size, 0).batches(0, 0, rank, world)
    batch = next(iter(batches))
    generator = tiny_generator(config=config)
    _, discriminator = initial(config, 0)
    step = TrainStep(
        config, generator, discriminator, optimizer=AdamW(0.0), world=group
    )
    losses = step(batch, draw(config, batch, 0, 0, first=rank * batch_size))
    state = step.state
    mx.eval(state, losses)
    return {name: np.array(value) for name, value in state.items()}


TWO_GPUS = mx.cuda.is_available() and mx.device_count(mx.gpu) > 1


@pytest.mark.parametrize(
    ("kind", "backend", "error", "prior_share"),
    [
        ("cpu", "ring", 3e-5, 0.0),
        ("cpu", "ring", 3e-5, 0.25),  # one item of the first process
        pytest.param(
            *("gpu", "nccl", 5e-3, 0.0),  # TF32
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not TWO_GPUS, reason="needs two NVIDIA GPUs"),
            ],
        ),
    ],
)
def test_two_processes_have_the_gradients_of_the_joint_batch(
    data, tmp_path, kind, backend, error, prior_share
):
    """Clips differ in length, so means over frames differ between the ranks."""
    script = tmp_path / "rank.py"
    script.write_text(PATHS + RANK)
    done = launch(script, data, tmp_path, kind, prior_share, backend=backend)
    assert done.returncode == 0, done.stderr
    device = mx.default_device()
    mx.set_default_device(getattr(mx, kind))
    joint = one_step(data, 4, prior_share=prior_share)
    mx.set_default_device(device)
    results = [tmp_path / f"{rank}.npz" for rank in range(2)]
    assert all(path.exists() for path in results), done.stdout + done.stderr
    ranks = [np.load(path) for path in results]
    moments = {k: v for k, v in joint.items() if k.startswith(("g_mean.", "d_mean."))}
    largest = dict.fromkeys("gd", 0.0)
    for name, wanted in moments.items():
        largest[name[0]] = max(largest[name[0]], np.abs(wanted).max(initial=0))
    compared = 0
    for name, wanted in joint.items():
        first, second = (rank[name] for rank in ranks)
        np.testing.assert_array_equal(first, second)  # ranks never drift apart
        if name in moments:
            # Sums over a batch are taken in another order; some gradients are 0 but for
            # rounding (the bias of keys: softmax does not see it).
            scale = np.abs(wanted).max(initial=0)
            allowed = error * (scale + 1e-2 * largest[name[0]])
            assert np.abs(first - wanted).max(initial=0) <= allowed, name
            compared += scale > 1e-3 * largest[name[0]]
    assert compared > 100


def test_train_command_runs_as_two_processes(folder, data, tmp_path, capsys):
    """As one process with twice the batch, as far as float32 goes."""
    alone = Path(shutil.copytree(data, tmp_path / "alone"))
    more = ("--batch-size", 2)
    for start in ((), ("--resume",)):
        done = launch("-m", "rvc_mlx", *words(folder, *start, epochs=1 + len(start)))
        assert done.returncode == 0, done.stderr
    assert main(words(alone, *more, epochs=2)) == 0
    found, wanted = ([r for r in rows(f) if SCORE in r] for f in (folder, alone))
    assert [r["step"] for r in found] == [r["step"] for r in wanted] == [2, 4]
    for mine, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(mine[SCORE], other[SCORE], rtol=1e-3)
    assert main(words(folder, "--resume", epochs=3)) == 1
    assert "(processes: saved 2, given 1)" in capsys.readouterr().err
