"""Which networks and voices of a run stay on the disk.

In the run's folder, for a voice called NAME: ``NAME.pth`` and ``NAME.safetensors``, the
voice of the best epoch, with the network it came from in ``G_best.pth``; and, every few
epochs, ``G_<step>.pth``, ``D_<step>.pth`` and the voice ``NAME_<epoch>e_<step>s``.
Without validation no epoch is known to be the best, and ``NAME`` is the latest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from rvc_mlx.models.voice_config import SynthesizerConfig
from rvc_mlx.training.parametrization import to_torch
from rvc_mlx.training.state import Progress
from rvc_mlx.training.voice_export import (
    Tensors,
    VoiceFacts,
    write_training_checkpoint,
    write_voice,
)

Parameters = Mapping[str, mx.array]

BEST = "G_best.pth"


class Keeper:
    """Writes a run's networks; every file appears whole or not at all.

    Args:
        folder: where to.
        config: of the generator.
        facts: what the voices' files say; epoch and step are the run's.
        learning_rate: the one the run started with.
        only_latest: keep nothing of single epochs.
    """

    def __init__(
        self,
        folder: Path,
        config: SynthesizerConfig,
        facts: VoiceFacts,
        learning_rate: float,
        only_latest: bool,
    ):
        self._folder, self._config, self._facts = folder, config, facts
        self._learning_rate, self._only_latest = learning_rate, only_latest

    def keep_best(self, generator: Parameters, progress: Progress) -> None:
        """Make this generator the voice.

        Raises:
            OSError: a file cannot be written; what was there is unchanged.
            ValueError: half precision cannot hold the network.
        """
        tensors = to_torch(generator)
        self._checkpoint(BEST, tensors, progress, self._config)
        self._voice(self._facts.name, tensors, progress)

    def keep_epoch(
        self,
        generator: Parameters,
        discriminator: Parameters,
        progress: Progress,
    ) -> None:
        """Keep both networks of an epoch, and its voice.

        Args:
            generator: flat parameters.
            discriminator: flat parameters.
            progress: names the files; where it knows no best epoch, this one is the
                voice for now.

        Raises:
            OSError: a file cannot be written; what was there is unchanged.
            ValueError: half precision cannot hold the network.
        """
        epoch, step = progress.epoch, progress.step
        tensors = to_torch(generator)
        if progress.best is None:
            self._voice(self._facts.name, tensors, progress)
        if self._only_latest:
            return
        self._checkpoint(f"G_{step}.pth", tensors, progress, self._config)
        self._checkpoint(f"D_{step}.pth", to_torch(discriminator), progress)
        self._voice(f"{self._facts.name}_{epoch}e_{step}s", tensors, progress)

    def _checkpoint(
        self,
        name: str,
        tensors: Tensors,
        progress: Progress,
        config: SynthesizerConfig | None = None,
    ) -> None:
        path = self._folder / name
        write_training_checkpoint(
            path, tensors, progress.epoch, self._learning_rate, config
        )

    def _voice(self, name: str, tensors: Tensors, progress: Progress) -> None:
        facts = replace(self._facts, epoch=progress.epoch, step=progress.step)
        for suffix in (".pth", ".safetensors"):
            path = self._folder / f"{name}{suffix}"
            write_voice(path, tensors, self._config, facts)
