"""Counts what a BERT layer in training launches and the bytes that it moves, on tensors without memory.

Each launch counts every tensor argument once; a tensor passed twice counts twice (read once, written once). This is the
traffic with a perfect cache, for matrix products too. Kernels are those that would run on an H100.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any
from unittest.mock import patch

import torch
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["SHAPES", "Traffic", "of_layer", "table"]

SHAPES = ((32, 128), (16, 512))  # sequences x their length
# ATen calls that launch nothing: allocations and views. Any other call counts.
_OF_THE_HOST = {
    *("empty", "empty_like", "new_empty", "view", "t", "slice", "detach", "unbind", "chunk", "promote_types"),
    *("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes"),
}


@dataclass
class Traffic:
    """Number of launches and bytes, by name."""

    launches: dict[str, int] = field(default_factory=dict)
    moved: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> tuple[int, int]:
        """Launches and bytes of all names together."""
        return sum(self.launches.values()), sum(self.moved.values())

    def add(self, name: str, moved: int) -> None:
        self.launches[name] = self.launches.get(name, 0) + 1
        self.moved[name] = self.moved.get(name, 0) + moved


class _Calls(TorchDispatchMode):
    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self._traffic = traffic

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name not in _OF_THE_HOST:
            self._traffic.add(name, sum(map(_bytes, _tensors((args, kwargs or {}, result)))))
        return result


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, dict):
        yield from _tensors(tuple(x.values()))
    elif isinstance(x, list | tuple):
        for y in x:
            yield from _tensors(y)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


@contextmanager
def _counting(architecture: str) -> Iterator[Traffic]:
    from fastbert.kernels.core import launch
    from fastbert.kernels.encoder_layer import products

    traffic = Traffic()

    def record(kernel: Any, programs: int, config: Any, arguments: dict[str, Any]) -> None:
        traffic.add(kernel.__name__, sum(map(_bytes, _tensors(arguments))))

    with (
        launch.recording(architecture, record),
        patch.object(products, "adds_last", lambda a: True),
        patch.object(torch, "is_autocast_enabled", lambda device: False),  # rejects the meta device
        _Calls(traffic),
    ):
        yield traffic


def of_layer(batch: int, seqlen: int, hidden: int = 768, architecture: str = "sm_90") -> Traffic:
    """The traffic of forward and backward of one layer with `hidden` columns, in bf16, with dropout 0.1 and a key mask."""
    from fastbert.kernels.encoder_layer import Settings, unchecked
    from fastbert.kernels.encoder_layer.settings import Layout, Weights

    def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    square, vector, inner = (hidden, hidden), (hidden,), 4 * hidden
    shapes = dict.fromkeys(Weights._fields, vector)
    shapes |= dict.fromkeys(("query", "key", "value", "attention_output"), square)
    shapes |= {"intermediate": (inner, hidden), "intermediate_bias": (inner,), "output": (hidden, inner)}
    weights = Weights(*(tensor(*shape).requires_grad_() for shape in shapes.values()))
    settings = Settings(hidden // 64, attention_p=0.1, attention_output_p=0.1, output_p=0.1)
    layout = Layout(tensor(batch, seqlen, dtype=torch.bool), tensor(batch, 3, dtype=torch.int32))
    x = tensor(batch, seqlen, hidden).requires_grad_()
    with _counting(architecture) as traffic:
        y = unchecked(x, weights, settings, layout)
        torch.autograd.grad(y, [x, *weights], tensor(*y.shape))
    return traffic


def table(found: list[Traffic]) -> Table:
    """Launches and bytes by name, for each of SHAPES."""
    result = Table(title="A BERT-base layer in training, bf16, dropout 0.1, key mask", caption="MB: 10^6 bytes")
    result.add_column("launch", no_wrap=True)
    for batch, seqlen in SHAPES:
        result.add_column(f"{batch} x {seqlen}", justify="right")
        result.add_column("MB", justify="right")
    for name in sorted(found[0].moved, key=found[0].moved.__getitem__, reverse=True):
        cells = [(str(t.launches.get(name, 0)), f"{t.moved.get(name, 0) / 1e6:.0f}") for t in found]
        result.add_row(name, *chain.from_iterable(cells))
    totals = [(str(launches), f"{moved / 1e6:.0f}") for launches, moved in (t.total for t in found)]
    result.add_row("all", *chain.from_iterable(totals))
    return result
