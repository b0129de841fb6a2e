"""What the content encoder hears in a generated segment, against the recording.

Two sounds may be equally far from a recording in their spectra, and one of them be
understood and the other not: where the features leave open what the recording does, the
mean of what it might do is the nearest, and consonants are blurred by it. The encoder that
made the features was trained to tell phones apart. So it hears both: the recording around
a segment as it is, and with the generated segment in its place::

    |<- MARGIN ->|<--- segment --->|<- MARGIN ->|
    |  recording |    generated    |  recording |

RVC has none of this; perceptual losses of a recogniser's features are common in speech
enhancement and synthesis (Germain et al. 2018, "Speech denoising with deep feature
losses").
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
from scipy.signal import firwin

from rvc_mlx.audio import SAMPLE_RATE
from rvc_mlx.models.contentvec import HOP_LENGTH, RECEPTIVE_FIELD
from rvc_mlx.training.forward import segments
from rvc_mlx.training.front_end import quicken

if TYPE_CHECKING:
    from rvc_mlx.loading import Encoder
    from rvc_mlx.training.presets import TrainingConfig

MARGIN = 40  # frames of 10 ms
_FRAME_RATE = 100
_FADE_SECONDS = 0.005  # from the recording to the generated sound and back
_SILENCE = 1e-6  # mean square, -60 dB
_ZERO_CROSSINGS = 16  # of the resampling filter, on each side
_KAISER = 8.0


class Listener:
    """Distance of two sounds by an encoder's features.

    Args:
        encode: 16 kHz audio ``[B, L]`` to features ``[B, F, C]``, float32.
        config: sample rate, hop and length of a segment.
    """

    def __init__(self, encode: Callable[[mx.array], mx.array], config: TrainingConfig):
        self._encode = encode
        self._hop = config.hop
        self._rate = config.model.sample_rate
        self._frames = config.segment_frames
        self._fade = _fade(config.segment_samples, round(_FADE_SECONDS * self._rate))

    def __call__(self, wave: mx.array, starts: mx.array, audio: mx.array) -> mx.array:
        """Mean over a segment's frames of 1 - cosine of the angle between features, 0 to 2.

        Where a recording is silent all around, nothing is heard: the encoder's first norm
        would make a voice of the faintest noise.

        Args:
            wave: recordings ``[B, T, hop]`` float32.
            starts: first frame of each segment, ``[B]`` int32.
            audio: generated segments ``[B, segment_samples]`` float32.
        """
        padded = mx.pad(wave, [(0, 0), (MARGIN, MARGIN), (0, 0)])
        real = segments(padded, starts, self._frames + 2 * MARGIN).flatten(1)
        before = MARGIN * self._hop
        after = before + audio.shape[1]
        own = real[:, before:after]
        mixed = own + mx.array(self._fade) * (audio - own)
        made = mx.concatenate([real[:, :before], mixed, real[:, after:]], axis=1)
        heard, wanted = mx.split(self._hear(mx.concatenate([made, real])), 2)
        distances = mx.mean(1 - _cosine(heard, mx.stop_gradient(wanted)), axis=1)
        loud = mx.mean(mx.square(real), axis=1) > _SILENCE
        return mx.mean(mx.where(loud, distances, 0))

    def _hear(self, wave: mx.array) -> mx.array:
        """Features of the frames whose middle lies in the segment."""
        features = self._encode(resampled(wave, self._rate, SAMPLE_RATE))
        middles = np.arange(features.shape[1]) * HOP_LENGTH + RECEPTIVE_FIELD / 2
        frames = middles * (_FRAME_RATE / SAMPLE_RATE) - MARGIN
        [inside] = np.nonzero((frames >= 0) & (frames < self._frames))
        return features[:, inside[0] : inside[-1] + 1]


def make_listener(encoder: Encoder, config: TrainingConfig) -> Listener:
    """A listener with the encoder's weights, in float32."""
    network, version = encoder.network(mx.float32), config.model.version
    quicken(network)
    return Listener(lambda audio: network(audio, version), config)


def _cosine(a: mx.array, b: mx.array) -> mx.array:
    norms = mx.sum(mx.square(a), axis=-1) * mx.sum(mx.square(b), axis=-1)
    return mx.sum(a * b, axis=-1) * mx.rsqrt(norms + 1e-6)


def _fade(samples: int, fade: int) -> np.ndarray:
    """Share of the generated sound ``[samples]``: 1 but for its ends."""
    places = np.minimum(np.arange(samples), np.arange(samples)[::-1])
    return np.minimum((places + 0.5) / fade, 1).astype(np.float32)


def resampled(wave: mx.array, rate: int, wanted: int) -> mx.array:
    """Audio at another sample rate, as one strided convolution.

    Args:
        wave: ``[B, L]`` float32 at ``rate``, L a multiple of ``rate / gcd``.
        rate: in Hz.
        wanted: in Hz.

    Returns:
        ``[B, L * wanted / rate]``.
    """
    weight, before, after, stride = _phases(rate, wanted)
    padded = mx.pad(wave, [(0, 0), (before, after)])[..., None]
    phases = mx.conv1d(padded, mx.array(weight), stride=stride)
    return phases[:, : wave.shape[1] // stride].flatten(1)


@cache
def _phases(rate: int, wanted: int) -> tuple[np.ndarray, int, int, int]:
    """Of a filter: its phases ``[up, taps, 1]``, zeros before and after, the stride.

    Output ``q * up + p`` lies at input ``q * down + p * down / up``.
    """
    up, down = wanted // math.gcd(rate, wanted), rate // math.gcd(rate, wanted)
    half = _ZERO_CROSSINGS * max(up, down)
    taps = up * firwin(2 * half + 1, 1 / max(up, down), window=("kaiser", _KAISER))
    reach = -(-half // up)
    inputs = np.arange(-reach, down + reach)
    distances = np.arange(up)[:, None] * down - inputs * up
    inside = np.abs(distances) <= half
    weight = np.where(inside, taps[np.clip(distances + half, 0, 2 * half)], 0)
    return weight[..., None].astype(np.float32), reach, reach + down, down
