"""What an op is, said once: what tests, the audit and the benchmarks read of it.

An OpSpec makes inputs of any size on any device, calls the op on them, and says what ships of it, what a call launches with
and which bytes and operations it needs. Each op has a file in specs/, with its SPEC. This file imports no kernel.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

DTYPES = {"bool": torch.bool, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
# Odd on purpose: packed rows come in any number, and divisibility must not be what makes a kernel good.
TOKENS, SEQLEN = 16383, 509
# Every bucket's own width (a power of two), BERT's 384 (MiniLM) and 768 (base) inside theirs, and one that no vector
# divides. Element size 8 exists for gradcheck, so it is compiled but at the widest of each bucket only.
HIDDEN = (384, 512, 768, 1023, 1024, 2048, 4096, 8192)
BUCKETS = (512, 1024, 2048, 4096, 8192)
FEED_FORWARD = (1536, 3072, 4096, 4095)
ACTIVATIONS = ("gelu_tanh", "relu", "silu")

Named = dict[str, Tensor]
Normal = Callable[..., Tensor]  # normal(*shape)


@dataclass(frozen=True)
class Size:
    """How large a call is, in BERT's terms; an op reads of it what it has.

    `lengths`: the real tokens of each sequence, where those are given.
    """

    batch: int
    seqlen: int
    hidden: int = 768
    heads: int = 12
    head_size: int = 64
    inner: int = 3072
    vocabulary: int = 30522
    lengths: tuple[int, ...] | None = None

    @property
    def tokens(self) -> int:
        """Rows of the batch, padding included."""
        return self.batch * self.seqlen


@dataclass(frozen=True)
class Draw:
    """Random tensors on a device, by its generator; on "meta" they are shapes alone."""

    device: torch.device | str
    generator: torch.Generator | None = None

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Drawn in float32 (float64 for that) and rounded, so that every dtype gets the same numbers."""
        wide = torch.promote_types(dtype, torch.float32)
        return torch.randn(shape, dtype=wide, device=self.device, generator=self.generator).to(dtype)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """int64, from `low` to below `high`."""
        return torch.randint(low, high, shape, device=self.device, generator=self.generator)

    def mask(self, rate: float, *shape: int) -> Tensor:
        """bool, true at this rate."""
        return torch.rand(shape, device=self.device, generator=self.generator) < rate

    def seed(self) -> Tensor:
        """Of dropout, always the same."""
        return torch.full((), 7, dtype=torch.int64, device=self.device)


@dataclass(frozen=True)
class Given:
    """One call: what is differentiated, what goes with it (masks, ids, numbers), and the gradient from above.

    `within`: makes what the call runs under, where something is decided that is no argument.
    `peers`: what other implementations of the op take in place of the context.
    """

    leaves: Named
    context: dict[str, Any] = field(default_factory=dict)
    dy: Tensor | None = None
    within: Callable[[], AbstractContextManager[None]] = nullcontext
    peers: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> Named:
        """Leaves, context and gradient by name: all that a call reads."""
        context = {name: x for name, x in self.context.items() if isinstance(x, Tensor)}
        return self.leaves | context | ({} if self.dy is None else {"dy": self.dy})

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> "Given":
        """The same call of other tensors; one of the context that is not among them is left out."""
        context = {
            name: tensors.get(name) if isinstance(x, Tensor) else x
            for name, x in self.context.items()
            if name in tensors or not isinstance(x, Tensor)
        }
        return replace(self, leaves={name: tensors[name] for name in self.leaves}, context=context, dy=tensors.get("dy"))

    def converted(self, dtype: torch.dtype) -> "Given":
        """Leaves and gradient in another dtype."""
        leaves = {name: x.to(dtype) for name, x in self.leaves.items()}
        return replace(self, leaves=leaves, dy=None if self.dy is None else self.dy.to(dtype))

    def packed(self) -> "Given":
        """The real rows only, [T, ...]: what an implementation without padding works on."""
        leaves = {name: self.real(x) for name, x in self.leaves.items()}
        return replace(self, leaves=leaves, dy=None if self.dy is None else self.real(self.dy))

    def real(self, x: Tensor) -> Tensor:
        """The rows of x that are no padding; x itself where none are, or where it is packed already."""
        mask = self.context.get("key_mask")
        return x if mask is None or x.shape[:2] != mask.shape else x[mask]


