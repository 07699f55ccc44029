"""Lists calls of every op; test_gpu_calls.py repeats, captures and delays each of them."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .rows import DEVICE
from .spec import Draw, OpSpec
from .specs import SPECS

Tensors = dict[str, Tensor]
Step = Callable[[Tensors], Tensors]


@dataclass(frozen=True)
class Call:
    """A call of an op in one of its forms."""

    spec: OpSpec
    form: str

    def __str__(self) -> str:
        return f"{self.spec} {self.form}".strip()

    def make(self, small: bool, dtype: torch.dtype, width: int | None = None) -> tuple[Tensors, Step]:
        """Inputs by name, and a step: a function from such inputs to outputs and gradients by name.

        All tensors that a step reads are among the inputs, including the dropout seed. `width` is the width by which the
        configuration tables are keyed (hidden size, head size or vocabulary size); None for the default.
        """
        size = self.spec.small if small else self.spec.large
        if width:
            size = replace(size, **{self.spec.width: width})
        given = self.spec.inputs(size, Draw(DEVICE), dtype, **self.spec.forms[self.form])
        return given.tensors(), lambda tensors: self.spec.run(given.with_tensors(tensors))


CALLS = tuple(Call(spec, form) for spec in SPECS.values() for form in spec.forms)
