"""Write into a voice what it asks of a conversion: ``python -m recipes.ask VOICE --export V``.

    python -m recipes.ask VOICE --f0-onset 1 --f0-offset 1 --export ASKING

The options of those names have these values in a conversion that leaves them to the voice.
A small voice is not heard yet in the first frame of a voiced part, or no longer in the last,
and so a source's melody gets lost there. RVC also holds the pitch of a frame from the frame's
middle on, so that a voice begins half a frame late. Wider voiced parts bring those frames back.
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
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("voice", type=Path)
    parser.add_argument(
        "--f0-threshold", type=float, help="salience of a voiced frame (default: RVC's)"
    )
    parser.add_argument(
        "--f0-onset",
        type=int,
        help="frames that voiced parts begin sooner (default: 0)",
    )
    parser.add_argument(
        "--f0-offset", type=int, help="frames that they end later (default: 0)"
    )
    parser.add_argument("--export", type=Path, required=True)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        voice = read_weights(options.voice, "voice")
        told = {k: v for k, v in voice.metadata.items() if k not in Asked._fields}
        for name in Asked._fields:
            if (value := getattr(options, name)) is not None:
                told[name] = value
        asked_by(replace(voice, metadata=told))
        options.export.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(options.export, voice.tensors, told)
    except (ValueError, OSError) as error:
        log.error(f"recipes.ask: {' '.join(str(error).split())}")
        return 1
    log.info(f"wrote {options.export}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
