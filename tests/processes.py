"""Programs that run as several processes of one training."""

import contextlib
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
# To begin a program with that imports a test's module.
PATHS = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"


def launch(*command, backend="ring"):
    """Run a Python program as two ranks on this machine."""
    start = "from mlx._distributed_utils.launch import main; main()"  # mlx.launch
    for _ in range(3):
        words = ["-n", "2", "--backend", backend]
        words += ["--starting-port", str(free_ports(4))]
        done = subprocess.run(
            [sys.executable, "-c", start, *words, "--", sys.executable, *map(str, command)],
            cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        # On a busy machine another program may take a port, or a rank start so late that
        # the other has given up; the launcher's own exit code does not tell.
        if "[ring]" not in done.stderr:
            break
    return done


def free_ports(count):
    """The first of so many ports in a row that nobody listens on."""
    for first in np.random.default_rng().integers(20_000, 60_000, 100).tolist():
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                probe = stack.enter_context(socket.socket())
                probe.bind(("127.0.0.1", port))
            return first
    raise OSError(f"no {count} free ports in a row")
