"""Counts what one step launches, by kind and name.

On a GPU torch's profiler counts every kernel. On a pretended GPU the stub counts, and a call of cuBLAS or cuDNN is one
launch. Without either, dispatched ATen calls and Triton launches count.
"""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from bench.core.pretended import pretended
from fastbert.kernels.core import launch

ATEN, TRITON, LIBRARIES, COPIES = KINDS = ("ATen", "Triton", "libraries", "copies")  # copies include fills
Launches = dict[str, dict[str, int]]  # kind -> name -> how often

LONGEST = 160  # characters of a name; those of C++ templates can exceed a thousand
_LIBRARY = re.compile(r"gemm|gemv|nvjet|xmma|cublas|cudnn|splitk|cutlass", re.IGNORECASE)
_ATTENTION = re.compile(r"^(void )?(pytorch_flash|flash|fmha)")  # ATen's own kernels, although built from cutlass


def of_step(step: Callable[[], None], device: str) -> Launches:
    """The launches of one call of `step`, which must have run before."""
    if device != "cuda":
        return _dispatched(step)
    stub = pretended()
    return _of_stub(step, stub) if stub else _profiled(step)


def kernels(launches: Launches) -> int:
    """The number of kernels of all kinds, without copies and fills."""
    return sum(sum(names.values()) for kind, names in launches.items() if kind != COPIES)


def _sorted(found: dict[str, Counter[str]]) -> Launches:
    return {kind: dict(found[kind].most_common()) for kind in KINDS}


def _short(name: str) -> str:
    return name.removeprefix("void ").replace("at::native::", "")[:LONGEST]


def kind_of(event: str) -> str:
    """The kind of launch that torch's profiler reports under this name."""
    if event.startswith(("Memcpy", "Memset")):
        return COPIES
    if _LIBRARY.search(event) and not _ATTENTION.match(event):
        return LIBRARIES
    # Triton's kernels have their Python names; ATen's have C++ names with namespaces and arguments.
    return TRITON if re.fullmatch(r"\w+", event) and not _ATTENTION.match(event) else ATEN


def _profiled(step: Callable[[], None]) -> Launches:
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    found: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for event in profile.events():
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if on_device and not getattr(event, "is_user_annotation", False):
            found[kind_of(event.name)][_short(event.name)] += 1
    return _sorted(found)


def _of_stub(step: Callable[[], None], stub: Any) -> Launches:
    stub.reset()
    step()
    counts = stub.counts()
    found: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for kind, names in ((ATEN, counts.runtime), (TRITON, counts.driver), (LIBRARIES, counts.library)):
        for name, times in names.items():
            found[kind][_short(stub.readable(name))] += times
    found[COPIES] = Counter({f"Memcpy {name}": times for name, times in counts.copies.items()})
    if counts.fills:
        found[COPIES]["Memset"] = counts.fills
    return _sorted(found)


class _Calls(TorchDispatchMode):
    """Counts ATen calls by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.paused:
            self.names[func.overloadpacket._qualified_op_name] += 1
        return func(*args, **(kwargs or {}))

    def pausing(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `call` so that its own dispatches do not count: Triton's interpreter copies a kernel's tensors."""

        def paused(*args: Any, **kwargs: Any) -> Any:
            self.paused = True
            try:
                return call(*args, **kwargs)
            finally:
                self.paused = False

        return paused


def _dispatched(step: Callable[[], None]) -> Launches:
    before = Counter(launch.counts)
    calls = _Calls()
    with mock.patch.object(GridExecutor, "__call__", calls.pausing(GridExecutor.__call__)), calls:
        step()
    found: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    found[ATEN], found[TRITON] = calls.names, launch.counts - before
    return _sorted(found)
