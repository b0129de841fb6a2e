"""Write into a voice what it asks of a conversion: ``python -m recipes.ask VOICE --export V``.

    python -m recipes.ask VOICE --f0-onset 1 --f0-offset 1 --export ASKING

The options of those names have these values in a conversion that leaves them to the voice.
A source's melody gets lost in the first and last frames of its voiced parts, where a small
voice is not heard yet, or any more: these bring it back.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rvc_mlx.checkpoint import save_checkpoint
from rvc_mlx.loading import Asked, asked_by, read_weights

log = logging.getLogger("recipes")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write, and say what was written; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("voice", type=Path)
    parser.add_argument("--f0-threshold", type=float, default=0.0, help="0: RVC's")
    for name in ("--f0-onset", "--f0-offset"):
        parser.add_argument(name, type=int, default=0, help="0: RVC's")
    parser.add_argument("--export", type=Path, required=True)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        voice = read_weights(options.voice, "voice")
        asked = {name: getattr(options, name) for name in Asked._fields}
        told = {k: v for k, v in {**voice.metadata, **asked}.items() if asked.get(k, 1)}
        asked_by(replace(voice, metadata=told))
        save_checkpoint(options.export, voice.tensors, told)
    except (ValueError, OSError) as error:
        log.error(f"recipes.ask: {' '.join(str(error).split())}")
        return 1
    log.info(f"wrote {options.export}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
