"""Replaces kernels by ones that fail."""

import ast
import math
import sys
from collections.abc import Callable, Iterable
from typing import Any

from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

import fastbert.kernels.adamw  # noqa: F401  the optimizer imports it in its first step

# Triton's errors for a kernel that does not compile, fit or assemble or that the driver rejects, and the error of the
# first launch on a machine without a C compiler.
ERRORS: dict[str, Callable[[], Exception]] = {
    "compilation": lambda: CompilationError("x = 1\ny = z", ast.Name("z", lineno=2, col_offset=4), "z is not defined"),
    "resources": lambda: OutOfResources(300_000, 232_448, "shared memory"),
    "ptxas": lambda: PTXASError("Internal Triton PTX codegen error"),
    "driver": lambda: RuntimeError("Triton Error [CUDA]: invalid argument"),
    "compiler": lambda: RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
    "passes": lambda: RuntimeError("PassManager::run failed"),
}


class Broken:
    """A kernel whose launches raise: `bad` of them, after the first `good`. `attempts` counts those that raised.

    Compiling it ahead of time, as for bound kernels, counts as a launch.
    """

    def __init__(self, name: str, error: Callable[[], Exception], good: int, bad: float) -> None:
        self.__name__ = name
        self.error = error
        self.good = good
        self.bad = bad
        self.attempts = 0
        self.kernel: Any = None

    @property
    def arg_names(self) -> list[str]:
        return self.kernel.arg_names

    @property
    def params(self) -> list[Any]:
        return self.kernel.params

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return lambda **arguments: self._or_raise(self.kernel[grid], **arguments)

    def warmup(self, *arguments: Any, **options: Any) -> Any:
        return self._or_raise(self.kernel.warmup, *arguments, **options)

    def _or_raise(self, start: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        if self.good or self.attempts >= self.bad:
            self.good = max(0, self.good - 1)
            return start(*arguments, **options)
        self.attempts += 1
        raise self.error()


def break_kernels(
    monkeypatch: Any,
    names: Iterable[str],
    error: Callable[[], Exception] = ERRORS["resources"],
    good: int = 0,
    bad: float = math.inf,
) -> dict[str, Broken]:
    """Break `bad` launches of each of these kernels, after the first `good`, in every module that refers to them."""
    broken = {name: Broken(name, error, good, bad) for name in names}
    found = set()
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("fastbert.kernels."):
            for name in broken.keys() & vars(module).keys():
                broken[name].kernel = getattr(module, name)
                monkeypatch.setattr(module, name, broken[name])
                found.add(name)
    assert found == broken.keys(), broken.keys() - found
    return broken
