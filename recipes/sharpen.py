"""A voice with less noise and a wider latent: ``python -m recipes.sharpen VOICE RECORDINGS``.

    python -m recipes.sharpen VOICE RECORDINGS --encoder E --rmvpe R --export SHARPENED

A vocoder that learnt from noisy latents takes a part of every deviation from the mean for
noise, and answers with less: its spectra are too smooth. Statistical synthesis knows that,
and gives speech its global variance back (Toda & Tokuda 2007, IEICE Trans. E90-D). Here the
prior's noise becomes ``--noise`` times as large, and what is left of the latent deviates
``--factor`` times as much.

Both go into weights, so they cost nothing in a conversion. The logarithm of the noise's size
comes out of the text encoder's last layer: its bias is moved. The vocoder's first layer is a
convolution: ``W (mean + factor (z - mean)) + b = (factor W) z + (b + (1 - factor) W mean)``.
At the ends of what the vocoder is given, within half a kernel, the convolution reads zeros
instead of ``z``, and there it is not the same; a conversion here has context there, which it
does not keep.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from recipes.average import MODEL_HASH
from rvc_mlx import VoiceConverter, load
from rvc_mlx.arrays import to_host
from rvc_mlx.audio import SAMPLE_RATE
from rvc_mlx.audio_io import load_audio
from rvc_mlx.batch import AUDIO_SUFFIXES
from rvc_mlx.checkpoint import Checkpoint, name_and_hash, save_checkpoint
from rvc_mlx.decoding import plan_of, sample_latents
from rvc_mlx.engine import DEVICES
from rvc_mlx.job import Job, Nets, prepare_all
from rvc_mlx.loading import PitchNet, read_weights
from rvc_mlx.options import ConversionOptions
from rvc_mlx.pitch import Signal, estimate_all
from rvc_mlx.spool import Spool

log = logging.getLogger("recipes")

SHARPENED = (
    "sharpened"  # in the metadata: the voice before, with its hash, and the factors
)
WEIGHT, BIAS = "dec.conv_pre.weight", "dec.conv_pre.bias"  # what the latent enters by
PRIOR = "enc_p.proj.bias"  # means, then logarithms of the noise's sizes
LEAST, MOST = 0.5, 2.0  # factors
LEAST_NOISE = 0.01


def latents(
    converter: VoiceConverter, audio: np.ndarray, options: ConversionOptions
) -> Iterator[np.ndarray]:
    """What a conversion gives the vocoder for a recording, without an index.

    Args:
        converter: of the voice.
        audio: ``[n]`` float32 at 16 kHz.
        options: of the conversion.

    Yields:
        The latent ``[T, inter_channels]`` float32 of each segment, 100 frames per second,
        without its context.

    Raises:
        ValueError: the recording is too short, or options do not fit the voice.
    """
    voice, encoder = converter.voice, converter.encoder
    nets = Nets(voice, encoder, converter.pitch_net, None)
    with Job(nets, Spool.around(audio), len(audio), SAMPLE_RATE, options) as job:
        prepare_all(nets, [job])
        if job.failure:
            raise job.failure
        if nets.pitch_net is not None:
            job.take_f0(_f0(nets.pitch_net, job, options))
        for segment in job.segments:
            heard = job.heard_on_host(segment.start, segment.start + segment.samples)
            features = np.repeat(encoder.encode(heard, voice.config.version), 2, axis=0)
            piece = job.piece(segment)
            plan = plan_of(voice, [piece])
            z = sample_latents(voice, features[None, : segment.frames], [piece], plan)
            yield to_host(z)[0, segment.first : segment.last]


def _f0(net: PitchNet, job: Job, options: ConversionOptions) -> np.ndarray:
    """``[T]`` in Hz of a job's padded recording."""
    settings = net.settings(
        threshold=options.f0_threshold, mel_padding=options.mel_padding
    )
    signal = Signal(
        lambda start, stop: job.heard_on_host(start, stop)[None], job.padded_length
    )
    return estimate_all(net.salience.start, [signal], settings)[0]