@dataclass(frozen=True)
class Variant:
    """One of what ships of an op, as the audit compiles it: at a dtype ("mixed" is autocast: x in bf16, the rest in fp32) and
    a width (of a row; of attention that of a head), with `options` of OpSpec.inputs that `label` names.

    kernels: only these of what it launches, where the others stand under other variants' names.
    launch: launches what no public call does by itself, given the variant and a number of rows.
    """

    op: str
    dtype: str
    width: int
    label: str
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    kernels: tuple[str, ...] = ()
    launch: "Callable[[Variant, int], None] | None" = None

    @property
    def name(self) -> str:
        """The key of its records, without architecture and direction."""
        return f"{self.op} {self.dtype} {self.width} {self.label}"

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Of x, and of the rest."""
        low = "bf16" if self.dtype == "mixed" else self.dtype
        return DTYPES[low], DTYPES["fp32" if self.dtype == "mixed" else self.dtype]


def _by_width(spec: "OpSpec", variant: Variant, rows: int) -> Size:
    return Size(1, rows, **{spec.width: variant.width})


@dataclass(frozen=True, eq=False)
class OpSpec:
    """An op.

    call, reference: the public function and its definition (kernels/reference.py), by keyword.
    inputs: inputs(size, draw, dtype, **options) makes a call. Of options all ops with dropout take p; x_dtype is that of x
        under autocast.
    variant, variants: variant(dtype, width, **options) is one of what the audit compiles; variants() are all that ship.
    short: of those, without the op's name, what BERT-base is trained with in bf16.
    width: the field of Size by which its tables are keyed.
    eager: as transformers computes it, which is what a benchmark compares with; the reference by default.
    tensors: those of tokens x width elements that are read or written, by direction.
    widen: how many times as wide as the hidden size they are in BERT.
    operations: operations(direction, size) of its matrix products.
    forms: calls that tests repeat, capture and delay: options of inputs by name.
    tables: by form, the tables of configurations that it launches with.
    dropout: whether eager, called by a benchmark, takes p.
    small, large: sizes at which tests call it, under the interpreter and on a GPU.
    audited: the size at which the audit launches a variant, given as many rows.
    tokens: as many rows as the audit gives.
    elements: of each tensor whose bytes are the floor, as the audit launches a variant.
    """

    name: str
    call: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: Callable[..., Given]
    variant: Callable[..., Variant]
    variants: Callable[[], Iterator[Variant]]
    short: tuple[str, ...] = ()
    width: str = "hidden"
    eager: Callable[..., Tensor] | None = None
    tensors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    widen: int = 1
    operations: Callable[[str, Size], int] = lambda direction, size: 0
    forms: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"": {}})
    tables: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    dropout: bool = False
    small: Size = Size(1, 5, hidden=24, heads=3, head_size=8, inner=40, vocabulary=11)
    large: Size = Size(1, 4099)
    audited: "Callable[[OpSpec, Variant, int], Size]" = _by_width
    tokens: int = TOKENS
    elements: "Callable[[OpSpec, Variant], int]" = lambda spec, variant: spec.tokens * variant.width

    def __str__(self) -> str:
        return self.name

    def moved(self, direction: str, tokens: int, hidden: int, itemsize: int) -> int:
        """The fewest bytes: each of `tensors` once. Weights, biases and statistics of rows are left out, which are under 1 % at
        4,096 tokens."""
        return len(self.tensors[direction]) * tokens * self.widen * hidden * itemsize

    def run(self, given: Given, call: Callable[..., Any] | None = None) -> dict[str, Tensor]:
        """{"y": what the op (or `call`) returns, "dx": the gradient of x, ...} of one forward and backward."""
        leaves = {name: x.detach().requires_grad_() for name, x in given.leaves.items()}
        with given.within():
            y = (call or self.call)(**leaves, **given.context)
            gradients = torch.autograd.grad(y, list(leaves.values()), given.dy) if leaves else ()
        if isinstance(y, Tensor):
            results = {"y": y.detach()}
        else:
            results = y if isinstance(y, dict) else {str(i): x for i, x in enumerate(y)}
        return results | {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}

    def launch(self, variant: Variant, rows: int | None = None) -> None:
        """Launch what a training step would of `variant`, forward then backward, on the meta device."""
        rows = rows or self.tokens
        if variant.launch:
            variant.launch(variant, rows)
        else:
            self.run(self.on_meta(variant, rows))

    def on_meta(self, variant: Variant, rows: int) -> Given:
        """The inputs that `launch` gives a variant."""
        low, dtype = variant.dtypes
        options = dict(variant.options) | ({} if low == dtype else {"x_dtype": low})
        return self.inputs(self.audited(self, variant, rows), Draw("meta"), dtype, **options)
