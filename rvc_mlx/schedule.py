"""The order in which recordings go through the networks.

Recordings come in waves, as many as the engine computes together, one on a CPU. A GPU is
one wave ahead of the host: before the F0 of one is waited for, but for the first, the first
networks of the next are under way, and before its result, the prior and the vocoder of the
next. So the recordings of three waves are held, and of a fourth one; what a caller finishes
beside the next ones is his to bound::

    host    prepare mel |F0 1| prepare mel  prepare mel |F0 2|      finish 1  prepare ...
    device       encode salience 1 prior vocoder 1 encode salience 2, 3 prior vocoder 2

To prepare is to filter a wave's recordings, together on CUDA. Where the device makes the
mel, too, it goes first, equal recordings together. On CUDA the encoder is computed beside the
pitch net (salience), so the two begin together.

Equal pieces of a wave share a call of a network; its result is what each alone gives, to
rounding, and exactly that where one goes at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NoReturn

import numpy as np

from rvc_mlx import pitch
from rvc_mlx.arrays import (
    Array,
    array_module,
    neighbours,
    one_ahead,
    reflected_together,
)
from rvc_mlx.decoding import Piece, Plan, Windows, sample_latents, start_windows
from rvc_mlx.job import Job, Nets, prepare_all
from rvc_mlx.options import ConversionOptions
from rvc_mlx.report import Report
from rvc_mlx.segments import FRAME, Segment

Part = tuple[Job, Segment]
Event = tuple[Job, np.ndarray | Exception]
Reading = Callable[[], Iterable[Event]]
Wave = Callable[[], Iterable[Reading]]

_OF_A_WAVE = (ValueError, OSError, MemoryError, RuntimeError)  # what befalls it alone


def convert_all(
    nets: Nets, jobs: Iterable[Job], report: Report
) -> Iterator[tuple[Job, Iterator[np.ndarray]]]:
    """Convert recordings.

    Args:
        nets: what they run on.
        jobs: recordings with the same options; taken when their turn comes.
        report: takes the time of the stages.

    Yields:
        Each job in order, with the blocks of its output at the voice's rate, to be read
        before the next job is asked for. They raise what went wrong with this one.
    """
    beside = _batch_frames(nets) > 0  # else the host itself computes, nothing beside it
    waves = _waves(nets, jobs, report)
    if beside:
        waves = _next_ahead(waves)
    begun: Iterator[Reading] = itertools.chain.from_iterable(wave() for wave in waves)
    if beside:
        begun = one_ahead(begun)
    events = itertools.chain.from_iterable(read() for read in begun)
    for job, own in itertools.groupby(events, key=lambda event: event[0]):
        yield job, _blocks(own)


def _blocks(events: Iterable[Event]) -> Iterator[np.ndarray]:
    for _, block in events:
        if isinstance(block, Exception):
            raise block
        yield block


def _batch_frames(nets: Nets) -> int:
    """Most frames of several segments that the networks take together; 0 for one each."""
    return min(nets.encoder.batch_frames, nets.voice.batch_frames)


def _next_ahead(waves: Iterator[Wave]) -> Iterator[Wave]:
    """Each wave, from the second on once the next one's first networks are begun."""
    yield from itertools.islice(waves, 1)
    yield from one_ahead(waves)


def _waves(nets: Nets, jobs: Iterable[Job], report: Report) -> Iterator[Wave]:
    """Each wave, its first networks begun, as what begins the others.

    That gives, in order, what reads each of its results.
    """
    most = _batch_frames(nets)
    waves = neighbours(jobs, lambda _: None, lambda job: job.length / FRAME, most)
    for wave in waves:
        with report.stage("prepare"):
            prepare_all(nets, wave)
        readings: list[Reading] = [
            partial(list, [(job, job.failure)]) for job in wave if job.failure
        ]
        good = [job for job in wave if not job.failure]
        try:
            begin_windows = _begin_wave(nets, good, most, report) if good else tuple
        except _OF_A_WAVE as error:
            begin_windows = partial(_raise, error)
        yield partial(_in_order, readings, good, begin_windows, report)


def _raise(error: Exception) -> NoReturn:
    raise error


def _in_order(
    readings: Iterable[Reading],
    jobs: Sequence[Job],
    begin_windows: Callable[[], Iterable[Windows]],
    report: Report,
) -> Iterator[Reading]:
    """``readings``, then those of jobs' windows.

    What begins them may raise, while results of other waves are still to be read. It is
    told when the jobs' turn comes that have windows left to begin.
    """
    yield from readings
    last = {job: [s for s in job.segments if s.last > s.first][-1] for job in jobs}
    try:
        for windows in begin_windows():
            yield partial(_read, windows, report)
            for piece in windows.ended():
                assert isinstance(piece.owner, Job)
                if last.get(piece.owner) is piece.segment:
                    del last[piece.owner]
    except _OF_A_WAVE as error:
        yield from [partial(list, [(job, error)]) for job in last]


def _read(windows: Windows, report: Report) -> Iterator[Event]:
    for piece, block in windows.read(report):
        assert isinstance(piece.owner, Job)
        yield piece.owner, block


