import tempfile
from itertools import pairwise

import numpy as np
import pytest
import soxr
from scipy import signal

from rvc_mlx.audio import (
    high_pass,
    high_pass_design,
    high_pass_spool,
    resample,
    resample_blocks,
)
from rvc_mlx.loudness import (
    Envelope,
    LoudnessMatch,
    SilenceGate,
    limit_gain,
    match_loudness,
    normalize_gain,
    peak,
    rms_points,
)
from rvc_mlx.spool import Spool


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def noise(rng, n, scale=0.1):
    return (scale * rng.standard_normal(n)).astype(np.float32)


def cut(x, rng, largest=3000):
    """The array in blocks of random lengths, some of them empty."""
    start = 0
    while start < len(x):
        stop = start + int(rng.integers(0, largest))
        yield x[start:stop]
        start = stop


def spool_of(x, dtype=np.float32, memory=1 << 20):
    spool = Spool(dtype, memory)
    spool.append(x)
    return spool


# Spool

IN_A_FILE, IN_MEMORY = 0, 1 << 30


@pytest.mark.parametrize("memory", [IN_A_FILE, 9000, IN_MEMORY])
@pytest.mark.parametrize("expected", [0, 100, 9000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_spool_holds_what_was_appended(rng, dtype, memory, expected):
    x = rng.standard_normal(5000).astype(dtype)
    with Spool(dtype, memory, expected) as spool:
        for block in cut(x, rng):
            spool.append(block)
        assert len(spool) == 5000
        assert spool.read(0, 5000).dtype == dtype
        np.testing.assert_array_equal(spool.read(17, 4001), x[17:4001])
        np.testing.assert_array_equal(np.concatenate(list(spool.blocks(999))), x)
        assert spool.read(5, 5).shape == (0,)
        taken = spool.take()
        np.testing.assert_array_equal(taken, x)
        taken[:] = 0  # the caller's own
        assert len(spool) == 0


@pytest.mark.parametrize("memory", [IN_A_FILE, IN_MEMORY])
@pytest.mark.parametrize("length", [1, 2, 3, 50])
def test_spool_reflects_as_numpy_does(rng, length, memory):
    x = noise(rng, length)
    expected = np.pad(x, 170, mode="reflect") if length > 1 else np.repeat(x, 341)
    ranges = [(-170, length + 170), (-170, -100), (-3, 1), (-1, 0), (0, length)]
    ranges += [(length - 1, length + 2), (length, length + 1), (length + 1, length + 1)]
    ranges += [(-length + 1, 2 * length - 1), (-length, 2 * length), (-2, -1)]
    with spool_of(x, memory=memory) as spool:
        for start, stop in ranges:
            got = spool.read_reflected(start, stop)
            np.testing.assert_array_equal(got, expected[start + 170 : stop + 170])
        assert spool.read_reflected(-9, -9).shape == (0,)


def test_spool_moves_to_a_file_when_it_outgrows_its_memory(rng, monkeypatch):
    made = []
    make = tempfile.TemporaryFile
    monkeypatch.setattr(
        "tempfile.TemporaryFile", lambda **k: made.append(k) or make(**k)
    )
    with Spool(np.float32, memory=400) as spool:
        spool.append(noise(rng, 100))
        assert not made
        spool.append(noise(rng, 1))
        assert len(made) == 1
        spool.append(noise(rng, 500))
        assert len(made) == 1
        with spool.like(expected=101):
            assert len(made) == 2


def test_spool_gives_what_is_added_where_the_host_reads_it_soonest(rng):
    x = noise(rng, 100)
    with Spool(np.float32, memory=400) as spool:
        kept = spool.append(x)
        assert np.shares_memory(kept, spool.read(0, 100))
        np.testing.assert_array_equal(kept, x)
        assert spool.append(x) is x  # the spool is a file now


def test_spool_around_an_array_is_the_array(rng):
    x = noise(rng, 100)
    with Spool.around(x) as spool:
        assert np.shares_memory(spool.read(0, 100), x)
        with pytest.raises(ValueError, match="read-only"):
            spool.read(0, 100)[0] = 1
    assert x.flags.writeable


def test_spool_refuses_ranges_outside_and_wrong_arrays():
    with Spool() as spool:
        with pytest.raises(ValueError, match="outside"):
            spool.read(0, 1)
        with pytest.raises(ValueError, match="empty"):
            spool.read_reflected(0, 1)
        with pytest.raises(ValueError, match=r"takes \[n\]"):
            spool.append(np.zeros((2, 2)))
    with pytest.raises(ValueError, match="float32 or float64"):
        Spool(np.int16)


def test_spool_leaves_no_file_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    spool = spool_of(np.zeros(1000), memory=IN_A_FILE)
    assert spool.read(0, 3).shape == (3,)
    spool.close()
    assert list(tmp_path.iterdir()) == []


def test_spool_says_when_the_disk_is_full(monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    with Spool(memory=IN_A_FILE) as spool:
        monkeypatch.setattr("os.pwrite", full)
        with pytest.raises(OSError, match="TMPDIR"):
            spool.append(np.zeros(10))


# Resampling


@pytest.mark.parametrize(
    "rates",
    [(44100, 16000), (8000, 16000), (192000, 16000), (16000, 48000), (768000, 16000)],
)
def test_resampling_in_blocks_equals_one_shot(rng, rates):
    x = noise(rng, 50000)
    expected = soxr.resample(x, *rates, quality="VHQ")
    np.testing.assert_array_equal(resample(x, *rates), expected)
    got = np.concatenate(list(resample_blocks(cut(x, rng), *rates)))
    assert got.dtype == np.float32
    assert got.shape == (round(50000 * rates[1] / rates[0]),)
    np.testing.assert_allclose(got, expected, atol=1e-6, rtol=0)


def test_equal_rates_pass_through(rng):
    x = noise(rng, 100)
    assert resample(x, 16000, 16000) is x
    assert next(resample_blocks([x], 16000, 16000)) is x


def test_resampling_nothing_gives_nothing():
    assert list(resample_blocks([], 44100, 16000)) == []
    assert resample(np.zeros(0, np.float32), 44100, 16000).shape == (0,)


# High pass


def scipy_high_pass(x):
    b, a = signal.butter(5, 48, "high", fs=16000)
    return signal.filtfilt(b, a, x)


def test_the_high_pass_is_scipys_butterworth():
    b, a, steady, edge = high_pass_design()
    expected = signal.butter(5, 48, "high", fs=16000)
    for found, wanted in zip((b, a), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-14)
    # Which is ill-conditioned: another LAPACK may give other digits.
    np.testing.assert_allclose(steady, signal.lfilter_zi(b, a), rtol=1e-6)
    assert edge == 18


def test_high_pass_equals_filtfilt(rng):
    x = noise(rng, 20000) + np.float32(0.3)
    got = high_pass(x)
    assert got.dtype == np.float64
    np.testing.assert_array_equal(got, scipy_high_pass(x.astype(np.float64)))


def test_high_pass_removes_a_constant_and_keeps_speech():
    t = np.arange(16000) / 16000
    assert np.abs(high_pass(np.ones(16000))).max() < 1e-7
    tone = np.sin(2 * np.pi * 440 * t)
    assert np.abs(high_pass(tone) - tone)[2000:-2000].max() < 1e-3


@pytest.mark.parametrize("n", [1, 2, 3, 17, 18, 19, 20, 37, 160, 5000])
@pytest.mark.parametrize("block", [7, 100, 1 << 18])
def test_high_pass_in_blocks_equals_the_array_form(rng, n, block):
    x = noise(rng, n)
    expected = high_pass(x * np.float64(0.5))
    with spool_of(x) as source, high_pass_spool(source, block, gain=0.5) as got:
        assert len(got) == n
        # Nothing is left out to settle: the same operations, rounded to float32.
        np.testing.assert_array_equal(got.read(0, n), expected.astype(np.float32))


@pytest.mark.parametrize("offset", [0.0, 0.9])
def test_high_pass_in_blocks_agrees_before_rounding(rng, monkeypatch, offset):
    x = noise(rng, 60000) + np.float32(offset)
    x[30000:] -= np.float32(offset)  # a step is what takes longest to settle
    like = Spool.like
    monkeypatch.setattr(
        Spool, "like", lambda self, dtype, expected: like(self, np.float64, expected)
    )
    with spool_of(x) as source, high_pass_spool(source, 1234) as got:
        expected = scipy_high_pass(x.astype(np.float64))
        # Both are off by 1e-8 to 5e-8, as rounding grows in a filter of this form.
        np.testing.assert_allclose(got.read(0, 60000), expected, atol=1e-7, rtol=0)


def test_high_pass_of_nothing_is_refused():
    with pytest.raises(ValueError, match="empty"):
        high_pass(np.zeros(0))
    with Spool() as source, pytest.raises(ValueError, match="empty"):
        high_pass_spool(source)


# Peaks


def test_peaks_and_gains(rng):
    x = noise(rng, 5000)
    x[1234] = -3.0
    assert peak(cut(x, rng)) == 3.0
    assert peak([]) == 0.0
    assert normalize_gain(3.0) == pytest.approx(0.95 / 3)
    assert limit_gain(3.0) == pytest.approx(0.99 / 3)
    assert [normalize_gain(v) for v in (0.0, 0.5, 0.95)] == [1, 1, 1]
    assert [limit_gain(v) for v in (0.0, 0.5, 0.99)] == [1, 1, 1]


# Loudness envelope


def centred_rms(x, hop):
    """The definition: zero padding of half a frame, frames of 2 hop every hop."""
    p = np.pad(x.astype(np.float64), hop)
    count = 1 + len(x) // hop
    frames = [p[i * hop : i * hop + 2 * hop] for i in range(count)]
    return np.array([np.sqrt(np.sum(f**2) / (2 * hop)) for f in frames])


@pytest.mark.parametrize("n", [0, 1, 159, 160, 161, 319, 320, 321, 8001])
def test_rms_points_follow_the_definition(rng, n):
    x = noise(rng, n)
    expected = centred_rms(x, 160)
    for blocks in (
        [x],
        cut(x, rng, 100),
        cut(x, rng, 1000),
        (x[i:][:1] for i in range(n)),
    ):
        got = rms_points(blocks, 160)
        assert got.shape == (1 + n // 160,)
        np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_envelope_can_be_read_while_it_grows(rng):
    x = noise(rng, 1000)
    envelope = Envelope(100)
    envelope.add(x[:450])
    np.testing.assert_allclose(envelope.points(), centred_rms(x[:450], 100))
    envelope.add(x[450:])
    np.testing.assert_allclose(envelope.points(), centred_rms(x, 100))
    with pytest.raises(ValueError, match="hop"):
        Envelope(0)


def stretched(points, total):
    """Linear interpolation with align_corners False, sample by sample."""
    out = np.empty(total)
    for i in range(total):
        p = min(max((i + 0.5) * len(points) / total - 0.5, 0), len(points) - 1)
        low = int(p)
        high = min(low + 1, len(points) - 1)
        out[i] = points[low] + (p - low) * (points[high] - points[low])
    return out


@pytest.mark.parametrize("rate", [0.0, 0.25, 0.9])
def test_match_loudness_follows_the_formula(rng, rate):
    source, y = noise(rng, 20000, 0.3), noise(rng, 4000)
    y[1000:2500] = 0
    rms1 = stretched(centred_rms(source, 8000), 4000)
    rms2 = np.maximum(stretched(centred_rms(y, 1000), 4000), 1e-6)
    expected = y * rms1 ** (1 - rate) * rms2 ** (rate - 1)
    got = match_loudness(y, 2000, source, rate)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=2e-6)  # float32
    points = centred_rms(source, 8000), centred_rms(y, 1000)
    match = LoudnessMatch(*points, 4000, rate)
    edges = [0, 1, 700, 700, 2900, 4000]
    pieces = [match.apply(y[a:b], a) for a, b in pairwise(edges)]
    np.testing.assert_allclose(np.concatenate(pieces), got, rtol=1e-6)


def test_match_loudness_edges():
    empty = np.zeros(0, np.float32)
    source = np.ones(100, np.float32)
    assert match_loudness(empty, 48000, source, 0.5).shape == (0,)
    y = np.ones(10, np.float32)
    assert match_loudness(y, 48000, source, 1.0) is y
    silent = match_loudness(np.zeros(10, np.float32), 48000, source, 0.0)
    np.testing.assert_array_equal(silent, np.zeros(10))
    assert not match_loudness(y, 48000, np.zeros(100), 0.5).any()


# Silence


def gate_of(x, **options):
    with spool_of(x) as spool:
        return SilenceGate(spool, **options)


def test_gate_is_closed_in_silence_only_and_fades_inside_it(rng):
    x = noise(rng, 48000)
    x[16000:32000] = 0  # 1 s to 2 s
    gate = gate_of(x)
    gain = gate.gain(0, 3 * 48000, 48000)
    assert gain.dtype == np.float32
    np.testing.assert_array_equal(gain[:48000], 1)
    np.testing.assert_array_equal(gain[96000:], 1)
    np.testing.assert_array_equal(gain[48480 : 96000 - 480], 0)
    np.testing.assert_allclose(gain[48000:48480], 1 - np.arange(480) / 480, atol=1e-6)
    np.testing.assert_allclose(gain[95520:96000], np.arange(480) / 480, atol=1e-6)


@pytest.mark.parametrize("rate", [16000, 32000, 40000, 44100, 48000])
def test_gate_is_the_same_in_pieces(rng, rate):
    x = noise(rng, 40000)
    x[3000:9000] = 0
    x[20000:30000] = 0
    gate = gate_of(x)
    total = round(len(x) * rate / 16000)
    whole = gate.gain(0, total, rate)
    edges = np.sort(np.append(rng.integers(0, total, 30), [0, total]))
    pieces = [gate.gain(a, b, rate) for a, b in pairwise(edges)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)
    assert np.count_nonzero(np.diff(whole < 1)) == 4  # two silences
    sound = noise(rng, total)
    gated = [gate.apply(sound[a:b], a, rate) for a, b in pairwise(edges)]
    np.testing.assert_array_equal(np.concatenate(gated), sound * whole)
    assert gate.apply(sound[:10], 0, rate).base is sound  # not copied for nothing


def test_gate_leaves_short_silence_and_quiet_sound(rng):
    x = noise(rng, 16000)
    x[3200:6240] = 0  # 190 ms
    assert gate_of(x).gain(0, 16000, 16000).min() == 1
    assert gate_of(x, min_seconds=0.19).gain(0, 16000, 16000).min() == 0
    quiet = np.full(16000, 1.1e-4, np.float32)
    assert gate_of(quiet).gain(0, 16000, 16000).min() == 1
    assert gate_of(quiet, threshold_db=-79).gain(0, 16000, 16000).max() == 0


def test_gate_has_no_fade_at_the_ends_of_the_recording(rng):
    x = np.concatenate([np.zeros(8000), noise(rng, 1600) + 1, np.zeros(8050)])
    gain = gate_of(x).gain(0, 18000, 16000)
    assert gain[0] == 0
    np.testing.assert_array_equal(gain[7840], 0)
    np.testing.assert_array_equal(gain[8000:9600], 1)
    assert not gain[9760:].any()  # also beyond the end of the source


@pytest.mark.parametrize("n", [1, 160, 161, 16000])
def test_gate_of_silence_is_closed_throughout(n):
    gain = gate_of(np.zeros(n)).gain(0, 3 * n + 7, 48000)
    np.testing.assert_array_equal(gain, np.zeros(3 * n + 7))


def test_gate_of_one_loud_sample_is_open():
    assert gate_of(np.ones(1)).gain(0, 5, 48000).min() == 1
    assert gate_of(np.zeros(0)).gain(0, 5, 48000).min() == 1
    zero = gate_of(np.append(np.zeros(8000), 1.0), fade_seconds=0).gain(0, 8001, 16000)
    assert zero[7999] == 0
    assert zero[8000] == 1
