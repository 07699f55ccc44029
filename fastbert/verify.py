"""Verifies a patched model on the user's own batch: outputs, loss and every parameter gradient, against eager.

The comparison is with eager attention, not SDPA, whose backends differ in their rounding and give zeros for a row that sees
no key. A patched model gives eager's average there, even if it was on SDPA before. A model with its own attention
(a registered function, a module of another class) keeps it on both sides.
"""

import copy
import html
import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from fastbert import display
from fastbert.numerics import Comparison, compare, largest
from fastbert.patch import _check_model, patched, unpatch
from fastbert.report import Report, report
from fastbert.wrapped import sharded_part

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table

_NOTHING = 1e-8  # relative to a typical tensor: the float64 residue of a gradient that is zero in exact arithmetic
_LARGE = 500_000_000  # parameters; above it a float64 copy with its gradients no longer fits beside the model
_HEADINGS = ("tensor", "error, patched", "error, eager", "allowed", "")
_NUMBERS = _HEADINGS[1:4]
_NARROW = ("tensor", "error,\npatched", "error,\neager", "allowed", "")
_REST = 45  # columns of the narrow table that are not the tensor's name
_OVER_THE_BOUND = "error "  # how the reason of a comparison starts whose numbers say the same


def _narrow(rows: list[tuple[str, ...]], width: int) -> "Table":
    """The table with long names on several lines."""
    folded = [(display.fold_name(name, max(width - _REST, 20)), *rest) for name, *rest in rows]
    return display.table(_NARROW, folded, right=_NARROW[1:4])


