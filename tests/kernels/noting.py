"""A kernel that only records its launches, by which cached and bound kernels are tested without a GPU."""

from types import SimpleNamespace

import torch
import triton.language as tl
from triton.runtime.jit import JITFunction


def _probe(x_ptr, n, size, N: tl.constexpr, NAME: tl.constexpr):
    pass


PROBE = JITFunction(_probe, do_not_specialize=["size"])
STREAM = 100  # device 0's


class Noting:
    """`launched`: "triton" with its binder's arguments, "warmup", or "address" with those of Triton's launcher."""

    debug = None

    def __init__(self):
        self.__name__ = "noting_kernel"
        self.arg_names, self.params, self.pre_run_hooks = PROBE.arg_names, PROBE.params, []
        self.launched = []
        self.fails = None

    def __getitem__(self, grid):
        def start(**arguments):
            self.launched.append(("triton", grid, arguments))
            return self.binary()

        return start

    def warmup(self, *values, grid, **options):
        if self.fails:
            raise self.fails
        self.launched.append(("warmup", values, options))
        return self.binary()

    def binary(self):
        def run(*arguments):
            if self.fails:
                raise self.fails
            self.launched.append(("address", *arguments))

        def launch_metadata(grid, stream, *arguments):
            return ("metadata", grid, stream, arguments)

        return SimpleNamespace(run=run, function=7, packed_metadata=(4,), launch_metadata=launch_metadata)


def on_a_device(monkeypatch, kept):
    """Kernels of this kind pass for Triton's own, on devices whose streams are numbered."""
    monkeypatch.setattr(kept, "triton", SimpleNamespace(JITFunction=Noting))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM + index, raising=False)
