"""Preparing recordings for training: slices, clips, features, filelist, batches, index."""

import dataclasses
import inspect
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.signal
import soundfile

from rvc_mlx.audio import resample
from rvc_mlx.training import files, slicer
from rvc_mlx.training.clips import (
    count_frames,
    cut_clip,
    linear_spectrogram,
    load_features,
    load_sound,
)
from rvc_mlx.training.cutting import PreprocessOptions
from rvc_mlx.training.dataset import BUCKETS, TrainingSet, prefetch
from rvc_mlx.training.features import extract_features
from rvc_mlx.training.filelist import Entry, hold_out, read_filelist, write_filelist
from rvc_mlx.training.preprocess import clip_names, preprocess
from rvc_mlx.training.presets import preset
from rvc_mlx.training.recordings import plan_recordings

ROOT = Path(__file__).parents[1]
RATE = 32000
HOP = RATE // 100
WIDTH = 6


def voice_like(rng, seconds, rate=RATE, level=0.3):
    """Noise bursts with gaps, float32."""
    n = round(seconds * rate)
    envelope = np.repeat(rng.uniform(0.2, 1, n // 800 + 1), 800)[:n]
    return (level * envelope * rng.uniform(-1, 1, n)).astype(np.float32)


def with_gaps(rng, *seconds, rate=RATE):
    """Speech, silence, speech ... of these lengths."""
    parts = [
        voice_like(rng, s, rate)
        if i % 2 == 0
        else np.zeros(round(s * rate), np.float32)
        for i, s in enumerate(seconds)
    ]
    return np.concatenate(parts)


def write(path, x, rate=RATE, subtype="FLOAT"):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, x, rate, subtype=subtype)
    return path


def tree(folder):
    """Every file of a folder with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != files.LOCK
    }


def kinds(report):
    return Counter(problem.kind for problem in report.problems)


class Encoder:
    """Stands in for ``loading.Encoder``: the same shapes, cheap."""

    def __init__(self, path, width=WIDTH):
        self.path, self.width, self.calls = path, width, 0
        path.write_bytes(b"weights")

    def encode(self, audio, version):
        self.calls += 1
        frames = (len(audio) - 400) // 320 + 1
        window = np.lib.stride_tricks.sliding_window_view(audio, 400)[::320][:frames]
        return np.abs(window[:, : self.width]).astype(np.float32) + (version == "v1")


class Pitch:
    """Stands in for ``loading.PitchNet``: every frame at one pitch."""

    frames_multiple = 32
    config = SimpleNamespace(n_mels=32)

    def __init__(self, path):
        self.path = path
        path.write_bytes(b"pitch")

    def salience(self, mel):
        result = np.zeros((*mel.shape[:2], 360), np.float32)
        result[..., 180] = 0.9
        return result


@pytest.fixture
def nets(tmp_path):
    return Encoder(tmp_path / "encoder.bin"), Pitch(tmp_path / "rmvpe.bin")


@pytest.fixture
def config():
    return preset("small", "v2", True, 3, feature_size=WIDTH)


@pytest.fixture
def recordings(tmp_path, rng):
    """Two speakers, three recordings."""
    write(tmp_path / "in/0/a.wav", with_gaps(rng, 4.0, 0.7, 2.5))
    write(tmp_path / "in/0/b.flac", voice_like(rng, 1.2, 44100), 44100, "PCM_16")
    write(tmp_path / "in/2/c.wav", voice_like(rng, 7.0))
    return tmp_path / "in"


@pytest.fixture
def prepared(tmp_path, recordings, nets):
    """A folder that is ready to train on."""
    folder = tmp_path / "voice"
    preprocess([recordings], folder, RATE, workers=1)
    extract_features(folder, *nets, "v2")
    write_filelist(folder, seed=3)
    return folder


# Slicing ------------------------------------------------------------------------------


def plain_loudness(x, rate):
    """Root mean square of centred frames, filled up with zeros, one by one."""
    hop = round(0.015 * rate)
    window = min(round(0.4 * rate), 4 * hop)
    padded = np.pad(np.asarray(x, np.float64), window // 2)
    starts = range(0, len(padded) - window + 1, hop)
    return np.array([np.sqrt(np.mean(padded[t : t + window] ** 2)) for t in starts])


def plain_slices(rms, samples, rate):
    """The slicer as its authors state it: one scan over the frames."""
    hop = round(0.015 * rate)
    length, interval, kept = (round(s * rate / hop) for s in (1.5, 0.4, 0.5))
    tags, start, clip_start = [], None, 0
    for i, value in enumerate(rms):
        if value < 10 ** (-42 / 20):
            start = i if start is None else start
            continue
        if start is None:
            continue
        leading = start == 0 and i > kept
        middle = i - start >= interval and i - clip_start >= length
        if leading or middle:
            first = start + np.argmin(rms[start : start + kept + 1])
            last = i - kept + np.argmin(rms[i - kept : i + 1])
            if i - start <= kept:
                left = right = start + np.argmin(rms[start : i + 1])
            elif i - start <= 2 * kept:
                both = i - kept + np.argmin(rms[i - kept : start + kept + 1])
                left, right = min(first, both), max(last, both)
            else:
                left, right = first, last
            tags.append((0 if start == 0 else left, right))
            clip_start = right
        start = None
    if start is not None and len(rms) - start >= interval:
        end = min(len(rms), start + kept)
        tags.append((start + np.argmin(rms[start : end + 1]), len(rms)))
    edges = [0, *(edge for tag in tags for edge in tag), len(rms)]
    bounds = [min(int(edge) * hop, samples) for edge in edges]
    pairs = zip(bounds[::2], bounds[1::2], strict=True)
    return [(start, stop) for start, stop in pairs if stop > start]


@pytest.mark.parametrize("rate", [32000, 40000, 48000])
def test_slicer_is_the_algorithm_stated_plainly(rate):
    rng = np.random.default_rng(rate)
    limits = np.array([0, 1, 25, 26, 27, 28, 32, 33, 34, 65, 66, 67, 98, 99, 100, 101])
    counts = Counter()
    for _ in range(400):
        runs = limits[rng.integers(len(limits), size=rng.integers(1, 10))]
        levels = [(0.001, 0.0079), (0.008, 0.1)]  # both sides of -42 dB, 0.00794
        first = rng.integers(2)
        rms = np.concatenate(
            [rng.uniform(*levels[(first + i) % 2], n) for i, n in enumerate(runs)]
            + [rng.uniform(0.001, 0.1, 1)]
        )
        samples = (len(rms) - 1) * round(0.015 * rate) + int(rng.integers(99))
        expected = plain_slices(rms, samples, rate)
        assert slicer.find_slices(rms, samples, rate) == expected
        counts[len(expected)] += 1
    assert len(counts) >= 4  # the data do exercise it


@pytest.mark.parametrize("rate", [32000, 40000, 48000])
def test_slices_of_a_recording(rate, rng):
    x = with_gaps(rng, 2.0, 0.7, 3.0, 0.2, 2.0, 1.5, 1.0, rate=rate)
    x += 1e-4 * rng.standard_normal(len(x)).astype(np.float32)
    loudness = slicer.frame_loudness(x, rate)
    assert loudness.shape == (len(x) // slicer.hop_length(rate) + 1,)
    np.testing.assert_allclose(loudness, plain_loudness(x, rate), rtol=1e-9)
    slices = slicer.find_slices(loudness, len(x), rate)
    assert slices == plain_slices(loudness, len(x), rate)
    seconds = np.array(slices) / rate
    # Cut in the silences of 0.7 s and 1.5 s, not in the one of 0.2 s.
    assert [2.0 < seconds[0][1] < 2.7, 7.9 < seconds[1][1] < 9.4] == [True, True]
    assert len(slices) == 3


def test_loudness_of_blocks_is_that_of_the_whole(rng):
    x = rng.standard_normal(10_007).astype(np.float32)
    whole = slicer.frame_loudness(x, RATE)
    frames = slicer.FrameLoudness(RATE)
    for block in np.split(x, [1, 2, 479, 480, 481, 5000]):
        frames.add(block)
    np.testing.assert_allclose(frames.frames(), whole, rtol=1e-12)
    assert slicer.frame_loudness(x[:0], RATE).tolist() == [0.0]


@pytest.mark.parametrize("samples", [1, 100, 3 * RATE, 105_600, 105_601, 10 * RATE + 7])
def test_clips_cover_a_stretch_and_overlap(samples):
    clips = slicer.cut_clips(50, 50 + samples, RATE, 3.0, 0.3)
    assert clips[0][0] == 50
    assert clips[-1][1] == 50 + samples
    for (a, b), (c, d) in itertools.pairwise(clips):
        assert b - a == 3 * RATE
        assert b - c == pytest.approx(0.3 * RATE, abs=1)
        assert d - c > 0.6 * RATE - 2
    assert clips[-1][1] - clips[-1][0] <= 3.3 * RATE


# Clips --------------------------------------------------------------------------------


def test_clip_is_filtered_normalised_and_resampled(tmp_path, rng):
    x = voice_like(rng, 2.0) + np.float32(0.2)
    write(tmp_path / "a.wav", x)
    preprocess([tmp_path / "a.wav"], tmp_path / "out", RATE, workers=1)
    b, a = scipy.signal.butter(5, 48, "high", fs=RATE)
    y = scipy.signal.lfilter(b, a, x.astype(np.float64))  # forwards only
    y = 0.9 * 0.75 * y / np.abs(y).max() + 0.25 * y
    found, rate = soundfile.read(tmp_path / "out/sliced_audios/0_0_0.wav")
    assert rate == RATE
    np.testing.assert_allclose(found, y, atol=2e-7)
    low, rate = soundfile.read(tmp_path / "out/sliced_audios_16k/0_0_0.wav")
    assert rate == 16000
    expected = resample(found.astype(np.float32), RATE, 16000)
    np.testing.assert_array_equal(low.astype(np.float32), expected)


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
def test_clips_are_float32_whatever_the_recording(tmp_path, rng, subtype):
    write(tmp_path / "a.wav", voice_like(rng, 1.0), RATE, subtype)
    preprocess([tmp_path / "a.wav"], tmp_path / "out", RATE, workers=1)
    for path in (tmp_path / "out").rglob("*.wav"):
        info = soundfile.info(path)
        assert (info.subtype, info.channels) == ("FLOAT", 1)
        assert np.abs(soundfile.read(path)[0]).max() < 1


def test_options_change_the_clips(tmp_path, rng):
    source = write(tmp_path / "a.wav", with_gaps(rng, 4.0, 0.8, 9.0))
    x = soundfile.read(source, dtype="float32")[0]

    def clips(**options):
        out = tmp_path / "out"
        preprocess([source], out, RATE, PreprocessOptions(**options), workers=1)
        return [
            soundfile.read(out / f"sliced_audios/{n}.wav")[0] for n in clip_names(out)
        ]

    [whole] = clips(cut="whole", high_pass=False, normalization="none")
    np.testing.assert_array_equal(whole, x)
    fixed = clips(cut="fixed", high_pass=False, normalization="none", clip_seconds=2.0)
    assert [len(c) for c in fixed[:-1]] == [2 * RATE] * (len(fixed) - 1)
    silence = clips(high_pass=False, normalization="none")
    assert sum(map(len, silence)) != sum(map(len, fixed))
    peaks = [np.abs(c).max() for c in clips(normalization="file")]
    assert len({round(p, 4) for p in peaks}) > 1
    with pytest.raises(ValueError, match="cut is 'never'; expected one of silence"):
        PreprocessOptions(cut="never")


@pytest.mark.filterwarnings("ignore:overflow")
def test_everything_unusable_is_in_the_report(tmp_path, rng):
    folder = tmp_path / "in"
    good = voice_like(rng, 1.0)
    write(folder / "good.wav", good)
    write(folder / "short.wav", good[:1600])
    write(folder / "brief.wav", good[: round(0.3 * RATE)])
    write(folder / "silent.wav", np.zeros(RATE))
    write(folder / "hum.wav", 1e-3 * good)
    write(folder / "loud.wav", 20 * good)
    write(folder / "clipped.wav", np.clip(8 * good, -1, 1), subtype="PCM_16")
    write(folder / "nan.wav", np.where(np.arange(RATE) == 500, np.nan, good))
    write(folder / "inf.wav", np.where(np.arange(RATE) == 500, np.inf, good))
    (folder / "empty.wav").touch()
    (folder / "text.wav").write_text("not audio at all" * 99)
    (folder / "cut.wav").write_bytes((folder / "good.wav").read_bytes()[:30000])
    (folder / "notes.txt").write_text("hello")
    (folder / "sub").mkdir()
    (folder / "sub/.hidden.wav").write_text("x")
    out = tmp_path / "out"
    report = preprocess([folder], out, RATE, workers=1)
    assert kinds(report) == {
        "unreadable": 5, "silent": 2, "too short": 1, "too loud": 1,
        "clipped": 1, "padded": 1, "not a sound file": 2,
    }  # fmt: skip
    used = {Path(p.source).name for p in report.problems if p.used}
    assert used == {"clipped.wav", "brief.wav"}
    # Every file that was found is a clip or a problem, or both.
    plan = json.loads((out / "recordings.json").read_text())["recordings"]
    with_clips = {name.rpartition("_")[0] for name in clip_names(out)}
    named = {Path(r["source"]).name for r in plan if r["name"] in with_clips}
    problems = {Path(p.source).name for p in report.problems}
    everything = {path.name for path in folder.rglob("*") if path.is_file()}
    assert named | problems == everything
    assert named == {"good.wav", "brief.wav", "clipped.wav"}
    saved = json.loads((out / "report.json").read_text())
    assert saved["clips"] == report.clips == 3
    assert len(saved["problems"]) == len(report.problems) == 13
    text = (out / "report.txt").read_text()
    assert text == report.table()
    for name in problems:
        assert name in text
    assert "not a finite number" in text


def test_brief_recording_is_filled_up_to_half_a_second(tmp_path, rng):
    write(tmp_path / "a.wav", voice_like(rng, 0.2))
    report = preprocess([tmp_path / "a.wav"], tmp_path / "out", RATE, workers=1)
    x, _ = soundfile.read(tmp_path / "out/sliced_audios/0_0_0.wav")
    assert len(x) == RATE // 2
    assert not x[round(0.2 * RATE) :].any()
    assert report.speakers[0].seconds == 0.5


def test_nothing_usable_is_an_error_with_a_report(tmp_path):
    write(tmp_path / "in/a.wav", np.zeros(RATE))
    with pytest.raises(ValueError, match=r"none of 1 recordings can be trained on"):
        preprocess([tmp_path / "in"], tmp_path / "out", RATE, workers=1)
    assert "digital silence" in (tmp_path / "out/report.txt").read_text()
    with pytest.raises(ValueError, match="sample rate of 44050 Hz; expected"):
        preprocess([tmp_path / "in"], tmp_path / "out", 44050, workers=1)


# Recordings and speakers --------------------------------------------------------------


def test_speakers_of_numbered_folders_and_of_several_inputs(tmp_path, rng):
    for name in ("in/0/a.wav", "in/7/x/b.wav", "in/root.wav", "other/c.wav"):
        write(tmp_path / name, voice_like(rng, 0.6))
    out = tmp_path / "out"
    out.mkdir()

    def speakers(*inputs):
        plan = plan_recordings([tmp_path / item for item in inputs], out)
        found = {(Path(r.source).name, r.speaker) for r in plan.recordings}
        return found, plan.speakers

    assert speakers("in") == (
        {("a.wav", 0), ("b.wav", 7), ("root.wav", 0)},
        {0: "in/0", 7: "in/7"},
    )
    assert speakers("other", "in/7") == (
        {("c.wav", 0), ("b.wav", 1)},
        {0: "other", 1: "7"},
    )
    write(tmp_path / "in/.trash/d.wav", voice_like(rng, 0.6))
    write(tmp_path / "in/7/.trash/d.wav", voice_like(rng, 0.6))
    (tmp_path / "in/results").mkdir()
    inside = plan_recordings([tmp_path / "in"], tmp_path / "in/results")
    assert len(inside.recordings) == 3
    (tmp_path / "in/results/recordings.json").unlink()
    (tmp_path / "in/results").rmdir()
    (tmp_path / "in/noise").mkdir()
    with pytest.raises(
        ValueError, match=r"numbered sub-folders .* and others \(noise\)"
    ):
        speakers("in")
    with pytest.raises(ValueError, match="given twice"):
        speakers("other", "other")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        speakers("nothing")
    with pytest.raises(FileNotFoundError, match="no sound files found"):
        speakers("in/noise")


def test_results_inside_the_recordings_are_not_recordings(tmp_path, rng):
    write(tmp_path / "in/a.wav", voice_like(rng, 0.6))
    for _ in range(2):
        report = preprocess([tmp_path / "in"], tmp_path / "in/out", RATE, workers=1)
        assert (report.recordings, report.problems) == (1, [])
    with pytest.raises(ValueError, match="recordings and results in one folder"):
        preprocess([tmp_path / "in"], tmp_path / "in", RATE, workers=1)


def test_added_and_removed_recordings_leave_the_others(tmp_path, rng, nets):
    source, out = tmp_path / "in", tmp_path / "out"
    for name in "bdf":
        write(source / f"{name}.wav", voice_like(rng, 0.6))
    preprocess([source], out, RATE, workers=1)
    extract_features(out, *nets, "v2")
    before = {p.name: p.stat().st_mtime_ns for p in (out / "sliced_audios").iterdir()}
    write(source / "a.wav", voice_like(rng, 0.6))
    (source / "d.wav").unlink()
    preprocess([source], out, RATE, workers=1)
    after = {p.name: p.stat().st_mtime_ns for p in (out / "sliced_audios").iterdir()}
    assert set(after) == {"0_0_0.wav", "0_2_0.wav", "0_3_0.wav"}
    assert all(after[name] == before[name] for name in ("0_0_0.wav", "0_2_0.wav"))
    left = {path.name for path in (out / "extracted").iterdir()}
    assert left == {"0_0_0.npy", "0_2_0.npy"}
    # A changed recording loses what was made of it.
    write(source / "f.wav", voice_like(rng, 0.7))
    preprocess([source], out, RATE, workers=1)
    assert {path.name for path in (out / "f0").iterdir()} == {"0_0_0.wav.npy"}


# Resuming -----------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import scipy.io.wavfile, scipy.signal  # once, not in every child
from rvc_mlx.training.features import extract_features
from rvc_mlx.training.filelist import write_filelist
from rvc_mlx.training.preprocess import preprocess

WIDTH = {width}
{fakes}

def run():
    preprocess([{source!r}], folder, 32000, workers=1)
    nets = Encoder(folder.parent / "encoder.bin"), Pitch(folder.parent / "rmvpe.bin")
    extract_features(folder, *nets, "v2")
    write_filelist(folder, seed=3)

def replace(self, target):
    event()  # written, not yet in its place
    rename(self, target)
    event()  # in its place

def event():
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

folder = Path({folder!r})
rename, Path.replace = Path.replace, replace
for left in {moments}:
    child = os.fork()
    if child == 0:
        run()
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_kill_at_any_write_and_resume_gives_the_same_bytes(
    tmp_path, recordings, prepared
):
    """Runs in one folder, killed after so many writes, until one may end."""
    folder = tmp_path / "killed"
    moments = [1, 2, 3, *np.random.default_rng(0).integers(4, 18, 20).tolist(), 9999]
    code = KILLED.format(
        width=WIDTH,
        fakes=inspect.getsource(Encoder) + inspect.getsource(Pitch),
        moments=moments, folder=str(folder), source=str(recordings),
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    ends = list(map(int, done.stdout.split()))
    assert ends[-1:] == [0], done.stderr
    assert set(ends[:-1]) <= {0, -signal.SIGKILL}, done.stderr
    assert ends.count(-signal.SIGKILL) >= 20
    assert tree(folder) == tree(prepared)


def test_killed_program_ends_its_workers_and_resumes(tmp_path, rng):
    """SIGKILL to the program only: its worker processes notice."""
    for i in range(8):
        write(tmp_path / f"in/{i}.wav", voice_like(rng, 4.0))
    script = tmp_path / "script.py"
    script.write_text(f"""if True:
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        from rvc_mlx.training.preprocess import preprocess
        if __name__ == "__main__":
            tell = lambda *done: print(*done, flush=True)
            preprocess([{str(tmp_path / "in")!r}], sys.argv[1], 32000, workers=2,
                       progress=tell)
        """)

    command = [sys.executable, script, tmp_path / "out"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout.readline() == "1 8\n"
        run.kill()
        run.communicate(
            timeout=60
        )  # ends when the workers have, who hold the pipe, too
        assert run.returncode == -signal.SIGKILL
    preprocess([tmp_path / "in"], tmp_path / "out", RATE, workers=1)
    told = []
    preprocess(
        [tmp_path / "in"], tmp_path / "whole", RATE, workers=2,
        progress=lambda *done: told.append(done),
    )  # fmt: skip
    assert told == [(i, 8) for i in range(1, 9)]
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_worker_that_dies_or_fails_ends_the_run():
    from rvc_mlx.training.preprocess import _done

    with pytest.raises(ChildProcessError, match="run again with fewer workers"):
        list(_done(os._exit, [3, 3], 2))
    with pytest.raises(FileNotFoundError):
        list(_done(os.stat, ["/nowhere/a", "/nowhere/b"], 2))


def test_second_run_does_nothing_and_new_options_do_all(tmp_path, recordings, nets):
    out = tmp_path / "out"
    told = []
    preprocess([recordings], out, RATE, workers=1, progress=lambda *d: told.append(d))
    assert told == [(1, 3), (2, 3), (3, 3)]
    extract_features(out, *nets, "v2")
    before, calls = tree(out), nets[0].calls
    told.clear()
    preprocess([recordings], out, RATE, workers=1, progress=lambda *d: told.append(d))
    extract_features(out, *nets, "v2")
    assert told == []
    assert tree(out) == before
    assert nets[0].calls == calls
    preprocess([recordings], out, 40000, workers=1)
    assert soundfile.info(out / "sliced_audios/0_0_0.wav").samplerate == 40000
    assert not any((out / "extracted").iterdir())  # they belonged to other clips
    fresh = tmp_path / "fresh"
    preprocess([recordings], fresh, 40000, workers=1)
    same = ("sliced_audios", "sliced_audios_16k", "done", "report.json")
    assert {k: v for k, v in tree(out).items() if k.startswith(same)} == {
        k: v for k, v in tree(fresh).items() if k.startswith(same)
    }


def test_lost_clip_is_made_again(tmp_path, recordings):
    out = tmp_path / "out"
    preprocess([recordings], out, RATE, workers=1)
    before = tree(out)
    (out / "sliced_audios/0_0_0.wav").write_bytes(b"")  # the machine crashed
    for place in (out, out / "sliced_audios"):
        (place / ".rvc-mlx-0123456789ab.part").touch()
    preprocess([recordings], out, RATE, workers=1)
    assert tree(out) == before


def test_two_runs_do_not_share_a_folder(tmp_path, recordings):
    out = tmp_path / "out"
    out.mkdir()
    with (
        files.locked(out),
        pytest.raises(OSError, match="another run is working in this folder"),
    ):
        preprocess([recordings], out, RATE, workers=1)


# Disk and permissions -----------------------------------------------------------------


SMALL_DISK = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
try:
    {call}
except OSError as error:
    print(error, end="")
else:
    raise AssertionError("it fits")
"""


def error_on_small_disk(size, setup, call):
    """The message of a call's OSError where no file can grow beyond ``size``.

    In a process of its own: the limit would hold for the output of pytest, too.
    """
    code = setup + SMALL_DISK.format(size=size, call=call)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (100_000, "cannot write temporary audio"),
        # The samples of the second recording fit, those and the header of a wav do not.
        (4 * RATE + 20, r"sliced_audios/0_1_0\.wav: writing failed \(File too large\)"),
    ],
)
def test_full_disk_is_one_line_and_leaves_nothing_half_written(
    tmp_path, rng, size, message
):
    write(tmp_path / "in/a.wav", voice_like(rng, 0.5))
    write(tmp_path / "in/b.wav", voice_like(rng, 1.0))
    options = PreprocessOptions(cut="whole")
    out, whole = tmp_path / "out", tmp_path / "whole"
    preprocess([tmp_path / "in"], whole, RATE, options, workers=1)
    told = error_on_small_disk(
        size,
        "from functools import partial\n"
        "from rvc_mlx.training import cutting\n"
        "from rvc_mlx.training.preprocess import PreprocessOptions, preprocess\n"
        "cutting.Spool = partial(cutting.Spool, memory=0)",  # as of a long recording
        f"preprocess([{str(tmp_path / 'in')!r}], {str(out)!r}, {RATE}, {options}, "
        "workers=1)",
    )
    assert re.search(message, told)
    assert "\n" not in told
    assert not list(out.rglob("*.part"))
    assert [path.name for path in (out / "done").iterdir()] == ["0_0.json"]
    preprocess([tmp_path / "in"], out, RATE, options, workers=1)
    assert tree(out) == tree(whole)


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.npy"
    files.write_array(path, np.arange(9))
    before = path.read_bytes()
    told = error_on_small_disk(
        4096,
        "import pathlib, numpy as np\nfrom rvc_mlx.training import files",
        f"files.write_array(pathlib.Path({str(path)!r}), np.zeros(10_000))",
    )
    assert re.search(r"a\.npy: writing failed \(File too large\)", told)
    assert tree(tmp_path) == {"a.npy": before}


