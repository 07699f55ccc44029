"""Compiled kernels, cached by what they were compiled for and launched by address.

Triton binds a launch's arguments, classifies them and looks up its cache in Python: 25 to 50 microseconds per launch, where the
compiled kernel's own launcher takes about one. Here a key of the same classes (dtypes, alignment, whether 16 divides a number)
finds the compiled kernel, whose launcher takes addresses; `launch()` then costs 5 to 15 microseconds. A new key goes through
Triton, and so does every launch while a debugger, an instrumenter or a profiler is active. Bound kernels (bound.py) are
debugged or instrumented only if that was enabled before they were compiled, as Triton's environment variables do.

tests/kernels/core/test_cache.py compares keys with Triton's own binder and launches with Triton's launcher, on any machine. A
new release of Triton is tried there first.
"""

from collections.abc import Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs

from .configs import Config

_INT32 = range(-(2**31), 2**31)


def _class_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype if value.data_ptr() % 16 == 0 else (value.dtype,)
    if type(value) is int:
        return value == 1, value % 16 == 0, value in _INT32
    if isinstance(value, tuple):  # strides
        return tuple(map(_class_of, value))
    return value if value is None or isinstance(value, torch.dtype) else type(value)


class LoadedKernel(NamedTuple):
    """A compiled kernel, loaded on its device.

    To launch it: launch(programs, 1, 1, stream, *prefix, *arguments), with the arguments as one tuple unless `spread`.
    """

    binary: Any
    launch: Any
    prefix: tuple[Any, ...]
    spread: bool


class Family:
    """Everything compiled from one kernel: by device, options and the classes of its arguments."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.names: list[str] = kernel.arg_names
        self.loaded: dict[tuple, LoadedKernel] = {}
        constants = [i for i, param in enumerate(kernel.params) if param.is_constexpr]
        self._constants = itemgetter(slice(0, 0), *constants)  # with the slice always a tuple
        self._sizes = [i for i, param in enumerate(kernel.params) if param.do_not_specialize]
        self._others = [i for i in range(len(kernel.params)) if i not in (*constants, *self._sizes)]
        self._unsized = itemgetter(slice(0, 0), *(i for i in range(len(kernel.params)) if i not in self._sizes))
        self._bound: dict[tuple, LoadedKernel] = {}  # by values instead of classes: one entry per set of strides

    def key(self, values: Sequence[Any], config: Config, device: int) -> tuple:
        """What Triton recompiles for. A dtype stands for a tensor whose address 16 divides."""
        others = [_class_of(values[i]) for i in self._others]
        return *_compiled_for(config, device), self._constants(values)[1:], *self._small(values), *others

    def _small(self, values: Sequence[Any]) -> list[bool]:
        return [values[i] in _INT32 for i in self._sizes]

    def bound(self, values: Sequence[Any], config: Config, device: int) -> LoadedKernel:
        """The kernel for `values`, in which dtypes stand for tensors; compiled and loaded if it is new.

        Only sizes differ from batch to batch, so the values without sizes are looked up first.
        """
        unsized = self._unsized(values)[1:]
        known = *_compiled_for(config, device), *self._small(values), unsized, *map(type, unsized)  # 1 and 1.0 are equal
        found = self._bound.get(known)
        if found is None:
            key = self.key(values, config, device)
            found = self.loaded.get(key) or self.keep(key, self.kernel.warmup(*values, grid=(1,), **options(config)))
            self._bound[known] = found
        return found

    def keep(self, key: tuple, binary: Any) -> LoadedKernel:
        """Store what Triton compiled for `key`, and load it if necessary."""
        loaded = self.loaded[key] = _loaded(binary)
        return loaded


def _loaded(binary: Any) -> LoadedKernel:
    """The kernel's launcher in C, where its arguments are known, else Triton's launcher in Python.

    The C launcher's arguments changed in triton 3.7, so it is called directly only where it looks as in 3.6 to 3.8 and asks for
    no scratch memory; these kernels need none.
    """
    run, metadata = binary.run, binary.packed_metadata
    scratch = getattr(run, "global_scratch_size", True) or getattr(run, "profile_scratch_size", True)
    if scratch or type(run).__name__ != "CudaLauncher" or getattr(run, "gsan_enabled", False):
        return LoadedKernel(binary, run, (binary.function, metadata, None, None, None), True)
    prefix = binary.function, run.launch_cooperative_grid, run.launch_pdl
    if hasattr(run, "arg_annotations"):
        return LoadedKernel(
            binary, run.launch, (*prefix, metadata, *(None,) * 5, run.arg_annotations, run.kernel_signature), False
        )
    return LoadedKernel(binary, run.launch, (*prefix, None, None, metadata, None, None, None), True)


_families: dict[int, Family] = {}


def family(kernel: Any) -> Family:
    """The Family of `kernel`."""
    found = _families.get(id(kernel))  # hash(JITFunction) hashes its source, which takes as long as a launch
    if found is None or found.kernel is not kernel:
        found = _families[id(kernel)] = Family(kernel)
    return found


def is_watched(kernel: Any) -> bool:
    """Whether Triton must make this launch: the kernel is debugged, instrumented, hooked or replaced."""
    instrumented = getattr(knobs.compilation, "instrumentation_mode", "")  # triton 3.5 has none
    return (
        type(kernel) is not triton.JITFunction
        or bool(knobs.runtime.debug or instrumented or kernel.debug or kernel.pre_run_hooks)
        or has_hooks()
    )


def has_hooks() -> bool:
    """Whether a hook, such as a profiler's, is called for each launch."""
    return (
        _runtime.launch_enter_hook is not _ENTER
        or _runtime.launch_exit_hook is not _EXIT
        or bool(_calls(_ENTER) or _calls(_EXIT))
    )


