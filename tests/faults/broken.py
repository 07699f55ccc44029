"""Kernels that fail, put in the place of those that work."""

import ast
import sys
from collections.abc import Callable
from typing import Any

import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

# What triton raises where a kernel does not compile, does not fit, does not assemble or is not taken by the driver, and
# what a machine without a C compiler makes of the first launch.
ERRORS: dict[str, Callable[[], Exception]] = {
    "compilation": lambda: CompilationError("x = 1\ny = z", ast.Name("z", lineno=2, col_offset=4), "z is not defined"),
    "resources": lambda: OutOfResources(300_000, 232_448, "shared memory"),
    "ptxas": lambda: PTXASError("Internal Triton PTX codegen error"),
    "driver": lambda: RuntimeError("Triton Error [CUDA]: invalid argument"),
    "compiler": lambda: RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
    "passes": lambda: RuntimeError("PassManager::run failed"),
}


class Broken:
    """A kernel whose launch raises; `attempts` counts them."""

    def __init__(self, name: str, error: Callable[[], Exception]) -> None:
        self.__name__ = name
        self.error = error
        self.attempts = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def start(**arguments: Any) -> None:
            self.attempts += 1
            raise self.error()

        return start


def break_kernels(monkeypatch: Any, names: Any, error: Callable[[], Exception] = ERRORS["resources"]) -> dict[str, Broken]:
    """Break the kernels of these names, wherever a module holds them."""
    broken = {name: Broken(name, error) for name in names}
    found = set()
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("fastbert.kernels."):
            for name in broken.keys() & vars(module).keys():
                monkeypatch.setattr(module, name, broken[name])
                found.add(name)
    assert found == broken.keys(), broken.keys() - found
    return broken