@dataclass(frozen=True)
class VerifyResult:
    """The result of `fastbert.verify`. It is true (`ok`, `bool()`) only if kernels ran and every comparison passed."""

    model: str
    dtype: torch.dtype
    device: torch.device
    reference_dtype: torch.dtype
    outputs: tuple[Comparison, ...]
    gradients: tuple[Comparison, ...]
    first_divergence: str | None
    kernel_calls: int
    report: Report
    notes: tuple[str, ...] = field(default=())

    @property
    def ok(self) -> bool:
        return self.kernel_calls > 0 and all(c.ok for c in (*self.outputs, *self.gradients))

    def __bool__(self) -> bool:
        return self.ok

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data, for JSON."""
        return {
            "ok": self.ok,
            "model": self.model,
            "dtype": str(self.dtype),
            "device": str(self.device),
            "reference_dtype": str(self.reference_dtype),
            "outputs": [vars(c) for c in self.outputs],
            "gradients": [vars(c) for c in self.gradients],
            "first_divergence": self.first_divergence,
            "kernel_calls": self.kernel_calls,
            "notes": list(self.notes),
        }

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "Iterator[RenderableType]":
        from rich.text import Text

        notes = display.Notes()
        rows = [(*cells, f"{verdict} {notes.mark(reason)}".rstrip()) for *cells, verdict, reason in self._cells()]
        yield Text(self._title())
        yield ""
        wide = display.table(_HEADINGS, rows, right=_NUMBERS)
        yield wide if display.fits(wide, console, options) else _narrow(rows, options.max_width)
        yield ""
        yield from (Text(line) for line in (self._verdict(), *self.notes))
        yield from notes.lines(options.max_width)

    def __str__(self) -> str:
        return display.as_text(self)

    def _repr_html_(self) -> str:
        """The table for a notebook, with the verdict and the notes below; everything in it is escaped."""
        made = display.html_table(self._title(), (*_HEADINGS, "reason"), self._cells())
        below = "".join(f"<p>{html.escape(line)}</p>" for line in (self._verdict(), *self.notes))
        return f"<div>{made}{below}</div>"

    def _cells(self) -> list[tuple[str, ...]]:
        """The rows of the table: name, three errors, verdict, and a reason that the errors do not show themselves."""
        rows = []
        for c in self._listed():
            errors = (f"{number:.2e}" for number in (c.error, c.eager_error, c.bound))
            reason = c.reason or ""
            said = "" if reason.startswith(_OVER_THE_BOUND) else reason
            rows.append((c.name, *errors, "equal" if c.ok else "DIFFERS", said))
        return rows

    def _title(self) -> str:
        where = f"{self.model}, {self.dtype} on {self.device}"
        return f"{where}: patched against eager, errors from {self.reference_dtype}"

    def _verdict(self) -> str:
        if not self.kernel_calls:
            reasons = Counter(row.reason for row in self.report.rows if row.kernel and row.reason)
            why = [reason for reason, _ in reasons.most_common(1)]
            return ": ".join(["NOTHING VERIFIED: no call went through a kernel", *why])
        wrong = [c.name for c in (*self.outputs, *self.gradients) if not c.ok]
        if wrong:
            return f"DIFFERENT: {len(wrong)} tensors; first module that diverges: {self.first_divergence}"
        counts = f"{len(self.outputs)} outputs and {len(self.gradients)} gradients"
        return f"EQUAL: {counts}, {self.kernel_calls} calls through kernels"

    def _listed(self) -> list[Comparison]:
        """Every output, every gradient that differs, and the gradient that came closest to its bound."""
        wrong = [c for c in self.gradients if not c.ok]
        closest = max(self.gradients, key=lambda c: c.error / c.bound if c.bound else 0.0, default=None)
        return [*self.outputs, *(wrong or ([closest] if closest else []))]


def verify(model: nn.Module, batch: Mapping[str, Any], **patch_keywords: Any) -> VerifyResult:
    """Run `batch` through the stock and the patched model, and compare outputs, loss and gradients.

    Three copies of the model run: the reference, stock in float64 (float32 for a half-precision model of over 500 million
    parameters); stock with eager attention in the model's own dtype; and patched in the same dtype. A model whose
    attention is not transformers' own (a registered function, a module of another class) keeps it in all three.
    Dropout is off in all three, because no two implementations draw the same bits. The rule is that of
    `fastbert.numerics.compare`, plus the rounding noise that is typical of eager in this model. `model` itself does not
    run: its mode, gradients and hooks and the random number generators are unchanged.

    Args:
        model: what `fastbert.patch` takes, patched or not, in any mode, dtype and device.
        batch: the keyword arguments of its forward, with tensors on any device. With labels, the model's own loss is
            compared and differentiated; without them, a fixed random projection of the outputs.
        **patch_keywords: passed to `fastbert.patch`. What they leave out is not compared, and a note says so: outputs at
            padded positions with `unpad=True`, logits with `mlm_logits="none"`.

    Returns:
        A `VerifyResult` to print or to use as a bool. If no kernel ran (no GPU), it is false and says so.

    Raises:
        TypeError: `model` is not a torch.nn.Module or `batch` is not a mapping.
        ValueError: FSDP has sharded the model, so that it cannot be copied.
        UnsupportedModelError: the model has nothing to patch.
    """
    _check_model(model)
    if (sharded := sharded_part(model)) is not None:
        raise ValueError(f"model: expected one that is not sharded, got a {type(sharded).__name__}; verify it before sharding")
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch: expected a mapping of the model's arguments, got {type(batch).__name__}")
    parameter = next(model.parameters())
    size = sum(p.numel() for p in model.parameters())
    half = parameter.dtype in (torch.float16, torch.bfloat16)
    reference_dtype = torch.float32 if half and size > _LARGE else torch.float64
    batch = _to_device(batch, parameter.device, None)

    own = _own_attention(model)
    real = _real_positions(batch) if patch_keywords.get("unpad") is True else None
    with torch.random.fork_rng(devices=[parameter.device] if parameter.device.type == "cuda" else []):
        # The reference runs first, because its copy is the largest.
        reference, widened = _reference(_deterministic_copy(model, own), batch, reference_dtype, real)
        copied = _deterministic_copy(model, own)
        eager = _run(copied, batch, real)
        with patched(copied, **patch_keywords):
            result = _run(copied, batch, real)
            after = report(copied)
        no_logits = patch_keywords.get("mlm_logits") == "none" and _leave_out_logits(eager, result)
        outputs = _compare_all(result.outputs, eager.outputs, reference.outputs)
        # A gradient that cancels is a rounding of the loss's own gradient, which is of the loss's size.
        loss_scale = _scale(reference.outputs["loss"]) if "loss" in reference.outputs else 0.0
        gradients = _compare_all(result.gradients, eager.gradients, reference.gradients, loss_scale)
        diverged = None
        if not all(c.ok for c in (*outputs, *gradients)):
            diverged = _first_divergence(copied, batch, patch_keywords, widened) or _last_wrong_gradient(gradients)

    notes = ["dropout was off for the comparison"]
    if own:
        notes.append(f"the model's own attention was left in place ({own}), on both sides")
    if widened:
        notes.append(f"the model makes tensors of other dtypes, which the run in {reference_dtype} widened")
    if eager.projected:
        notes.append("the model returned no loss: gradients are those of a fixed random projection of its outputs")
    if real is not None and not real.all():
        notes.append("outputs at padded positions, which unpad=True leaves out, were not compared")
    if no_logits:
        notes.append("logits, which mlm_logits='none' leaves out, were not compared")
    if not gradients:
        notes.append("no parameter requires a gradient: none was compared")
    return VerifyResult(
        type(model).__name__,
        parameter.dtype,
        parameter.device,
        reference_dtype,
        outputs,
        gradients,
        diverged,
        sum(row.kernel_calls for row in after.rows),
        after,
        tuple(notes),
    )


@dataclass
class _Run:
    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]
    projected: bool


def _own_attention(model: nn.Module) -> str | None:
    """The first attention in `model` that is not transformers' own and that renaming the implementation would not replace."""
    from fastbert.integrations.attention import implementation_reason
    from fastbert.layers.family import DISTILBERT, FAMILIES
    from fastbert.layers.stock import part_of

    attentions = tuple(family["Attention"] for family in FAMILIES)
    for name, module in model.named_modules():
        attends = getattr(module, "self", None) if isinstance(module, attentions) else None
        if isinstance(module, DISTILBERT["Layer"]):
            attends = module.attention
        if attends is not None and part_of(type(attends)).part not in ("SelfAttention", "CrossAttention"):
            return f"{name}.self is a {type(attends).__name__}"
        config = getattr(module, "config", None)
        reason = implementation_reason(getattr(config, "_attn_implementation", None)) if config is not None else None
        if reason is not None:
            return reason
    return None


