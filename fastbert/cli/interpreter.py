"""Switches a command to Triton's interpreter on a machine without a GPU, restarting the process if necessary."""

import os
import sys
from collections.abc import Callable
from importlib import util

_SWITCHED_ON = ("1", "true", "yes", "on", "y")  # as triton reads it


def is_switched_on() -> bool:
    """Whether the environment switches Triton's interpreter on."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in _SWITCHED_ON


def use_interpreter_without_gpu(say: Callable[[str], None]) -> None:
    """Without a GPU, make Triton's interpreter run the kernels, and `say` so; with a GPU or without triton, do nothing.

    Triton reads TRITON_INTERPRET only at its first import. If triton is already imported, the process restarts from the
    beginning with the variable set, so call this before a command has done or printed anything.
    """
    import torch

    if torch.cuda.is_available() or ("triton" not in sys.modules and util.find_spec("triton") is None):
        return
    if not is_switched_on():
        os.environ["TRITON_INTERPRET"] = "1"
        if "triton" in sys.modules:  # already imported: too late in this process
            sys.stdout.flush()
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    say("no NVIDIA GPU here: Triton's interpreter runs the kernels on the CPU, on small inputs")

    from fastbert.testing.interpreter import accelerate  # imports triton

    accelerate()
