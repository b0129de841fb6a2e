"""Convert an RMVPE pitch network to .safetensors or .npz: ``python tools/convert_rmvpe.py IN OUT``."""

from __future__ import annotations

import sys

from rvc_mlx.cli import run_convert_tool

if __name__ == "__main__":
    sys.exit(run_convert_tool("rmvpe", __doc__))