def _real_positions(batch: Mapping[str, Any]) -> Tensor | None:
    """Where the batch has tokens, bool [B, S], if it says so."""
    mask = batch.get("attention_mask")
    return mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _leave_out_logits(eager: "_Run", result: "_Run") -> bool:
    """Take the logits that only eager has out of its outputs; returns whether there were any."""
    left_out = [name for name in eager.outputs if name in ("logits", "prediction_logits") and name not in result.outputs]
    for name in left_out:
        del eager.outputs[name]
    return bool(left_out)


def _reference(wide: nn.Module, batch: Mapping[str, Any], dtype: torch.dtype, real: Tensor | None) -> tuple["_Run", bool]:
    """The run in `dtype`, and whether operands had to be widened because the forward makes tensors of fixed dtypes."""
    device = next(wide.parameters()).device
    with torch.autocast(device.type, enabled=False):
        wide, batch = wide.to(dtype), _to_device(batch, device, dtype)
        try:
            return _run(wide, batch, real), False
        except RuntimeError:
            wide.zero_grad(set_to_none=True)
            with Widened(dtype):
                return _run(wide, batch, real), True


class Widened(TorchFunctionMode):
    """A mode in which an operation with at least one tensor of `dtype` gets all its floating-point tensors in `dtype`."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        writes = name.startswith("__") or name.endswith("_")  # attributes, and operations in place
        if not writes and any(self._is_wide(x) for x in tree_leaves((args, kwargs))):
            args, kwargs = tree_map(self._widen, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _is_wide(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.dtype == self.dtype

    def _widen(self, x: Any) -> Any:
        narrow = isinstance(x, Tensor) and x.is_floating_point() and x.dtype.itemsize < self.dtype.itemsize
        return x.to(self.dtype) if narrow else x


def _deterministic_copy(model: nn.Module, own: str | None) -> nn.Module:
    """A deterministic stock copy: no dropout, no gradients, and eager attention unless the model has its `own`."""
    copied = unpatch(copy.deepcopy(model))
    for module in copied.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if not own and hasattr(module, "set_attn_implementation"):
            module.set_attn_implementation("eager")  # pyright: ignore[reportCallIssue]  torch declares a tensor or a module
    copied.zero_grad(set_to_none=True)
    return copied


def _run(model: nn.Module, batch: Mapping[str, Any], real: Tensor | None) -> _Run:
    """real: the positions [B, S] that are compared; outputs elsewhere count as 0. None: all."""
    torch.manual_seed(0)  # seeds the forked generators, so that all three runs draw the same numbers
    outputs = {name: _only(real, name, tensor) for name, tensor in _tensors("", _call(model, batch))}
    loss = outputs.get("loss")
    projected = loss is None
    if projected:
        loss = _projection(outputs)
    gradients = {}
    if loss is not None and loss.requires_grad:
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
    return _Run({name: t.detach() for name, t in outputs.items()}, gradients, projected)


def _only(real: Tensor | None, name: str, output: Tensor) -> Tensor:
    # Of the outputs with two dimensions, only question answering's have positions.
    has_positions = output.dim() > 2 or name in ("start_logits", "end_logits")
    if real is None or not has_positions or output.shape[:2] != real.shape or not output.is_floating_point():
        return output
    return output.masked_fill(~real.view(*real.shape, *(1 for _ in output.shape[2:])), 0.0)


def _call(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    # SentenceTransformer and its modules take the batch as one dictionary.
    if type(model).__module__.startswith("sentence_transformers"):
        return model(dict(batch))
    return model(**batch)


def _projection(outputs: Mapping[str, Tensor]) -> Tensor | None:
    """A scalar to which every element of every differentiable output contributes."""
    terms = []
    for tensor in outputs.values():
        if tensor.requires_grad and tensor.numel():
            generator = torch.Generator().manual_seed(tensor.numel())
            weights = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            terms.append((tensor * weights.to(tensor)).sum() / tensor.numel() ** 0.5)
    return torch.stack([term.double() for term in terms]).sum() if terms else None


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in a model's output, with its path as a name."""
    if isinstance(value, Tensor):
        yield name or "output", value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(f"{name}.{key}" if name else str(key), item)
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from _tensors(f"{name}[{index}]" if name else f"[{index}]", item)
    elif hasattr(value, "layers"):  # a key-value cache
        for index, layer in enumerate(value.layers):
            for key in ("keys", "values"):
                if isinstance(getattr(layer, key, None), Tensor):
                    yield f"{name}[{index}].{key}", getattr(layer, key)