def _begin_wave(
    nets: Nets, jobs: Sequence[Job], most: int, report: Report
) -> Callable[[], Iterator[Windows]]:
    """Begin encoder and F0 of prepared recordings; what begins their windows in order."""
    options = jobs[0].options
    encoded = one_ahead(_encoded(nets, jobs, most, report))
    # What the host does for F0 is done beside the encoder; if it does nothing, the device
    # ends the F0, which is waited for, beside the launches of the encoder.
    f0_first = nets.pitch_net is not None and nets.pitch_net.on_device
    first = None if f0_first else next(encoded)
    with report.stage("pitch"):
        find_f0 = begin_f0(nets, jobs, options)
    first = first or next(encoded)
    plan = _plan(nets, first[0])
    if most:  # the device draws while F0 comes back, not when all wait for it
        plan.draw()

    def begin_windows() -> Iterator[Windows]:
        with report.stage("pitch"):
            find_f0()
        yield from _decoded(nets, *first, plan, report)
        for parts, raw in encoded:
            yield from _decoded(nets, parts, raw, _plan(nets, parts), report)
        if len(jobs) == 1:  # of several the host has no time to spare
            with report.stage("finish"):  # what can be done before there is a result
                jobs[0].find_silence()

    return begin_windows


def _plan(nets: Nets, parts: Sequence[Part]) -> Plan:
    return Plan(nets.voice, [(segment, job.noise) for job, segment in parts])


def _decoded(
    nets: Nets, parts: Sequence[Part], raw: Array, plan: Plan, report: Report
) -> Iterator[Windows]:
    """The windows of segments that are encoded, their F0 known."""
    pieces = [job.piece(segment) for job, segment in parts]

    def latents() -> Array:
        with report.stage("index"):
            features = _features(nets, raw, pieces, parts[0][0].options)
        with report.stage("prior"):
            return sample_latents(nets.voice, features, pieces, plan)

    return start_windows(nets.voice, latents, pieces, plan, report)


def _encoded(
    nets: Nets, jobs: Sequence[Job], most: int, report: Report
) -> Iterator[tuple[list[Part], Array]]:
    """Segments of one length and their content features ``[B, F, C]``."""
    parts = [(job, segment) for job in jobs for segment in job.segments]

    def weight(part: Part) -> int:
        segment = part[1]
        window = nets.voice.window_frames(max(segment.last - segment.first, 1))
        return max(segment.frames, window)

    for batch in neighbours(parts, lambda part: part[1].samples, weight, most):
        with nets.encoder.beside():
            audio = reflected_together(
                [job.heard(s.start, s.start + s.samples) for job, s in batch]
            )
        with report.stage("content"):
            features = nets.encoder.start(audio, nets.voice.config.version)
        yield batch, features


def begin_f0(
    nets: Nets, jobs: Sequence[Job], options: ConversionOptions
) -> Callable[[], None]:
    """Begin to find F0; what waits for it and gives each job its own."""
    net = nets.pitch_net
    if net is None:
        return lambda: None
    settings = nets.voice.pitch_settings(net, options)
    asked = [job for job in jobs if job.given_f0 is None]

    def frames(job: Job) -> int:
        return settings.filled_up(job.padded_length // FRAME + 1)

    most = settings.batch_frames if net.on_device else 0
    alike = neighbours(asked, lambda job: job.padded_length, frames, most)
    signals = [_signal(few, net.on_device) for few in alike]
    found = pitch.begin_all(net.salience.start, signals, settings)

    def finish() -> None:
        for job, f0 in zip(asked, found(), strict=True):
            job.take_f0(f0)
        for job in jobs:
            if job.given_f0 is not None:
                job.take_f0(job.given_f0)

    return finish


def _signal(jobs: Sequence[Job], on_device: bool) -> pitch.Signal:
    """Padded recordings of one length; one alone where the host makes the log-mel."""

    def read(start: int, stop: int) -> Array:
        if on_device:
            return reflected_together([job.heard(start, stop) for job in jobs])
        return jobs[0].heard_on_host(start, stop)[None]

    return pitch.Signal(read, jobs[0].padded_length, len(jobs))


def _features(
    nets: Nets, raw: Array, pieces: Sequence[Piece], options: ConversionOptions
) -> Array:
    """Retrieval, doubling to 100 frames per second, and protection of consonants.

    Args:
        nets: with retrieval, or without.
        raw: ``[B, F, C]`` float32, 50 frames per second.
        pieces: ``B`` segments of ``T`` frames.
        options: rate of retrieval, protection.

    Returns:
        ``[B, T, C]`` float32.
    """
    xp, frames = array_module(raw), pieces[0].segment.frames
    doubled: Array = xp.repeat(raw, 2, axis=1)[:, :frames]
    if nets.blend is None or options.index_rate == 0:
        return doubled
    rows = raw.reshape(-1, raw.shape[-1])
    found = nets.blend(rows, options.index_rate, options.index_exact)
    xp = array_module(found)  # where it was searched
    blended: Array = xp.repeat(found.reshape(raw.shape), 2, axis=1)[:, :frames]
    if nets.pitch_net is None or options.protect >= 0.5:
        return blended
    f0 = np.stack([piece.f0 for piece in pieces if piece.f0 is not None])
    share = np.where(f0 < 1, options.protect, 1.0).astype(np.float32)[..., None]
    return xp.array(share) * blended + xp.array(1 - share) * xp.array(doubled)
