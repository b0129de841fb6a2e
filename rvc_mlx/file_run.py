"""Files to files, streaming: what a conversion reads and writes.

A file that fails leaves nothing behind, and the others go on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rvc_mlx.audio_io import AudioReader, AudioWriter, load_spool
from rvc_mlx.job import Job, Nets
from rvc_mlx.machine import in_parallel
from rvc_mlx.options import ConversionOptions
from rvc_mlx.output_format import check_output
from rvc_mlx.report import Report
from rvc_mlx.schedule import convert_all

FileProgress = Callable[[int, float, float], None]
Result = tuple[int, Report | Exception]

_OF_A_FILE = (ValueError, OSError, MemoryError)  # what may befall one file alone


@dataclass(frozen=True)
class _File:
    """A file under way."""

    number: int
    target: Path
    seconds: float
    job: Job


class _Written(NamedTuple):
    """A file that lacks its name only, or what befell it."""

    file: _File
    result: Report | Exception


class FileRun:
    """A conversion of several files; see ``VoiceConverter.convert_files``.

    Args:
        nets: what it runs on.
        options: how.
        subtype: of the samples written.
        progress: takes a file's number, seconds of it done and seconds in all.
    """

    def __init__(
        self,
        nets: Nets,
        options: ConversionOptions,
        subtype: str | None,
        progress: FileProgress | None,
    ):
        self._nets, self._options = nets, options
        self._subtype, self._progress = subtype, progress
        self._rate = options.output_rate or nets.voice.config.sample_rate
        self._report = Report()
        self._open: dict[Job, _File] = {}
        self._unplaced: dict[int, ExitStack] = {}  # writers of what lacks its name
        self._failed: deque[Result] = deque()
        self._error: Exception
        self._all_taken = False

    def convert(self, files: Sequence[tuple[Path, Path]]) -> Iterator[Result]:
        """Number and report of every file, or what befell it, as they are done."""
        jobs = self._jobs(files)
        try:
            while self._open or not self._all_taken:
                self._error = RuntimeError("the conversion ended early")
                writing = self._writing(jobs, aside=len(files) > 1)
                # Several are written while the networks compute what comes behind them.
                with closing(in_parallel(lambda write: write(), writing)) as written:
                    for file, result in written:
                        yield from self._failures()
                        placed = self._placed(file, result)
                        if self._progress and isinstance(placed, Report):
                            self._progress(file.number, file.seconds, file.seconds)
                        yield file.number, placed
                # What was raised between files has ended all that are open.
                for file in self._open.values():
                    self._failed.append((file.number, self._error))
                self._close()
                yield from self._failures()
        finally:
            self._close()
            self._drop()

    def _writing(
        self, jobs: Iterator[Job], *, aside: bool
    ) -> Iterator[Callable[[], _Written]]:
        """What writes each file, or has written it."""
        try:
            for job, raw in convert_all(self._nets, jobs, self._report):
                file = self._open[job]
                told = self._progress and partial(self._progress, file.number)
                observed = job.observed(raw, told)
                if aside and job.ends_aside:
                    yield self._writing_aside(file, observed)
                    continue
                result = self._written(file, observed, self._report)
                if isinstance(result, Exception):
                    self._error = result
                    # The networks may still be on their way through it.
                    with suppress(*_OF_A_FILE):
                        deque(raw, maxlen=0)
                del self._open[job]
                job.close()
                yield partial(_Written, file, result)
        except _OF_A_FILE as error:
            self._error = error

    def _writing_aside(
        self, file: _File, raw: Iterator[np.ndarray]
    ) -> Callable[[], _Written]:
        """What writes a file whose blocks are there."""
        blocks, error = [], None
        try:
            blocks = list(raw)
        except _OF_A_FILE as raised:
            self._error = error = raised
        del self._open[file.job]
        report, self._report.stages = Report(stages=self._report.stages), {}

        def write() -> _Written:
            with file.job:
                return _Written(
                    file, error or self._written(file, iter(blocks), report)
                )

        return write

    def _placed(self, file: _File, result: Report | Exception) -> Report | Exception:
        """The report, now that the file is in its place; or what befell it."""
        if isinstance(result, Report):
            try:
                self._unplaced.pop(file.number).close()
            except _OF_A_FILE as error:
                return error
        return result

    def _drop(self) -> None:
        """Leave nothing of files that nobody was told of."""
        while self._unplaced:
            _, writer = self._unplaced.popitem()
            with suppress(*_OF_A_FILE):
                writer.__exit__(GeneratorExit, GeneratorExit(), None)

    def _failures(self) -> Iterator[Result]:
        while self._failed:
            yield self._failed.popleft()

    def _close(self) -> None:
        for job in self._open:
            job.close()
        self._open.clear()

    def _jobs(self, files: Sequence[tuple[Path, Path]]) -> Iterator[Job]:
        for number, (source, target) in enumerate(files):
            try:
                with self._report.stage("load"):
                    check_output(target, self._rate, self._subtype)
                    job, seconds = self._load(source)
            except _OF_A_FILE as error:
                self._failed.append((number, error))
                continue
            self._open[job] = _File(number, target, seconds, job)
            yield job
        self._all_taken = True

    def _load(self, source: Path) -> tuple[Job, float]:
        with AudioReader(source) as reader:
            rate = reader.sample_rate
            spool, frames = load_spool(reader)
        try:
            job = Job(self._nets, spool, frames, rate, self._options)
        except BaseException:
            spool.close()
            raise
        return job, frames / rate

    def _written(
        self, file: _File, raw: Iterator[np.ndarray], report: Report
    ) -> Report | Exception:
        """Write a file, all but its name; its report, or what befell it."""
        try:
            with ExitStack() as stack:
                writer = AudioWriter(file.target, self._rate, self._subtype)
                stack.enter_context(writer)
                for block in file.job.blocks(raw, report):
                    with report.stage("write"):
                        writer.write(block)
                self._unplaced[file.number] = stack.pop_all()
        except _OF_A_FILE as error:
            return error
        stages, report.stages = report.stages, {}
        joins = file.job.joins
        return Report(file.seconds, writer.frames, self._rate, stages, joins=joins)