def mean_latent(
    converter: VoiceConverter, recordings: Sequence[Path], options: ConversionOptions
) -> np.ndarray:
    """``[inter_channels]`` float64: the mean over the frames of recordings.

    Raises:
        ValueError: one does not fit; names it.
        OSError: one cannot be read.
    """
    total, frames = np.zeros(converter.voice.config.inter_channels), 0
    for path in recordings:
        audio = load_audio(path)
        try:
            for z in latents(converter, audio, options):
                total += z.sum(axis=0, dtype=np.float64)
                frames += len(z)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    log.info(f"the mean is of {frames} frames of {len(recordings)} recordings")
    return total / frames


def fold(
    tensors: Mapping[str, np.ndarray], factor: float, mean: np.ndarray, noise: float
) -> dict[str, np.ndarray]:
    """Tensors of a voice whose vocoder makes of ``z`` what it made of a sharper one.

    Args:
        tensors: of a voice, in PyTorch's layout: the weight is ``[out, in, taps]``.
        factor: how many times as large deviations from the mean become.
        mean: of the latent, ``[in]``.
        noise: how many times as large the prior's noise becomes, above 0.

    Returns:
        All tensors, of the types that they had.

    Raises:
        ValueError: a result is not finite, or does not fit its type; names the tensor.
    """
    weight, bias = (tensors[name].astype(np.float64) for name in (WEIGHT, BIAS))
    of_mean = weight.sum(axis=2) @ mean
    prior = tensors[PRIOR].astype(np.float64)
    prior[len(prior) // 2 :] += np.log(noise)
    folded = {
        WEIGHT: factor * weight,
        BIAS: bias + (1 - factor) * of_mean,
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
    voice: Checkpoint, factor: float, mean: np.ndarray, noise: float, path: Path
) -> None:
    """Write a sharpened voice; what it tells is the voice's, and what was done to it.

    As with a mean, its weights are of no run, so it has no ``model_hash``.

    Raises:
        ValueError: a weight does not fit its type.
        OSError: it cannot be written.
    """
    tensors = fold(voice.tensors, factor, mean, noise)
    kept = {k: v for k, v in voice.metadata.items() if k != MODEL_HASH}
    told = f"{name_and_hash(voice.path)} * {factor:g}, noise * {noise:g}"
    told = "; ".join(filter(None, (told, str(kept.get(SHARPENED, "")))))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, tensors, {**kept, SHARPENED: told})


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("voice", type=Path)
    parser.add_argument("recordings", type=Path, help="folder, for the latent's mean")
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument("--rmvpe", type=Path, required=True)
    parser.add_argument(
        "--factor", type=float, default=1.35,
        help=f"of deviations from the mean, {LEAST:g} to {MOST:g} (default: 1.35)",
    )  # fmt: skip
    parser.add_argument(
        "--noise", type=float, default=0.25,
        help=f"of the prior's noise, {LEAST_NOISE:g} to 1 (default: 0.25)",
    )  # fmt: skip
    parser.add_argument("--limit", type=int, default=40, help="recordings at most")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--export", type=Path, required=True)
    return parser.parse_args(arguments)


def _check(options: argparse.Namespace) -> None:
    if not LEAST <= options.factor <= MOST:  # also when it is not a number
        raise ValueError(
            f"--factor {options.factor:g}; expected {LEAST:g} to {MOST:g}, 1 changes "
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
        recordings = recordings_of(options.recordings, options.limit)
        conversion = ConversionOptions(seed=options.seed)
        converter = load(
            options.voice,
            encoder=options.encoder,
            rmvpe=options.rmvpe,
            device=options.device,
            precision="f32",
        )
        mean = mean_latent(converter, recordings, conversion)
        sharpen(voice, options.factor, mean, options.noise, options.export)
    except (ValueError, OSError) as error:
        log.error(f"recipes.sharpen: {' '.join(str(error).split())}")
        return 1
    log.info(f"wrote {options.export}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
