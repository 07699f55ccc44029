"""One small call of every op and its reference, for the fault tests to break, poison or move to another device."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastbert.kernels import reference
from fastbert.kernels.attention import attention
from fastbert.kernels.bias_gelu import bias_gelu
from fastbert.kernels.dropout_add_layernorm import dropout_add_layernorm
from fastbert.kernels.embedding_layernorm import embedding_layernorm
from fastbert.kernels.gather_rows import gather_rows
from fastbert.kernels.gelu_layernorm import gelu_layernorm
from fastbert.kernels.linear_cross_entropy import linear_cross_entropy
from fastbert.kernels.pool_rows import MODES, pool_rows
from fastbert.testing.attention import drawn_keep
from fastbert.testing.numerics import assert_close
from fastbert.testing.rows import DEVICE, Inputs, double, drawn_mask, run, seed_tensor

ROWS, WIDTH, CLASSES = 5, 24, 7
SEED = 1234
Results = dict[str, Tensor | None]


@dataclass(frozen=True)
class Case:
    """A call: `inputs` are differentiated, `options` go to kernel and reference, `keep` draws the dropout mask for p > 0."""

    name: str
    call: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    inputs: Inputs
    dy: Tensor
    forward: tuple[str, ...]
    backward: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    keep: Callable[[float, Tensor], Tensor] | None = None

    def __str__(self) -> str:
        return self.name

    def run(self, p: float = 0.0) -> Results:
        """The results of the op: y and the gradient of every input."""
        extra = {"p": p, "seed": seed_tensor(SEED)} if p else {}
        return run(self.call, self.inputs, self.dy, **self.options, **extra)

    def eager(self, p: float = 0.0, exact: bool = False) -> Results:
        """The results of the reference with the same dropout mask; with `exact`, in float64."""
        extra = {"p": p, "keep": self.keep(p, seed_tensor(SEED))} if p else {}
        inputs, dy = (double(self.inputs), self.dy.double()) if exact else (self.inputs, self.dy)
        return run(self.reference, inputs, dy, **self.options, **extra)

    def check(self, results: Results, p: float = 0.0) -> None:
        """Check that `results` are within the bound; 16-bit ones are judged as 16-bit numbers."""
        relative = None if self.dy.element_size() == 2 else 1e-5
        assert_close(results, self.eager(p), self.eager(p, exact=True), relative_fp32=relative)


def cases(dtype: torch.dtype = torch.float32) -> dict[str, Case]:
    """The cases by name, with new inputs each time, from torch's generator."""

    def normal(*shape: int, at: float = 0.0) -> Tensor:
        return (at + torch.randn(shape, dtype=torch.float64)).to(DEVICE, dtype)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape).to(DEVICE)

    def rows(*shape: int) -> Tensor:
        return normal(*(shape or (ROWS, WIDTH)))

    def norm(op: str) -> dict[str, tuple[str, ...]]:
        return {"forward": (f"{op}_fwd_kernel",), "backward": (f"{op}_bwd_kernel",)}

    weight = {"weight": 0.3 * normal(WIDTH, at=3.0), "bias": normal(WIDTH)}
    labels = integers(CLASSES, ROWS)
    labels[1] = -100
    index = torch.tensor([3, 1, -1, 4], dtype=torch.int32, device=DEVICE)
    inverse = torch.tensor([-1, 1, -1, 0, 3], dtype=torch.int32, device=DEVICE)
    key_mask = torch.tensor([[True] * 4 + [False], [False] * 5], device=DEVICE)
    packed = {
        "cu_seqlens": torch.tensor([0, 2, 4, ROWS], dtype=torch.int32, device=DEVICE),
        "index": torch.tensor([0, 2, 3, 4, -1], dtype=torch.int32, device=DEVICE),
        "mask": torch.tensor([[True, True, True], [False, True, True]], device=DEVICE),
    }
    bounds = torch.tensor([0, 2, 2, ROWS], dtype=torch.int32, device=DEVICE)
    loss = {"forward": tuple(f"linear_cross_entropy_{part}_kernel" for part in ("fwd", "reduce"))}
    loss["backward"] = ("linear_cross_entropy_bwd_scale_kernel",)
    attending = {
        "forward": ("attention_fwd_kernel",),
        "backward": ("attention_bwd_q_kernel", "attention_bwd_kv_kernel"),
    }
    short = attending | {"backward": ("attention_bwd_short_kernel",)} if dtype.itemsize == 2 else attending
    found = [
        Case(
            "dropout_add_layernorm",
            dropout_add_layernorm,
            reference.dropout_add_layernorm,
            {"x": rows(), "residual": rows(), **weight, "x_bias": normal(WIDTH)},
            rows(),
            **norm("dropout_add_layernorm"),
            keep=lambda p, seed: drawn_mask((ROWS, WIDTH), p, seed),
        ),
        *(
            Case(
                f"bias_gelu {activation}",
                bias_gelu,
                reference.bias_gelu,
                {"x": rows(), "bias": normal(WIDTH)},
                rows(),
                **norm("bias_gelu"),
                options={"activation": activation},
            )
            for activation in reference.ACTIVATIONS
        ),
        Case(
            "gelu_layernorm",
            gelu_layernorm,
            reference.gelu_layernorm,
            {"x": rows(), **weight, "x_bias": normal(WIDTH)},
            rows(),
            **norm("gelu_layernorm"),
        ),
        Case(
            "embedding_layernorm",
            embedding_layernorm,
            reference.embedding_layernorm,
            {"words": normal(CLASSES, WIDTH), "positions": normal(6, WIDTH), "types": normal(2, WIDTH), **weight},
            rows(2, ROWS, WIDTH),
            ("embedding_layernorm_fwd_kernel",),
            tuple(f"embedding_layernorm_bwd{part}_kernel" for part in ("", "_order", "_runs", "_sums", "_finish")),
            {"ids": integers(CLASSES, 2, ROWS), "token_type_ids": integers(2, 2, ROWS), "padding_idx": 0},
            lambda p, seed: drawn_mask((2, ROWS, WIDTH), p, seed),
        ),
        Case(
            "gather_rows",
            gather_rows,
            reference.gather_rows,
            {"x": rows()},
            rows(4, WIDTH),
            ("gather_rows_kernel",),
            ("gather_rows_kernel",),
            {"index": index, "inverse": inverse},
        ),
        *(
            Case(
                f"pool_rows {mode}",
                pool_rows,
                reference.pool_rows,
                {"x": rows()},
                rows(2, WIDTH),
                **norm("pool_rows"),
                options={"mode": mode, "n_sequences": 2, "seqlen": 3, **packed},
            )
            for mode in MODES
        ),
        Case(
            "attention",
            attention,
            reference.attention,
            {name: rows(2, ROWS, 2, 8) for name in "qkv"},
            rows(2, ROWS, 2, 8),
            **short,
            options={"key_mask": key_mask},
            keep=lambda p, seed: drawn_keep(2, 2, ROWS, ROWS, p, seed),
        ),
        Case(
            "attention causal",
            attention,
            reference.attention,
            {"q": rows(1, 3, 2, 8), "k": rows(1, ROWS, 2, 8), "v": rows(1, ROWS, 2, 8)},
            rows(1, 3, 2, 8),
            **attending,
            options={"causal": True, "mask": normal(1, 2, 3, ROWS)},
            keep=lambda p, seed: drawn_keep(1, 2, 3, ROWS, p, seed),
        ),
        Case(
            "attention packed",
            attention,
            reference.attention,
            {name: rows(ROWS, 2, 8) for name in "qkv"},
            rows(ROWS, 2, 8),
            **short,
            options={"cu_seqlens": bounds, "max_seqlen": ROWS},
            keep=lambda p, seed: drawn_keep(3, 2, ROWS, ROWS, p, seed),
        ),
        Case(
            "attention grouped",
            attention,
            reference.attention,
            {"q": rows(2, ROWS, 4, 8), "k": rows(2, ROWS, 2, 8), "v": rows(2, ROWS, 2, 8)},
            rows(2, ROWS, 4, 8),
            **attending,
            options={"key_mask": key_mask, "mask": normal(2, 4, ROWS, ROWS)},
            keep=lambda p, seed: drawn_keep(2, 4, ROWS, ROWS, p, seed),
        ),
        *(
            Case(
                f"linear_cross_entropy {reduction}" + (" weighted" if class_weights is not None else ""),
                linear_cross_entropy,
                reference.linear_cross_entropy,
                {"hidden": rows(), "weight": normal(CLASSES, WIDTH), "bias": normal(CLASSES)},
                normal(ROWS) if reduction == "none" else normal(at=2.0),
                **(loss | ({"backward": loss["forward"][:1]} if reduction == "none" else {})),
                options={
                    "labels": labels,
                    "class_weights": class_weights,
                    "reduction": reduction,
                    "label_smoothing": smoothing,
                },
            )
            for class_weights in (None, normal(CLASSES).abs())
            for reduction, smoothing in (("mean", 0.0 if class_weights is None else 0.1), ("sum", 0.1), ("none", 0.1))
        ),
    ]
    return {case.name: case for case in found}


NAMES = tuple(cases())
WITH_DROPOUT = tuple(name for name, case in cases().items() if case.keep)
