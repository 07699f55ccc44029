"""Whether a thousand tensors have the same types, dtypes, devices, sizes and strides as a step ago.

Any of these can change at the same address: through `tensor.data = other`, or when a new gradient takes the memory of an old
one. Comparing them one by one in Python takes as long as the rest of an optimizer step. torch compares them in one call, for
its compiler's guards (TensorGuards). That is no public API, so it is used only after it has shown that it notices each
difference; otherwise Python lists are compared.
"""

from collections.abc import Sequence
from functools import cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

_ATTRIBUTES = [attrgetter(name) for name in ("dtype", "device", "layout", "shape")]
_MAX_GUARDS = 8


class Forms:
    """The forms of `tensors`; the tensors themselves are not kept."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._forms = _forms(tensors)
        self._length = len(tensors)
        self._guards: Any = None
        self._guards_left = _MAX_GUARDS  # slow to build, and they also see autocast and requires_grad

    def same(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these tensors have the same forms, in order."""
        guards = self._guards  # read once: another thread may change it
        if guards is not None and len(tensors) == self._length and guards.check(*tensors):
            return True
        if list(map(type, tensors)) != self._forms[0] or _forms(tensors) != self._forms:
            return False
        self._guards = None
        if self._guards_left:
            self._guards_left -= 1
            self._guards = _guards(tensors)
        return True


def _forms(tensors: Sequence[Tensor]) -> list[Any]:
    found: list[Any] = [list(map(type, tensors)), *(list(map(attribute, tensors)) for attribute in _ATTRIBUTES)]
    found.append([tensor.stride() if tensor.layout is torch.strided else None for tensor in tensors])
    return found


def _guards(tensors: Sequence[Tensor]) -> Any:
    """torch's guards for these tensors; None if they are unavailable or refuse them (a tensor listed twice)."""
    kind = _proven()
    if kind is None:
        return None
    found = _make(kind, tensors)
    return found if found.check(*tensors) else None


def _make(kind: Any, tensors: Sequence[Tensor]) -> Any:
    sizes, strides = ([list(form(tensor)) for tensor in tensors] for form in (Tensor.size, Tensor.stride))
    return kind(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)


@cache
def _proven() -> Any:
    """torch's class, if this release has it and it notices each single difference."""
    try:
        from torch._C._dynamo.guards import TensorGuards

        return TensorGuards if _notices(TensorGuards) else None
    except Exception:  # another release may fail in any way
        return None


def _notices(kind: Any) -> bool:
    like = torch.zeros(4, 6)
    others = (
        torch.zeros(4, 6, dtype=torch.float16),
        torch.zeros(4, 6, dtype=torch.int32),
        torch.zeros(4, 6, device="meta"),
        torch.zeros(4, 6).to_sparse(),
        torch.zeros(6, 4).t(),
        torch.zeros(3, 6),
        torch.zeros(24),
        torch.nn.Parameter(torch.zeros(4, 6)),
    )
    guards = _make(kind, [like])
    return guards.check(torch.ones(4, 6)) is True and not any(guards.check(other) for other in others)
