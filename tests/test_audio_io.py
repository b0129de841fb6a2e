import builtins
import os
import shutil
import stat
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from rvc_mlx.audio_io import (
    AudioReader,
    AudioWriter,
    check_output,
    load_audio,
    load_spool,
    save_audio,
)


@pytest.fixture
def rng():
    return np.random.default_rng(3)


@pytest.fixture
def no_ffmpeg(monkeypatch):
    """Neither PyAV nor an ffmpeg program."""
    hide_av(monkeypatch)
    monkeypatch.setattr("shutil.which", lambda name: None)


def hide_av(monkeypatch):
    original = builtins.__import__

    def without_av(name, *args, **kwargs):
        if name == "av":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_av)


def noise(rng, *shape):
    return (0.1 * rng.standard_normal(shape)).astype(np.float32)


def read_all(path, size=1 << 18):
    with AudioReader(path) as reader:
        return np.concatenate(list(reader.blocks(size)))


def refusal(path):
    """The message of the error that reading the whole file ends in: one line."""
    with pytest.raises((ValueError, OSError)) as caught:
        read_all(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


# Reading


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3", "aiff"])
def test_reader_gives_what_was_written(rng, tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    t = np.arange(30000) / 44100
    x = (0.5 * np.sin(2 * np.pi * 440 * t)).astype(np.float32)
    soundfile.write(path, x, 44100)
    with AudioReader(path) as reader:
        assert (reader.sample_rate, reader.channels, reader.frames) == (44100, 1, 30000)
        first = np.concatenate(list(reader.blocks()))
        assert reader.frames == 30000
        blocks = list(reader.blocks(7000))
    assert [len(b) for b in blocks] == [7000] * 4 + [2000]
    assert all(b.dtype == np.float32 and b.ndim == 1 for b in blocks)
    np.testing.assert_array_equal(np.concatenate(blocks), first)
    tolerance = 0.05 if suffix in ("ogg", "mp3") else 1 / 32768
    assert np.abs(first - x)[2000:-2000].max() < tolerance


@pytest.mark.parametrize(
    ("rate", "channels"),
    [(8000, 1), (192000, 2), (16000, 8), (44100, 2), (1000, 3), (768000, 1)],
)
def test_rates_and_channels(rng, tmp_path, rate, channels):
    path = tmp_path / "x.wav"
    x = noise(rng, 5000, channels)
    soundfile.write(path, x, rate, subtype="FLOAT")
    with AudioReader(path) as reader:
        assert (reader.sample_rate, reader.channels) == (rate, channels)
    np.testing.assert_allclose(read_all(path, 333), x.mean(1), atol=1e-7)


def test_load_spool_is_mono_at_16_khz(rng, tmp_path):
    path = tmp_path / "x.wav"
    x = noise(rng, 44100, 2)
    soundfile.write(path, x, 44100, subtype="FLOAT")
    spool, frames = load_spool(AudioReader(path))
    with spool:
        assert frames == 44100
        got = spool.read(0, len(spool))
    assert got.shape == (16000,)
    expected = soxr.resample(x.mean(1), 44100, 16000, quality="VHQ")
    np.testing.assert_allclose(got, expected, atol=1e-6)
    np.testing.assert_array_equal(load_audio(path), got)
    spool, _ = load_spool(AudioReader(path), 44100)
    with spool:
        assert len(spool) == 44100


@pytest.mark.parametrize("rate", [8000, 16000, 48000, 192000])
@pytest.mark.parametrize("seconds", [0, 0.01])
def test_one_sample_and_10_ms_load(tmp_path, rate, seconds):
    path = tmp_path / "x.wav"
    n = max(1, round(seconds * rate))
    soundfile.write(path, np.full(n, 0.25), rate)
    spool, frames = load_spool(AudioReader(path))
    with spool:
        assert frames == n
        assert len(spool) == max(1, round(n * 16000 / rate))


def test_levels_above_full_scale_are_kept(tmp_path):
    path = tmp_path / "x.wav"
    soundfile.write(path, np.full(100, 3.0), 16000, subtype="FLOAT")
    np.testing.assert_array_equal(load_audio(path), np.full(100, 3.0))


def test_paths_that_are_no_files(tmp_path):
    assert "no such file" in refusal(tmp_path / "missing.wav")
    assert "folder" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe.wav")
    assert "not an ordinary file" in refusal(tmp_path / "pipe.wav")


@pytest.mark.parametrize("with_av", [False, True])
def test_files_that_are_not_audio(tmp_path, monkeypatch, with_av):
    if with_av:
        pytest.importorskip("av")
    else:
        hide_av(monkeypatch)
        monkeypatch.setattr("shutil.which", lambda name: None)
    path = tmp_path / "x.wav"
    path.write_bytes(b"")
    assert "0 bytes" in refusal(path)
    path.write_text("This is a text file, not a recording.\n" * 30)
    assert "not a readable audio file" in refusal(path)
    path.write_bytes(b"RIFF")
    assert "not a readable audio file" in refusal(path)
    soundfile.write(path, np.zeros(0), 16000)
    assert "0 samples" in refusal(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite(rng, tmp_path, value):
    path = tmp_path / "x.wav"
    x = noise(rng, 40000, 2)
    x[20000, 1] = value
    soundfile.write(path, x, 16000, subtype="FLOAT")
    assert "1.250 s" in refusal(path)


@pytest.mark.parametrize("rate", [999, 768001])
def test_impossible_rates(tmp_path, rate):
    path = tmp_path / "x.wav"
    soundfile.write(path, np.zeros(100), rate)
    assert "1000 to 768000" in refusal(path)


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "aiff", "au"])
def test_files_that_are_cut_off(rng, tmp_path, no_ffmpeg, suffix):
    path = tmp_path / f"x.{suffix}"
    soundfile.write(path, noise(rng, 60000), 16000)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert any(word in refusal(path) for word in ("cut off", "complete"))


def test_damage_in_the_middle(rng, tmp_path):
    path = tmp_path / "x.flac"
    soundfile.write(path, noise(rng, 200000), 16000)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 :][:2000] = rng.bytes(2000)
    data[len(data) // 2 : len(data) // 2 + 2000] = rng.bytes(2000)
    path.write_bytes(data)
    assert "damaged" in refusal(path)


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF])
def test_recordings_to_a_pipe_do_not_know_their_length(rng, tmp_path, size):
    path = tmp_path / "x.wav"
    soundfile.write(path, noise(rng, 1000), 16000)
    data = path.read_bytes()
    path.write_bytes(data[:40] + struct.pack("<I", size) + data[44:])
    assert read_all(path).shape == (1000,)


