"""The mean of two networks' weights: ``python -m recipes.average BEFORE AFTER --export MEAN``.

A network that was trained on from another lies near it, and what lies between the two often
does better on what neither has heard than either (Wortsman et al. 2022, "Model soups"). An
encoder in the middle also keeps to what its voices know, so they need fewer steps on it.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from rvc_mlx.checkpoint import (
    Checkpoint,
    name_and_hash,
    read_checkpoint,
    save_checkpoint,
)

log = logging.getLogger("recipes")

MODEL_HASH = "model_hash"  # of a voice: names its run and step
MEAN_OF = "mean_of"  # in the metadata: the files with their hashes and shares
SHARPENED = "sharpened"  # in the metadata: see ``recipes.sharpen``


def mean(
    before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray], share: float
) -> dict[str, np.ndarray]:
    """Tensors between those of two networks, of the types of ``after``.

    Args:
        before: by name.
        after: of the same names and shapes.
        share: of ``after``, 0..1.

    Raises:
        ValueError: names or shapes differ; names the first that does.
    """
    for name in sorted({*before, *after}):
        shapes = [
            str(tensors[name].shape) if name in tensors else "nothing"
            for tensors in (before, after)
        ]
        if len(set(shapes)) > 1:
            raise ValueError(
                f"{name}: {' and '.join(shapes)}; expected two files of one network, the "
                "second trained on from the first"
            )
    return {
        name: (
            (1 - share) * before[name].astype(np.float32)
            + share * value.astype(np.float32)
        ).astype(value.dtype)
        for name, value in after.items()
    }


def average(before: Checkpoint, after: Checkpoint, share: float, path: Path) -> None:
    """Write the mean of two files; what it tells is ``after``'s, and what it was made of.

    A voice's ``model_hash`` names the run whose weights a file has; a mean's are of none.

    Raises:
        ValueError: they are of different networks, or were sharpened in different ways.
        OSError: it cannot be written.
    """
    kinds = [str(read.metadata.get("kind", "untold")) for read in (before, after)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"{before.path} is of the kind {kinds[0]}, {after.path} {kinds[1]}; expected "
            "one kind"
        )
    told_apart = [str(read.metadata.get(SHARPENED, "")) for read in (before, after)]
    if told_apart[0] != told_apart[1]:
        raise ValueError(
            f"of {before.path} and {after.path} one is sharpened, or each in another way; "
            "average first, then sharpen"
        )
    parts = ((before, 1 - share), (after, share))
    told = "; ".join(f"{name_and_hash(read.path)} * {part:g}" for read, part in parts)
    tensors = mean(before.tensors, after.tensors, share)
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {k: v for k, v in after.metadata.items() if k != MODEL_HASH}
    save_checkpoint(path, tensors, {**kept, MEAN_OF: told})


def main(arguments: Sequence[str] | None = None) -> int:
    """Average, and say what was written; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path, help="trained on from the first")
    parser.add_argument(
        "--share", type=float, default=0.5, help="of the second, 0 to 1"
    )
    parser.add_argument("--export", type=Path, required=True)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if not 0 <= options.share <= 1:
            raise ValueError(f"--share {options.share:g}; expected 0 to 1")
        before, after = (read_checkpoint(p) for p in (options.before, options.after))
        average(before, after, options.share, options.export)
    except (ValueError, OSError) as error:
        log.error(f"recipes.average: {' '.join(str(error).split())}")
        return 1
    log.info(f"wrote {options.export}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
