"""Channels of every block of RMVPE's U-Net, ours beside PyTorch's; computes nothing.

    python benchmarks/debug_unet_channels.py [--frames 64]

Fails when a block has other channels or another size on the two sides.
"""

from __future__ import annotations

import argparse

import common
import mlx.core as mx
import torch
from tracing import OUR_BLOCKS, TORCH_BLOCKS, trace_mlx, trace_torch

from rvc_mlx.models.rmvpe import RMVPE, RMVPEConfig
from rvc_reference import rmvpe as reference


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--frames", type=int, default=64, help="a multiple of 32")
    frames = parser.parse_args().frames
    if frames < 32 or frames % 32:
        parser.error(f"--frames is {frames}; expected a multiple of 32")
    with torch.device("meta"):
        theirs = reference.RMVPE().eval()
        mel = torch.zeros(1, theirs.config.n_mels, frames)
    ours = RMVPE(RMVPEConfig())
    with trace_torch(theirs, TORCH_BLOCKS) as expected, torch.no_grad():
        theirs(mel)
    with trace_mlx(ours, OUR_BLOCKS) as found:
        ours.image_features(mx.zeros((1, frames, ours.config.n_mels)))
    rows, wrong = [], 0
    for name, block in expected.items():
        mine = found.get(name)
        shape = tuple(block.value.shape)
        same = mine is not None and (mine.given, tuple(mine.value.shape)) == (
            block.given,
            shape,
        )
        wrong += not same
        channels = "-" if mine is None else mine.value.shape[-1]
        size = f"{shape[1]} x {shape[2]}"
        answer = "yes" if same else "NO"
        rows.append([name, block.given[-1], shape[-1], size, channels, answer])
    header = ("block", "channels in", "out", "frames x mels", "ours", "same")
    print(common.table(header, rows))
    print(f"{len(rows)} blocks, {wrong} different")
    return 1 if wrong or not rows else 0


if __name__ == "__main__":
    raise SystemExit(main())
