"""How a kernel is launched: on which device, with which configuration.

Sizes and counts are `do_not_specialize` arguments: Triton would otherwise recompile for a size that is 1, which it makes a
constant, or a multiple of 16, in the middle of training. Strides are specialised, because a stride that 16 divides is what
allows 16-byte accesses. tests/kernels/test_specialisations.py lowers every kernel at every kind of int.
"""

import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
import triton
from torch import Tensor

from . import cache
from .configs import ARCHITECTURES, LENGTHS, TABLES, Config
from .failures import KernelFailed, advise, is_of_the_kernel, move_cache

logger = logging.getLogger("fastbert")

# triton.jit decides at decoration time whether kernels run in the interpreter, so this is read once.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

# Launches by kernel name. Tests read it: a kernel that silently fell back must not pass.
counts: Counter[str] = Counter()

Result = TypeVar("Result")
Recorder = Callable[[Any, int, Config, dict[str, Any]], None]
_recording: tuple[str, Recorder] | None = None


def float32_products() -> str:
    """ "tf32" or "ieee": how products of float32 may be rounded, set by either of torch's interfaces.

    `torch.get_float32_matmul_precision` raises once torch.backends' fp32_precision was used.
    """
    return "tf32" if torch._C._get_fp32_precision_getter("cuda", "matmul") == "tf32" else "ieee"


@contextmanager
def recording(architecture: str, record: Recorder) -> Iterator[None]:
    """Pass each launch (kernel, programs, configuration, arguments) to `record` instead of a device.

    The audit compiles exactly what `architecture` would launch this way, on a machine without a GPU.
    """
    global _recording
    _recording = (architecture, record)
    try:
        yield
    finally:
        _recording = None


def is_recording() -> bool:
    """Whether launches are recorded instead of made."""
    return _recording is not None


@functools.cache
def architecture(device: torch.device) -> str:
    """The newest architecture of the tables that is not newer than the device."""
    if device.type == "cpu":
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    known = [name for name in ARCHITECTURES if int(name.removeprefix("sm_")) <= 10 * major + minor]
    name = known[-1] if known else ARCHITECTURES[0]
    if name != f"sm_{major}{minor}":
        logger.info("no table for sm_%d%d: using the one for %s", major, minor, name)
    return name


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    # In the interpreter two, so that sums over programs have several terms; 132 (an H100) where launches are only recorded.
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 2 if device.type == "cpu" else 132


def table_of(like: Tensor) -> str:
    """The architecture whose tables configure kernels on the tensor's device."""
    return _recording[0] if _recording else architecture(like.device)


def choose(kernel: str, like: Tensor, width: int, length: int | None = None) -> Config:
    """The frozen configuration of `kernel` for rows of `width` elements of the type and on the device of `like`.

    A kernel may have a second table, named with the suffix _uneven, for rows whose bytes 16 does not divide; and tables named
    with a length, for sequences of at most that many rows. `length` is that of the longest sequence.
    """
    uneven = f"{kernel}_uneven"
    if uneven in TABLES and width * like.element_size() % 16:
        kernel = uneven
    if length is not None:
        kernel = by_length(kernel, length) or kernel
    by_width = _table(kernel, like)
    return by_width[next((limit for limit in by_width if limit >= width), max(by_width))]


def choose_short(kernel: str, like: Tensor, width: int, length: int) -> Config | None:
    """Like `choose`, for a kernel with tables by length only; None where no table serves this width and length."""
    name = by_length(kernel, length)
    by_width = _table(name, like) if name else {}
    return next((config for limit, config in by_width.items() if limit >= width), None)


def by_length(kernel: str, length: int) -> str | None:
    """The name of the kernel's table for sequences of up to `length` rows; None if there is none."""
    names = (f"{kernel}_{limit}" for limit in LENGTHS if limit >= length)
    return next((name for name in names if name in TABLES), None)


def _table(kernel: str, like: Tensor) -> dict[int, Config]:
    return TABLES[kernel][table_of(like)].get(like.element_size(), {})


