"""What both training scripts share: the schedule, the step, its state on disk.

Weights are float32; the network sees a copy in the compute type. The whole state is a
flat dict of arrays, so a run that is stopped continues as if it had not been.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from rvc_mlx import compiling
from rvc_mlx.training.distributed import (
    Group,
    agree,
    gather,
    mean_gradients,
    rank_of,
    share_start,
)
from rvc_mlx.training.parametrization import Packing

HostBatch = dict[str, np.ndarray]
Batch = dict[str, mx.array]
Losses = dict[str, mx.array]
_ALL = "all"  # name of the vector that holds every weight
# Network, batch and strength (0 at the start of training, 1 at its end) to losses;
# "total" is what is minimised.
LossFunction = Callable[[nn.Module, Batch, mx.array], Losses]


def fused(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """``function`` of any shapes as one kernel on a GPU; on the CPU it is left as it is.

    There MLX would call a C compiler. Nothing is fused while MLX differentiates, nor in a
    step that is only traced.
    """

    @cache
    def kernel() -> Callable[..., mx.array]:
        on_gpu = mx.default_device().type == mx.DeviceType.gpu
        return mx.compile(function, shapeless=True) if on_gpu else function

    return lambda *arguments: kernel()(*arguments)


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Attributes:
        learning_rate: highest.
        steps: of the whole training.
        minutes: of the whole training; the nearer of the two limits counts.
        warmup: share of the training in which the rate rises.
        weight_decay: of AdamW.
        clip: largest norm of the gradient.
    """

    learning_rate: float
    steps: int
    minutes: float = 1e9
    warmup: float = 0.03
    weight_decay: float = 0.01
    clip: float = 1.0

    def progress(self, step: int, seconds: float) -> float:
        """Share of the training that is done, 0..1."""
        return min(1.0, max(step / self.steps, seconds / (60 * self.minutes)))

    def rate(self, progress: float) -> float:
        """Learning rate: linear rise, then half a cosine down to 2 %."""
        if progress < self.warmup:
            return self.learning_rate * max(progress / self.warmup, 1e-3)
        angle = math.pi * (progress - self.warmup) / (1 - self.warmup)
        return self.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(angle)))


@dataclass(frozen=True)
class Launched:
    """A step that the device works on.

    Attributes:
        queued: weights, buffers, moments and losses after it, not yet computed.
        began: ``time.perf_counter()`` at its start.
    """

    queued: tuple[Any, Any, Any, Losses]
    began: float


