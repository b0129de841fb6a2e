"""A voice with less noise and a wider latent: ``python -m recipes.sharpen VOICE RECORDINGS``.

    python -m recipes.sharpen VOICE RECORDINGS --encoder E --rmvpe R --export SHARPENED

A vocoder that learnt from noisy latents takes a part of every deviation from the mean for
noise, as Wiener's filter does, and answers with less: its spectra are too smooth. Statistical
synthesis knows that, and gives speech its global variance back (Toda & Tokuda 2007, IEICE
Trans. E90-D). Here the prior's noise becomes ``--noise`` times as large, and each channel of
the latent deviates ``1 + strength * noise / signal`` times as much, in variances that are
measured before, but never so much that more noise is left than there was.

Both go into weights, so they cost nothing in a conversion. The logarithm of the noise's size
comes out of the text encoder's last layer: its bias is moved. The vocoder's first layer is a
convolution: ``W (mean + k (z - mean)) + b = (k W) z + (b + W ((1 - k) mean))``.
At the ends of what the vocoder is given, within half a kernel, the convolution reads zeros
instead of ``z``, and there it is not the same; a conversion here has context there, which it
does not keep.

Train on, and average, voices from before that.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from recipes.average import MODEL_HASH, SHARPENED
from rvc_mlx import VoiceConverter, load
from rvc_mlx.arrays import to_host
from rvc_mlx.audio import SAMPLE_RATE
from rvc_mlx.audio_io import load_audio
from rvc_mlx.batch import AUDIO_SUFFIXES
from rvc_mlx.checkpoint import Checkpoint, name_and_hash, save_checkpoint
from rvc_mlx.decoding import plan_of, sample_latents
from rvc_mlx.engine import DEVICES
from rvc_mlx.job import Job, Nets, prepare_all
from rvc_mlx.loading import read_weights
from rvc_mlx.noise import Noise
from rvc_mlx.options import ConversionOptions
from rvc_mlx.schedule import begin_f0
from rvc_mlx.segments import FRAME
from rvc_mlx.spool import Spool

log = logging.getLogger("recipes")

WEIGHT, BIAS = "dec.conv_pre.weight", "dec.conv_pre.bias"  # what the latent enters by
PRIOR = "enc_p.proj.bias"  # means, then logarithms of the noise's sizes
MOST_STRENGTH = 2.0
LEAST_NOISE = 0.01
_LEAST_SIGNAL = 0.02  # of the variance of the middle: no channel is all noise


class Spread(NamedTuple):
    """What a voice's latent is made of, by channel.

    Attributes:
        mean: ``[inter_channels]`` float64.
        signal: variance of what another seed leaves, above 0.
        noise: variance between seeds.
    """

    mean: np.ndarray
    signal: np.ndarray
    noise: np.ndarray

    def factors(self, strength: float, noise: float) -> np.ndarray:
        """How many times as far each channel is to deviate from its mean.

        Args:
            strength: 0 or more.
            noise: how many times as large its noise becomes before; no channel gets more
                of it than it had.
        """
        return np.minimum(1 + strength * self.noise / self.signal, max(1 / noise, 1))


def latents(
    converter: VoiceConverter,
    audio: np.ndarray,
    options: Sequence[ConversionOptions],
) -> Iterator[np.ndarray]:
    """What conversions give the vocoder for a recording, without an index.

    The noise is the host's, also where a GPU converts and would draw its own.

    Args:
        converter: of the voice.
        audio: ``[n]`` float32 at 16 kHz.
        options: of each conversion, alike but for the seed.

    Yields:
        The latents ``[conversions, T, inter_channels]`` float32 of each segment, 100 frames per
        second, without its context.

    Raises:
        ValueError: the recording is too short, or options do not fit the voice.
    """
    voice, encoder = converter.voice, converter.encoder
    nets = Nets(voice, encoder, converter.pitch_net, None)
    with Job(nets, Spool.around(audio), len(audio), SAMPLE_RATE, options[0]) as job:
        prepare_all(nets, [job])
        if job.failure:
            raise job.failure
        begin_f0(nets, [job], options[0])()
        for segment in job.segments:
            heard = job.heard_on_host(segment.start, segment.start + segment.samples)
            features = np.repeat(encoder.encode(heard, voice.config.version), 2, axis=0)
            made = []
            for one in options:
                piece = replace(job.piece(segment), noise=Noise(one.seed))
                plan, given = plan_of(voice, [piece]), features[None, : segment.frames]
                z = to_host(sample_latents(voice, given, [piece], plan))
                made.append(z[0, segment.first : segment.last])
            yield np.stack(made)


def audible(audio: np.ndarray) -> np.ndarray:
    """Which of the 100 frames per second of ``[n]`` at 16 kHz are within 40 dB of the loudest."""
    frames = len(audio) // FRAME + 1
    power = np.pad(audio.astype(np.float64) ** 2, (0, frames * FRAME - len(audio)))
    power = power.reshape(frames, FRAME).sum(axis=1)
    return power >= 1e-4 * power.max()


def spread_of(
    converter: VoiceConverter, recordings: Sequence[Path], seed: int
) -> Spread:
    """The latent's over the audible frames of recordings, each converted with two seeds.

    Raises:
        ValueError: one does not fit; names it.
        OSError: one cannot be read.
    """
    options = [ConversionOptions(seed=n) for n in (seed, seed + 1)]
    sums, frames = np.zeros((3, converter.voice.config.inter_channels)), 0
    for path in recordings:
        audio = load_audio(path)
        try:
            made = list(latents(converter, audio, options))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        heard = np.concatenate(made, axis=1)[:, audible(audio)]
        one, other = heard.astype(np.float64)
        middle, half = (one + other) / 2, (one - other) / 2
        sums += [part.sum(axis=0) for part in (middle, middle**2, half**2)]
        frames += len(one)
    log.info(f"measured {frames} frames of {len(recordings)} recordings")
    mean, square, half_square = sums / frames
    # The middle of two holds half of the noise's variance, and so does half their difference.
    variance = square - mean**2
    signal = np.maximum(variance - half_square, _LEAST_SIGNAL * variance)
    return Spread(mean, signal, 2 * half_square)


def fold(
    tensors: Mapping[str, np.ndarray],
    factors: np.ndarray,
    mean: np.ndarray,
    noise: float,
) -> dict[str, np.ndarray]:
    """Tensors of a voice whose vocoder makes of ``z`` what it made of a sharper one.

    Args:
        tensors: of a voice, in PyTorch's layout: the weight is ``[out, in, taps]``.
        factors: how many times as large deviations from the mean become, ``[in]``.
        mean: of the latent, ``[in]``.
        noise: how many times as large the prior's noise becomes, above 0.

    Returns:
        All tensors, of the types that they had.

    Raises:
        ValueError: a result is not finite, or does not fit its type; names the tensor.
    """
    weight, bias = (tensors[name].astype(np.float64) for name in (WEIGHT, BIAS))
    moved = weight.sum(axis=2) @ ((1 - factors) * mean)
    prior = tensors[PRIOR].astype(np.float64)
    prior[len(prior) // 2 :] += np.log(noise)
    folded = {
        WEIGHT: factors[:, None] * weight,
        BIAS: bias + moved,
        PRIOR: prior,
    }
    result = dict(tensors)
    for name, value in folded.items():
        with np.errstate(over="ignore"):
            result[name] = value.astype(tensors[name].dtype)
        if not np.isfinite(result[name]).all():
            raise ValueError(
                f"{name}: {np.abs(value).max():.3g} does not fit {result[name].dtype}; "
                "expected a voice that has not diverged"
            )
    return result


def read_voice(path: Path) -> Checkpoint:
    """A voice whose vocoder begins with a convolution that is stored as it is.

    Raises:
        ValueError: it is no such voice.
        OSError: it cannot be read.
    """
    voice = read_weights(path, "voice")
    if WEIGHT not in voice.tensors or BIAS not in voice.tensors:
        raise ValueError(
            f"{path}: there is no {WEIGHT}; expected a voice with the HiFi-GAN vocoder, "
            "without weight norm there: extract the voice first (rvc-mlx extract)"
        )
    return voice


def recordings_of(folder: Path, limit: int) -> list[Path]:
    """At most ``limit`` of the sound files in a folder and below, evenly chosen, sorted.

    Raises:
        FileNotFoundError: there are none.
    """
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES)
    if not found:
        raise FileNotFoundError(
            f"{folder}: no sound files; expected a folder with some"
        )
    count = min(limit, len(found))
    chosen = np.linspace(0, len(found) - 1, count).round().astype(int)
    return [found[i] for i in chosen]


def sharpen(
    voice: Checkpoint, spread: Spread, strength: float, noise: float, path: Path
) -> None:
    """Write a sharpened voice; what it tells is the voice's, and what was done to it.

    As with a mean, its weights are of no run, so it has no ``model_hash``.

    Raises:
        ValueError: a weight does not fit its type.
        OSError: it cannot be written.
    """
    tensors = fold(voice.tensors, spread.factors(strength, noise), spread.mean, noise)
    kept = {k: v for k, v in voice.metadata.items() if k != MODEL_HASH}
    told = f"{name_and_hash(voice.path)}, strength {strength:g}, noise * {noise:g}"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, tensors, {**kept, SHARPENED: told})


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("voice", type=Path)
    parser.add_argument("recordings", type=Path, help="folder, to measure the latent")
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument("--rmvpe", type=Path, required=True)
    parser.add_argument(
        "--strength", type=float, default=0.7,
        help=f"of the deviations from the mean, 0 to {MOST_STRENGTH:g} (default: 0.7)",
    )  # fmt: skip
    parser.add_argument(
        "--noise", type=float, default=0.25,
        help=f"of the prior's noise, {LEAST_NOISE:g} to 1 (default: 0.25)",
    )  # fmt: skip
    parser.add_argument("--limit", type=int, default=40, help="recordings at most")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the noise, and the next"
    )
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--export", type=Path, required=True)
    return parser.parse_args(arguments)


def _check(options: argparse.Namespace) -> None:
    if not 0 <= options.strength <= MOST_STRENGTH:  # also when it is not a number
        raise ValueError(
            f"--strength {options.strength:g}; expected 0 to {MOST_STRENGTH:g}, 0 changes "
            "nothing"
        )
    if not LEAST_NOISE <= options.noise <= 1:
        raise ValueError(
            f"--noise {options.noise:g}; expected {LEAST_NOISE:g} to 1, 1 changes nothing"
        )
    if options.limit < 1:
        raise ValueError(f"--limit {options.limit}; expected 1 or more")
    if options.export.suffix != ".safetensors":
        raise ValueError(f"--export {options.export}; expected a .safetensors file")
    if options.export.resolve() == options.voice.resolve():
        raise ValueError(
            f"--export {options.export} is the voice itself; expected another file"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Sharpen, and say what was written; returns the exit code."""
    options = _parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        _check(options)
        voice = read_voice(options.voice)
        if SHARPENED in voice.metadata:
            raise ValueError(
                f"{options.voice} is sharpened already; give the voice from before that"
            )
        recordings = recordings_of(options.recordings, options.limit)
        converter = load(
            options.voice,
            encoder=options.encoder,
            rmvpe=options.rmvpe,
            device=options.device,
            precision="f32",
        )
        spread = spread_of(converter, recordings, options.seed)
        factors = spread.factors(options.strength, options.noise)
        shown = ", ".join(f"{k:.2f}" for k in np.quantile(factors, (0, 0.5, 1)))
        log.info(f"factors (least, median, most): {shown}")
        sharpen(voice, spread, options.strength, options.noise, options.export)
    except (ValueError, OSError) as error:
        log.error(f"recipes.sharpen: {' '.join(str(error).split())}")
        return 1
    log.info(f"wrote {options.export}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
