"""Set how readily a pitch network hears a voice: ``python -m recipes.calibrate_pitch``.

RVC's threshold is fixed, so the last bias is shifted instead: a constant added to all
classes' logits leaves their order, and with it the pitch; only voicing changes. `train_pitch`
does so at its end; this command does it again with another balance.

    python -m recipes.calibrate_pitch CORPUS... --network rmvpe.safetensors --export OUT

The file tells which one it comes from, and ``bundle`` takes it for that one.
"""

from __future__ import annotations

import argparse
import logging
import math
from pathlib import Path

import mlx.core as mx
import numpy as np

from recipes import cli
from recipes.exporting import export
from recipes.pitch_training import PitchBatches, PitchTrainer, prepare
from rvc_mlx.checkpoint import name_and_hash
from rvc_mlx.loading import read_weights
from rvc_mlx.models.layers import load_strictly
from rvc_mlx.models.rmvpe import RMVPEConfig
from rvc_mlx.pitch import VOICING_THRESHOLD

log = logging.getLogger("recipes")

# In the metadata: the files before, with their hashes.
CALIBRATED_FROM = "calibrated_from"
_CANDIDATES = np.geomspace(0.002, 0.9, 100)


def best_threshold(
    salience: np.ndarray, voiced: np.ndarray, missed: float = 1.0
) -> float:
    """The threshold on the strongest class with the fewest voicing errors.

    Args:
        salience: ``[...]`` strongest class of each frame, 0..1.
        voiced: truth, the same shape.
        missed: how many false frames a missed one weighs.

    Returns:
        One between .002 and .9.
    """
    errors = [
        missed * (voiced & ~heard).mean() + (heard & ~voiced).mean()
        for heard in (salience > threshold for threshold in _CANDIDATES)
    ]
    return float(_CANDIDATES[int(np.argmin(errors))])


def calibrate(
    network: PitchTrainer, batches: PitchBatches, count: int = 8, missed: float = 1.0
) -> float:
    """Shift the last bias so that RVC's fixed threshold is the best.

    Args:
        network: is changed, and must be in evaluation mode.
        batches: of a seed that training has not seen.
        count: batches that are looked at.
        missed: see `best_threshold`.

    Returns:
        The threshold that was best before.
    """
    n_mels = network.rmvpe.config.n_mels
    strongest, voiced = [], []
    for step in range(count):
        batch = prepare(batches(step), batches.length, n_mels)
        logits = network.logits(batch["mel"]).max(axis=-1)
        strongest.append(np.array(mx.sigmoid(logits)))
        voiced.append(np.array(batch["height"]) == 1)
    found = best_threshold(np.concatenate(strongest), np.concatenate(voiced), missed)
    shift = _logit(VOICING_THRESHOLD) - _logit(found)
    last = network.rmvpe.fc[1]
    last.bias = last.bias + shift
    return found


def _logit(p: float) -> float:
    return math.log(p / (1 - p))


def main(arguments: list[str] | None = None) -> None:
    """Calibrate an exported network again."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("corpus", nargs="+", type=Path, help="folders with shards")
    parser.add_argument("--network", type=Path, required=True)
    parser.add_argument("--export", type=Path, required=True)
    parser.add_argument(
        "--missed",
        type=float,
        default=1.8,
        help="false frames that a missed one weighs",
    )
    parser.add_argument("--leave-out", nargs="*", default=[], help="speakers, or f*")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--seed", type=int, default=10**6)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if not 0 < options.missed < math.inf or options.batches < 1:
        raise ValueError(
            f"--missed {options.missed:g} --batches {options.batches}; expected both "
            "above 0"
        )
    read = read_weights(options.network, "rmvpe")
    network = PitchTrainer(RMVPEConfig.from_tensors(read.tensors))
    load_strictly(network.rmvpe, read.tensors)
    network.eval()
    shards = cli.read_corpus(options.corpus, options.leave_out)
    batches = PitchBatches(shards, options.batch, 160, options.seed)
    found = calibrate(network, batches, options.batches, options.missed)
    before = {k: str(value) for k, value in read.metadata.items() if k != "kind"}
    lineage = [name_and_hash(options.network), before.get(CALIBRATED_FROM, "")]
    facts = {
        **before,
        CALIBRATED_FROM: "; ".join(filter(None, lineage)),
        "threshold_before_calibration": f"{found:.4f}",
        "false_frames_per_missed_one": f"{options.missed:g}",
        "calibration_seed": str(options.seed),
    }
    export(options.export, network.rmvpe, "rmvpe", facts)
    log.info(f"wrote {options.export}; the best threshold was {found:.4f}")


if __name__ == "__main__":
    main()
