"""adamw: one optimizer step over one parameter."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastbert.kernels import reference
from fastbert.kernels.adamw import adamw
from fastbert.kernels.adamw.tables import Hyperparameters, Parameter, Tables

from ..spec import Draw, Given, Named, OpSpec, Size, Variant

NAME = "adamw"


def _stepping(function: Callable[..., None]) -> Callable[..., Named]:
    """A step on copies of a parameter and its state, which it returns."""

    def step(*, grad_scale: Tensor | None = None, found_inf: Tensor | None = None, **state: Tensor) -> Named:
        after = {name: x.clone() for name, x in state.items()}
        tables = Tables(captured=after["param"].is_cuda and torch.cuda.is_current_stream_capturing())
        found: dict[str, Any] = {"grad_scale": grad_scale, "found_inf": found_inf, "tables": tables}
        function([Parameter(**after)], [Hyperparameters()], **found)
        return after

    return step


def _inputs(
    size: Size,
    draw: Draw,
    dtype: torch.dtype,
    *,
    x_dtype: torch.dtype | None = None,
    amsgrad: bool = False,
    scaled: bool = False,
) -> Given:
    """A parameter of size.tokens elements with its state in `dtype`; with x_dtype also a master, and the parameter in
    x_dtype."""
    low, shape = x_dtype or dtype, (size.tokens,)
    state = {"param": draw.normal(*shape, dtype=low), "grad": draw.normal(*shape, dtype=low)}
    state |= {"exp_avg": draw.normal(*shape, dtype=dtype), "exp_avg_sq": draw.normal(*shape, dtype=dtype).square()}
    state["step"] = torch.full((), 3.0, device=draw.device)
    if amsgrad:
        state["max_exp_avg_sq"] = draw.normal(*shape, dtype=dtype)
    if x_dtype:
        state["master"] = state["param"].to(dtype)
    if scaled:
        state |= {name: torch.full((), value, device=draw.device) for name, value in (("grad_scale", 2.0), ("found_inf", 0.0))}
    return Given({}, state)


def _variant(dtype: str, width: int = 1, form: str = "plain") -> Variant:
    """With dtype "mixed": a bf16 parameter with float32 state and master."""
    return Variant(NAME, dtype, width, form, {} if form == "plain" else {form: True})


def _variants() -> Iterator[Variant]:
    for dtype in ("bf16", "fp16", "fp32", "mixed"):
        for form in ("plain", "amsgrad", "scaled"):
            yield _variant(dtype, form=form)


SPEC = OpSpec(
    NAME,
    _stepping(adamw),
    _stepping(reference.adamw),
    _inputs,
    _variant,
    _variants,
    short=("fp32 1 plain",),
    tensors={"step": ("param", "grad", "exp_avg", "exp_avg_sq", "new param", "new exp_avg", "new exp_avg_sq")},
    forms={"": {}, "amsgrad": {"amsgrad": True}},
    tables={"": ("adamw",)},
    small=Size(1, 37),
    large=Size(4099, 769),
    audited=lambda spec, variant, rows: Size(1, rows),
)
