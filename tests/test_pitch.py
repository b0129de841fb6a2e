"""Pitch and spectra, against the PyTorch reference and plain float64 formulas."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from scipy import ndimage

from rvc_mlx import pitch, spectral
from rvc_reference import rmvpe as reference

SAMPLE_RATE = 16000


def tone(samples, seed=0):
    """A gliding buzz in a little noise, with a silent stretch."""
    rng = np.random.default_rng(seed)
    t = np.arange(samples) / SAMPLE_RATE
    phase = 2 * np.pi * np.cumsum(150 * 2 ** np.sin(2 * t)) / SAMPLE_RATE
    buzz = sum(np.sin(k * phase) / k for k in (1, 2, 3, 5))
    audio = 0.2 * buzz + 0.01 * rng.standard_normal(samples)
    audio[samples // 3 : samples // 2] = 0
    return audio.astype(np.float32)


def reference_mel(audio, n_mels=128):
    return reference.MelSpectrogram(n_mels)(torch.from_numpy(audio)[None])[0].T.numpy()


# Log-mel ------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [513, 4000, 40_123])
@pytest.mark.parametrize("n_mels", [32, 128])
def test_log_mel_equals_the_reference(samples, n_mels):
    audio = tone(samples)
    mel = spectral.log_mel(np.pad(audio, spectral.N_FFT // 2, mode="reflect"), n_mels)
    expected = reference_mel(audio, n_mels)
    assert mel.shape == expected.shape == (samples // 160 + 1, n_mels)
    assert mel.dtype == np.float32
    difference = np.abs(mel - expected)
    assert difference.max() <= 1e-5  # ten steps of float32 at ln(1e-5)
    assert difference.mean() <= 1e-6


def test_log_mel_of_silence_is_the_floor():
    mel = spectral.log_mel(np.zeros(1024 + 160 * 4, np.float32), 128)
    np.testing.assert_allclose(mel, np.log(1e-5), rtol=1e-6)


def test_blocks_of_frames_do_not_show(monkeypatch):
    audio = tone(20_000)
    whole = spectral.log_mel(audio, 128)
    monkeypatch.setattr(spectral, "_FRAMES_PER_BLOCK", 7)
    np.testing.assert_array_equal(spectral.log_mel(audio, 128), whole)


def test_log_mels_together_are_what_each_is_alone():
    audio = np.stack([tone(30_000, seed) for seed in range(6)]).reshape(2, 3, -1)
    found = spectral.log_mel(audio, 128)
    assert found.shape == (2, 3, (30_000 - 1024) // 160 + 1, 128)
    alone = [[spectral.log_mel(samples, 128) for samples in row] for row in audio]
    np.testing.assert_array_equal(found, alone)


def test_mel_filters_equal_the_reference():
    filters = spectral.mel_filters(128)
    np.testing.assert_array_equal(filters.T, reference.mel_filters(128))


def test_hann_window_is_periodic():
    expected = torch.hann_window(1024, dtype=torch.float64).numpy()
    np.testing.assert_allclose(spectral.hann_window(1024), expected, atol=1e-15)


# Salience to F0 -----------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.03, 0.5])
def test_decode_equals_the_reference(threshold):
    rng = np.random.default_rng(0)
    salience = rng.random((500, 360)).astype(np.float32) ** 8
    salience[::7] *= 0.02
    f0 = pitch.decode_salience(salience, threshold)
    expected = reference.decode(salience, threshold)
    np.testing.assert_allclose(f0, expected, rtol=1e-12)
    assert 0 < (f0 == 0).sum() < 500


@pytest.mark.parametrize("peak", [0, 1, 3, 4, 180, 355, 356, 359])
def test_decode_at_every_edge(peak):
    salience = np.full((1, 360), 1e-3)
    salience[0, peak] = 0.9
    expected = reference.decode(salience)
    np.testing.assert_allclose(pitch.decode_salience(salience), expected, rtol=1e-12)
    cents = 1200 * np.log2(expected[0] / 10)
    assert abs(cents - (20 * peak + 1997.3794084376191)) < 1


def test_a_frame_at_the_threshold_is_unvoiced():
    salience = np.zeros((3, 360))
    salience[:, 100] = (0.03, np.nextafter(0.03, 1), 0)
    f0 = pitch.decode_salience(salience)
    assert (f0 > 0).tolist() == [False, True, False]


def test_decode_of_no_frames():
    assert pitch.decode_salience(np.zeros((0, 360))).shape == (0,)


@pytest.mark.parametrize(
    ("onset", "offset", "expected"),
    [
        (0, 0, [0, 0, 0, 5, 6, 0, 7, 0, 0]),
        (1, 0, [0, 0, 5, 5, 6, 7, 7, 0, 0]),
        (0, 1, [0, 0, 0, 5, 6, 6, 7, 7, 0]),
        (1, 1, [0, 0, 5, 5, 6, 7, 7, 7, 0]),
        (9, 9, [5, 5, 5, 5, 6, 7, 7, 7, 7]),
    ],
)
def test_voiced_runs_are_widened(onset, offset, expected):
    f0 = np.array([0, 0, 0, 5, 6, 0, 7, 0, 0.0])
    assert pitch.widened(f0, onset, offset).tolist() == expected


# From samples to F0 -------------------------------------------------------------------

REACH = 40  # frames on each side that the pretended network sees


def smooth_salience(mel):
    """A salience that depends on ``REACH`` frames to each side, zeros beyond the edge."""
    smooth = ndimage.uniform_filter1d(
        mel[0].astype(np.float64) + 12, 2 * REACH + 1, axis=0, mode="constant"
    )
    picked = smooth[:, np.arange(360) * 128 // 360]
    return (picked / (1 + picked.max(axis=1, keepdims=True)))[None]


class Recording:
    """Reads a signal and remembers what was asked for."""

    def __init__(self, audio):
        self.audio = audio
        self.asked = []

    def __call__(self, start, stop):
        assert 0 <= start < stop <= self.audio.shape[-1]
        self.asked.append(stop - start)
        return self.audio[..., start:stop]


@pytest.mark.parametrize("padding", ["reflect", "constant"])
@pytest.mark.parametrize("frames", [1500, 1504, 1537])
def test_chunks_do_not_show(frames, padding, monkeypatch):
    monkeypatch.setattr(pitch, "CHUNK_CONTEXT", 64)  # not below the reach
    read = Recording(tone(frames * 160))
    f0 = [
        pitch.estimate_f0(
            smooth_salience,
            read,
            len(read.audio),
            mel_padding=padding,
            chunk_frames=chunk,
        )
        for chunk in (10**6 // 32 * 32, 256, 416)
    ]
    assert len(set(np.round(f0[0], 2))) > 50
    np.testing.assert_allclose(f0[1], f0[0], rtol=1e-9)
    np.testing.assert_allclose(f0[2], f0[0], rtol=1e-9)
    assert max(read.asked[1:]) <= 416 * 160 + 1024


def test_runs_are_widened_whatever_the_chunks(monkeypatch):
    monkeypatch.setattr(pitch, "CHUNK_CONTEXT", 64)
    audio = tone(1500 * 160)

    def heard(mel):  # voiced now and then, one frame of a run being a chunk's first
        return np.where(mel.argmax(axis=-1) % 3 > 0, 0.5, 0)[..., None] * np.eye(360)[9]

    def found(onset, offset, chunk):
        settings = pitch.PitchSettings(onset=onset, offset=offset, chunk_frames=chunk)
        return pitch.estimate_one(heard, Recording(audio), len(audio), settings)

    plain = found(0, 0, 9600)
    assert 0 < (plain > 0).mean() < 1
    expected = pitch.widened(plain, 2, 1)
    assert (expected > 0).sum() > (plain > 0).sum()
    for chunk in (9600, 256, 416):
        np.testing.assert_allclose(found(2, 1, chunk), expected)


@pytest.mark.parametrize("chunk", [pitch.CHUNK_FRAMES, 1120])
@pytest.mark.parametrize("samples", [513, 4000, 160_000])
def test_the_network_sees_the_reference_s_mel(samples, chunk):
    audio, seen = tone(samples), []

    def salience(mel):
        assert mel.shape[0] == 1
        assert mel.shape[1] % 32 == 0
        seen.append(mel[0])
        return np.zeros((*mel.shape[:2], 360))

    pitch.estimate_f0(salience, Recording(audio), samples, chunk_frames=chunk)
    expected = reference_mel(audio)
    first, last = seen[0], seen[-1]
    np.testing.assert_allclose(first[: len(expected)][:600], expected[:600], atol=1e-5)
    missing = -len(expected) % 32
    padded = np.pad(expected, ((0, missing), (0, 0)), mode="reflect")
    np.testing.assert_allclose(last, padded[len(padded) - len(last) :], atol=1e-5)


@pytest.mark.parametrize("batch", [0, 700, 10**6])
def test_signals_together_are_what_each_is_alone(batch, monkeypatch):
    monkeypatch.setattr(pitch, "CHUNK_CONTEXT", 64)
    recordings = [
        tone(160 * n, seed) for seed, n in enumerate([300, 310, 300, 1500, 40])
    ]
    signals = [pitch.Signal(Recording(audio[None]), len(audio)) for audio in recordings]
    sizes = []

    def salience(mel):
        sizes.append(mel.shape[:2])
        return np.concatenate([smooth_salience(row[None]) for row in mel])

    settings = pitch.PitchSettings(chunk_frames=320, batch_frames=batch)
    found = pitch.estimate_all(salience, signals, settings)
    assert sum(count for count, _ in sizes) == 3 + 1 + 8
    largest = max(count * length for count, length in sizes)
    assert largest <= max(batch, 320)
    assert (largest > 320) == (batch > 320)
    for audio, f0 in zip(recordings, found, strict=True):
        alone = pitch.estimate_f0(
            smooth_salience, Recording(audio), len(audio), chunk_frames=320
        )
        np.testing.assert_array_equal(f0, alone)


@pytest.mark.parametrize(("batch", "counts"), [(10**4, [10, 2]), (2000, [6, 4, 2])])
def test_recordings_of_one_signal_are_what_each_is_alone(batch, counts, monkeypatch):
    """Next to others whose chunks are as long."""
    monkeypatch.setattr(pitch, "CHUNK_CONTEXT", 64)
    recordings = [
        np.stack([tone(160 * n, 10 * n + i) for i in range(count)])
        for n, count in [(300, 3), (310, 1), (700, 2), (40, 2)]
    ]
    signals = [
        pitch.Signal(Recording(audio), audio.shape[1], len(audio))
        for audio in recordings
    ]
    sizes = []

    def salience(mel):
        sizes.append(mel.shape[:2])
        return np.concatenate([smooth_salience(row[None]) for row in mel])

    settings = pitch.PitchSettings(chunk_frames=320, batch_frames=batch)
    found = pitch.estimate_all(salience, signals, settings)
    assert sizes == [*((count, 320) for count in counts[:-1]), (counts[-1], 64)]
    each = [audio for several in recordings for audio in several]
    for audio, f0 in zip(each, found, strict=True):
        alone = pitch.estimate_f0(
            smooth_salience, Recording(audio), len(audio), chunk_frames=320
        )
        np.testing.assert_array_equal(f0, alone)


@pytest.mark.parametrize("chunk", [0, 1024, 1056, 6401])
def test_chunks_that_cannot_work_are_refused(chunk):
    with pytest.raises(ValueError, match="chunk_frames"):
        pitch.estimate_f0(
            smooth_salience, Recording(tone(16_000)), 16_000, chunk_frames=chunk
        )


def test_constant_padding_is_zeros_in_the_log_domain():
    seen = []

    def salience(mel):
        seen.append(mel[0])
        return np.zeros((*mel.shape[:2], 360))

    pitch.estimate_f0(salience, Recording(tone(16_000)), 16_000, mel_padding="constant")
    assert len(seen[0]) == 128
    assert not seen[0][101:].any()
    assert seen[0][:101].all()


@pytest.mark.parametrize("multiple", [1, 8, 32])
def test_one_value_per_frame(multiple):
    def salience(mel):
        return np.full((*mel.shape[:2], 360), 0.5)

    for samples in [*range(513, 1130, 7), 1599, 1600, 1601, 102_399, 102_400]:
        audio = np.zeros(samples, np.float32)
        f0 = pitch.estimate_f0(
            salience, Recording(audio), samples, frames_multiple=multiple
        )
        assert f0.shape == (samples // 160 + 1,)
        assert f0.dtype == np.float64
        assert (f0 > 0).all()


def test_estimate_equals_the_reference():
    torch.manual_seed(0)
    network = reference.RMVPE(
        reference.RMVPEConfig(
            channels=2, levels=3, inter_layers=1, blocks=1, gru_hidden=4, n_mels=32
        )
    ).eval()
    audio = tone(12_345)

    @torch.inference_mode()
    def salience(mel):
        return network(torch.from_numpy(mel).transpose(1, 2)).numpy()

    for padding in ("reflect", "constant"):
        expected = reference.estimate_f0(network, audio, pad_mode=padding)
        f0 = pitch.estimate_f0(
            salience,
            Recording(audio),
            len(audio),
            n_mels=32,
            frames_multiple=8,
            mel_padding=padding,
        )
        np.testing.assert_allclose(f0, expected, rtol=1e-6)
        assert (f0 > 0).any()


# What the user changes ----------------------------------------------------------------


def test_coarse_pitch_table():
    hertz = np.array([0, 60, 80, 110, 220, 440, 880, 1100])
    coarse = pitch.quantize_f0(hertz)
    assert coarse.tolist() == [1, 5, 12, 23, 60, 122, 217, 255]
    assert coarse.dtype == np.int32


def test_coarse_pitch_is_clamped():
    coarse = pitch.quantize_f0(np.array([1e-9, 10, 49.9, 50, 1100.1, 4000]))
    assert coarse.tolist() == [1, 1, 1, 1, 255, 255]


def test_shift():
    f0 = np.array([0, 110, 220.0])
    np.testing.assert_allclose(pitch.shift_f0(f0, 12), [0, 220, 440])
    np.testing.assert_allclose(pitch.shift_f0(f0, -0.5), f0 * 2 ** (-0.5 / 12))


def test_autotune_notes_are_the_scale_s():
    notes = pitch.AUTOTUNE_NOTES
    assert len(notes) == 54
    assert (notes[0], notes[-1]) == (49.00, 1046.50)
    assert 440 in notes


def test_autotune_keeps_unvoiced_frames_unvoiced():
    f0 = np.array([0, 445, 100, 0, 20, 5000])
    tuned = pitch.autotune_f0(f0, 1.0)
    np.testing.assert_allclose(tuned, [0, 440, 98, 0, 49, 1046.5])
    np.testing.assert_allclose(pitch.autotune_f0(f0, 0.5), (f0 + tuned) / 2)
    np.testing.assert_array_equal(pitch.autotune_f0(f0, 0.0), f0)


@pytest.mark.parametrize(
    ("f0", "target", "shift"),
    [
        ([0, 0, 0], 155, 0),
        ([0, 100, 0], 155, 0),  # one voiced frame is none
        ([100, 100], 200, 12),
        ([100, 0, 100], 155, 8),
        ([200, 200, 200], 155, -4),
        ([50, 50], 1000, 12),  # an octave at most
        ([1000, 1000], 50, -12),
        ([155, 155], 155, 0),
        ([100, 0, 0, 0, 0, 400], 255, 0),  # gaps are filled before the median: 250
    ],
)
def test_proposed_shift(f0, target, shift):
    result = pitch.propose_shift(np.array(f0, float), target)
    assert result == shift
    assert isinstance(result, int)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no lines"),
        ("\n \n", "no lines"),
        ("0.0,100\n0.1;100\n", "line 2: '0.1;100'"),
        ("0.0\n", "line 1"),
        ("0.0,100,5\n", "line 1"),
        ("\n\nzero,100\n", "line 3"),
        ("0.0,nan\n", "line 1"),
        ("0.0,inf\n", "line 1"),
        ("0.0,-5\n", "line 1"),
        ("-1,100\n", "line 1"),
    ],
)
def test_bad_f0_files_are_told(tmp_path, text, message):
    path = tmp_path / "curve.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"curve.csv.*{message}"):
        pitch.read_f0_file(path)


def test_f0_file_is_sorted(tmp_path):
    path = tmp_path / "curve.csv"
    path.write_text("0.5, 200\n\n0.1,100\r\n 0.3 ,0\n")
    points = pitch.read_f0_file(path)
    assert points.tolist() == [[0.1, 100], [0.3, 0], [0.5, 200]]


def test_curve_is_laid_over_f0():
    f0 = np.full(20, 50.0)
    points = np.array([[0.0, 100], [0.04, 140], [0.06, 120]])
    result = pitch.overlay_f0(f0, points, first_frame=5)
    expected = f0.copy()
    expected[5:12] = [100, 110, 120, 130, 140, 130, 120]
    np.testing.assert_allclose(result, expected)
    assert (f0 == 50).all()


def test_curve_starts_at_its_time():
    result = pitch.overlay_f0(np.zeros(20), np.array([[0.03, 100], [0.05, 100]]), 5)
    assert np.flatnonzero(result).tolist() == [8, 9, 10]


@pytest.mark.parametrize(("first", "left"), [(15, 5), (19, 1), (20, 0), (50, 0)])
def test_curve_beyond_the_end_is_cut(first, left):
    result = pitch.overlay_f0(np.zeros(20), np.array([[0, 100], [1, 100]]), first)
    assert len(result) == 20
    assert (result > 0).sum() == left


def test_single_point_is_one_frame():
    result = pitch.overlay_f0(np.zeros(5), np.array([[0.0, 100]]), 2)
    assert result.tolist() == [0, 0, 100, 0, 0]


# Oscillator ---------------------------------------------------------------------------


def test_cycles_are_held():
    cycles = pitch.sample_cycles(np.array([0, 100, 200.0]), 4)
    assert cycles.shape == (3, 4)
    expected = np.repeat([[0], [0.25], [0.5]], 4, axis=1)
    np.testing.assert_allclose(cycles, expected)


@pytest.mark.parametrize("frames", [1, 2, 30])
@pytest.mark.parametrize("per_frame", [3, 320])
def test_linear_cycles_equal_torch(frames, per_frame):
    f0 = np.random.default_rng(0).uniform(0, 500, frames) * (np.arange(frames) % 4 > 0)
    glide = torch.nn.functional.interpolate(
        torch.from_numpy(f0)[None, None],
        size=frames * per_frame,
        mode="linear",
        align_corners=False,
    )
    cycles = pitch.sample_cycles(f0, per_frame, linear=True)
    assert cycles.shape == (frames, per_frame)
    np.testing.assert_allclose(
        cycles.ravel() * 100 * per_frame, glide[0, 0].numpy(), atol=1e-9
    )


@pytest.mark.parametrize("linear", [False, True])
def test_phases_after_a_minute_at_48_khz(linear):
    T, U = 6000, 480
    rng = np.random.default_rng(0)
    f0 = 300 * 2 ** np.sin(np.arange(T) / 50) + rng.uniform(0, 5, T)
    f0[1000:1100] = 0
    cycles = pitch.sample_cycles(f0, U, linear)
    phases = pitch.sample_phases(cycles)
    assert phases.dtype == np.float32
    assert phases.shape == (T, U)
    assert np.abs(phases).max() <= 0.5
    exact = np.cumsum(cycles.astype(np.longdouble))
    if not linear:
        held = np.cumsum(f0.astype(np.longdouble) / 100)
        np.testing.assert_allclose(exact[U - 1 :: U].astype(float), held.astype(float))
    difference = exact - phases.ravel()
    assert np.abs(difference - np.rint(difference)).max() <= 1e-6
    assert (phases[1001:1100] == phases[1000, -1]).all() or linear


def test_a_device_decodes_before_the_result_is_asked_for(rng, monkeypatch):
    salience = mx.array(rng.uniform(size=(1, 64, 360)).astype(np.float32))
    begun = []
    monkeypatch.setattr(pitch, "begin", lambda *arrays: begun.append(arrays))
    silence = pitch.Signal(
        lambda start, stop: np.zeros((1, stop - start), np.float32), 10000
    )
    finish = pitch.begin_all(lambda mel: salience, [silence], pitch.PitchSettings())
    ((strongest, strengths),) = begun
    assert (strongest.shape, strengths.shape) == ((64,), (64, 9))
    (found,) = finish()
    np.testing.assert_array_equal(
        found, pitch.decode_salience(np.array(salience[0]))[:63]
    )
