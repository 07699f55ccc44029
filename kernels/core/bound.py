"""A kernel bound to everything but its tensors: an op of many launches binds once for all calls of one shape.

Binding compiles and loads the kernel, so a kernel that fails to compile says so before the op has done any work. A call passes
addresses, all multiples of 16, and takes about two microseconds. An argument that never changes costs some ten nanoseconds
per launch, so strides of absent masks stay in the signatures: shorter ones would gain nothing.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from triton import knobs

from . import cache
from .launch import INTERPRETED, Work, counts, is_recording, raise_for, retried

# The interpreter and the audit take the tensors themselves in place of addresses.
Place = Tensor | int | None


def by_address() -> bool:
    """Whether bound kernels are called with addresses: on a device. The interpreter and the audit take the tensors."""
    return not (INTERPRETED or is_recording())


def addressing() -> Callable[[Tensor], Place]:
    """The function that turns a tensor into what bound kernels take."""
    return Tensor.data_ptr if by_address() else _itself


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def streams(device: torch.device) -> Callable[[], int | None]:
    """The function that returns the current stream of `device` in the form that bound kernels take."""
    if device.type != "cuda":
        return lambda: None
    return partial(torch._C._cuda_getCurrentRawStream, device.index)


class Bound:
    """A kernel bound for tensors of given dtypes.

    Args:
        work: a kernel whose first arguments are its tensors, and everything else that it is launched with.
        like: a tensor on the device that the kernel runs on, which must be the current device.
        tensors: dtypes by argument name, in the kernel's order; None for an absent tensor.

    Raises:
        KernelFailed: the kernel cannot be compiled or loaded.
    """

    def __init__(self, work: Work, like: Tensor, tensors: dict[str, torch.dtype | None]) -> None:
        kernel, self._programs, config, numbers = self._work = work
        self._name = kernel.__name__
        self._like = like
        self._tensors = tuple(tensors)
        self._loaded: cache.LoadedKernel | None = None
        if not self._programs or not by_address():
            return
        names = kernel.arg_names
        assert tuple(names[: len(tensors)]) == self._tensors, (names, self._tensors)
        self._numbers = tuple(numbers[name] for name in names[len(tensors) :])
        values = (*tensors.values(), *self._numbers)
        self._loaded = retried(kernel, like, lambda: cache.compiled(kernel, config, like.device, values))
        _, self._launch, self._prefix, self._spread = self._loaded

    def __call__(self, stream: int | None, *places: Place) -> None:
        """Launch with the tensors in the order of `tensors`, as addresses where `by_address()`."""
        if self._loaded is None:
            tensors = dict(zip(self._tensors, places, strict=True))
            return self._work.launch(self._like, **tensors)
        try:
            if cache.has_hooks():
                self._launch_watched(stream, (*places, *self._numbers))
            elif self._spread:
                self._launch(self._programs, 1, 1, stream, *self._prefix, *places, *self._numbers)
            else:
                self._launch(self._programs, 1, 1, stream, *self._prefix, (*places, *self._numbers))
        except Exception as error:
            raise_for(self._work.kernel, error, self._like.device)
        counts[self._name] += 1

    def _launch_watched(self, stream: int | None, arguments: tuple[Place, ...]) -> None:
        """Launch as Triton does, so that hooks receive the kernel's name and, where the kernel defines any, its metadata."""
        binary, runtime = self._loaded.binary, knobs.runtime
        metadata = binary.launch_metadata((self._programs, 1, 1), stream, *arguments)
        hooks = runtime.launch_enter_hook, runtime.launch_exit_hook
        binary.run(self._programs, 1, 1, stream, binary.function, binary.packed_metadata, metadata, *hooks, *arguments)


class Workspace:
    """Several arrays in one allocation, each aligned to 16 bytes.

    Args:
        arrays: shape and dtype of each.
    """

    def __init__(self, *arrays: tuple[tuple[int, ...], torch.dtype]) -> None:
        self._arrays = arrays
        self._starts = []
        end = 0
        for shape, dtype in arrays:
            self._starts.append(end)
            end += -(-torch.Size(shape).numel() * dtype.itemsize // 16) * 16
        self.bytes = end

    def allocate(self, like: Tensor) -> Tensor:
        """The memory for all arrays, as a tensor of the dtype and device of `like`."""
        return like.new_empty(self.bytes // like.element_size())

    def places(self, memory: Tensor) -> list[Place]:
        """Each array in the form that bound kernels take."""
        if by_address():
            first = memory.data_ptr()
            return [first + start for start in self._starts]
        return [self.view(memory, i) for i in range(len(self._arrays))]

    def view(self, memory: Tensor, i: int) -> Tensor:
        """Array i as a tensor."""
        shape, dtype = self._arrays[i]
        start = self._starts[i]
        size = torch.Size(shape).numel() * dtype.itemsize
        return memory.view(torch.uint8)[start : start + size].view(dtype).view(shape)
