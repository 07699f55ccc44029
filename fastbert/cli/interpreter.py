"""Switches a command to Triton's interpreter on a machine without a GPU, restarting the process if necessary."""

import os
import sys
from collections.abc import Callable
from importlib import metadata, util

from packaging.version import Version

from fastbert.errors import InputError

_SWITCHED_ON = ("1", "true", "yes", "on", "y")  # as triton reads it
# The interpreter of older tritons makes numbers of arrays with one element, which numpy refuses from this release on.
_TRITON, _NUMPY = Version("3.7"), Version("2.4")


def is_switched_on() -> bool:
    """Whether the environment switches Triton's interpreter on."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in _SWITCHED_ON


def numpy_misfit() -> tuple[str, str] | None:
    """What is wrong and what to do, if the interpreter of the installed triton cannot run with the installed numpy."""
    try:
        triton, numpy = metadata.version("triton"), metadata.version("numpy")
    except metadata.PackageNotFoundError:  # triton under another name: it is tried
        return None
    if Version(triton) >= _TRITON or Version(numpy) < _NUMPY:
        return None
    advice = f"install triton {_TRITON} or newer, or numpy<{_NUMPY}"
    return f"the interpreter of triton {triton} does not run with numpy {numpy}", advice


def use_interpreter_without_gpu(say: Callable[[str], None]) -> None:
    """Without a GPU, make Triton's interpreter run the kernels, and `say` so; with a GPU or without triton, do nothing.

    Triton reads TRITON_INTERPRET only at its first import. If triton is already imported, the process restarts from the
    beginning with the variable set, so call this before a command has done or printed anything.

    Raises:
        InputError: the interpreter of this triton cannot run with this numpy.
    """
    import torch

    if torch.cuda.is_available() or ("triton" not in sys.modules and util.find_spec("triton") is None):
        return
    if (misfit := numpy_misfit()) is not None:
        raise InputError("no NVIDIA GPU here, and {}: {}".format(*misfit))
    if not is_switched_on():
        os.environ["TRITON_INTERPRET"] = "1"
        if "triton" in sys.modules:  # already imported: too late in this process
            sys.stdout.flush()
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    say("no NVIDIA GPU here: Triton's interpreter runs the kernels on the CPU, on small inputs")

    from fastbert.testing.interpreter import accelerate  # imports triton

    accelerate()
