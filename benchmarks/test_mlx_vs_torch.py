"""Direct comparison layer by layer, in float32, each layer on the same input.

    python benchmarks/test_mlx_vs_torch.py [--engine ...] [--precision f32]

Mel, U-Net encoder, decoder, BiGRU, output; Q, K, V, scores, weights and output of an
attention; TextEncoder, flow, generator. Also runs under ``pytest benchmarks``.
"""

from __future__ import annotations

import argparse
import sys
from functools import cache
from pathlib import Path

import common
import stages
from parity import Row, parity_table, require
from twins import Sides, choose_sides, main_for_each, save

SECONDS = 1.5
FRAMES = 128


@cache
def _sides() -> Sides:
    return choose_sides(_parser().parse_args([]), keep=False)


def _parser() -> argparse.ArgumentParser:
    return common.parser(__doc__, precisions=("f32",))


def rmvpe_rows(sides: Sides, models: Path | None = None) -> list[Row]:
    path = common.model_file("rmvpe.pt", models)
    return stages.rmvpe_rows(sides, path, common.synthetic_audio(SECONDS))


def attention_rows(sides: Sides, models: Path | None = None) -> list[Row]:
    return stages.attention_rows(sides, common.model_file("v2_48k.pth", models), FRAMES)


def synthesis_rows(sides: Sides, models: Path | None = None) -> list[Row]:
    return stages.synthesis_rows(sides, common.model_file("v2_48k.pth", models), FRAMES)


def test_rmvpe() -> None:
    require(rmvpe_rows(_sides()))


def test_attention() -> None:
    require(attention_rows(_sides()))


def test_synthesis() -> None:
    require(synthesis_rows(_sides()))


def measure(arguments: argparse.Namespace, sides: Sides) -> int:
    groups = {
        "test_rmvpe": rmvpe_rows,
        "test_attention": attention_rows,
        "test_synthesis": synthesis_rows,
    }
    rows = [
        row | {"test": f"benchmarks/{sys.argv[0].rsplit('/', 1)[-1]}::{name}"}
        for name, group in groups.items()
        for row in group(sides, arguments.models)
    ]
    print(parity_table(rows))
    names = ("rmvpe.pt", "v2_48k.pth")
    used = {name: common.model_file(name, arguments.models) for name in names}
    save(arguments, sides, "mlx_vs_torch", used, rows=rows)
    failed = [row["stage"] for row in rows if not row["passed"]]
    print(f"{len(rows) - len(failed)} of {len(rows)} within tolerance", *failed)
    return 1 if failed else 0


def main() -> int:
    return main_for_each(_parser(), measure, keep=False)


if __name__ == "__main__":
    raise SystemExit(main())
