"""AdamW with bias correction over flat dicts of arrays, and the scale of float16 losses.

Source: Loshchilov & Hutter 2019; numbers as ``torch.optim.AdamW``. ``mlx.optimizers``
leaves the bias correction out by default, which makes RVC's first steps three times as
long.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

Arrays = dict[str, mx.array]

# Loss scaling of float16, as torch's GradScaler does it.
FIRST_SCALE = 65536.0
GROWTH_INTERVAL = 2000  # steps without overflow after which the scale doubles


@dataclass(frozen=True)
class AdamW:
    """The optimiser's numbers, RVC's by default.

    Attributes:
        learning_rate: of the first step.
        betas: decay of mean and square.
        eps: added to the square's root.
        weight_decay: of all parameters, times the learning rate.
    """

    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.8, 0.99)
    eps: float = 1e-9
    weight_decay: float = 0.01


def moments(parameters: Mapping[str, mx.array]) -> tuple[Arrays, Arrays]:
    """Mean and square before the first step: zeros."""
    mean = {name: mx.zeros_like(value) for name, value in parameters.items()}
    square = {name: mx.zeros_like(value) for name, value in parameters.items()}
    return mean, square


def norm_of(gradients: Mapping[str, mx.array]) -> mx.array:
    """Euclidean norm of all gradients together; not finite if one value is not."""
    return mx.sqrt(mx.sum(mx.stack([mx.sum(mx.square(g)) for g in gradients.values()])))


def update(
    optimizer: AdamW,
    current: tuple[Arrays, Arrays, Arrays],
    gradients: Mapping[str, mx.array],
    learning_rate: mx.array,
    count: mx.array,
    apply: mx.array,
) -> tuple[Arrays, Arrays, Arrays]:
    """One step.

    Args:
        optimizer: betas, epsilon and decay.
        current: parameters, mean and square.
        gradients: by the parameters' names.
        learning_rate: float32 scalar.
        count: steps up to and with this one, int32 scalar.
        apply: boolean scalar; where false, nothing changes.

    Returns:
        New parameters, mean and square.
    """
    steps = count.astype(mx.float32)
    corrections = [-mx.expm1(steps * math.log(beta)) for beta in optimizer.betas]
    rate = learning_rate / corrections[0]
    spread = mx.rsqrt(corrections[1])
    first, second = optimizer.betas
    new: tuple[Arrays, Arrays, Arrays] = ({}, {}, {})
    for name, gradient in gradients.items():
        parameter, mean, square = (part[name] for part in current)
        new_mean = first * mean + (1 - first) * gradient
        new_square = second * square + (1 - second) * mx.square(gradient)
        size = mx.sqrt(new_square) * spread + optimizer.eps
        decayed = parameter * (1 - learning_rate * optimizer.weight_decay)
        moved = decayed - rate * new_mean / size
        for part, value, old in zip(
            new,
            (moved, new_mean, new_square),
            (parameter, mean, square),
            strict=True,
        ):
            part[name] = mx.where(apply, value, old)
    return new


def first_counters(optimizer: AdamW, precision: str) -> Arrays:
    """Scalars of the state before the first step."""
    return {
        "g_steps": mx.array(0, mx.int32),
        "d_steps": mx.array(0, mx.int32),
        "good_steps": mx.array(0, mx.int32),
        "scale": mx.array(FIRST_SCALE if precision == "f16" else 1.0),
        "learning_rate": mx.array(optimizer.learning_rate),
    }


def next_scale(counters: Arrays, finite: mx.array, precision: str) -> Arrays:
    """Loss scale of the next step: halved on overflow, doubled after a long while.

    Args:
        counters: of this step.
        finite: whether all gradients were, boolean scalar.
        precision: other than ``"f16"``, the scale stays 1.

    Returns:
        ``scale`` and ``good_steps``.
    """
    scale, good = counters["scale"], counters["good_steps"]
    if precision == "f16":
        good = mx.where(finite, good + 1, 0)
        grow = good >= GROWTH_INTERVAL
        scale = mx.where(finite, mx.where(grow, 2 * scale, scale), scale / 2)
        good = mx.where(grow, 0, good)
    return {"scale": scale, "good_steps": good}