def headless_mp3(path, x):
    """A variable bit rate mp3 behind a tag, without the header that tells its length."""
    with soundfile.SoundFile(path, "w", 44100, 1, bitrate_mode="VARIABLE") as file:
        for start in range(0, len(x), 65536):
            file.write(x[start : start + 65536])
    data = path.read_bytes()
    head = max(data.find(b"Xing"), data.find(b"Info"))
    tag = b"ID3\x04\x00\x00" + bytes([0, 0, 1, 2]) + bytes(130)
    path.write_bytes(tag + data[data.find(b"\xff\xfb", head) :])


@pytest.mark.parametrize("loud", [90000, 441000])
def test_mp3_of_unknown_length_is_whole(rng, tmp_path, no_ffmpeg, loud):
    """libsndfile takes the length from the bit rate of the beginning, and is wrong."""
    path = tmp_path / "x.mp3"
    headless_mp3(path, noise(rng, 441000) * (np.arange(441000) < loud))
    with AudioReader(path) as reader:
        next(reader.blocks(100))
        assert reader.frames == pytest.approx(441000, abs=3000)
        assert sum(map(len, reader.blocks())) == reader.frames


# Other containers


def test_other_formats_name_both_remedies(tmp_path, no_ffmpeg):
    path = tmp_path / "x.m4a"
    path.write_bytes(b"\0\0\0 ftypM4A \0\0\0\0" + bytes(100))
    message = refusal(path)
    assert "PyAV" in message
    assert "ffmpeg" in message


