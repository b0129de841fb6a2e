"""Recordings to clips: decoded, filtered, cut at silences, normalised, and at 16 kHz too.

The folder of a voice in training, with names as in Applio::

    recordings.json         the plan: recordings, their numbers and speakers
    sliced_audios/          clips, mono float32 wav at the voice's rate: 0_12_3.wav is
                            clip 3 of recording 12 of speaker 0
    sliced_audios_16k/      the same at 16 kHz, for the content encoder and the pitch net
    done/                   one marker per finished recording, written after its clips
    report.json, report.txt everything that was left out or looks wrong
    extracted/ f0/ f0_voiced/ mute/ features.json    see ``features``
    filelist.txt            see ``filelist``

Every file appears whole or not at all, and no file holds the time or the way it was made:
a run that was killed and started again gives the same bytes as one that was not.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

from rvc_mlx.machine import processors
from rvc_mlx.training.cutting import PreprocessOptions, prepare_recording
from rvc_mlx.training.data_report import (
    REPORT_JSON,
    Clip,
    PreprocessReport,
    Problem,
    SpeakerReport,
)
from rvc_mlx.training.files import (
    Progress,
    locked,
    make_folders,
    read_json,
    remove_parts,
    write_json,
)
from rvc_mlx.training.recordings import PLAN, Plan, Recording, plan_recordings

log = logging.getLogger("rvc_mlx")

CLIPS, CLIPS_16K, DONE = "sliced_audios", "sliced_audios_16k", "done"
FILELIST = "filelist.txt"
DERIVED = ("extracted", "f0", "f0_voiced")  # made from clips by ``features``
_VERSION = 1  # raised when the same recordings and options give other clips


@dataclass(frozen=True)
class _Marker:
    """What stands in ``done`` for a recording."""

    clips: list[Clip]
    problems: list[Problem]


def preprocess(
    inputs: Sequence[str | Path],
    folder: str | Path,
    sample_rate: int,
    options: PreprocessOptions | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> PreprocessReport:
    """Make clips of recordings, going on where an earlier run stopped.

    Recordings that are unchanged and were finished with the same options are kept.
    Worker processes are started anew, so a script that calls this needs
    ``if __name__ == "__main__"`` (``workers=1`` starts none).

    Args:
        inputs: folders or files, see ``plan_recordings``.
        folder: where to; made if missing.
        sample_rate: of the voice, Hz.
        options: how; the defaults if None.
        workers: processes; None for one per processor.
        progress: called with recordings done and recordings in all.

    Returns:
        What came of it; it is in the folder as ``report.json`` and ``report.txt``, too.

    Raises:
        ValueError: a rate or inputs that do not fit, or nothing in them can be trained
            on.
        OSError: the folder cannot be written, or another run works in it.
    """
    options = options or PreprocessOptions()
    if sample_rate < 8000 or sample_rate % 100:
        raise ValueError(
            f"a sample rate of {sample_rate} Hz; expected the voice's, a multiple of "
            "100: 32000, 40000 or 48000"
        )
    folder = Path(folder).absolute()
    make_folders(folder, (CLIPS, CLIPS_16K, DONE))
    with locked(folder):
        remove_parts(folder)
        plan = plan_recordings([Path(item) for item in inputs], folder)
        settings = {
            "version": _VERSION,
            "sample_rate": sample_rate,
            **dataclasses.asdict(options),
        }
        done = partial(_read_marker, folder, settings)
        todo = [item for item in plan.recordings if done(item) is None]
        if todo:
            (folder / FILELIST).unlink(missing_ok=True)
        _clear(folder, _names(plan.recordings) - _names(todo))
        job = partial(_finish, folder, sample_rate, options, settings)
        count = len(plan.recordings)
        _run(job, todo, workers or processors(), progress, count)
        report = _report(folder, plan, done, sample_rate)
        report.save()
    if report.clips == 0:
        raise ValueError(
            f"{folder}: none of {count} recordings can be trained on; report.txt in "
            "this folder says why of each"
        )
    log.info("%d clips, %.1f minutes", report.clips, report.seconds / 60)
    return report


def clip_names(folder: Path) -> list[str]:
    """Stems of all clips of finished recordings, in the plan's order.

    Raises:
        FileNotFoundError: ``preprocess`` did not finish there.
    """
    if not (folder / REPORT_JSON).is_file():
        raise FileNotFoundError(
            f"{folder}: no finished preparation in this folder; run preprocess first"
        )
    plan = read_json(folder / PLAN)["recordings"]
    names = []
    for item in plan:
        marker = read_json(folder / DONE / f"{item['name']}.json")
        names += [clip["name"] for clip in marker["clips"]]
    return names


def _names(recordings: Iterable[Recording]) -> set[str]:
    return {item.name for item in recordings}


def _finish(
    folder: Path,
    sample_rate: int,
    options: PreprocessOptions,
    settings: dict[str, Any],
    recording: Recording,
) -> None:
    """Prepare one recording and write its marker last."""
    clips, problems = prepare_recording(
        recording,
        (folder / CLIPS, folder / CLIPS_16K),
        sample_rate,
        options,
    )
    write_json(
        folder / DONE / f"{recording.name}.json",
        {
            "settings": settings,
            "recording": dataclasses.asdict(recording),
            "clips": [dataclasses.asdict(clip) for clip in clips],
            "problems": [dataclasses.asdict(problem) for problem in problems],
        },
    )


def _read_marker(
    folder: Path, settings: dict[str, Any], recording: Recording
) -> _Marker | None:
    """The marker of a recording; None if it is to be prepared (again)."""
    path = folder / DONE / f"{recording.name}.json"
    if not path.is_file() or path.stat().st_size == 0:
        return None
    content = read_json(path)
    if content["settings"] != settings:
        return None
    if content["recording"] != dataclasses.asdict(recording):
        return None
    clips = [Clip(**{**c, "bytes": tuple(c["bytes"])}) for c in content["clips"]]
    for clip in clips:  # a crash of the machine may have lost what was not yet on disk
        for name, size in zip((CLIPS, CLIPS_16K), clip.bytes, strict=True):
            file = folder / name / f"{clip.name}.wav"
            if not file.is_file() or file.stat().st_size != size:
                return None
    return _Marker(clips, [Problem(**problem) for problem in content["problems"]])


def _clear(folder: Path, kept: set[str]) -> None:
    """Remove all files of recordings that are not in ``kept``, markers first.

    The report goes before, and a filelist that names such files or lacks new ones.
    """
    (folder / REPORT_JSON).unlink(missing_ok=True)
    for name in (DONE, *DERIVED, CLIPS_16K, CLIPS):
        directory = folder / name
        for path in directory.iterdir() if directory.is_dir() else ():
            stem = path.name.split(".")[0]
            if name != DONE:
                stem = stem.rpartition("_")[0]
            if stem not in kept:
                path.unlink()
                (folder / FILELIST).unlink(missing_ok=True)


def _run(
    job: Callable[[Recording], None],
    todo: Sequence[Recording],
    workers: int,
    progress: Progress | None,
    count: int,
) -> None:
    """Do the job for all recordings, telling how far it is."""
    finished = count - len(todo)
    for _ in _done(job, todo, min(workers, len(todo))):
        finished += 1
        if progress:
            progress(finished, count)


def _done(
    job: Callable[[Recording], None], todo: Sequence[Recording], workers: int
) -> Iterator[None]:
    """Yield whenever a recording is finished; an error ends them all."""
    if workers <= 1:
        yield from map(job, todo)
        return
    # Spawned, not forked: the program may have threads of MLX or a GPU at work.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _end_with_parent)
    try:
        for future in as_completed([pool.submit(job, item) for item in todo]):
            yield future.result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a worker process ended early, probably for lack of memory; run again with "
            "fewer workers to go on"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """End this worker when the program that started it is killed.

    A keyboard interrupt reaches both; the program lets workers finish their recording.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _report(
    folder: Path,
    plan: Plan,
    done: Callable[[Recording], _Marker | None],
    sample_rate: int,
) -> PreprocessReport:
    """Join the markers of all recordings."""
    speakers = {n: SpeakerReport(name) for n, name in sorted(plan.speakers.items())}
    report = PreprocessReport(folder, sample_rate, speakers, list(plan.problems))
    for item in plan.recordings:
        marker = done(item)
        if marker is None:
            raise OSError(f"{item.source}: its clips vanished meanwhile; run again")
        speaker = speakers[item.speaker]
        speaker.recordings += 1
        speaker.clips += len(marker.clips)
        speaker.seconds += sum(clip.samples for clip in marker.clips) / sample_rate
        report.problems += marker.problems
    return report