_runtime = knobs.runtime
# Triton's own hook lists. Hooks are added to them, or a function replaces them altogether.
_ENTER, _EXIT = _runtime.launch_enter_hook, _runtime.launch_exit_hook


def _calls(hook: Any) -> list[Any]:
    return [] if hook is None else hook.calls


def _compiled_for(config: Config, device: int) -> tuple[int | None, ...]:
    return device, config.num_warps, config.num_stages, config.maxnreg


def options(config: Config) -> dict[str, int]:
    """The compiler options of a configuration; its tile sizes are the kernel's constants."""
    found = {"num_warps": config.num_warps}
    if config.num_stages is not None:
        found["num_stages"] = config.num_stages
    if config.maxnreg is not None:
        found["maxnreg"] = config.maxnreg
    return found


def start(kernel: Any, programs: int, config: Config, device: torch.device, arguments: dict[str, Any]) -> None:
    """Launch `kernel` on `device`, which must be the current device."""
    if is_watched(kernel):
        kernel[(programs,)](**arguments, **options(config))
        return
    members = family(kernel)
    values = [arguments[name] for name in members.names]
    key = members.key(values, config, device.index)
    loaded = members.loaded.get(key)
    if loaded is None:
        members.keep(key, kernel[(programs,)](**arguments, **options(config)))
        return
    stream = torch._C._cuda_getCurrentRawStream(device.index)
    addresses = tuple([value.data_ptr() if isinstance(value, Tensor) else value for value in values])
    if loaded.spread:
        loaded.launch(programs, 1, 1, stream, *loaded.prefix, *addresses)
    else:
        loaded.launch(programs, 1, 1, stream, *loaded.prefix, addresses)


def compiled(kernel: Any, config: Config, device: torch.device, values: Sequence[Any]) -> LoadedKernel:
    """`kernel` for arguments of these classes (see Family.key), compiled and loaded if it is new. Nothing is launched; `device`
    must be the current device."""
    return family(kernel).bound(values, config, device.index)
