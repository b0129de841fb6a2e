"""The conversions to judge: made here, or found where they were made before."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from evaluation_inputs import Target, converted_file, parse_options
from judge_pitch import PITCH, semitones_to
from judges import Heard
from judging import Missing, NoReadingError, Recording

from rvc_mlx.options import ConversionOptions
from rvc_mlx.pipeline import VoiceConverter, load

MOST_SEMITONES = 36.0


class Output(NamedTuple):
    """One conversion.

    Attributes:
        recording: the result.
        semitones: the shift of the pitch.
        seed: of the noise; None for one that was made before.
        seconds: what it took; None for one that was made before.
        joins: where pieces meet, seconds; None for one that was made before.
    """

    recording: Recording
    semitones: float
    seed: int | None
    seconds: float | None
    joins: tuple[float, ...] | None


def pitch_shift(target: Target, source: Recording, heard: Heard) -> float:
    """Semitones for one clip: as given, or from the medians.

    Args:
        target: the voice.
        source: the clip.
        heard: pitch of the clip and of the target's references, for ``auto``.

    Raises:
        ValueError: one of them has no voiced frame.
    """
    if target.pitch is not None:
        return target.pitch
    curves = [heard[PITCH.name, recording] for recording in target.references]
    curves = [curve for curve in curves if not isinstance(curve, Missing)]
    try:
        shift = semitones_to(heard[PITCH.name, source], curves)
    except NoReadingError as error:
        raise ValueError(
            f"--pitch auto: {source.path.name} to {target.name}: {error}; "
            "give the shift as a number, or leave the clip out"
        ) from error
    return max(-MOST_SEMITONES, min(MOST_SEMITONES, shift))


def _converter(target: Target, arguments: argparse.Namespace) -> VoiceConverter:
    assert target.voice is not None
    return load(
        target.voice,
        target.index,
        encoder=arguments.encoder,
        rmvpe=arguments.rmvpe,
        device=arguments.device,
        precision=arguments.precision,
    )


def convert_one(
    target: Target,
    sources: Sequence[Recording],
    shifts: Mapping[Recording, float],
    folder: Path,
    arguments: argparse.Namespace,
) -> tuple[dict[Recording, list[Output]], str]:
    """Every source into one target, as float wavs in a folder of its name.

    Those with further seeds are in folders below it, ``seed-1`` and so on.

    Returns:
        The conversions of each source, one for each seed, and what computed them, in words.

    Raises:
        ValueError: the models or an option do not fit.
        OSError: a file is missing or cannot be read or written.
    """
    outputs: dict[Recording, list[Output]] = {source: [] for source in sources}
    if target.converted is not None:
        for source in sources:
            made = Recording(converted_file(target.converted, source))
            outputs[source].append(Output(made, shifts[source], None, None, None))
        return outputs, "converted before"
    converter = _converter(target, arguments)
    options = parse_options(arguments.option)
    first = options.pop("seed", 0)
    for seed in range(first, first + arguments.seeds):
        name = target.name if seed == first else f"{target.name}/seed-{seed}"
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number, source in enumerate(sources, 1):
            path = folder / name / f"{source.path.stem}.wav"
            start = time.perf_counter()
            wanted = ConversionOptions(pitch=shifts[source], seed=seed, **options)
            report = converter.convert_file(source.path, path, wanted, subtype="FLOAT")
            seconds = time.perf_counter() - start
            joins = tuple(report.joins)
            made = Output(Recording(path), shifts[source], seed, seconds, joins)
            outputs[source].append(made)
            print(f"{name}: {number}/{len(sources)} {source.path.name}", flush=True)
    return outputs, f"{converter.device}, {converter.precision}"
