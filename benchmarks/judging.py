"""What the judges of a conversion share: recordings, cases, verdicts, their tools.

A judge hears every recording once (``observe``), then compares what it heard of a source
with what it heard of the output (``compare``). Listening is slow and runs in processes
of its own; comparing is arithmetic.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rvc_mlx.audio import SAMPLE_RATE, resample
from rvc_mlx.audio_io import AudioReader

Row = dict[str, Any]  # metric to value; None where a clip gives none
INSTALL = 'pip install "rvc-mlx[eval]" && pip install --no-deps resemblyzer'


class NoReadingError(ValueError):
    """A recording that gives a judge nothing to measure; the reason is reported."""


class Sound(NamedTuple):
    """A recording in memory.

    Attributes:
        heard: ``[n]`` float32 at 16 kHz.
        full: ``[m]`` float32 at its own rate.
        rate: that rate, Hz.
    """

    heard: np.ndarray
    full: np.ndarray
    rate: int


@dataclass(frozen=True)
class Recording:
    """A sound file, and what is said in it where that is known (see ``plain_text``)."""

    path: Path
    text: str | None = None

    def load(self) -> Sound:
        """The sound, mono.

        Raises:
            ValueError: it is damaged, empty or no sound.
            OSError: it cannot be read.
        """
        with AudioReader(self.path) as reader:
            full = np.concatenate(list(reader.blocks()))
            rate = reader.sample_rate
        return Sound(resample(full, rate, SAMPLE_RATE), full, rate)


@dataclass(frozen=True)
class Missing:
    """In place of an observation: why there is none."""

    reason: str


@dataclass(frozen=True)
class Case:
    """One conversion as one judge heard it.

    Attributes:
        source: observation of the source.
        output: observation of the output.
        references: observations of recordings of the target.
        semitones: by how much the pitch was to change.
        text: what is said, or None.
        joins: where pieces meet in the output, seconds; None where it is not known.
    """

    source: Any
    output: Any
    references: Sequence[Any] = ()
    semitones: float = 0.0
    text: str | None = None
    joins: Sequence[float] | None = None


def mean_values(rows: Sequence[Row]) -> Row:
    """Mean of every figure over the clips that have it; of yes and no, the share in %."""
    means: Row = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row[name] for row in rows if is_figure(row.get(name))]
        if values:
            scale = 100.0 if all(isinstance(value, bool) for value in values) else 1.0
            means[name] = scale * float(np.mean(values))
    return means


def is_figure(value: Any) -> bool:
    """Whether a value is a finite number (or yes or no)."""
    return isinstance(value, int | float) and math.isfinite(value)


@dataclass(frozen=True)
class Judge:
    """One kind of measurement.

    Attributes:
        name: for ``--judges`` and the results.
        tools: what it imports, and the distribution that holds it.
        observe: what it hears in a recording; a value that can be pickled.
        compare: the figures of one conversion.
        summarize: the figures of a voice from those of its clips.
        references: whether it also hears recordings of the target.
        nothing: the figures of an output in which it hears nothing.
    """

    name: str
    observe: Callable[[Recording], Any]
    compare: Callable[[Case], Row]
    tools: Mapping[str, str] = field(default_factory=dict)
    summarize: Callable[[Sequence[Row]], Row] = mean_values
    references: bool = False
    nothing: Mapping[str, Any] = field(default_factory=dict)

    def missing_tools(self) -> list[str]:
        """Distributions that are not installed."""
        return [
            package
            for module, package in self.tools.items()
            if importlib.util.find_spec(module) is None
        ]

    def verdict(self, case: Case) -> Row:
        """The figures of one conversion; where there are none, a ``note`` says why.

        An output without speech must not pass because it cannot be measured: it gets
        the figures of ``nothing``. A source without speech gives no figures.
        """
        if isinstance(case.source, Missing):
            return {"note": f"source: {case.source.reason}"}
        if isinstance(case.output, Missing):
            return {**self.nothing, "note": f"output: {case.output.reason}"}
        try:
            return self.compare(case)
        except NoReadingError as error:
            return {"note": str(error)}


@contextmanager
def foreign_code() -> Iterator[None]:
    """Around imports and calls of judges' tools: their deprecations are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
