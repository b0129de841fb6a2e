"""RMVPE with loaded weights, block by block: shapes, levels, and the difference.

    python benchmarks/debug_with_weights.py [--model rmvpe.pt] [--frames 32]

MLX runs the blocks itself, without OpenVINO: on the GPU where there is one, else on
MLX's own CPU back end, which takes a few seconds.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import common
import mlx.core as mx
import numpy as np
import torch
from stages import rmvpe_network
from tracing import OUR_BLOCKS, TORCH_BLOCKS, our_mel_image, trace_mlx, trace_torch

from rvc_mlx.models.layers import load_strictly
from rvc_reference.loading import load_rmvpe

TOLERANCE = 1e-3  # of the largest difference, relative to the block's level


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", type=Path, metavar="FILE", help="an rmvpe.pt")
    parser.add_argument("--frames", type=int, default=32, help="a multiple of 32")
    arguments = parser.parse_args()
    if arguments.frames < 32 or arguments.frames % 32:
        parser.error(f"--frames is {arguments.frames}; expected a multiple of 32")
    os.environ["MLX_ENABLE_TF32"] = "0"  # PyTorch's side runs on the CPU, in float32
    path = arguments.model or common.model_file("rmvpe.pt")
    network = rmvpe_network(path)
    ours = network.make()
    load_strictly(ours, network.tensors)
    theirs = load_rmvpe(path)
    mel = our_mel_image(arguments.frames, theirs.config.n_mels)
    with trace_mlx(ours, OUR_BLOCKS) as found:
        ours.image_features(mx.array(mel))
    with trace_torch(theirs, TORCH_BLOCKS) as expected, torch.inference_mode():
        theirs(torch.from_numpy(mel).transpose(1, 2))
    mx.eval([block.value for block in found.values()])
    rows, wrong = [], 0
    for name, block in expected.items():
        mine, wanted = np.array(found[name].value), block.value.numpy()
        facts = common.difference(mine, wanted)
        level = float(np.sqrt(np.mean(wanted**2)))
        wrong += not facts["max_abs"] <= TOLERANCE * level
        shape = "x".join(map(str, mine.shape[1:]))
        rows.append([name, block.given[-1], mine.shape[-1], shape, level])
        rows[-1] += [facts["max_abs"], facts["mean_abs"]]
    header = ("block", "channels in", "out", "shape", "rms", "max abs", "mean abs")
    print(common.table(header, rows))
    print(f"{path.name}: {len(rows)} blocks, {wrong} beyond {TOLERANCE} of their level")
    return 1 if wrong or not rows else 0


if __name__ == "__main__":
    raise SystemExit(common.exit_code(main))
