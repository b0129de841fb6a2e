"""Shapes and values of every block of a network, on our side and on PyTorch's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import mlx.nn
import numpy as np
import torch

from rvc_mlx.models import rmvpe as ours
from rvc_reference import rmvpe as theirs

# Blocks of RMVPE under which both sides have the same names.
OUR_BLOCKS = (ours.ConvBlockRes, ours.ResEncoderBlock, ours.ResDecoderBlock)
OUR_BLOCKS += (ours.Intermediate, ours.DeepUNet, mlx.nn.Conv2d)
TORCH_BLOCKS = (theirs.ConvBlockRes, theirs.Level, theirs.UpLevel)
TORCH_BLOCKS += (theirs.Intermediate, theirs.DeepUnet, torch.nn.Conv2d)


class Block(NamedTuple):
    """What one block was given and gave; channels last on both sides.

    Attributes:
        given: shape of its first input.
        value: its output, array or tensor.
    """

    given: tuple[int, ...]
    value: Any


@contextmanager
def trace_mlx(net: mlx.nn.Module, kinds: Sequence[type]) -> Iterator[dict[str, Block]]:
    """Record every call of a block of ``net`` inside the block; nothing is computed."""
    names = {id(module): name for name, module in net.named_modules()}
    seen: dict[str, Block] = {}

    def recording(kind: type) -> Any:
        call = kind.__call__

        def record(module: Any, x: Any, *rest: Any) -> Any:
            result = call(module, x, *rest)
            if id(module) in names:
                seen[names[id(module)]] = Block(tuple(x.shape), result)
            return result

        return mock.patch.object(kind, "__call__", record)

    with ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(recording(kind))
        yield seen


@contextmanager
def trace_torch(
    net: torch.nn.Module, kinds: tuple[type, ...]
) -> Iterator[dict[str, Block]]:
    """The same for PyTorch, whose images ``[B, C, T, M]`` are shown channels last."""
    seen: dict[str, Block] = {}
    handles = []
    for name, module in net.named_modules():
        if isinstance(module, kinds):

            def record(_: Any, given: tuple, result: Any, name: str = name) -> None:
                x = given[0].permute(0, 2, 3, 1)
                seen[name] = Block(tuple(x.shape), result.permute(0, 2, 3, 1))

            handles.append(module.register_forward_hook(record))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def our_mel_image(frames: int, n_mels: int, seed: int = 0) -> np.ndarray:
    """A random log-mel ``[1, T, n_mels]`` float32 of realistic range."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((1, frames, n_mels)) * 2 - 6).astype(np.float32)
