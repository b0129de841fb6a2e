"""Resampling and the 48 Hz high pass, for arrays and for streams of blocks.

What meets a whole recording has a form that works block by block, so that an hour of
audio costs no more memory than a minute. Loudness is in ``loudness``, files are in
``audio_io``.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import cache

import numpy as np
import soxr

from .machine import in_parallel
from .spool import Spool

SAMPLE_RATE = 16000  # Hz: what the content encoder and the pitch nets hear
HIGH_PASS_ORDER, HIGH_PASS_HZ = 5, 48.0
# Samples after which the filter's start is forgotten, to 1e-15; on both sides of a block
# they make a length that is quick to transform.
SETTLED = 8192
_QUALITY = "VHQ"


def resample(x: np.ndarray, rate_in: int, rate_out: int) -> np.ndarray:
    """Return ``x`` at another sample rate (soxr, very high quality).

    Args:
        x: ``[n]`` float32.
        rate_in: its rate, Hz.
        rate_out: the rate wanted, Hz.

    Returns:
        ``[round(n * rate_out / rate_in)]`` float32; ``x`` itself for equal rates.
    """
    if rate_in == rate_out:
        return x
    x = np.ascontiguousarray(x, np.float32)
    return soxr.resample(x, rate_in, rate_out, quality=_QUALITY)


def resample_blocks(
    blocks: Iterable[np.ndarray], rate_in: int, rate_out: int
) -> Iterator[np.ndarray]:
    """Yield a stream of float32 blocks ``[n]`` at another sample rate.

    Joined, the blocks are what ``resample`` gives for the joined input, however it is
    cut. Equal rates pass the blocks through.
    """
    if rate_in == rate_out:
        yield from blocks
        return
    stream = soxr.ResampleStream(rate_in, rate_out, 1, "float32", _QUALITY)
    for block in blocks:
        out = stream.resample_chunk(np.ascontiguousarray(block, np.float32))
        if len(out):
            yield out
    out = stream.resample_chunk(np.empty(0, np.float32), last=True)
    if len(out):
        yield out


# ``scipy.signal.butter`` of these numbers, and its ``lfilter_zi``. To import that takes
# longer than a GPU needs for the first minutes of audio.
_NUMERATOR = (
    0.9699606451838447, -4.849803225919223, 9.699606451838447,
    -9.699606451838447, 4.849803225919223, -0.9699606451838447,
)  # fmt: skip
_DENOMINATOR = (
    1.0, -4.939001819168364, 9.757863526739543,
    -9.639544849413458, 4.761506797356209, -0.9408236532054606,
)  # fmt: skip
_STEADY = (
    -0.9699604796995847, 3.8798419288925783, -5.819762908173043,
    3.879841948472456, -0.9699604894923387,
)  # fmt: skip


@cache
def high_pass_design() -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Return b, a, the steady state of the filter for a unit step, and its padding.

    Returns:
        ``[6]``, ``[6]`` with a[0] = 1, and ``[5]`` float64; samples.
    """
    b, a, steady = map(np.array, (_NUMERATOR, _DENOMINATOR, _STEADY))
    return b, a, steady, 3 * len(a)


