"""What code sees while its thread records a graph on the CPU (fastbert.testing.graphs): the rules of a capture on a GPU.

fastbert.AdamW takes the step of a capture, but does not insist on `capturable=True`, which torch refuses on the CPU.
Checks that exist on the CPU only are left out. Launches go to the recording, and torch's generator cannot be set. Other threads
see what they always see.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Recording(Protocol):
    """What records the calls of a thread."""

    executing: int  # above 0, launches are part of an operation that is recorded

    def launch(self, run: Callable[..., None], kernel: Any, arguments: Arguments) -> None:
        """Record a launch: run(kernel, *args, **kwargs)."""


_thread = threading.local()


def current() -> Recording | None:
    """The recording of this thread, if there is one."""
    return getattr(_thread, "recording", None)


@contextmanager
def recorded_by(recording: Recording) -> Iterator[None]:
    """Calls of this thread in the block are recorded."""
    with intercepting():
        _thread.recording = recording
        try:
            yield
        finally:
            _thread.recording = None


def not_permitted(what: str) -> RuntimeError:
    """What a call raises that the capture of a CUDA graph does not permit."""
    return RuntimeError(f"operation not permitted while a graph is captured: {what}")


# Triton's interpreter keeps the program's number in a global variable, so one kernel runs at a time.
_interpreter = threading.RLock()
_lock = threading.Lock()
_users = 0
_installed = ExitStack()


@contextmanager
def intercepting() -> Iterator[None]:
    """The replacements are in place; kernels of several threads run one after the other."""
    global _users
    with _lock:
        _users += 1
        if _users == 1:
            _install()
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                _installed.close()


def _install() -> None:
    from fastbert import optim
    from fastbert.kernels import embedding_layernorm, linear_cross_entropy
    from fastbert.kernels.adamw import tables

    run, on_device, is_capturing = InterpretedFunction.run, tables._on_device, optim._is_capturing

    def run_alone(kernel: Any, *args: Any, **kwargs: Any) -> None:
        with _interpreter:
            run(kernel, *args, **kwargs)

    def run_or_record(self: Any, *args: Any, **kwargs: Any) -> None:
        recording = current()
        if recording is None or recording.executing:
            run_alone(self, *args, **kwargs)
        else:
            recording.launch(run_alone, self, (args, kwargs))

    replacements = (
        (InterpretedFunction, "run", run_or_record),
        (optim, "_is_capturing", lambda param: current() is not None or is_capturing(param)),
        (tables, "_on_device", lambda x: on_device(x) or (current() is not None and isinstance(x, Tensor))),
        # On a GPU the kernels check what these look at.
        (embedding_layernorm, "_check_range", _skipping(embedding_layernorm._check_range)),
        (linear_cross_entropy, "check_on_cpu", _skipping(linear_cross_entropy.check_on_cpu)),
        # A generator of a GPU refuses it as well. Gradient checkpointing does it, to repeat dropout.
        (torch, "set_rng_state", _refusing(torch.set_rng_state)),
        (torch.random, "set_rng_state", _refusing(torch.random.set_rng_state)),
        (torch, "manual_seed", _refusing(torch.manual_seed)),
    )
    for owner, name, new in replacements:
        _installed.enter_context(mock.patch.object(owner, name, new))


def _skipping(check: Callable[..., None]) -> Callable[..., None]:
    return lambda *args: check(*args) if current() is None else None


def _refusing(function: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any) -> Any:
        if current() is not None:
            raise not_permitted(f"{function.__name__} sets the generator")
        return function(*args)

    return called