def write_with_av(path, codec, x, rate):
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.layout = "stereo"
        frame = av.AudioFrame.from_ndarray(x, format="fltp", layout="stereo")
        frame.sample_rate = rate
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)


def tone(rate, seconds=2):
    t = np.arange(rate * seconds) / rate
    x = (0.5 * np.sin(2 * np.pi * 440 * t)).astype(np.float32)
    return np.stack([x, 0.5 * x])


@pytest.mark.parametrize(
    ("name", "codec", "rate"),
    [
        ("x.m4a", "aac", 44100),
        ("x.mp4", "aac", 48000),
        ("x.webm", "libopus", 48000),
        ("x.mka", "pcm_s16le", 22050),
        ("mislabelled.wav", None, 44100),
    ],
)
def test_pyav_reads_other_containers(tmp_path, name, codec, rate):
    pytest.importorskip("av")
    path = tmp_path / name
    x = tone(rate)
    if codec is None:
        write_with_av(tmp_path / "x.m4a", "aac", x, rate)
        (tmp_path / "x.m4a").rename(path)
    else:
        write_with_av(path, codec, x, rate)
    with AudioReader(path) as reader:
        assert (reader.sample_rate, reader.channels) == (rate, 2)
        blocks = list(reader.blocks(10000))
        assert {len(b) for b in blocks[:-1]} == {10000}
        got = np.concatenate(blocks)
        assert reader.frames == len(got)
    assert 0 <= len(got) - 2 * rate < 4096  # encoders pad
    middle = got[rate // 2 : rate]
    assert np.std(middle) == pytest.approx(0.375 / np.sqrt(2), abs=0.01)
    assert AudioReader(path).frames == len(got)


@pytest.mark.parametrize("name", ["x.m4a", "x.webm"])
def test_pyav_notices_a_cut(tmp_path, name):
    pytest.importorskip("av")
    path = tmp_path / name
    codec = "aac" if name == "x.m4a" else "libopus"
    write_with_av(path, codec, tone(48000, 4), 48000)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert any(word in refusal(path) for word in ("cut off", "complete"))


def test_pyav_follows_no_playlist(tmp_path):
    pytest.importorskip("av")
    soundfile.write(tmp_path / "x.wav", np.zeros(1000), 16000)
    path = tmp_path / "list.m3u8"
    path.write_text(
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nhttp://localhost:1/x.wav\n"
        "#EXT-X-ENDLIST\n"
    )
    refusal(path)


FAKE_FFMPEG = """#!{python}
import struct, sys
source = sys.argv[sys.argv.index("-i") + 1]
assert source.startswith("file:/")
if open(source[5:], "rb").read() == b"bad":
    sys.exit("moov atom not found")
out = sys.stdout.buffer
out.write(struct.pack(">4s5I", b".snd", 32, 0xFFFFFFFF, 6, 22050, 2) + bytes(8))
for i in range(5000):
    out.write(struct.pack(">2f", i / 5000, 0.0))
if open(source[5:], "rb").read() == b"cut":
    sys.exit("stream 0: partial file")
"""


@pytest.fixture
def fake_ffmpeg(tmp_path, monkeypatch):
    hide_av(monkeypatch)
    program = tmp_path / "bin" / "ffmpeg"
    program.parent.mkdir()
    program.write_text(FAKE_FFMPEG.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)


def test_ffmpeg_is_read_through_a_pipe(tmp_path, fake_ffmpeg):
    path = tmp_path / "x.m4a"
    path.write_bytes(b"good")
    with AudioReader(path) as reader:
        assert (reader.sample_rate, reader.channels) == (22050, 2)
        for _ in range(2):
            blocks = list(reader.blocks(999))
            assert {len(b) for b in blocks[:-1]} == {999}
            got = np.concatenate(blocks)
            np.testing.assert_allclose(got, np.arange(5000) / 10000, atol=1e-6)
        assert reader.frames == 5000
        next(reader.blocks(10))  # an abandoned pass leaves no process behind


def test_ffmpeg_errors_are_told(tmp_path, fake_ffmpeg):
    path = tmp_path / "x.m4a"
    path.write_bytes(b"bad")
    assert "moov atom not found" in refusal(path)
    path.write_bytes(b"cut")
    assert "partial file" in refusal(path)


def test_ffmpeg_program_for_real(tmp_path, monkeypatch):
    if shutil.which("ffmpeg") is None:
        pytest.skip("no ffmpeg program")
    path = tmp_path / "x.m4a"
    command = [
        "ffmpeg",
        "-v",
        "error",
        "-f",
        "lavfi",
        "-i",
        "sine=440:duration=1",
        path,
    ]
    subprocess.run(command, check=True)
    hide_av(monkeypatch)
    assert len(read_all(path)) == pytest.approx(44100, abs=2048)


# Writing


@pytest.mark.parametrize(
    ("name", "subtype", "stored", "step"),
    [
        ("x.wav", None, "PCM_16", 1 / 32768),
        ("x.wav", "PCM_24", "PCM_24", 1 / (1 << 23)),
        ("x.WAV", "FLOAT", "FLOAT", 0),
        ("x.flac", None, "PCM_16", 1 / 32768),
        ("x.flac", "PCM_24", "PCM_24", 1 / (1 << 23)),
    ],
)
def test_writer_keeps_the_samples(rng, tmp_path, name, subtype, stored, step):
    path = tmp_path / name
    x = noise(rng, 200000)
    with AudioWriter(path, 48000, subtype) as writer:
        for start in range(0, len(x), 70001):
            writer.write(x[start : start + 70001])
        assert writer.frames == len(x)
    info = soundfile.info(path)
    assert (info.samplerate, info.subtype, info.channels) == (48000, stored, 1)
    got, _ = soundfile.read(path, dtype="float32")
    assert got.shape == x.shape
    assert np.abs(got - x).max() <= step
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("suffix", ["mp3", "ogg"])
def test_writer_makes_lossy_files(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    x = tone(48000, 5)[0]
    save_audio(path, x, 48000)
    got, rate = soundfile.read(path, dtype="float32")
    assert rate == 48000
    assert got.shape == x.shape
    assert np.abs(got - x)[4000:-4000].max() < 0.02


def test_long_writes_do_not_crash_vorbis(tmp_path):
    """libsndfile overflows its stack on one write of some million samples."""
    save_audio(tmp_path / "x.ogg", np.zeros(1 << 21, np.float32), 48000)
    assert soundfile.info(tmp_path / "x.ogg").frames == 1 << 21


def test_full_scale_clips_and_does_not_wrap(tmp_path):
    x = np.array([1, -1, 1.5, -1.5, 0.5, 1 / 32768], np.float32)
    save_audio(tmp_path / "x.wav", x, 16000)
    got, _ = soundfile.read(tmp_path / "x.wav", dtype="int16")
    np.testing.assert_array_equal(got, [32767, -32768, 32767, -32768, 16384, 1])
    save_audio(tmp_path / "x.wav", x, 16000, "FLOAT")
    np.testing.assert_array_equal(soundfile.read(tmp_path / "x.wav")[0], x)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("existing", [False, True])
def test_an_interrupted_file_never_appears(tmp_path, error, existing):
    path = tmp_path / "x.wav"
    if existing:
        path.write_bytes(b"old")
    with pytest.raises(error), AudioWriter(path, 16000) as writer:  # noqa: PT012
        writer.write(np.zeros(100000, np.float32))
        raise error
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"] * existing


def test_a_finished_file_replaces_the_old_one(tmp_path):
    path = tmp_path / "x.wav"
    path.write_bytes(b"old")
    with AudioWriter(path, 16000) as writer:
        writer.write(np.zeros(10, np.float32))
        assert path.read_bytes() == b"old"
    assert soundfile.info(path).frames == 10


def test_files_have_ordinary_permissions_and_links_stay(tmp_path):
    old = os.umask(0o022)
    try:
        save_audio(tmp_path / "x.wav", np.zeros(10, np.float32), 16000)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "x.wav").stat().st_mode) == 0o644
    (tmp_path / "link.wav").symlink_to(tmp_path / "x.wav")
    save_audio(tmp_path / "link.wav", np.zeros(20, np.float32), 16000)
    assert (tmp_path / "link.wav").is_symlink()
    assert soundfile.info(tmp_path / "x.wav").frames == 20


