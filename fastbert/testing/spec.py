"""Describes an op once, for the tests, the audit and the benchmarks.

An OpSpec makes inputs of any size on any device, calls the op on them, and lists its shipped variants, the configuration
tables of a call, and the bytes and operations that it needs. Each op has a file with its SPEC in specs/. This file imports
no kernel.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

DTYPES = {"bool": torch.bool, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
# Odd on purpose: the number of packed rows is arbitrary, and a kernel must not depend on its divisibility.
TOKENS, SEQLEN = 16383, 509
# Every bucket's own width (a power of two), BERT's 384 (MiniLM) and 768 (base) within their buckets, and one that no vector
# size divides. Element size 8 exists for gradcheck, so it is compiled only at the widest of each bucket.
HIDDEN = (384, 512, 768, 1023, 1024, 2048, 4096, 8192)
BUCKETS = (512, 1024, 2048, 4096, 8192)
FEED_FORWARD = (1536, 3072, 4096, 4095)
ACTIVATIONS = ("gelu_tanh", "relu", "silu")

Named = dict[str, Tensor]
Normal = Callable[..., Tensor]  # normal(*shape)


@dataclass(frozen=True)
class Size:
    """The size of a call, in BERT's terms; an op reads the fields that it has.

    lengths: the number of real tokens per sequence; None without padding.
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
    """Draws random tensors on a device with a generator; on "meta" they have shapes only."""

    device: torch.device | str
    generator: torch.Generator | None = None

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A normal tensor, drawn in float32 (or float64) and rounded, so that every dtype gets the same numbers."""
        wide = torch.promote_types(dtype, torch.float32)
        return torch.randn(shape, dtype=wide, device=self.device, generator=self.generator).to(dtype)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """An int64 tensor in [low, high)."""
        return torch.randint(low, high, shape, device=self.device, generator=self.generator)

    def mask(self, rate: float, *shape: int) -> Tensor:
        """A bool tensor, true at this rate."""
        return torch.rand(shape, device=self.device, generator=self.generator) < rate

    def seed(self) -> Tensor:
        """The dropout seed, always the same."""
        return torch.full((), 7, dtype=torch.int64, device=self.device)


@dataclass(frozen=True)
class Given:
    """The inputs of one call.

    leaves: the tensors that are differentiated.
    context: the other arguments (masks, ids, numbers).
    dy: the gradient of the output.
    within: makes the context manager that the call runs in, for a setting that is not an argument.
    peers: arguments that other implementations of the op take instead of the context.
    """

    leaves: Named
    context: dict[str, Any] = field(default_factory=dict)
    dy: Tensor | None = None
    within: Callable[[], AbstractContextManager[None]] = nullcontext
    peers: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> Named:
        """Leaves, tensors of the context, and dy by name: all that a call reads."""
        context = {name: x for name, x in self.context.items() if isinstance(x, Tensor)}
        return self.leaves | context | ({} if self.dy is None else {"dy": self.dy})

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> "Given":
        """The same call with other tensors; a tensor of the context that is not among them is dropped."""
        context = {
            name: tensors.get(name) if isinstance(x, Tensor) else x
            for name, x in self.context.items()
            if name in tensors or not isinstance(x, Tensor)
        }
        return replace(self, leaves={name: tensors[name] for name in self.leaves}, context=context, dy=tensors.get("dy"))

    def converted(self, dtype: torch.dtype) -> "Given":
        """The call with leaves and dy in another dtype."""
        leaves = {name: x.to(dtype) for name, x in self.leaves.items()}
        return replace(self, leaves=leaves, dy=None if self.dy is None else self.dy.to(dtype))

    def packed(self) -> "Given":
        """The call on the real rows only, [T, ...], for an implementation without padding."""
        leaves = {name: self.real(x) for name, x in self.leaves.items()}
        return replace(self, leaves=leaves, dy=None if self.dy is None else self.real(self.dy))

    def real(self, x: Tensor) -> Tensor:
        """The rows of x that are not padding; x itself if there is no padding or it is already packed."""
        mask = self.context.get("key_mask")
        return x if mask is None or x.shape[:2] != mask.shape else x[mask]


@dataclass(frozen=True)
class Variant:
    """A shipped variant of an op, as the audit compiles it.

    op: the name of the op.
    dtype: a key of DTYPES, or "mixed" for autocast (x in bf16, the rest in fp32).
    width: the width of a row; for attention, the head size.
    label: a name for `options`.
    options: options of OpSpec.inputs.
    kernels: only these of the launched kernels, if the others belong to other variants.
    launch: launch(variant, rows) for launches that no public call makes by itself.
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
        """The key of its audit records, without architecture and direction."""
        return f"{self.op} {self.dtype} {self.width} {self.label}"

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """The dtypes of x and of the other inputs."""
        low = "bf16" if self.dtype == "mixed" else self.dtype
        return DTYPES[low], DTYPES["fp32" if self.dtype == "mixed" else self.dtype]


def _by_width(spec: "OpSpec", variant: Variant, rows: int) -> Size:
    return Size(1, rows, **{spec.width: variant.width})


@dataclass(frozen=True, eq=False)
class OpSpec:
    """The spec of an op.

    call, reference: the public function and its reference (kernels/reference.py), called by keyword.
    inputs: inputs(size, draw, dtype, **options) makes a call. All ops with dropout take the option p; the option x_dtype is
        the dtype of x under autocast.
    variant, variants: variant(dtype, width, **options) makes one variant for the audit; variants() yields all shipped ones.
    short: the variants, without the op's name, with which BERT-base is trained in bf16.
    width: the field of Size by which its configuration tables are keyed.
    eager: the op as transformers computes it, for benchmarks; the reference by default.
    tensors: per direction, the tensors of tokens x width elements that are read or written.
    widen: their width in BERT, as a multiple of the hidden size.
    operations: operations(direction, size), the operations of its matrix products.
    forms: options of inputs by name, for the calls that tests repeat, capture and delay.
    tables: per form, the configuration tables that its launches use.
    dropout: whether eager takes p in a benchmark.
    small, large: the sizes at which tests call it, in the interpreter and on a GPU.
    audited: audited(spec, variant, rows), the size at which the audit launches a variant.
    tokens: the number of rows in the audit.
    elements: elements(spec, variant), the elements per tensor that counts towards the floor of bytes in the audit.
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
        """The minimum of bytes moved: each of `tensors` once.

        Weights, biases and statistics of rows are left out; they are under 1 % at 4,096 tokens.
        """
        return len(self.tensors[direction]) * tokens * self.widen * hidden * itemsize

    def run(self, given: Given, call: Callable[..., Any] | None = None) -> dict[str, Tensor]:
        """Run one forward and backward of the op (or `call`): {"y": the output, "dx": the gradient of x, ...}."""
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
        """Launch a training step of `variant`, forward and backward, on the meta device."""
        rows = rows or self.tokens
        if variant.launch:
            variant.launch(variant, rows)
        else:
            self.run(self.on_meta(variant, rows))

    def on_meta(self, variant: Variant, rows: int) -> Given:
        """The inputs with which `launch` calls a variant."""
        low, dtype = variant.dtypes
        options = dict(variant.options) | ({} if low == dtype else {"x_dtype": low})
        return self.inputs(self.audited(self, variant, rows), Draw("meta"), dtype, **options)
