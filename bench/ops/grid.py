"""Defines ops, lanes and cases, and the grid of cases.

For one case a lane builds a function (inputs, p) -> output, or raises Absent if it cannot run the case. All lanes of a
case get the same inputs and are checked against the same reference (bench.ops.check).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.core import floors
from bench.core.lengths import Lengths
from fastbert.testing.spec import Draw, Given, Size

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DIRECTIONS = floors.DIRECTIONS


@dataclass(frozen=True)
class Case:
    """One size of one op. An op over tokens has batch x seqlen rows; fill is attention's share of real tokens."""

    op: str
    dtype: str
    hidden: int
    batch: int
    seqlen: int
    fill: float = 1.0
    p: float = 0.0

    @property
    def lengths(self) -> list[int]:
        return Lengths().of_batch(self.batch, self.seqlen, self.fill)

    @property
    def size(self) -> Size:
        """The case's size in the form that an op's spec takes."""
        lengths = tuple(self.lengths) if self.fill < 1.0 else None
        return replace(floors.size(self.batch, self.seqlen, self.hidden), lengths=lengths)

    def moved(self, direction: str) -> int:
        """Stated bytes: each input read once, each output written once, real rows only."""
        if direction == "both":
            return self.moved("forward") + self.moved("backward")
        size = torch.empty((), dtype=DTYPES[self.dtype]).element_size()
        return floors.stated_bytes(self.op, direction, sum(self.lengths), self.hidden, size)

    def operations(self, direction: str) -> int:
        """Stated operations of the matrix products, over pairs within a sequence; 0 for an op that only moves bytes."""
        if direction == "both":
            return self.operations("forward") + self.operations("backward")
        return sum(floors.stated_operations(self.op, direction, 1, n, self.hidden) for n in self.lengths)


Inputs = Given
Function = Callable[[Inputs, float], Tensor]


@dataclass(frozen=True)
class Lane:
    """build(case) returns the function or raises Absent. A packed lane gets inputs without padding."""

    build: Callable[[Case], Function]
    packed: bool = False


@dataclass(frozen=True)
class Op:
    """make(case, draw) returns random inputs of the case's dtype. reference is plain PyTorch without dropout."""

    make: Callable[[Case, Draw], Inputs]
    reference: Function
    lanes: dict[str, Lane]


def run(function: Function, inputs: Inputs, p: float) -> dict[str, Tensor]:
    """{"y": output, "dx": gradient, ...} of one forward and backward."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.leaves.items()}
    y = function(replace(inputs, leaves=leaves), p)
    gradients = torch.autograd.grad(y, list(leaves.values()), inputs.dy)
    return {"y": y.detach()} | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}


NAMES = (
    "attention",
    "dropout_add_layernorm",
    "bias_gelu",
    "feed_forward",
    "gelu_layernorm",
    "gather_rows",
    "linear_cross_entropy",
    "embedding_layernorm",
    "pool_rows",
)
WITH_DROPOUT = ("attention", "dropout_add_layernorm", "embedding_layernorm")
SEQLENS = (512, 128, 2048, 64, 256, 1024)  # most important first
TOKENS = 16384
LABELLED = {512: 16384, 128: 4096, 64: 2457, 256: 614}  # rows of linear_cross_entropy, in place of a sequence length
FED = {512: 16384, 128: 4096, 64: 2048, 256: 1024, 1024: 32768}  # rows of feed_forward, in the same way
ROWS = {"linear_cross_entropy": LABELLED, "feed_forward": FED}
TINY = {"attention": (64, 2, 24)} | dict.fromkeys(NAMES[1:], (48, 2, 9)) | {"feed_forward": (32, 2, 9)}


def cases(names: tuple[str, ...] = NAMES, dtypes: tuple[str, ...] = ("bf16", "fp16", "fp32")) -> Iterator[Case]:
    """The grid, most important first: BERT-base and BERT-large, S from 64 to 2,048 at 16,384 tokens."""
    for dtype in dtypes:
        for seqlen in SEQLENS if dtype == "bf16" else SEQLENS[:2]:
            for hidden in floors.MODELS.values():
                for name in names:
                    if name not in ROWS:
                        yield from _of_shape(Case(name, dtype, hidden, TOKENS // seqlen, seqlen))
                    elif seqlen in ROWS[name]:
                        yield Case(name, dtype, hidden, 1, ROWS[name][seqlen])


def _of_shape(case: Case) -> Iterator[Case]:
    """The cases of one shape: with and without dropout for ops that have it, with and without padding for attention and
    pooling."""
    fills = {"attention": (1.0, 0.5), "gather_rows": (0.5,), "pool_rows": (1.0, 0.5)}.get(case.op, (1.0,))
    for fill in fills:
        for p in (0.1, 0.0) if case.op in WITH_DROPOUT else (0.0,):
            yield replace(case, fill=fill, p=p)


def tiny_cases(names: tuple[str, ...] = NAMES) -> Iterator[Case]:
    """One small case of each kind, for a dry run in the interpreter."""
    for name in names:
        hidden, batch, seqlen = TINY[name]
        yield from _of_shape(Case(name, "fp32", hidden, batch, seqlen))