def resident_programs(config: Config, like: Tensor, blocks: int) -> int:
    """The number of persistent programs that share `blocks` blocks of rows: as many as run at once, at most one per block."""
    assert config.programs_per_multiprocessor is not None
    return max(1, min(blocks, _multiprocessors(like.device) * config.programs_per_multiprocessor))


def fills(programs: int, like: Tensor) -> bool:
    """Whether there are at least as many programs as SMs on the device of `like`."""
    return programs >= _multiprocessors(like.device)


def as_rows(x: Tensor) -> Tensor:
    """x as [rows, columns] with any strides; copied only where no strides can express that."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def launch(kernel: Any, programs: int, config: Config, like: Tensor, **arguments: Any) -> None:
    """Run `kernel` with `programs` programs on the device of `like`, even when another device is current.

    Raises:
        KernelFailed: the kernel could not be compiled or launched.
        Exception: unchanged, if the fault is not the kernel's: the device failed, or a CUDA graph is being captured.
    """
    if programs == 0:
        return
    if _recording:
        return _recording[1](kernel, programs, config, arguments)
    # One grid axis only: axes 1 and 2 of a CUDA grid stop at 65,535.
    try:
        if not like.is_cuda:
            kernel[(programs,)](**arguments, **cache.options(config))
        elif like.device.index == torch._C._cuda_getDevice():
            cache.start(kernel, programs, config, like.device, arguments)
        else:
            with torch.cuda.device(like.device):
                cache.start(kernel, programs, config, like.device, arguments)
    except Exception as error:
        if move_cache(error):
            return launch(kernel, programs, config, like, **arguments)
        raise_for(kernel, error, like.device)
    counts[kernel.__name__] += 1


def retried(kernel: Any, like: Tensor, compile: Callable[[], Result]) -> Result:
    """The result of `compile`, called again with Triton's cache in another folder if its folder is of no use.

    Raises:
        KernelFailed: `kernel` cannot be compiled or loaded.
    """
    try:
        return compile()
    except Exception as error:
        if move_cache(error):
            return retried(kernel, like, compile)
        raise_for(kernel, error, like.device)


def raise_for(kernel: Any, error: Exception, device: torch.device) -> NoReturn:
    """Raise the error of a launch: as KernelFailed if it is the kernel's, else unchanged, with advice."""
    try:
        if is_of_the_kernel(error, device):
            raise KernelFailed(kernel.__name__, error) from error
        advise(kernel.__name__, error, device)
        raise error
    finally:
        # Its traceback holds this frame, and with it the launch's tensors: as a cycle they would outlive the error, and a step
        # that ran out of memory would do so again.
        del error


class Work(NamedTuple):
    """A launch without its tensors: kernel, programs, configuration and numbers, the same for every call of one shape."""

    kernel: Any
    programs: int
    config: Config
    numbers: dict[str, Any]

    def launch(self, like: Tensor, **tensors: Tensor | None) -> None:
        """Launch with these tensors on the device of `like`; raises what `launch` raises."""
        launch(self.kernel, self.programs, self.config, like, **tensors, **self.numbers)


# Triton's versions also work on constants inside kernels, and take two microseconds.
def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n; 1 for 0."""
    return 1 << (n - 1).bit_length() if n > 0 else 1


def accumulator(dtype: torch.dtype) -> triton.language.dtype:
    """The type a kernel computes in: float32; float64 for float64, which only the interpreter computes, for gradcheck."""
    return triton.language.float64 if dtype == torch.float64 else triton.language.float32


def accumulator_torch(dtype: torch.dtype) -> torch.dtype:
    """The accumulator as a torch dtype: that of saved statistics and of partial sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def draw_seed(device: torch.device) -> Tensor:
    """A dropout seed, int64 [], from torch's generator of `device`, without a synchronisation.

    torch.manual_seed reproduces it, gradient checkpointing restores it, and each replay of a CUDA graph draws a new one.
    """
    return torch.randint(2**62, (), dtype=torch.int64, device=device)