def _to_device(batch: Mapping[str, Any], device: torch.device, dtype: torch.dtype | None) -> dict[str, Any]:
    def convert(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype if dtype and value.is_floating_point() else value.dtype)

    return {name: convert(value) for name, value in batch.items()}


def _compare_all(
    result: dict[str, Tensor], eager: dict[str, Tensor], reference: dict[str, Tensor], loss_scale: float = 0.0
) -> tuple[Comparison, ...]:
    """Apply `compare` to every tensor of the three runs; a tensor that only one of them has is a difference.

    Eager may compute a tensor exactly by luck, and one that is zero in exact arithmetic (the gradient of a key's bias) is
    pure noise. So each tensor may also err by twice the relative error that one in twenty of eager's tensors exceeds, plus
    the rounding of a typical tensor. Twice the median would be too little: among a trained BERT's hundred gradients, the
    worst error is 3 to 6 times the median with SDPA, and 2 to 4 times with eager.
    """
    scales = {name: _scale(tensor) for name, tensor in reference.items()}
    typical_scale = statistics.median(scales.values()) if scales else 0.0
    significant = [n for n in eager if n in reference and scales[n] > _NOTHING * typical_scale]
    relative = sorted(_error(eager[n], reference[n]) / scales[n] for n in significant)
    usual_error = relative[int(0.95 * len(relative))] if relative else 0.0
    comparisons = []
    for name in {**eager, **result}:
        if name not in eager or name not in result or name not in reference:
            present = "patched" if name in result else "eager"
            reason = f"only the {present} model has it"
            comparisons.append(Comparison(name, float("inf"), 0.0, 0.0, False, reason))
            continue
        atol = 0.0
        if result[name].is_floating_point():
            rounding = torch.finfo(result[name].dtype).eps
            if result[name].dtype == reference[name].dtype:  # eager is the reference here and appears exact
                rounding *= 32
            atol = 2 * max(usual_error, rounding) * scales[name] + rounding * typical_scale
            if scales[name] <= _NOTHING * typical_scale:  # pure noise, of the size of the terms that cancelled
                atol = rounding * max(loss_scale, *scales.values())
        comparisons.append(compare(name, result[name], eager[name], reference[name], atol=atol))
    return tuple(comparisons)