def test_folder_that_cannot_be_made(tmp_path, recordings):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"the folder cannot be made \(Not a directory\)"):
        preprocess([recordings], tmp_path / "file/out", RATE, workers=1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_that_may_not_be_written(tmp_path, recordings):
    out = tmp_path / "out"
    preprocess([recordings], out, RATE, workers=1)
    out.chmod(0o500)
    (out / files.LOCK).chmod(0o400)
    with pytest.raises(OSError, match="cannot be written"):
        preprocess([recordings], out, RATE, workers=1)
    out.chmod(0o700)


# Features and pitch -------------------------------------------------------------------


def test_features_and_pitch_of_real_networks(tmp_path, small_converter, small_models):
    """Shapes of SPEC: [(n - 400) // 320 + 1, C] and n // 160 + 1, v1 unlike v2."""
    from rvc_mlx.pitch import quantize_f0

    encoder, net = small_converter.encoder, small_converter.pitch_net
    out = tmp_path / "out"
    preprocess([small_models.speech], out, RATE, workers=1)
    report = extract_features(out, encoder, net, "v2")
    assert report.problems == []
    assert report.clips == len(clip_names(out))
    for name in clip_names(out):
        samples = soundfile.info(out / f"sliced_audios_16k/{name}.wav").frames
        features = np.load(out / f"extracted/{name}.npy")
        coarse = np.load(out / f"f0/{name}.wav.npy")
        hertz = np.load(out / f"f0_voiced/{name}.wav.npy")
        width = encoder.config.feature_size("v2")
        assert features.shape == ((samples - 400) // 320 + 1, width)
        assert features.dtype == np.float32
        assert coarse.shape == hertz.shape == (samples // 160 + 1,)
        assert hertz.dtype == np.float64
        assert coarse.dtype == np.int32
        np.testing.assert_array_equal(coarse, quantize_f0(hertz))
    v2 = np.load(out / f"extracted/{name}.npy")
    pitch_before = (out / f"f0/{name}.wav.npy").stat().st_mtime_ns
    extract_features(out, encoder, net, "v1")
    v1 = np.load(out / f"extracted/{name}.npy")
    assert v1.shape == (len(v2), encoder.config.feature_size("v1"))
    assert (out / f"f0/{name}.wav.npy").stat().st_mtime_ns == pitch_before


def test_other_encoder_or_threshold_makes_its_own_part_again(prepared, nets):
    encoder, net = nets

    def ages(folder):
        return {p.name: p.stat().st_mtime_ns for p in (prepared / folder).iterdir()}

    features, pitch = ages("extracted"), ages("f0")
    extract_features(prepared, encoder, net, "v2", threshold=0.5)
    assert ages("extracted") == features
    assert all(ages("f0")[name] != age for name, age in pitch.items())
    pitch = ages("f0")
    encoder.path.write_bytes(b"other weights")
    extract_features(prepared, encoder, net, "v2", threshold=0.5)
    assert all(ages("extracted")[name] != age for name, age in features.items())
    assert ages("f0") == pitch
    calls = encoder.calls
    extract_features(prepared, encoder, None, "v2")  # a voice without F0
    assert ages("f0") == pitch
    assert encoder.calls == calls


def test_features_that_are_not_finite_are_left_out_and_told(prepared, nets):
    net = nets[1]
    victim = clip_names(prepared)[1]
    good = Encoder.encode

    def bad(self, audio, version):
        result = good(self, audio, version)
        if self.calls == 3:  # silence is first
            result[2] = np.nan
        return result

    broken = type("Broken", (Encoder,), {"encode": bad})(prepared.parent / "other.bin")
    broken.path.write_bytes(b"broken")
    report = extract_features(prepared, broken, net, "v2")
    assert [(p.source, p.kind) for p in report.problems] == [(victim, "not finite")]
    assert json.loads((prepared / "features.json").read_text())["problems"]
    listed = {entry.wave.stem for entry in write_filelist(prepared)}
    assert listed == {*clip_names(prepared), "mute32000"} - {victim}


def test_mute_entries(prepared):
    mute = prepared / "mute"
    wave, rate = soundfile.read(mute / "mute32000.wav")
    assert (len(wave), rate) == (3 * RATE, RATE)
    assert not wave.any()
    assert soundfile.info(mute / "mute32000.wav").subtype == "FLOAT"
    coarse = np.load(mute / "f0/mute.wav.npy")
    hertz = np.load(mute / "f0_voiced/mute.wav.npy")
    assert coarse.shape == hertz.shape == (301,)
    assert (coarse == 1).all()  # 0 is for what fills up a batch
    assert not hertz.any()
    assert hertz.dtype == np.float64
    assert np.load(mute / "extracted/mute.npy").shape == (149, WIDTH)


def test_extraction_wants_finished_clips(tmp_path, nets):
    with pytest.raises(FileNotFoundError, match="run preprocess first"):
        extract_features(tmp_path, *nets, "v2")


# Filelist -----------------------------------------------------------------------------


def test_filelist_lists_every_clip_once_and_silence_for_each_speaker(prepared):
    lines = (prepared / "filelist.txt").read_text().splitlines()
    entries = read_filelist(prepared / "filelist.txt")
    assert len(lines) == len(entries)
    found = Counter(entry.wave.stem for entry in entries)
    assert found == Counter([*clip_names(prepared), *["mute32000"] * 4])
    mutes = [entry.speaker for entry in entries if entry.recording == "mute"]
    assert sorted(mutes) == [0, 0, 2, 2]
    for line, entry in zip(lines, entries, strict=True):
        assert line.count("|") == 4
        assert all(path.is_file() for path in entry.files)
        if entry.recording != "mute":
            stem = entry.wave.stem
            assert stem.startswith(f"{entry.speaker}_")
            assert line == (
                f"sliced_audios/{stem}.wav|extracted/{stem}.npy|f0/{stem}.wav.npy|"
                f"f0_voiced/{stem}.wav.npy|{entry.speaker}"
            )
    text = (prepared / "filelist.txt").read_text()
    assert write_filelist(prepared, seed=3) == entries
    assert (prepared / "filelist.txt").read_text() == text
    write_filelist(prepared, seed=4)
    assert (prepared / "filelist.txt").read_text() != text
    write_filelist(prepared, f0=False, mutes=0)
    assert (prepared / "filelist.txt").read_text().splitlines()[0].count("|") == 2
    assert read_filelist(prepared / "filelist.txt")[0].f0 is None


def test_filelist_wants_all_features(prepared):
    (prepared / "f0" / f"{clip_names(prepared)[0]}.wav.npy").unlink()
    with pytest.raises(FileNotFoundError, match="run the extraction again"):
        write_filelist(prepared)


def test_filelist_of_another_trainer_and_wrong_lines(tmp_path):
    path = tmp_path / "filelist.txt"
    path.write_text("/x/a.wav|/x/a.npy|/x/c.npy|/x/f.npy|3\n\nb.wav|b.npy|0\n")
    first, second = read_filelist(path)
    x = Path("/x")
    assert first == Entry(x / "a.wav", x / "a.npy", x / "c.npy", x / "f.npy", 3)
    assert second == Entry(tmp_path / "b.wav", tmp_path / "b.npy", None, None, 0)
    for text, message in [("a|b|c|1", "line 1: expected wave"), ("\n", "empty list")]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_filelist(path)


def entry(stem, speaker=0):
    return Entry(Path(f"{stem}.wav"), Path(f"{stem}.npy"), None, None, speaker)


def test_hold_out_never_splits_a_recording():
    entries = [entry(f"0_{i}_{j}") for i in range(20) for j in range(4)]
    entries += [entry("mute32000")] * 2
    train, aside = hold_out(entries, 0.1, seed=1)
    assert Counter([*train, *aside]) == Counter(entries)
    assert {e.recording for e in train} & {e.recording for e in aside} == set()
    assert len(aside) == 8
    assert entry("mute32000") in train
    assert hold_out(entries, 0.1, seed=1) == (train, aside)
    assert hold_out(entries, 0.1, seed=2) != (train, aside)
    assert hold_out(entries, 0.0) == (entries, [])
    assert len(hold_out(entries[:8], 0.001)[1]) == 4
    # One recording: its end, and nothing that overlaps it.
    one = [entry(f"0_0_{j}") for j in (2, 11, 0, 1, 10)]
    assert hold_out(one, 0.2) == ([one[0], one[2], one[3]], [one[1]])
    assert hold_out(one[:2], 0.5) == (one[:2], [])
    # Other features of a clip go where it goes.
    both = [e for clip in one for e in (clip, replace(clip, features=Path("x.y.npy")))]
    train, aside = hold_out(both, 0.2)
    assert ([e.wave.stem for e in train], [e.wave.stem for e in aside]) == (
        ["0_0_2", "0_0_2", "0_0_0", "0_0_0", "0_0_1", "0_0_1"],
        ["0_0_11", "0_0_11"],
    )


# Batches ------------------------------------------------------------------------------


def make_clip(folder, stem, frames, speaker=0, extra=(0, 0, 0)):
    """Files of a clip; ``extra`` frames of features, pitch and sound beyond a common T."""
    rng = np.random.default_rng(zlib.crc32(stem.encode()))
    more, pitch, samples = extra
    feature_frames = (frames + more + 1) // 2
    wave = write(folder / f"{stem}.wav", voice_like(rng, (frames + samples) / 100))
    paths = [folder / f"{stem}{end}.npy" for end in ("", "_c", "_f")]
    features = rng.standard_normal((feature_frames, WIDTH)).astype(np.float32)
    np.save(paths[0], features)
    np.save(paths[1], rng.integers(1, 256, frames + pitch))
    np.save(paths[2], rng.uniform(50, 500, frames + pitch))
    return Entry(wave, *paths, speaker)


def load_clip(entry, config):
    frames = count_frames(entry, config)
    sound, features = load_sound(entry, config), load_features(entry)
    return cut_clip(sound, features, 0, frames, config.hop)


def test_clip_arrays_are_cut_to_the_shortest(tmp_path, config):
    for extra in [(0, 1, 0), (2, 1, 0), (2, 0, 3), (0, 1, 5), (4, 0, 1)]:
        item = make_clip(tmp_path, "a", 60, extra=extra)
        clip = load_clip(item, config)
        assert count_frames(item, config) == 60
        assert clip.phone.shape == (60, WIDTH)
        assert clip.pitch.shape == clip.pitchf.shape == (60,)
        assert clip.spec.shape == (60, config.n_fft // 2 + 1)
        assert clip.wave.shape == (60 * HOP,)
        features = np.load(item.features)
        np.testing.assert_array_equal(clip.phone[::2], features[:30])  # 50 to 100 Hz
        np.testing.assert_array_equal(clip.phone[1::2], features[:30])
        np.testing.assert_array_equal(clip.pitch, np.load(item.f0_coarse)[:60])


def test_prepared_clip_loses_at_most_two_frames(prepared, config):
    for item in read_filelist(prepared / "filelist.txt"):
        frames = soundfile.info(item.wave).frames // HOP
        assert frames - 2 <= count_frames(item, config) <= frames


def test_spectrogram_is_the_original_s(rng):
    torch = pytest.importorskip("torch")
    wave = voice_like(rng, 0.7)[:-37]
    for n_fft, hop in [(1024, 320), (2048, 400), (2048, 480)]:
        x = torch.from_numpy(wave)[None, None]
        x = torch.nn.functional.pad(x, ((n_fft - hop) // 2,) * 2, mode="reflect")[0]
        expected = torch.stft(
            x, n_fft, hop, n_fft, torch.hann_window(n_fft), center=False,
            return_complex=True,
        )  # fmt: skip
        expected = (expected.real**2 + expected.imag**2 + 1e-6).sqrt()[0].T.numpy()
        found = linear_spectrogram(wave, n_fft, hop, n_fft)
        assert found.shape == expected.shape == (len(wave) // hop, n_fft // 2 + 1)
        assert found.dtype == np.float32
        # Float32 sums of n_fft terms up to 1 in two orders.
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    silence = linear_spectrogram(np.zeros(6400, np.float32), 1024, 320, 1024)
    np.testing.assert_allclose(silence, 1e-3, rtol=1e-6)


def test_16_bit_clip_of_another_trainer_has_its_true_loudness(tmp_path, config):
    item = make_clip(tmp_path, "a", 60)
    x, _ = soundfile.read(item.wave, dtype="float32")
    write(item.wave, x, RATE, "PCM_16")
    clip = load_clip(item, config)
    np.testing.assert_allclose(clip.wave, x[: len(clip.wave)], atol=1e-4)


def many_clips(folder):
    lengths = [
        48,
        3,
        50,
        51,
        99,
        130,
        180,
        298,
        298,
        297,
        301,
        330,
        299,
        650,
        900,
        901,
        1900,
    ]
    return [make_clip(folder, f"0_{i}_0", n, i % 3) for i, n in enumerate(lengths)]


def test_no_clip_is_lost_neither_short_nor_long(tmp_path, config):
    """The original drops float32 clips below 0.75 s and above 6.75 s without a word."""
    entries = many_clips(tmp_path)
    data = TrainingSet(tmp_path, config, 4, 1, entries=entries)
    covered = {item.wave: [] for item in entries}
    seen = Counter()
    for batch in data.batches(0):
        T = batch.phone.shape[1]
        assert T in BUCKETS
        assert batch.lengths.max() <= T
        seen.update(batch.lengths.tolist())
    for item in data.items:
        assert item.frames <= 900
        covered[item.entry.wave] += range(item.first, item.first + item.frames)
        assert seen[item.frames]
    for clip in entries:
        assert covered[clip.wave] == list(range(count_frames(clip, config)))
    assert sum(len(places) for places in data.buckets.values()) == len(data.items) == 20
    used = np.concatenate([places for _, places in data.plan(0)])
    assert set(used) == set(range(20))
    # Topped up to whole batches, and not by more than that.
    for bucket, places in data.buckets.items():
        count = sum(len(p) for b, p in data.plan(0) if b == bucket)
        assert count == -(-len(places) // 4) * 4
        repeats = Counter(np.concatenate([p for b, p in data.plan(0) if b == bucket]))
        assert max(repeats.values()) - min(repeats.values()) <= 1
    assert data.steps_per_epoch == len(list(data.batches(0)))


def test_batch_holds_the_clips_and_zeros(tmp_path, config):
    entries = many_clips(tmp_path)
    data = TrainingSet(tmp_path, config, 3, 1, entries=entries)
    hop, bins = config.hop, config.n_fft // 2 + 1
    for (T, places), batch in zip(data.plan(2), data.batches(2), strict=True):
        assert batch.phone.shape == (3, T, WIDTH)
        assert batch.spec.shape == (3, T, bins)
        assert batch.wave.shape == (3, T * hop)
        assert batch.pitch.shape == batch.pitchf.shape == (3, T)
        types = [a.dtype for a in dataclasses.astuple(batch)]
        f, i = np.dtype(np.float32), np.dtype(np.int32)
        assert types == [f, i, i, f, f, f, i]
        for row, place in enumerate(places):
            item = data.items[place]
            clip = load_clip(item.entry, config)
            n, part = item.frames, slice(item.first, item.first + item.frames)
            assert batch.lengths[row] == n
            assert batch.sid[row] == item.entry.speaker
            for name in ("phone", "pitch", "pitchf", "spec"):
                array = getattr(batch, name)[row]
                np.testing.assert_array_equal(array[:n], getattr(clip, name)[part])
                assert not array[n:].any()
            wave = clip.wave[part.start * hop : part.stop * hop]
            np.testing.assert_array_equal(batch.wave[row, : n * hop], wave)
            assert not batch.wave[row, n * hop :].any()


def same(one, other):
    for a, b in zip(dataclasses.astuple(one), dataclasses.astuple(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_batches_depend_on_seed_and_epoch_only(tmp_path, config):
    entries = many_clips(tmp_path)

    def data(seed, **options):
        return TrainingSet(tmp_path, config, 2, seed, entries=entries, **options)

    def order(seed, epoch):
        return [places.tolist() for _, places in data(seed).plan(epoch)]

    assert order(1, 5) == order(1, 5)
    assert order(1, 5) != order(1, 6)
    assert order(1, 5) != order(2, 5)
    whole = list(data(1).batches(5))
    one = data(1, threads=1, cache_bytes=0)
    for a, b in zip(whole, one.batches(5), strict=True):
        same(a, b)
    for start in (0, 1, 4, len(whole) - 1, len(whole)):  # resuming inside an epoch
        rest = list(one.batches(5, start))
        assert len(rest) == len(whole) - start
        for a, b in zip(whole[start:], rest, strict=True):
            same(a, b)


def test_start_loads_nothing_before_it(tmp_path, config, monkeypatch):
    data = TrainingSet(tmp_path, config, 2, 1, entries=many_clips(tmp_path))
    loaded = []
    monkeypatch.setattr(data, "_load", lambda item: loaded.append(item))
    assert list(data.batches(0, data.steps())) == []
    assert loaded == []


def test_replicas_share_the_joint_batch(tmp_path, config):
    entries = many_clips(tmp_path)
    joint = TrainingSet(tmp_path, config, 6, 1, entries=entries)
    split = TrainingSet(tmp_path, config, 2, 1, entries=entries)
    assert split.steps(3) == joint.steps()
    parts = [list(split.batches(4, 1, rank, 3)) for rank in range(3)]
    for whole, *replicas in zip(joint.batches(4, 1), *parts, strict=True):
        for field in dataclasses.fields(whole):
            rows = [getattr(replica, field.name) for replica in replicas]
            np.testing.assert_array_equal(
                np.concatenate(rows), getattr(whole, field.name)
            )


def test_memory_of_loaded_clips_is_bounded(tmp_path, config, monkeypatch):
    entries = many_clips(tmp_path)
    limit = 3_000_000
    data = TrainingSet(tmp_path, config, 2, 1, entries=entries, cache_bytes=limit)
    list(data.batches(0))
    kept = sum(loaded.nbytes for loaded in data._kept.values())
    assert 0 < kept <= limit
    assert len(data._kept) < 2 * len(entries)


def test_files_that_change_meanwhile_are_told(tmp_path, config):
    entry = make_clip(tmp_path, "0_0_0", 80)
    data = TrainingSet(tmp_path, config, 1, 1, entries=[entry])
    x, _ = soundfile.read(entry.wave)
    write(entry.wave, x[: 60 * HOP])
    with pytest.raises(ValueError, match=r"0_0_0\.wav: changed meanwhile: 60 frames"):
        next(data.batches(0))
    data = TrainingSet(tmp_path, config, 1, 1, entries=[entry])
    entry.wave.write_bytes(b"RIFF")
    with pytest.raises(ValueError, match=r"0_0_0\.wav: not a readable sound file"):
        next(data.batches(0))
    entry.wave.unlink()
    with pytest.raises(FileNotFoundError, match="run preprocess again"):
        next(data.batches(0))


def test_clips_that_differ_in_features_alone_share_their_sound(tmp_path, config):
    own = make_clip(tmp_path, "0_0_0", 80)
    other = tmp_path / "0_0_0.other.npy"
    np.save(other, 1 + np.load(own.features))
    entries = [own, dataclasses.replace(own, features=other)]
    data = TrainingSet(tmp_path, config, 2, 1, entries=entries)
    batch = next(data.batches(0))
    np.testing.assert_array_equal(*batch.wave)
    np.testing.assert_array_equal(*batch.spec)
    assert (np.abs(np.diff(batch.phone[:, :80], axis=0) ** 2 - 1) < 1e-5).all()
    assert len(data._kept) == 3


def test_voice_without_pitch(prepared):
    write_filelist(prepared, f0=False)
    config = preset("small", "v2", False, 3, feature_size=WIDTH)
    data = TrainingSet(prepared, config, 2, 1)
    batch = next(data.batches(0))
    assert batch.pitch is None
    assert batch.pitchf is None
    with_f0 = preset("small", "v2", True, 3, feature_size=WIDTH)
    with pytest.raises(ValueError, match="listed without pitch"):
        TrainingSet(prepared, with_f0, 2, 1)


def test_data_that_do_not_fit_are_refused(tmp_path, config):
    item = make_clip(tmp_path, "a", 60, 7)
    with pytest.raises(ValueError, match="speaker 7, but the voice has 3 speakers"):
        TrainingSet(tmp_path, config, 2, 1, entries=[item])
    item = dataclasses.replace(item, speaker=0)
    cases = [
        (item.features, np.zeros((30, 768), np.float32), "takes .F, 6."),
        (item.features, np.full((30, WIDTH), np.nan, np.float32), "not finite"),
        (item.f0_coarse, np.zeros(60, int), r"coarse pitch 0\.\.0; expected 1\.\.255"),
        (item.features, np.zeros((0, WIDTH), np.float32), "shorter than one frame"),
    ]
    for path, array, message in cases:
        before = np.load(path)
        np.save(path, array)
        with pytest.raises(ValueError, match=message):
            list(TrainingSet(tmp_path, config, 2, 1, entries=[item]).batches(0))
        np.save(path, before)
    item.features.write_bytes(b"\x93NUMPY garbage")
    with pytest.raises(ValueError, match=r"not a readable \.npy file"):
        TrainingSet(tmp_path, config, 2, 1, entries=[item])
    item.wave.unlink()
    np.save(item.features, np.zeros((30, WIDTH), np.float32))
    with pytest.raises(FileNotFoundError, match="run preprocess again"):
        TrainingSet(tmp_path, config, 2, 1, entries=[item])
    item = make_clip(tmp_path, "b", 60)
    write(item.wave, np.zeros(60 * 400), 40000)
    with pytest.raises(ValueError, match="40000 Hz, but the voice has 32000 Hz"):
        TrainingSet(tmp_path, config, 2, 1, entries=[item])


def test_prefetch_gives_everything_in_order_and_ahead():
    made = []

    def numbers():
        for i in range(20):
            made.append(i)
            yield i

    batches = prefetch(numbers(), 3)
    assert next(batches) == 0
    until = time.monotonic() + 5
    while len(made) < 5 and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == 5  # one taken, three wait, one in hand
    assert list(batches) == list(range(1, 20))


def test_prefetch_passes_errors_on_and_ends_when_left():
    ended = []

    def numbers(count):
        try:
            yield from range(count)
            raise ValueError("file: damaged")
        finally:
            ended.append(True)

    batches = prefetch(numbers(2), 1)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(ValueError, match="file: damaged"):
        next(batches)
    batches = prefetch(numbers(10**9), 2)
    assert next(batches) == 0
    batches.close()
    assert len(ended) == 2


# Index --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "cells"),
    [(1, 1), (38, 1), (39, 1), (78, 2), (10_000, 256), (200_000, 5128), (10**6, 16000)],
)
def test_number_of_cells(rows, cells):
    from rvc_mlx.training.index import count_cells

    assert count_cells(rows) == cells == max(1, min(int(16 * rows**0.5), rows // 39))


@pytest.mark.parametrize(("rows", "width"), [(5, 8), (900, 24)])
def test_index_is_read_back_with_faiss_s_neighbours(tmp_path, rng, rows, width):
    faiss = pytest.importorskip("faiss")
    from rvc_mlx.retrieval import nearest, read_index
    from rvc_mlx.training.index import build_index, count_cells

    features = rng.standard_normal((rows, width)).astype(np.float32)
    path = build_index(features, tmp_path / "a.index", "v2")
    assert path == tmp_path / "a.index"
    index, theirs = read_index(path), faiss.read_index(str(path))
    assert theirs.ntotal == len(index) == rows
    assert theirs.nlist == len(index.centroids) == count_cells(rows)
    assert theirs.nprobe == index.nprobe == 1
    assert isinstance(theirs, faiss.IndexIVFFlat)
    order = np.lexsort(features.T)
    np.testing.assert_array_equal(
        index.vectors[np.lexsort(index.vectors.T)], features[order]
    )
    queries = rng.standard_normal((40, width)).astype(np.float32)
    distances, ids = nearest(index, queries)
    expected, expected_ids = theirs.search(queries, 8)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(distances, expected, rtol=1e-5)
    again = build_index(features, tmp_path / "b.index", "v2")
    assert again.read_bytes() == path.read_bytes()
    other = build_index(features, tmp_path / "c.index", "v2", seed=1)
    assert (other.read_bytes() == path.read_bytes()) is False


def test_many_rows_become_centres(tmp_path, rng):
    pytest.importorskip("faiss")
    from rvc_mlx.retrieval import read_index
    from rvc_mlx.training.index import build_index

    places = 10 * rng.standard_normal((25, 8))
    features = places[rng.integers(25, size=4000)] + 0.01 * rng.standard_normal(
        (4000, 8)
    )
    path = build_index(features, tmp_path / "a.index", "v2", max_rows=3999, centres=100)
    index = read_index(path)
    assert len(index) == 100
    distance = np.linalg.norm(index.vectors[:, None] - places, axis=-1).min(axis=1)
    assert distance.max() < 0.1
    path = build_index(features, tmp_path / "a.index", "v2", max_rows=4000, centres=100)
    assert len(read_index(path)) == 4000


def test_index_of_a_folder(prepared):
    pytest.importorskip("faiss")
    from rvc_mlx.retrieval import read_index
    from rvc_mlx.training.index import build_index

    path = build_index(prepared, prepared, "v2")
    names = sorted(clip_names(prepared))
    rows = np.concatenate([np.load(prepared / f"extracted/{n}.npy") for n in names])
    cells = min(int(16 * len(rows) ** 0.5), len(rows) // 39)
    assert path.name == f"added_IVF{cells}_Flat_nprobe_1_voice_v2.index"
    vectors = read_index(path).vectors
    assert Counter(map(bytes, vectors)) == Counter(map(bytes, rows))


def test_index_that_cannot_be_built(tmp_path, rng, monkeypatch):
    pytest.importorskip("faiss")
    from rvc_mlx.training.index import build_index

    path = tmp_path / "a.index"
    with pytest.raises(FileNotFoundError, match="run the extraction first"):
        build_index(tmp_path, path, "v2")
    for wrong in (np.zeros((0, 4)), np.zeros(4), np.full((3, 4), np.nan)):
        with pytest.raises(ValueError, match=r"expected .n, C. finite numbers"):
            build_index(wrong, path, "v2")
    np.save(tmp_path / "a.npy", np.zeros((3, 4)))
    np.save(tmp_path / "b.npy", np.zeros((3, 5)))
    with pytest.raises(ValueError, match=r"b\.npy: features of shape \(3, 5\)"):
        build_index(tmp_path, path, "v2")
    features = rng.standard_normal((3000, 16))
    told = error_on_small_disk(
        10_000,
        "import numpy as np\nfrom rvc_mlx.training.index import build_index\n"
        "features = np.random.default_rng(0).standard_normal((3000, 16))",
        f"build_index(features, {str(path)!r}, 'v2')",
    )
    assert re.search(r"a\.index: writing failed \(File too large\)", told)
    assert not path.exists()
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'rvc-mlx\[train\]'"):
        build_index(features, path, "v2")