@pytest.mark.parametrize(
    ("name", "rate", "subtype", "expected"),
    [
        ("x.aac", 48000, None, "wav, flac, mp3, ogg"),
        ("x", 48000, None, "no suffix"),
        ("x.wav", 48000, "PCM_8", "PCM_16 or PCM_24 or FLOAT"),
        ("x.flac", 48000, "FLOAT", "PCM_16 or PCM_24"),
        ("x.mp3", 40000, None, "44100"),
        ("x.mp3", 48000, "PCM_16", "cannot hold PCM_16"),
        ("x.ogg", 200001, None, "8000 to 192000"),
        ("x.ogg", 1000, None, "8000 to 192000"),
        ("x.flac", 655360, None, "655350"),
        ("x.flac", 65537, None, "in tens"),
        ("x.wav", 0, None, "1000 to 768000"),
        ("missing/x.wav", 48000, None, "no folder"),
        ("folder.wav", 48000, None, "a folder was given"),
    ],
)
def test_impossible_outputs_are_refused_early(tmp_path, name, rate, subtype, expected):
    (tmp_path / "folder.wav").mkdir()
    path = tmp_path / name
    with pytest.raises((ValueError, OSError), match=expected) as caught:
        check_output(path, rate, subtype)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    with pytest.raises((ValueError, OSError), match=expected):
        AudioWriter(path, rate, subtype)
    assert [p.name for p in tmp_path.iterdir()] == ["folder.wav"]


