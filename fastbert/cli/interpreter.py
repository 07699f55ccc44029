"""A command that runs the kernels on a machine without a GPU: in Triton's interpreter, for which it may start anew."""

import os
import sys
from collections.abc import Callable

_SWITCHED_ON = ("1", "true", "yes", "on", "y")  # as triton reads it


def use_interpreter_without_gpu(say: Callable[[str], None]) -> None:
    """Without a GPU, let Triton's interpreter run the kernels, and `say` so; with one, do nothing.

    Triton looks at TRITON_INTERPRET only when it is first imported. Where that has happened, the process starts again
    with the variable set, from its first line: call this before a command has done or printed anything.
    """
    import torch

    if torch.cuda.is_available():
        return
    if os.environ.get("TRITON_INTERPRET", "").lower() not in _SWITCHED_ON:
        os.environ["TRITON_INTERPRET"] = "1"
        if "triton" in sys.modules:  # too late in this process
            sys.stdout.flush()
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    say("no NVIDIA GPU here: Triton's interpreter runs the kernels on the CPU, on small inputs")

    from fastbert.testing.interpreter import accelerate  # brings in triton

    accelerate()
