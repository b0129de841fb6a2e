"""What a run tells while it goes: a table of numbers always, TensorBoard where wanted.

``metrics.jsonl`` in the run's folder has one JSON object per line. TensorBoard files are
written by tensorboardX (extra ``train``), which needs no PyTorch: scalars, the held-out
clips as audio, their spectrograms beside the recordings' as pictures. Whoever continues
a run continues both: what was logged beyond the saved state is taken back.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rvc_mlx.training.state import Progress, replacing
from rvc_mlx.training.validation import Scores

_LOG = logging.getLogger("rvc_mlx")
METRICS = "metrics.jsonl"
EVENTS = "events"
_HEARD = 2  # clips of each epoch that TensorBoard gets

# Black, violet, red, yellow, white: the corners of a colour scale for spectrograms.
_COLOURS = np.array(
    [(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)]
)
_PICTURE_RANGE = 8.0  # natural log units below the peak that a picture shows


class Monitor:
    """Logs a run; use it as a context manager.

    Args:
        folder: of the run.
        step: steps that are done; later entries of an earlier try are dropped.
        epoch: epochs that are done; as for ``step``.
        tensorboard: True demands it, False leaves it out, None takes it if installed.

    Raises:
        ImportError: TensorBoard files are demanded and tensorboardX is missing.
    """

    def __init__(
        self, folder: Path, step: int, epoch: int, tensorboard: bool | None = None
    ):
        self._table = folder / METRICS
        _cut_table(self._table, step, epoch)
        self._writer: Any = None
        found = importlib.util.find_spec("tensorboardX") is not None
        if tensorboard and not found:
            raise ImportError(
                "TensorBoard files need tensorboardX; install it with: pip install "
                "'rvc-mlx[train]' (or leave --tensorboard out)"
            )
        if tensorboard is None and not found:
            _LOG.info("no TensorBoard files: tensorboardX is not installed")
        if found and tensorboard is not False:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(
                str(folder / EVENTS), purge_step=step + 1 if step else None
            )

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._writer:
            self._writer.close()

    def scalars(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Log numbers; those of one call share a line of the table.

        Args:
            step: steps done.
            epoch: epochs done.
            values: number by name.
        """
        row = {"step": step, "epoch": epoch, **{k: float(v) for k, v in values.items()}}
        with self._table.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self._writer:
            for name, value in values.items():
                self._writer.add_scalar(name, float(value), step)

    def clip(self, step: int, name: str, audio: np.ndarray, sample_rate: int) -> None:
        """Log audio ``[n]`` float32 in -1..1, where TensorBoard files are written."""
        if self._writer:
            audio = np.clip(audio, -1, 1)[:, None]
            self._writer.add_audio(name, audio, step, sample_rate)

    def picture(self, step: int, name: str, mels: list[np.ndarray]) -> None:
        """Log log-mels ``[T, n_mels]``, one above the other, low bands at the bottom."""
        if self._writer:
            image = np.concatenate([draw_mel(mel) for mel in mels])
            self._writer.add_image(name, image, step, dataformats="HWC")

    def end_epoch(
        self, progress: Progress, timing: Mapping[str, float], scores: Scores | None
    ) -> None:
        """Log an epoch: its numbers, and some held-out clips beside their recordings.

        Args:
            progress: after the epoch.
            timing: speed and learning rate.
            scores: of the validation, None without one.
        """
        step, epoch = progress.step, progress.epoch
        values = {**timing, **(scores.values if scores else {})}
        self.scalars(step, epoch, values)
        for i, clip in enumerate(scores.clips[:_HEARD] if scores else []):
            if epoch == 1:
                self.clip(step, f"recording/{i}", clip.target, clip.sample_rate)
            self.clip(step, f"voice/{i}", clip.output, clip.sample_rate)
            mels = [clip.target_mel, clip.output_mel]
            self.picture(step, f"recording_above_voice/{i}", mels)
        if self._writer:
            self._writer.flush()
        shown = ", ".join(
            f"{name.rsplit('/', 1)[-1]} {value:.4g}" for name, value in values.items()
        )
        best = f", best epoch {progress.best_epoch}" if progress.best_epoch else ""
        _LOG.info("epoch %d, step %d: %s%s", epoch, step, shown, best)


def draw_mel(mel: np.ndarray) -> np.ndarray:
    """A picture of a log-mel spectrogram.

    Args:
        mel: ``[T, n_mels]``, natural logarithm.

    Returns:
        ``[n_mels, T, 3]`` uint8; the loudest cell is the brightest.
    """
    level = np.clip((mel - mel.max()) / _PICTURE_RANGE + 1, 0, 1)
    place = np.linspace(0, 1, len(_COLOURS))
    channels = [np.interp(level, place, colour) for colour in _COLOURS.T]
    return np.stack(channels, axis=-1).astype(np.uint8).swapaxes(0, 1)[::-1]


def _cut_table(path: Path, step: int, epoch: int) -> None:
    """Drop rows beyond a step or epoch, and a last line that was cut short."""
    if not path.exists():
        return
    kept = []
    lines = path.read_text("utf-8").splitlines(keepends=True)
    for line in lines:
        if line.endswith("\n"):
            row = json.loads(line)
            if row["step"] <= step and row["epoch"] <= epoch:
                kept.append(line)
    if len(kept) < len(lines):
        with replacing(path) as partial:
            partial.write_text("".join(kept), "utf-8")
