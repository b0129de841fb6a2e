"""The run itself: epochs of steps, validation, choice of the best, saving, stopping.

The host stays one step ahead of the device: while a step computes, the next batch is
read and its graph is built; losses are looked at when the step after theirs is under
way. What is on the disk is always the state after a whole step whose numbers were all
finite, so a run that is killed, fills the disk or diverges goes on from there, and
arrives at the same weights, bit for bit.
"""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from rvc_mlx.training.dataset import Batch, TrainingSet, prefetch
from rvc_mlx.training.distributed import Group, agree, rank_of
from rvc_mlx.training.forward import draw, step_inputs
from rvc_mlx.training.keeper import Keeper
from rvc_mlx.training.monitor import Monitor
from rvc_mlx.training.presets import TrainingConfig
from rvc_mlx.training.run_options import RunOptions
from rvc_mlx.training.state import Progress, read_state, sweep, write_state
from rvc_mlx.training.step import TrainStep
from rvc_mlx.training.validation import SCORE, Scores, Validator

_LOG = logging.getLogger("rvc_mlx")
STATE = "state.safetensors"
_AHEAD = 2  # batches that are read before they are wanted
_SKIPS = 30  # steps in a row that float16 may skip to find its loss scale


class DivergedError(RuntimeError):
    """A loss or gradient of the run is not finite."""


class StepError(RuntimeError):
    """The device did not compute a step."""


