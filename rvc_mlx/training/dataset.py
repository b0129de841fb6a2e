"""Batches of clips of similar length, the same ones for the same seed and epoch.

Every clip is used: the upper end of a bucket is how far its clips are filled up with
zeros, so that few shapes are compiled, and nothing lies outside of the buckets. (The
original takes lengths from file sizes, which makes them a third too long, and drops what
falls outside of its buckets: float32 clips below 0.75 s or above 6.75 s.)

* Short clips fall into the first bucket. ``preprocess`` makes none below half a second.
* Clips above 900 frames are cut into equal parts, each an item of its own.
* A bucket that is no multiple of the batch is topped up by repeating some of its clips.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from rvc_mlx.machine import memory_bytes, processors
from rvc_mlx.training.clips import (
    ClipArrays,
    Sound,
    count_frames,
    cut_clip,
    load_features,
    load_sound,
)
from rvc_mlx.training.filelist import Entry, read_filelist
from rvc_mlx.training.preprocess import FILELIST

if TYPE_CHECKING:
    from rvc_mlx.training.presets import TrainingConfig

Made = TypeVar("Made")

BUCKETS = (50, 100, 200, 300, 400, 500, 600, 700, 800, 900)  # frames
CACHE_SHARE = 1 / 8  # of the memory, for clips, so that later epochs need not compute


def cache_size(processes: int = 1) -> int:
    """Bytes for the clips of each of the processes that train together."""
    return int(memory_bytes() * CACHE_SHARE) // processes


@dataclass(frozen=True)
class Batch:
    """B clips, filled up with zeros to T frames.

    Attributes:
        phone: ``[B, T, C]`` float32 content features.
        lengths: ``[B]`` int32 frames of each clip.
        pitch: ``[B, T]`` int32 in 1..255, 0 beyond the clip; None without F0.
        pitchf: ``[B, T]`` float32 in Hz; None without F0.
        spec: ``[B, T, bins]`` float32 magnitudes.
        wave: ``[B, T * hop]`` float32.
        sid: ``[B]`` int32 speakers.
    """

    phone: np.ndarray
    lengths: np.ndarray
    pitch: np.ndarray | None
    pitchf: np.ndarray | None
    spec: np.ndarray
    wave: np.ndarray
    sid: np.ndarray


@dataclass(frozen=True)
class Item:
    """A clip, or a part of a long one.

    Attributes:
        entry: its files.
        first: first frame.
        frames: how many.
    """

    entry: Entry
    first: int
    frames: int


class TrainingSet:
    """The clips of a folder in batches.

    Args:
        folder: with a ``filelist.txt``.
        config: what is trained.
        batch_size: clips per batch and replica.
        seed: of the order.
        entries: clips to use instead of the filelist's, see ``filelist.hold_out``.
        threads: that load clips; None for one per processor, up to 8.
        cache_bytes: memory for clips that were loaded once; None for an eighth of all.

    Attributes:
        items: every clip or part of one, in the filelist's order.
        buckets: frames to the items of this bucket, by place in ``items``.

    Raises:
        ValueError: a file does not fit the configuration, or a clip has no frames.
        OSError: a file is missing or cannot be read.
    """

    def __init__(
        self,
        folder: str | Path,
        config: TrainingConfig,
        batch_size: int,
        seed: int,
        *,
        entries: Sequence[Entry] | None = None,
        threads: int | None = None,
        cache_bytes: int | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected 1 or more")
        if entries is None:
            entries = read_filelist(Path(folder) / FILELIST)
        self.config, self.batch_size, self.seed = config, batch_size, seed
        self.items = [item for e in entries for item in _items(e, config)]
        self.buckets = _fill_buckets(self.items, config.segment_frames)
        self._threads = threads or min(processors(), 8)
        if cache_bytes is None:
            cache_bytes = cache_size()
        self._free = cache_bytes
        self._kept: dict[Path | tuple[Path | None, ...], Any] = {}
        self._lock = threading.Lock()

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one epoch, for one replica."""
        return self.steps()

    def steps(self, world: int = 1) -> int:
        """Batches of one epoch, for each of ``world`` replicas."""
        joint = self.batch_size * world
        return sum(-(-len(places) // joint) for places in self.buckets.values())

    def batches(
        self, epoch: int, start: int = 0, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """The batches of an epoch, which depend on nothing but seed and epoch.

        Args:
            epoch: number, 0 or more.
            start: steps to leave out, without loading them.
            rank: of this replica: it gets these rows of the batch that one replica
                with ``world`` times the batch size would get.
            world: replicas.

        Raises:
            ValueError, OSError: a file was changed or removed meanwhile.
        """
        rows = slice(rank * self.batch_size, (rank + 1) * self.batch_size)
        plan = self.plan(epoch, world)[start:]
        with ThreadPoolExecutor(self._threads) as pool:
            for bucket, places in plan:
                items = [self.items[place] for place in places[rows]]
                clips = list(pool.map(self._load, items))
                yield _collate(items, clips, bucket, self.config.hop)

    def plan(self, epoch: int, world: int = 1) -> list[tuple[int, np.ndarray]]:
        """Bucket and places in ``items`` of each joint batch of an epoch."""
        rng = np.random.default_rng([self.seed, epoch])
        joint = self.batch_size * world
        batches = []
        for bucket, places in self.buckets.items():
            order = rng.permutation(places)
            whole = -(-len(order) // joint) * joint
            order = np.resize(order, whole)  # repeats from the beginning
            batches += [(bucket, batch) for batch in order.reshape(-1, joint)]
        return [batches[place] for place in rng.permutation(len(batches))]

    def _load(self, item: Item) -> ClipArrays:
        """An item; clips that differ in their features alone share their sound."""
        entry, config = item.entry, self.config
        recorded = (entry.wave, entry.f0_coarse, entry.f0)
        sound: Sound = self._keep(recorded, lambda: load_sound(entry, config))
        phone: np.ndarray = self._keep(entry.features, lambda: load_features(entry))
        try:
            return cut_clip(sound, phone, item.first, item.frames, config.hop)
        except ValueError as error:
            raise ValueError(f"{entry.wave}: changed meanwhile: {error}") from error

    def _keep(
        self, key: Path | tuple[Path | None, ...], load: Callable[[], Any]
    ) -> Any:
        """What was loaded before, or is now and stays in memory where there is room."""
        found = self._kept.get(key)
        if found is None:
            found = load()
            with self._lock:
                if key not in self._kept and found.nbytes <= self._free:
                    self._free -= found.nbytes
                    self._kept[key] = found
        return found


def _items(entry: Entry, config: TrainingConfig) -> list[Item]:
    """A clip as one item, or as several of at most 900 frames."""
    frames = count_frames(entry, config)
    if frames < 1:
        raise ValueError(f"{entry.wave}: shorter than one frame; remove it")
    parts = -(-frames // BUCKETS[-1])
    edges = [frames * part // parts for part in range(parts + 1)]
    return [
        Item(entry, first, last - first) for first, last in itertools.pairwise(edges)
    ]


def _fill_buckets(items: Sequence[Item], segment: int) -> dict[int, np.ndarray]:
    """Places of the items by the smallest boundary that holds them and a segment."""
    lengths = np.array([max(item.frames, segment) for item in items])
    found = np.searchsorted(BUCKETS, lengths)
    return {
        BUCKETS[bucket]: np.flatnonzero(found == bucket) for bucket in np.unique(found)
    }


def _collate(
    items: Sequence[Item], clips: Sequence[ClipArrays], T: int, hop: int
) -> Batch:
    """Join clips into arrays of ``T`` frames."""

    def joined(name: str) -> np.ndarray | None:
        arrays = [getattr(clip, name) for clip in clips]
        if arrays[0] is None:
            return None
        length = T * hop if name == "wave" else T
        shape = (len(arrays), length, *arrays[0].shape[1:])
        result = np.zeros(shape, arrays[0].dtype)
        for row, array in zip(result, arrays, strict=True):
            row[: len(array)] = array
        return result

    return Batch(
        lengths=np.array([item.frames for item in items], np.int32),
        sid=np.array([item.entry.speaker for item in items], np.int32),
        **{field.name: joined(field.name) for field in fields(ClipArrays)},  # type: ignore[arg-type]
    )


def prefetch(batches: Iterator[Made], depth: int = 2) -> Iterator[Made]:
    """Pass on batches that a thread prepares while the device works.

    Args:
        batches: where they come from, none of them None; its errors are raised here.
        depth: batches prepared ahead.
    """
    worker = _Prefetcher(batches, depth)
    worker.start()
    try:
        while (batch := worker.ready.get()) is not None:
            yield batch
        if worker.error is not None:
            raise worker.error
    finally:
        worker.stopped.set()
        worker.join()


class _Prefetcher(threading.Thread):
    """Puts batches into a queue, and None after the last one or an error."""

    def __init__(self, batches: Iterator[Any], depth: int):
        super().__init__(name="prefetch", daemon=True)
        self._batches = batches
        self.ready: queue.Queue[Any] = queue.Queue(depth)
        self.stopped = threading.Event()
        self.error: BaseException | None = None

    def run(self) -> None:
        """Work until the end, an error, or nobody wants more."""
        try:
            for batch in self._batches:
                self._put(batch)
                if self.stopped.is_set():
                    break
        except BaseException as error:  # noqa: BLE001 (raised again by the reader)
            self.error = error
        finally:
            close = getattr(self._batches, "close", None)
            if close is not None:
                close()
            self._put(None)

    def _put(self, batch: Any) -> None:
        while not self.stopped.is_set():
            try:
                self.ready.put(batch, timeout=0.1)
            except queue.Full:
                continue
            return
