"""Several processes that train one voice: means over a group, agreement, one writer.

Each process (rank) takes its share of every batch. The losses are means over the items
of a batch, of which every rank has as many, so the mean of the ranks' gradients is the
gradient of the joint batch. The KL loss is a mean over valid frames, of which ranks have
unlike numbers: ``frame_share`` weights it so that the same holds for it.

Start with ``mlx.launch -n 2 -- rvc-mlx train ...``; back ends are NCCL on NVIDIA, ring
over TCP and MPI elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import mlx.core as mx
import numpy as np

BUCKET_BYTES = 32 * 2**20  # gradients are summed in pieces of about this size

Group = mx.distributed.Group


def connect() -> Group | None:
    """The group that this process belongs to; None if it works alone.

    Raises:
        RuntimeError: the launcher's settings are there but the others do not answer.
    """
    group = mx.distributed.init(strict=False)
    return group if group.size() > 1 else None


def rank_of(group: Group | None) -> tuple[int, int]:
    """Rank and size; ``(0, 1)`` without a group."""
    return (group.rank(), group.size()) if group else (0, 1)


def mean_gradients(
    gradients: Mapping[str, mx.array],
    group: Group | None,
    bucket_bytes: int = BUCKET_BYTES,
) -> dict[str, mx.array]:
    """Mean over the group of every array; may be traced by ``mx.compile``.

    Small arrays travel together: one message each would cost more than their bytes.

    Args:
        gradients: name to array; the same names, shapes and types on every rank.
        group: None leaves them as they are.
        bucket_bytes: size at which a message is full.
    """
    if group is None:
        return dict(gradients)
    means: dict[str, mx.array] = {}
    for names in _buckets(gradients, bucket_bytes):
        parts = [gradients[name] for name in names]
        joined = mx.concatenate([part.reshape(-1) for part in parts])
        joined = mx.distributed.all_sum(joined, group=group) * (1 / group.size())
        ends = np.cumsum([part.size for part in parts])[:-1].tolist()
        for name, part, mean in zip(names, parts, mx.split(joined, ends), strict=True):
            means[name] = mean.reshape(part.shape)
    return {name: means[name] for name in gradients}


def _buckets(
    gradients: Mapping[str, mx.array], bucket_bytes: int
) -> Iterator[list[str]]:
    """Names in groups of one type and of about ``bucket_bytes``, alike on every rank."""
    names: list[str] = []
    size = 0
    for name in sorted(gradients, key=lambda n: (str(gradients[n].dtype), n)):
        array = gradients[name]
        if names and (
            size + array.nbytes > bucket_bytes
            or array.dtype != gradients[names[-1]].dtype
        ):
            yield names
            names, size = [], 0
        names.append(name)
        size += array.nbytes
    if names:
        yield names


def frame_share(frames: mx.array, group: Group | None) -> mx.array:
    """Weight of this rank's mean over frames, so that the ranks' mean is the joint one.

    With sums S_r over n_r frames: the mean over R ranks of ``S_r / n_r * share_r`` with
    ``share_r = n_r * R / sum(n)`` is ``sum(S) / sum(n)``.

    Args:
        frames: valid frames of this rank's batch, a scalar.
        group: None gives 1.

    Returns:
        A float32 scalar.
    """
    if group is None:
        return mx.array(1.0)
    frames = frames.astype(mx.float32)
    return frames * group.size() / mx.distributed.all_sum(frames, group=group)


def agree(values: list[float], group: Group | None) -> list[float]:
    """What rank 0 has, on every rank; also waits for all of them.

    Args:
        values: as many on every rank; float32 is enough for them.
        group: None gives them back.
    """
    if group is None:
        return values
    mine = mx.array(values if group.rank() == 0 else [0.0] * len(values))
    shared = mx.distributed.all_sum(mine, group=group)
    return np.array(shared).tolist()


def gather(value: int, group: Group | None) -> list[int]:
    """What every rank has, in their order; also waits for all of them."""
    if group is None:
        return [value]
    values = mx.distributed.all_gather(mx.array([value], mx.int32), group=group)
    return np.array(values).tolist()


def share_start(
    arrays: Mapping[str, mx.array], group: Group | None
) -> dict[str, mx.array]:
    """What rank 0 has of the same names, shapes and types, evaluated.

    Ranks that start alike stay alike: they apply the same mean gradients.
    """
    if group is None:
        return dict(arrays)
    first = group.rank() == 0
    shared = {
        name: mx.distributed.all_sum(
            value if first else mx.zeros_like(value), group=group
        )
        for name, value in sorted(arrays.items())
    }
    mx.eval(shared)
    return shared
