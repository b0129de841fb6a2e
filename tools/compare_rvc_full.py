"""Stage by stage: how far one voice is from PyTorch's conversion with the same voice.

    python tools/compare_rvc_full.py [--pt_model voice.pth] [--mlx_model voice.safetensors]

HuBERT, F0, TextEncoder, flow, generator and the whole conversion of a speech clip, in
float32 with equal noise. Fails when a stage is beyond its tolerance.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import common
import stages
from parity import parity_table
from twins import Sides, main_for_each, save


def measure(arguments: argparse.Namespace, sides: Sides) -> int:
    files = common.models(arguments.models)
    pt = arguments.pt_model or files.voice
    files = files._replace(voice=arguments.mlx_model or pt)
    if arguments.pt_model:  # the random index is made for the random voice
        files = files._replace(index=None)
    clip = common.real_audio(arguments.seconds, arguments.audio)
    rows = stages.synthesis_rows(sides, files.voice, pt_path=pt)
    rows += stages.conversion_rows(sides, files, clip, pt)
    rows = [row | {"test": "tools/compare_rvc_full.py"} for row in rows]
    print(parity_table(rows))
    save(
        arguments, sides, "compare", {**files._asdict(), "voice PyTorch": pt}, rows=rows
    )
    return 0 if all(row["passed"] for row in rows) else 1


def main() -> int:
    parser = common.parser(__doc__, precisions=("f32",))
    parser.add_argument(
        "--pt_model", "--pt-model", type=Path, metavar="P", help="a voice .pth"
    )
    parser.add_argument(
        "--mlx_model", "--mlx-model", type=Path, metavar="M", help="the same for us"
    )
    parser.add_argument(
        "--audio", type=Path, metavar="F", help="default: the tests' clip"
    )
    parser.add_argument(
        "--seconds", type=common.seconds, default=5.0, help="of the clip (default: 5)"
    )
    return main_for_each(parser, measure)


if __name__ == "__main__":
    raise SystemExit(main())
