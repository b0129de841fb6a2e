"""``python -m rvc_mlx``."""

import sys

from rvc_mlx.cli import main

if __name__ == "__main__":
    sys.exit(main())