class Training:
    """A network in training, alone or with the other processes of a group.

    All processes start from the first one's weights, see ``join``; each step takes the
    mean of their gradients and running statistics, and the clock of the first.

    Attributes:
        network: its structure; the arrays that count are in ``weights``.
        weights: trainable, float32, packed into one vector (few kernels a step).
        buffers: the rest (running statistics), float32.
        moments: AdamW's state.
        step: steps done.
        seconds: time spent in them.
        rank: of this process in its group; the first, 0, logs and writes.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: LossFunction,
        schedule: Schedule,
        dtype: mx.Dtype = mx.float32,
        compiled: str = "traced",
        group: Group | None = None,
    ):
        network.train()
        self._group = group
        self.rank, self._world = rank_of(group)
        self.network = network
        self.schedule = schedule
        trainable = dict(tree_flatten(network.trainable_parameters()))
        self._packing = Packing({name: a.shape for name, a in trainable.items()})
        self._shapes = {name: list(a.shape) for name, a in trainable.items()}
        self.weights = {_ALL: self._packing.pack(trainable)}
        self.buffers = _rest(network)
        self.step = 0
        self.seconds = 0.0
        self._started = False
        self._optimiser = optim.AdamW(
            schedule.learning_rate,
            betas=[0.9, 0.98],
            weight_decay=schedule.weight_decay,
            bias_correction=True,
        )
        self._optimiser.init(self.weights)
        self.moments = self._optimiser.state
        self._loss, self._dtype = loss, dtype
        self._advance = compiling.compiled(self._pure_step, compiled)

    def _pure_step(self, weights, buffers, moments, batch, progress):
        def total(trainable):
            self.network.update(tree_unflatten(list(trainable.items())))
            self.network.update(buffers)
            losses = self._loss(self.network, batch, progress)
            return losses["total"], (losses, _rest(self.network))

        seen = self._packing.unpack(weights[_ALL].astype(self._dtype))
        (_, (losses, buffers)), gradients = mx.value_and_grad(total)(seen)
        gradients = {_ALL: self._packing.pack(gradients).astype(mx.float32)}
        gradients = mean_gradients(gradients, self._group)
        statistics = mean_gradients(dict(tree_flatten(buffers)), self._group)
        buffers = _tree(list(statistics.items()))
        gradients, norm = optim.clip_grad_norm(gradients, self.schedule.clip)
        self._optimiser.state = moments
        weights = self._optimiser.apply_gradients(gradients, weights)
        return weights, buffers, self._optimiser.state, {**losses, "norm": norm}

    def launch(self, batch: Batch) -> Launched:
        """Queue one step; the device works on it while the caller prepares the next."""
        began = time.perf_counter()
        progress = self.schedule.progress(self.step, self.seconds)
        moments = dict(self.moments)
        moments["learning_rate"] = mx.array(self.schedule.rate(progress), mx.float32)
        queued = self._advance(
            self.weights, self.buffers, moments, batch, mx.array(progress, mx.float32)
        )
        mx.async_eval(queued)
        return Launched(queued, began)

    def finish(self, launched: Launched) -> dict[str, float]:
        """Wait for a step and take over its state; its losses as numbers.

        Raises:
            FloatingPointError: the loss is not finite; the state is the one before.
        """
        weights, buffers, moments, losses = launched.queued
        values = {name: value.item() for name, value in losses.items()}
        if not math.isfinite(values["total"] + values["norm"]):
            raise FloatingPointError(f"step {self.step}: the losses are {values}")
        self.weights, self.buffers, self.moments = weights, buffers, moments
        self.step += 1
        # The first step of a process is traced or compiled, that for minutes on a bare GPU.
        self.seconds += time.perf_counter() - launched.began if self._started else 0.0
        self._started = True
        return values

    def join(self) -> None:
        """Start from where the first process stands.

        Raises:
            ValueError: the processes stand at different steps.
        """
        steps = gather(self.step, self._group)
        if len(set(steps)) > 1:
            raise ValueError(
                f"the processes stand at steps {steps}; expected the same step: give all "
                "of them the same state, or none"
            )
        shared = share_start(self._arrays(), self._group)
        self.weights, self.buffers, self.moments = (
            _tree([(name, shared[f"{kind}.{name}"]) for name, _ in tree_flatten(tree)])
            for kind, tree in self._trees().items()
        )

    def _trees(self) -> dict[str, Any]:
        return {"w": self.weights, "b": self.buffers, "m": self.moments}

    def _arrays(self) -> dict[str, mx.array]:
        """The whole state, flat."""
        return {
            f"{kind}.{name}": value
            for kind, tree in self._trees().items()
            for name, value in tree_flatten(tree)
        }

    def goes_on(self, late: bool = False) -> bool:
        """Whether there is another step; the first process decides, for all.

        Args:
            late: this call's time is over.
        """
        self.seconds, stop = agree([self.seconds, float(late)], self._group)
        return not (stop or self.done)

    def advance(self, batch: Batch) -> dict[str, float]:
        """One step from start to end, see ``finish``."""
        return self.finish(self.launch(batch))

    @property
    def done(self) -> bool:
        """Whether the schedule is at its end."""
        return self.schedule.progress(self.step, self.seconds) >= 1

    def finished_network(self) -> nn.Module:
        """The network with the present float32 weights, in evaluation mode."""
        weights = self._packing.unpack(self.weights[_ALL])
        self.network.update(tree_unflatten(list(weights.items())))
        self.network.update(self.buffers)
        self.network.eval()
        return self.network

    def save(self, path: Path) -> None:
        """Write everything, atomically."""
        told = {"step": self.step, "seconds": self.seconds, "shapes": self._shapes}
        metadata = {"training": json.dumps({**told, "processes": self._world})}
        partial = path.with_name(f".{path.stem}.partial.safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        mx.save_safetensors(str(partial), self._arrays(), metadata)
        os.replace(partial, path)

    def load(self, path: Path) -> None:
        """Continue from what ``save`` wrote.

        Raises:
            ValueError: it belongs to another network, or to another number of processes.
        """
        arrays, metadata = mx.load(str(path), return_metadata=True)
        told = json.loads(metadata["training"])
        processes = told.get("processes", 1)  # early states were one process's
        if processes != self._world:
            # Each of N processes makes every N-th batch: others would follow.
            raise ValueError(
                f"{path}: the processes that made it were {processes}, not {self._world}; "
                "continue with as many, or give another folder"
            )
        trees: dict[str, Any] = {}
        for kind, present in self._trees().items():
            found = {
                name[2:]: value
                for name, value in arrays.items()
                if name.startswith(f"{kind}.")
            }
            expected = {name: a.shape for name, a in tree_flatten(present)}
            same = {name: a.shape for name, a in found.items()} == expected
            if not same or told["shapes"] != self._shapes:
                raise ValueError(
                    f"{path}: made by a network of other sizes; give the options it was "
                    "trained with, or another folder"
                )
            # The order of the leaves is that of the sums over them.
            ordered = [(name, found[name]) for name in expected]
            trees[kind] = _tree(ordered)
        self.weights, self.buffers, self.moments = trees["w"], trees["b"], trees["m"]
        self.step, self.seconds = told["step"], told["seconds"]


def _rest(network: nn.Module) -> dict:
    """Parameters that are not trained, as a tree."""
    trained = {name for name, _ in tree_flatten(network.trainable_parameters())}
    rest = [
        (name, value)
        for name, value in tree_flatten(network.parameters())
        if name not in trained
    ]
    return _tree(rest)


def _tree(named: list[tuple[str, mx.array]]) -> dict:
    """The inverse of ``tree_flatten``, of nothing too."""
    return tree_unflatten(named) if named else {}