@cache
def _high_pass_power(n: int) -> np.ndarray:
    """Squared gain of the filter at the frequencies of ``n`` samples' spectrum.

    Source: the Butterworth response; the bilinear transform makes tangents of it.
    """
    turns = np.tan(np.pi * np.arange(n // 2 + 1) / n)
    turns[-1] = np.inf if n % 2 == 0 else turns[-1]
    with np.errstate(divide="ignore"):
        ratio = np.tan(np.pi * HIGH_PASS_HZ / SAMPLE_RATE) / turns
    return 1 / (1 + ratio ** (2 * HIGH_PASS_ORDER))


def high_pass(x: np.ndarray) -> np.ndarray:
    """Return ``x`` without what lies below 48 Hz, with no phase shift.

    A Butterworth filter of order 5 run forwards and backwards in float64 (float32
    diverges: its poles lie within 0.02 of the unit circle). Both ends are extended by
    18 odd-mirrored samples, or by n - 1 where the signal is 18 samples or shorter.

    Args:
        x: ``[n]`` float at 16 kHz, n >= 1.

    Returns:
        ``[n]`` float64.

    Raises:
        ValueError: if ``x`` is empty.

    Source:
        RVC, ``infer/modules/vc/pipeline.py``: ``signal.filtfilt(bh, ah, audio)``.
    """
    b, a, *_ = high_pass_design()
    x = np.asarray(x, np.float64)
    edge = edge_samples(len(x))
    from scipy import signal

    return signal.filtfilt(b, a, x, padlen=edge)


def edge_samples(count: int) -> int:
    """Return by how many samples ``high_pass`` extends both ends of a recording.

    Args:
        count: samples of the recording.

    Raises:
        ValueError: if there are none.
    """
    if count == 0:
        raise ValueError("there is no audio to filter: the recording is empty")
    return min(high_pass_design()[-1], count - 1)


HighPass = Callable[[Sequence[Spool], Sequence[float]], list[Spool]]
"""What filters recordings: ``high_pass_spools``, or as it does on a device."""


def high_pass_spools(sources: Sequence[Spool], gains: Sequence[float]) -> list[Spool]:
    """``high_pass_spool`` of several recordings, each with its gain."""
    pairs = list(zip(sources, gains, strict=True))
    filtered = in_parallel(lambda pair: high_pass_spool(pair[0], gain=pair[1]), pairs)
    with ExitStack() as made:
        found = [made.enter_context(spool) for spool in filtered]
        made.pop_all()
    return found


def high_pass_spool(source: Spool, block: int = 1 << 16, gain: float = 1.0) -> Spool:
    """Return ``high_pass`` of a long recording, block by block, on several threads.

    Each block is filtered together with its surroundings, where what they lack of the
    rest of the recording fades::

                |....settles....|-------block-------|....settles....|

    Near the ends that is done forwards and backwards, from the steady state of the first
    sample. Elsewhere the two together multiply the spectrum by the filter's power, which
    is nearer to the exact result and runs on several threads.

    Args:
        source: the recording at 16 kHz, at least one sample.
        block: samples of the result made at once.
        gain: factor applied to the recording first (``normalize_gain``).

    Returns:
        A float32 spool of the same length, kept as the source is; the arithmetic before
        is float64.

    Raises:
        ValueError: if the spool is empty.
    """
    from scipy import fft, signal

    b, a, steady, _ = high_pass_design()
    count = len(source)
    edge = edge_samples(count)

    def run(x: np.ndarray) -> np.ndarray:
        return signal.lfilter(b, a, x, zi=steady * x[0])[0]

    def filtered(start: int) -> np.ndarray:
        stop = min(start + block, count)
        if start >= SETTLED and start + block + SETTLED <= count:
            x = source.read(start - SETTLED, stop + SETTLED).astype(np.float64)
            y = fft.irfft(_high_pass_power(len(x)) * fft.rfft(gain * x), len(x))
            return y[SETTLED : SETTLED + block]
        low = max(start - SETTLED, -edge)
        x = np.concatenate(
            _odd_extended(source, low, min(stop + SETTLED, count + edge)), dtype=float
        )
        forwards = run(gain * x)[start - low :]
        return run(forwards[::-1])[::-1][: stop - start]

    result = source.like(np.float32, count)
    try:
        for y in in_parallel(filtered, range(0, count, block)):
            result.append(y)
    except BaseException:
        result.close()
        raise
    return result


def _odd_extended(source: Spool, start: int, stop: int) -> list[np.ndarray]:
    """Return samples around which ``edge_samples`` are point-mirrored at both ends.

    Args:
        source: a recording of ``count`` samples.
        start: the first, from ``-edge`` on.
        stop: the end, up to ``count + edge``.

    Returns:
        What comes before the recording, float64; what lies in it, as it is stored; what
        comes after it, float64. Together ``stop - start`` samples.
    """
    count = len(source)
    edge = edge_samples(count)
    before = after = np.empty(0)
    if start < 0:
        head = source.read(0, edge + 1).astype(np.float64)
        before = (2 * head[0] - head[:0:-1])[edge + start :]
    if stop > count:
        tail = source.read(count - edge - 1, count).astype(np.float64)
        after = (2 * tail[-1] - tail[-2::-1])[: stop - count]
    return [before, source.read(max(start, 0), min(stop, count)), after]
