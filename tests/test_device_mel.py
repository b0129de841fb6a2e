"""The log-mel of a GPU against the host's, and F0 found through it."""

import mlx.core as mx
import numpy as np
import pytest

from rvc_mlx import pitch
from rvc_mlx.device_mel import device_log_mel
from rvc_mlx.engine import MLXEngine, OpenVINOEngine
from rvc_mlx.loading import PitchNet, read_weights
from rvc_mlx.spectral import HOP_LENGTH, N_FFT, log_mel


@pytest.mark.parametrize("n_mels", [32, 128])
@pytest.mark.parametrize("frames", [1, 2, 97])
def test_mel_is_the_hosts(speech, frames, n_mels):
    samples = speech[8000 : 8000 + (frames - 1) * HOP_LENGTH + N_FFT]
    found, wanted = device_log_mel(samples, n_mels), log_mel(samples, n_mels)
    assert (found.shape, found.dtype) == (wanted.shape, mx.float32)
    assert np.abs(found - wanted).max() < 1e-2
    on_gpu = mx.default_device() == mx.Device(mx.gpu)
    assert np.abs(found - wanted).mean() < (3e-3 if on_gpu else 1e-3)  # TF32


@pytest.mark.parametrize("shape", [(1,), (5,), (2, 3)])
@pytest.mark.parametrize("frames", [1, 97])
def test_mels_together_are_what_each_is_alone(speech, frames, shape):
    n = (frames - 1) * HOP_LENGTH + N_FFT
    clips = [speech[start : start + n] for start in 4000 * np.arange(np.prod(shape))]
    found = device_log_mel(mx.array(np.reshape(clips, (*shape, n))), 128)
    assert found.shape == (*shape, frames, 128)
    rows = np.array(found).reshape(-1, frames, 128)
    for clip, mel in zip(clips, rows, strict=True):
        alone = np.array(device_log_mel(clip, 128))
        assert alone.std() > 0.5
        assert np.abs(mel - alone).max() < 1e-4


def test_transforms_have_few_lengths(monkeypatch):
    """However many mels are made together."""
    lengths, rfft = set(), mx.fft.rfft

    def watched(windows):
        lengths.add(windows.size // N_FFT)
        return rfft(windows)

    monkeypatch.setattr(mx.fft, "rfft", watched)
    for count in range(1, 7):
        for frames in range(150, 170):
            samples = mx.zeros((count, (frames - 1) * HOP_LENGTH + N_FFT))
            device_log_mel(samples, 32)
    assert len(lengths) <= 20
    assert max(lengths) < 6 * 169 * 9 / 8


def test_silence_is_the_floor():
    found = device_log_mel(np.zeros(N_FFT, np.float32), 128)
    assert np.allclose(found, np.log(1e-5))


def salience(mel):
    """Bands as bins: what is loud there is the pitch."""
    xp = mx if isinstance(mel, mx.array) else np
    return xp.pad(xp.exp(mel) * 50, ((0, 0), (0, 0), (0, 232)))


@pytest.mark.parametrize("padding", ["reflect", "constant"])
@pytest.mark.parametrize("batch", [0, 4000])
def test_curves_are_those_of_the_host(speech, padding, batch):
    """Short chunks, filled up, alone and together."""
    long = np.tile(speech, 3)
    signal = pitch.Signal(lambda start, stop: long[None, start:stop], len(long))
    common = {"mel_padding": padding, "chunk_frames": 1088, "batch_frames": batch}
    host = pitch.PitchSettings(**common)
    device = pitch.PitchSettings(**common, log_mel=device_log_mel)
    [wanted] = pitch.estimate_all(salience, [signal], host)
    [found] = pitch.estimate_all(salience, [signal], device)
    assert (wanted > 0).any()
    assert ((found > 0) == (wanted > 0)).all()
    assert np.allclose(found, wanted, rtol=1e-3)


@pytest.mark.parametrize("padding", ["reflect", "constant"])
@pytest.mark.parametrize("batch", [0, 1500, 10**5])
def test_curves_together_are_what_each_is_alone(speech, padding, batch):
    """Equal ones, nearly equal ones, several chunks, and the shortest."""
    lengths = [(3, 16_000), (1, 16_050), (2, 16_200), (2, 16_000 * 14), (2, 513)]
    talk = np.tile(speech, 4)
    several = [
        np.stack([talk[5000 * i + 7000 :][:n] for i in range(count)])
        for count, n in lengths
    ]
    settings = pitch.PitchSettings(
        mel_padding=padding,
        chunk_frames=1088,
        batch_frames=batch,
        log_mel=device_log_mel,
    )

    def signal(clips):
        read = mx.array(clips)
        return pitch.Signal(
            lambda start, stop: read[:, start:stop], clips.shape[1], len(clips)
        )

    found = pitch.estimate_all(salience, list(map(signal, several)), settings)
    each = [clip for clips in several for clip in clips]
    assert [len(f0) for f0 in found] == [len(clip) // HOP_LENGTH + 1 for clip in each]
    for clip, f0 in zip(each, found, strict=True):
        [alone] = pitch.estimate_all(salience, [signal(clip[None])], settings)
        assert (alone > 0).any()
        assert ((f0 > 0) == (alone > 0)).all()
        assert np.allclose(f0, alone, rtol=1e-4)


def test_exact_engines_and_hosts_keep_the_exact_mel(speech):
    exact = log_mel(speech, 128)
    for engine in (
        MLXEngine(mx.Device(mx.cpu), "f32"),
        MLXEngine(mx.Device(mx.gpu), "f32", tf32=False),
    ):
        assert np.array_equal(engine.log_mel(speech, 128), exact)


def test_hosts_spread_chunks_over_threads(small_models):
    """F0 is found so where the mel is known as the host's."""
    pytest.importorskip("openvino")
    engines = [OpenVINOEngine("f32", None), MLXEngine(mx.Device(mx.cpu), "f32")]
    for engine in engines:
        net = PitchNet(read_weights(small_models.rmvpe, "rmvpe"), engine)
        assert net.settings().log_mel is log_mel