def test_possible_outputs_pass_and_leave_nothing(tmp_path):
    for name, rate in [
        *[("x.wav", rate) for rate in (1000, 44100, 768000)],
        *[("x.flac", rate) for rate in (1000, 65535, 192000, 655350)],
        *[("x.mp3", rate) for rate in (8000, 22050, 48000)],
        *[("x.ogg", rate) for rate in (8000, 40000, 192000)],
    ]:
        check_output(tmp_path / name, rate)
        assert list(tmp_path.iterdir()) == []
        save_audio(tmp_path / name, np.zeros(100, np.float32), rate)
        assert soundfile.info(tmp_path / name).samplerate == rate
        (tmp_path / name).unlink()


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", denied)
    with pytest.raises(OSError, match=r"cannot be written \(Permission denied\)"):
        check_output(tmp_path / "x.wav", 48000)


def test_a_wav_beyond_4_gib_is_refused(tmp_path):
    check_output(tmp_path / "x.wav", 48000, frames=(1 << 31) - 10000)
    with pytest.raises(ValueError, match="4 GiB"):
        check_output(tmp_path / "x.wav", 48000, "PCM_24", frames=1 << 31)
    check_output(tmp_path / "x.flac", 48000, frames=1 << 31)


@pytest.mark.parametrize(
    "bad", [np.full(3, np.nan), np.full(3, np.inf), np.zeros((2, 2))]
)
def test_samples_that_are_no_sound_are_not_written(tmp_path, bad):
    with pytest.raises(ValueError, match="finite"):
        save_audio(tmp_path / "x.wav", bad.astype(np.float32), 16000)
    assert list(tmp_path.iterdir()) == []


FULL_DISK = """
import resource, sys
import numpy as np
from rvc_mlx.audio_io import save_audio
resource.setrlimit(resource.RLIMIT_FSIZE, (200000, 200000))
try:
    save_audio(sys.argv[1], np.random.default_rng(0).random(1 << 20), 48000)
except OSError as error:
    print(error)
"""


def test_a_full_disk_is_told_and_cleaned_up(tmp_path):
    path = tmp_path / "x.flac"
    command = [sys.executable, "-c", FULL_DISK, path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "disk is not full" in done.stdout
    assert list(tmp_path.iterdir()) == []