def _scale(tensor: Tensor) -> float:
    size = largest(tensor)
    return size if math.isfinite(size) else largest(tensor[tensor.isfinite()])


def _error(tensor: Tensor, reference: Tensor) -> float:
    return _scale(tensor.to(reference.dtype) - reference)


def _first_divergence(model: nn.Module, batch: Mapping[str, Any], patch_keywords: dict[str, Any], widened: bool) -> str | None:
    """The first module, in call order, whose output differs.

    Modules inside a layer are compared only if the layer differs. Hooks make the layer run module by module, where the
    difference may not appear.
    """
    coarse = _first_of(model, batch, patch_keywords, widened, inside=False)
    fine = _first_of(model, batch, patch_keywords, widened, inside=True)
    return fine if coarse is None or (fine or "").startswith(f"{coarse}.") else coarse


def _first_of(
    model: nn.Module, batch: Mapping[str, Any], patch_keywords: dict[str, Any], widened: bool, inside: bool
) -> str | None:
    with torch.no_grad():
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            wide = copy.deepcopy(model).double()
            device = next(model.parameters()).device
            with Widened(torch.float64) if widened else nullcontext():
                reference = _module_outputs(wide, _to_device(batch, device, torch.float64), inside)
        eager = _module_outputs(model, batch, inside)
        with patched(model, **patch_keywords):
            result = _module_outputs(model, batch, inside)
    for comparison in _compare_all(result, eager, reference):
        if not comparison.ok:
            return comparison.name
    return None


def _module_outputs(model: nn.Module, batch: Mapping[str, Any], inside: bool) -> dict[str, Tensor]:
    """The output of every module that has children, in the order in which they finish; within layers only if `inside`."""
    from fastbert.layers.family import FAMILIES

    classes = tuple(family["Layer"] for family in FAMILIES)
    layers = () if inside else tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, classes))
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            first = next(iter(_tensors("", output)), None)
            if first is not None:
                seen.setdefault(name, first[1].detach())

        return hook

    # No leaves: a hook on a Linear or a LayerNorm would itself make the call fall back to stock code.
    watched = [m for m in model.named_modules() if next(m[1].children(), None) and not m[0].startswith(layers)]
    handles = [module.register_forward_hook(keep(name)) for name, module in watched]
    try:
        torch.manual_seed(0)
        _call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name or type(model).__name__: tensor for name, tensor in seen.items()}


def _last_wrong_gradient(gradients: tuple[Comparison, ...]) -> str | None:
    """The module nearest to the loss with a wrong gradient, which the backward reaches first."""
    wrong = [c.name for c in gradients if not c.ok]
    return f"{wrong[-1].rpartition('.')[0]} (in the backward)" if wrong else None