class Trainer:
    """One run in one folder.

    Args:
        folder: takes the state.
        config: the network's.
        options: the run's.
        step: the networks and their optimisers.
        data: training batches.
        validator: None trains without validation.
        keeper: writes networks and voices.
        group: of the processes that train together, None for one.

    Attributes:
        progress: where the run stands.
    """

    def __init__(
        self,
        folder: Path,
        config: TrainingConfig,
        options: RunOptions,
        step: TrainStep,
        data: TrainingSet,
        validator: Validator | None,
        keeper: Keeper,
        group: Group | None = None,
    ):
        self.progress = Progress()
        self._path, self._config, self._options = folder / STATE, config, options
        self._step, self._data, self._validator = step, data, validator
        self._keeper, self._group = keeper, group
        self._rank, self._world = rank_of(group)
        self._saved_at = time.monotonic()
        self._skipped = 0
        self._interrupted = threading.Event()

    def resume(
        self, identity: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
    ) -> None:
        """Continue from the saved state; without one, start at the beginning.

        Args:
            identity: settings that a continued run must share, see ``write_state``.
            defaults: of those that the state may lack, see ``read_state``.

        Raises:
            ValueError: the state is of a run with other settings.
        """
        if self._rank == 0:
            sweep(self._path.parent)
        if not self._path.exists():
            _LOG.info("nothing was saved yet; starting at the beginning")
            return
        tensors, self.progress = read_state(self._path, identity, defaults)
        self._step.state = {name: mx.array(value) for name, value in tensors.items()}
        done = self.progress
        _LOG.info("continuing after %d epochs and %d steps", done.epoch, done.step)

    def run(self, identity: Mapping[str, Any], monitor: Monitor | None) -> Progress:
        """Train to the end, or until the early stop.

        Args:
            identity: see ``resume``.
            monitor: takes the log; rank 0 has one.

        Raises:
            DivergedError: a number is not finite; the last saved state is a good one.
            StepError: the device failed at a step, for want of memory perhaps; likewise.
            OSError: something cannot be written; the last saved state is unchanged.
            KeyboardInterrupt: it was asked to stop; the state was saved.
        """
        with self._stoppable():
            while self.progress.epoch < self._options.epochs:
                if self.progress.stopped:
                    break
                timing = self._train_epoch(identity, monitor)
                self._end_epoch(identity, monitor, timing)
        return self.progress

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM ends the run after the current step."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def request(number: int, frame: Any) -> None:  # noqa: ARG001
            if self._interrupted.is_set():
                raise KeyboardInterrupt
            self._interrupted.set()

        wanted = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, request) for number in wanted]
        try:
            yield
        finally:
            for number, handler in zip(wanted, before, strict=True):
                signal.signal(number, handler)

    def _train_epoch(
        self, identity: Mapping[str, Any], monitor: Monitor | None
    ) -> dict[str, float]:
        """The rest of the current epoch; gives its speed."""
        first = self.progress
        rate = self._options.learning_rate * self._options.decay**first.epoch
        self._step.learning_rate = rate
        batches = self._data.batches(
            first.epoch, first.position, rank=self._rank, world=self._world
        )
        started = time.perf_counter()
        waiting: tuple[dict[str, mx.array], Progress] | None = None
        for inputs in prefetch(self._inputs(batches, first.step), _AHEAD):
            if 0 < self.progress.step == self._options.adversarial_from:
                # What came before sounds worse at the same distance, and is no rival.
                self.progress = replace(self.progress, best=None, best_epoch=0, stale=0)
            judged = self.progress.step >= self._options.adversarial_from
            with self._computing(self.progress.step + 1):
                losses = self._step.advance(inputs, judged)
            if waiting:
                self._look_at(*waiting, monitor)
            now = self.progress
            self.progress = replace(now, position=now.position + 1, step=now.step + 1)
            waiting = (losses, self.progress)
            if self._due():
                self._look_at(*waiting, monitor)
                waiting = None
                self._save(identity)
                if self._interrupted.is_set():
                    raise KeyboardInterrupt
        if waiting:
            self._look_at(*waiting, monitor)
        spent = time.perf_counter() - started
        steps = max(self.progress.step - first.step, 1)
        return {"time/step_seconds": spent / steps, "learning_rate": rate}

    def _inputs(
        self, batches: Iterator[Batch], first: int
    ) -> Iterator[dict[str, mx.array]]:
        """Each batch with the random numbers of its step, the ``first`` and those after."""
        item = self._rank * self._options.batch_size
        for step, batch in enumerate(batches, first):
            draws = draw(self._config, batch, self._options.seed, step, item)
            yield step_inputs(batch, draws)

    def _look_at(
        self,
        losses: Mapping[str, mx.array],
        progress: Progress,
        monitor: Monitor | None,
    ) -> None:
        """Wait for a step and check its numbers; log some."""
        with self._computing(progress.step):
            values = {name: float(np.array(value)) for name, value in losses.items()}
        finite = {name: math.isfinite(value) for name, value in values.items()}
        skipped = not all(ok for name, ok in finite.items() if name.startswith("grad_"))
        diverged = not all(
            ok for name, ok in finite.items() if not name.startswith("grad_")
        )
        self._skipped = self._skipped + 1 if skipped else 0
        allowed = _SKIPS if self._options.precision == "f16" else 0
        if diverged or self._skipped > allowed:
            shown = ", ".join(f"{name} {value:g}" for name, value in values.items())
            raise DivergedError(
                f"epoch {progress.epoch + 1}, step {progress.step}: the training has "
                f"diverged ({shown}); {self._last_good()}"
            )
        if monitor and progress.step % self._options.log_steps == 0:
            named = {f"train/{name}": value for name, value in values.items()}
            monitor.scalars(progress.step, progress.epoch, named)

    @contextmanager
    def _computing(self, step: int) -> Iterator[None]:
        """What the device reports there, which may be late, becomes a `StepError`."""
        try:
            yield
        except RuntimeError as error:
            size = self._options.batch_size
            advice = f"; a --batch-size below {size} may do, in a new run"
            raise StepError(
                f"epoch {self.progress.epoch + 1}, step {step} or the one before: the "
                f"device failed ({error}){advice if size > 1 else ''}"
            ) from error

    def _last_good(self) -> str:
        if not self._path.exists():
            return "nothing was saved yet; start again with a lower --learning-rate"
        return (
            f"{self._path.name} still holds the last good state; start a new run from "
            "the last G_*.pth and D_*.pth with a lower --learning-rate or in f32"
        )

    def _due(self) -> bool:
        """Whether the state is to be saved after the current step."""
        every = self._options.save_steps
        return (
            self._interrupted.is_set()
            or bool(every and self.progress.step % every == 0)
            or time.monotonic() - self._saved_at > 60 * self._options.save_minutes
        )

    def _save(self, identity: Mapping[str, Any]) -> None:
        """Save the whole state; the old one stays until the new one is on the disk."""
        state = self._step.state
        floats = [v for v in state.values() if mx.issubdtype(v.dtype, mx.floating)]
        if not mx.all(mx.stack([mx.all(mx.isfinite(v)) for v in floats])).item():
            raise DivergedError(
                f"step {self.progress.step}: the networks hold numbers that are not "
                f"finite; {self._last_good()}"
            )
        if self._rank == 0:
            write_state(self._path, state, self.progress, identity)
        self._saved_at = time.monotonic()

    def _end_epoch(
        self,
        identity: Mapping[str, Any],
        monitor: Monitor | None,
        timing: Mapping[str, float],
    ) -> None:
        """Validate, keep what is to be kept, save where it is time."""
        now = self.progress
        self.progress = replace(now, epoch=now.epoch + 1, position=0)
        epoch = self.progress.epoch
        final = epoch == self._options.epochs
        wanted = final or epoch % self._options.validate_every == 0
        scores = self._validate() if wanted else None
        if scores:
            self._judge(scores.values[SCORE])
        if monitor:
            monitor.end_epoch(self.progress, timing, scores)
        last = self.progress.stopped or final
        kept = last or epoch % self._options.save_every == 0
        if kept and self._rank == 0:
            networks = self._step.generator, self._step.discriminator
            self._keeper.keep_epoch(*networks, self.progress)
        if kept or self._due():
            self._save(identity)
            if self._interrupted.is_set():
                raise KeyboardInterrupt

    def _validate(self) -> Scores | None:
        """Scores of rank 0, on every rank; None without held-out clips."""
        if not self._validator:
            return None
        scores = Scores({SCORE: 0.0})
        if self._rank == 0:
            scores = self._validator(self._step.generator)
        [score] = agree([scores.values[SCORE]], self._group)
        return Scores({**scores.values, SCORE: score}, scores.clips)

    def _judge(self, score: float) -> None:
        """Keep the best so far; stop where it has been long since the last one."""
        now, patience = self.progress, self._options.patience
        if score < (math.inf if now.best is None else now.best):
            now = replace(now, best=score, best_epoch=now.epoch, stale=0)
            if self._rank == 0:
                self._keeper.keep_best(self._step.generator, now)
        else:
            # Before the discriminator joins in, nothing is at its end.
            stale = now.stale + 1 if now.step > self._options.adversarial_from else 0
            now = replace(now, stale=stale, stopped=0 < patience <= stale)
        self.progress = now
