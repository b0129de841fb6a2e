"""The options of one conversion, in one place.

The command line, and every other front end, derives its options from the fields of
``ConversionOptions``: name, help, range, choices and the names that users of Applio and
the RVC WebUI know them by.
"""

from __future__ import annotations

from dataclasses import Field, dataclass, field, fields
from typing import Any

MOST_WIDENED = 10  # frames by which voiced parts may begin sooner, or end later


def option(
    default: Any,
    text: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] | None = None,
    aliases: tuple[str, ...] = (),
) -> Any:
    """A field with what a front end needs to offer it.

    Args:
        default: its default, which also gives its type.
        text: one sentence of help, with the unit.
        low: smallest value allowed.
        high: largest value allowed.
        choices: the values allowed.
        aliases: other names that users know, without dashes.
    """
    return field(
        default=default,
        metadata={
            "help": text,
            "low": low,
            "high": high,
            "choices": choices,
            "aliases": aliases,
        },
    )


@dataclass(frozen=True)
class ConversionOptions:
    """How to convert; every field has a default that suits speech of like pitch.

    Raises:
        ValueError: a value is out of range; says which, and the range.
    """

    pitch: float = option(
        0.0,
        "shift of the pitch in semitones",
        low=-36,
        high=36,
        aliases=("f0up_key", "f0-up-key", "transpose"),
    )
    index_rate: float = option(
        0.75,
        "share of the features that comes from the index, 0 to 1; needs an index",
        low=0,
        high=1,
    )
    index_exact: bool = option(
        False,
        "search the whole index; faiss, and so the original, looks into one cell only",
    )
    protect: float = option(
        0.33,
        "keeps consonants and breaths: share of the index in unvoiced frames; "
        "0.5 switches it off",
        low=0,
        high=0.5,
    )
    volume_envelope: float = option(
        1.0,
        "1 keeps the loudness of the voice, 0 imposes that of the source",
        low=0,
        high=1,
        aliases=("rms_mix_rate", "rms-mix-rate"),
    )
    speaker: int = option(
        0, "speaker of a voice that has several", low=0, aliases=("sid",)
    )
    f0_method: str = option(
        "rmvpe", "pitch estimator", choices=("rmvpe",), aliases=("f0method",)
    )
    f0_threshold: float = option(
        -1.0,
        "salience above which a frame is voiced, 0 to 1; -1 keeps the voice's: RVC's 0.03 "
        "unless it asks for another",
        low=-1,
        high=1,
    )
    f0_onset: int = option(
        -1,
        "frames of 10 ms by which voiced parts begin sooner than the pitch is heard; -1 "
        "keeps the voice's: RVC's 0 unless it asks for more; a given curve stays as it is",
        low=-1,
        high=MOST_WIDENED,
    )
    f0_offset: int = option(
        -1,
        "frames of 10 ms by which voiced parts end later than the pitch is heard; else as "
        "--f0-onset; pauses as short as both together are voiced",
        low=-1,
        high=MOST_WIDENED,
    )
    f0_file: str = option(
        "", "pitch curve to use instead: lines 'seconds,hertz'", aliases=("f0-file",)
    )
    f0_autotune: bool = option(False, "pull the pitch to the nearest semitone")
    f0_autotune_strength: float = option(
        1.0, "how far autotune pulls, 0 to 1", low=0, high=1
    )
    proposed_pitch: bool = option(
        False, "shift so that the median pitch meets --proposed-pitch-threshold"
    )
    proposed_pitch_threshold: float = option(
        155.0,
        "target of --proposed-pitch in Hz (155 suits male, 255 female voices)",
        low=50,
        high=1199,
    )
    mel_padding: str = option(
        "reflect",
        "how RMVPE fills up its last frames: reflect (Applio) or constant (WebUI)",
        choices=("reflect", "constant"),
    )
    reference_lengths: bool = option(
        False,
        "give exactly the samples of the original program, which are a few frames "
        "fewer than the input's, and leave silence as the voice fills it",
    )
    seed: int = option(
        0, "seed of the noise; the same seed gives the same audio", low=0, high=2**32
    )
    output_rate: int = option(
        0,
        "sample rate of the result in Hz; 0 keeps the voice's",
        low=0,
        high=768000,
        aliases=("resample_sr", "resample-sr"),
    )
    x_pad: float = option(
        1.0, "context on both sides of a segment, seconds", low=0.2, high=10
    )
    x_query: float = option(
        6.0, "how far around a cut to look for quiet, seconds", low=0.1, high=60
    )
    x_center: float = option(
        38.0, "length of a segment of a long file, seconds", low=2, high=600
    )
    x_max: float = option(
        41.0, "files up to this length are one segment, seconds", low=2, high=660
    )

    def __post_init__(self) -> None:
        """Check every range and choice."""
        for item in fields(self):
            _check(item, getattr(self, item.name))
        if self.output_rate and self.output_rate < 8000:
            raise ValueError(
                f"output_rate is {self.output_rate} Hz; expected 0, or 8000 and more"
            )
        if 2 * self.x_query > self.x_center:  # else cuts could go backwards
            raise ValueError(
                f"x_query is {self.x_query} s; expected at most half of x_center "
                f"({self.x_center} s)"
            )


def _check(item: Field[Any], value: Any) -> None:
    low, high = item.metadata["low"], item.metadata["high"]
    choices = item.metadata["choices"]
    if choices and value not in choices:
        raise ValueError(
            f"{item.name} is {value!r}; expected one of {', '.join(choices)}"
        )
    if low is not None and not (low <= value and (high is None or value <= high)):
        span = f"{low} to {high}" if high is not None else f"{low} or more"
        raise ValueError(f"{item.name} is {value}; expected {span}")
