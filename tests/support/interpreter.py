"""A process of its own, with Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*arguments, **environment):
    """A process with the given environment variables on top; those of the backend are unset otherwise."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("KARA_BACKEND", "TRITON_INTERPRET")}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=inherited | environment, capture_output=True, text=True, cwd=ROOT)
