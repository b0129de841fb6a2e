"""All judges by name, and how they listen: in parallel, each recording once."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
from typing import Any

from judge_pitch import PITCH
from judge_sound import CLICKS, DNSMOS, LOUDNESS
from judge_speaker import SPEAKER
from judge_words import PHONES, WORDS
from judging import INSTALL, Judge, Missing, NoReadingError, Recording

# Slowest first: the pool is then busy until its end.
JUDGES = {
    judge.name: judge
    for judge in (WORDS, PHONES, SPEAKER, DNSMOS, PITCH, CLICKS, LOUDNESS)
}
_ALWAYS = ("torch", "matplotlib")  # for the record, the page
Heard = dict[tuple[str, Recording], Any]  # by judge and recording


def chosen_judges(names: str) -> list[Judge]:
    """The judges of a list like ``f0,speaker``, or all of them for ``all``.

    Raises:
        ValueError: a name is unknown, or a chosen judge lacks a tool.
    """
    wanted = list(JUDGES) if names == "all" else names.replace(",", " ").split()
    unknown = [name for name in wanted if name not in JUDGES]
    if unknown or not wanted:
        raise ValueError(
            f"no judge {', '.join(unknown) or 'was named'}; "
            f"there are {', '.join(JUDGES)}, and all"
        )
    chosen = [judge for name, judge in JUDGES.items() if name in wanted]
    require_tools(chosen)
    return chosen


def require_tools(judges: Iterable[Judge]) -> None:
    """Check that the tools of some judges are there.

    Raises:
        ValueError: some are not; says which, for whom, and how to get them.
    """
    lacking = {judge.name: judge.missing_tools() for judge in judges}
    if absent := [name for name in _ALWAYS if find_spec(name) is None]:
        raise ValueError(
            f"evaluations need {', '.join(absent)}; install the extra 'eval': {INSTALL}"
        )
    lacking = {name: missing for name, missing in lacking.items() if missing}
    if lacking:
        tools = dict.fromkeys(tool for tools in lacking.values() for tool in tools)
        usable = [name for name, judge in JUDGES.items() if not judge.missing_tools()]
        raise ValueError(
            f"the judges {', '.join(lacking)} need {', '.join(tools)}; install the "
            f"extra 'eval': {INSTALL}; or do without: --judges {','.join(usable)}"
        )


def observe(name: str, recording: Recording) -> Any:
    """What one judge hears in one recording, or ``Missing`` with the reason."""
    try:
        return JUDGES[name].observe(recording)
    except NoReadingError as error:
        return Missing(str(error))


def _one_thread() -> None:
    """Processes share the cores; threads inside them would only wait for each other."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"


def observe_all(
    wanted: Mapping[str, Sequence[Recording]], workers: int, known: Heard | None = None
) -> Heard:
    """Let judges listen.

    Args:
        wanted: recordings by the name of the judge; each is heard once.
        workers: processes; 1 listens in this one.
        known: what was heard before; not heard again, and part of the result.

    Raises:
        RuntimeError: a process died.
    """
    heard = dict(known or {})
    tasks = [
        (name, recording)
        for name in JUDGES
        for recording in dict.fromkeys(wanted.get(name, ()))
        if (name, recording) not in heard
    ]
    if workers <= 1 or len(tasks) <= 1:
        return heard | {task: observe(*task) for task in tasks}
    context = multiprocessing.get_context("spawn")  # forked threads would hang
    count = min(workers, len(tasks))
    with ProcessPoolExecutor(count, context, initializer=_one_thread) as pool:
        running = {task: pool.submit(observe, *task) for task in tasks}
        try:
            return heard | {task: _result(task, running[task]) for task in tasks}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _result(task: tuple[str, Recording], future: Future[Any]) -> Any:
    name, recording = task
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a process of the judges died (out of memory, or a fault in a tool) at or "
            f"before {name} of {recording.path.name}; --workers 1 shows where"
        ) from error
