"""The loop round the step: batches prepared ahead, losses logged, the state saved, the clock."""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from recipes.optimisation import Batch, HostBatch, Training
from rvc_mlx.training.distributed import Group, rank_of

log = logging.getLogger("recipes")


def random_key(rng: np.random.Generator) -> np.ndarray:
    """A key for ``mx.random``, made on the host."""
    return rng.integers(0, 2**32, 2, dtype=np.uint32)


def on_device(batch: Mapping[str, np.ndarray | mx.array]) -> Batch:
    """The batch as MLX arrays; made in the thread that uses them."""
    return {name: mx.array(value) for name, value in batch.items()}


def prefetch(
    make: Callable[[int], HostBatch],
    first: int,
    group: Group | None = None,
    workers: int = 4,
) -> Iterator[HostBatch]:
    """Batches ``make(first)``, ``make(first + 1)`` and so on, prepared ahead by threads.

    Of N processes each makes every N-th, so that N steps of one have the batches of a
    joint step. An error of ``make`` is raised here when its batch is due.
    """
    rank, world = rank_of(group)
    numbers = itertools.count(first * world + rank, world)
    with ThreadPoolExecutor(workers) as pool:
        ahead = deque(pool.submit(make, next(numbers)) for _ in range(2 * workers))
        while True:
            yield ahead.popleft().result()
            ahead.append(pool.submit(make, next(numbers)))


@dataclass(frozen=True)
class Watch:
    """When to log, save and stop.

    Attributes:
        checkpoint: path of the state.
        minutes: of this call; the rest of the training is for the next.
        log_every: steps.
        save_every: seconds.
    """

    checkpoint: Path
    minutes: float = 1e9
    log_every: int = 50
    save_every: float = 120.0


def run(training: Training, batches: Iterator[Batch], watch: Watch) -> list[dict]:
    """Train until the schedule or this call's time is over, then save.

    Of several processes that train together, the first logs and saves; all start from
    its weights.

    Args:
        training: where it stands.
        batches: without end; one more is taken than steps are done.
        watch: limits of this call.

    Returns:
        Mean losses of every ``log_every`` steps.

    Raises:
        ValueError: the processes stand at different steps.
    """
    training.join()
    began = saved = time.monotonic()
    history: list[dict] = []
    sums: dict[str, float] = {}
    counted, last = 0, began
    batch = None if training.done else next(batches)
    while training.goes_on(time.monotonic() - began >= 60 * watch.minutes):
        launched = training.launch(batch)
        batch = next(batches)  # while the device is busy
        for name, value in training.finish(launched).items():
            sums[name] = sums.get(name, 0.0) + value
        if training.rank != 0:
            continue
        counted += 1
        now = time.monotonic()
        if counted == watch.log_every or training.done:
            means = {name: value / counted for name, value in sums.items()}
            history.append({"step": training.step, **means})
            shown = " ".join(f"{name} {value:.4f}" for name, value in means.items())
            log.info(f"{training.step}: {shown} | {counted / (now - last):.2f} steps/s")
            sums, counted, last = {}, 0, now
        if now - saved > watch.save_every:
            training.save(watch.checkpoint)
            saved = time.monotonic()
    if training.rank == 0:
        training.save(watch.checkpoint)
    return history


def write_history(path: Path, history: list[dict], facts: Mapping[str, Any]) -> None:
    """Append one call's losses to a JSON file of lines."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**facts, "history": history}) + "\n")
