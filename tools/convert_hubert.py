"""Convert a HuBERT / ContentVec encoder to .safetensors or .npz: ``python tools/convert_hubert.py IN OUT``."""

from __future__ import annotations

import sys

from rvc_mlx.cli import run_convert_tool

if __name__ == "__main__":
    sys.exit(run_convert_tool("contentvec", __doc__))
