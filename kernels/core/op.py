"""An op from one description: the eager function, the custom ops for torch.compile, their fakes and the autograd rule.

An op's arguments are the fields of a NamedTuple, and so is what its backward reads; each list is written once:

    class Inputs(NamedTuple):                           class Saved(NamedTuple):
        x: Tensor                                           x: Tensor
        bias: Tensor | None                                 bias: Tensor | None
        activation: str                                     activation: str

    forward(inputs: Inputs) -> outputs                  backward(dy: Tensor, saved: Saved, ...) -> gradients

One autograd rule has two forms. In eager mode `forward` and `backward` (the launchers) run inside an autograd.Function, because
a custom op costs tens of microseconds per call. While torch.compile traces, the custom ops fastbert::<name> and
fastbert::<name>_backward replace them and take those fields in their order. torch.library.triton_op would let a compiler see
the kernels, but fails opcheck's fake-tensor test under Triton's interpreter.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor

from .autograd import check_unbatched, first_order_only, links
from .collectives import waited

TENSORS = (Tensor, Tensor | None)
# The package that holds this copy of the kernels: "fastbert", or the unique name under which a build folder is loaded
# (fastbert/hub). Both may be in one process, where torch.library takes a name once.
NAMESPACE = re.sub(r"\W", "_", __name__.partition(".kernels.")[0])
# The function that launches, and the function that allocates what it returns.
Launcher = tuple[Callable[..., Any], Callable[..., Any]]


def define_op(
    name: str,
    forward: Launcher,
    backward: Launcher | None = None,
    save: Callable[..., Any] | None = None,
    gradients: Callable[..., dict[str, Tensor]] | None = None,
    eager_backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """The differentiable function of `forward`'s arguments, eager or as a custom op while torch.compile traces.

    Args:
        name: of the custom op.
        forward: the launcher, whose annotations become the op's, and the allocation of its outputs, which is all that tracing
            needs. Of a tuple of outputs only the first has a gradient.
        backward: the same for the backward, with any annotated arguments; None: `forward` again.
        save: (*forward's arguments, *outputs) -> the NamedTuple that the backward reads. Without it the op has no gradient.
        gradients: (backward, dy, saved, needs) -> gradients by field name of `forward`'s first argument, a NamedTuple. `needs`
            has a bool per field; gradients that nobody asked for are ignored, the others are cast to their input's dtype.
        eager_backward: the backward launcher in eager mode, where gradients may be views of one buffer.

    A second derivative raises RuntimeError: the backward kernels have none.
    """
    launch, _ = forward
    taken = _Arguments(get_type_hints(launch))
    op = _custom_op(name, *forward)
    if save is None:
        return lambda *arguments: op(*flat(arguments)) if torch.compiler.is_compiling() else launch(*arguments)
    backward_op = op if backward is None else _custom_op(f"{name}_backward", *backward)
    launch_backward = eager_backward or (backward or forward)[0]
    inputs_type, saved_type = taken.types[0], _Arguments({"saved": get_type_hints(save)["return"]})
    n_inputs = len(inputs_type._fields)
    is_tensor = [hint in TENSORS for hint in saved_type.fields.values()]

    def keep(ctx: Any, values: Sequence[Any], output: Any) -> list[Tensor | None]:
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        saved = flat([save(*taken.of(values), *outputs)])
        tensors = [value for value, tensor in zip(saved, is_tensor, strict=True) if tensor]
        ctx.save_for_backward(*tensors)
        ctx.settings = [value for value, tensor in zip(saved, is_tensor, strict=True) if not tensor]
        ctx.dtypes = [value.dtype if isinstance(value, Tensor) else None for value in values[:n_inputs]]
        ctx.n_others = len(values) - n_inputs
        return tensors

    def derive(ctx: Any, backward: Callable[..., Any], tensors: Sequence[Tensor | None], dy: Tensor | None) -> tuple[Any, ...]:
        needs = inputs_type(*ctx.needs_input_grad[:n_inputs])
        others = (None,) * ctx.n_others
        if dy is None or not any(needs):
            return (None,) * n_inputs + others
        left, right = iter(tensors), iter(ctx.settings)
        [saved] = saved_type.of([next(left if tensor else right) for tensor in is_tensor])
        found = gradients(backward, dy, saved, needs)
        fields = zip(inputs_type._fields, needs, ctx.dtypes, strict=True)
        return *(found[field].to(dtype) if needed else None for field, needed, dtype in fields), *others

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *values: Any) -> Any:
            ready = waited(values)
            output = launch(*taken.of(ready))
            tensors = keep(ctx, ready, output)
            ctx.links = links(values, tensors)
            ctx.strides = [None if x is None else x.stride() for x in tensors]
            return output

        @staticmethod
        def backward(ctx: Any, *upstream: Any) -> Any:
            check_unbatched(upstream)
            sources = ctx.saved_tensors  # once: checkpointing allows a single read
            with torch.no_grad():
                found = derive(ctx, launch_backward, with_strides(sources, ctx.strides), waited(upstream)[0])
            return first_order_only(found, (*upstream, *sources, *ctx.links)) if torch.is_grad_enabled() else found

    def keep_compiled(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        keep(ctx, inputs, output)

    def derive_compiled(ctx: Any, *upstream: Any) -> Any:
        return derive(ctx, lambda *arguments: backward_op(*flat(arguments)), ctx.saved_tensors, upstream[0])

    op.register_autograd(derive_compiled, setup_context=keep_compiled)

    def call(*arguments: Any) -> Any:
        values = flat(arguments)
        return op(*values) if torch.compiler.is_compiling() else Eager.apply(*values)

    return call


def with_strides(tensors: Sequence[Tensor | None], strides: Sequence[tuple[int, ...] | None]) -> list[Tensor | None]:
    """The tensors with these strides, copied if necessary: hooks on saved tensors may return them with others."""
    return [
        x if x is None or x.stride() == stride else x.new_empty_strided(x.shape, stride).copy_(x)
        for x, stride in zip(tensors, strides, strict=True)
    ]


def _custom_op(name: str, launch: Callable[..., Any], allocate: Callable[..., Any]) -> Any:
    """`launch` as the custom op <namespace>::<name>. NamedTuples among its arguments are flattened into their fields."""
    hints = get_type_hints(launch)
    taken = _Arguments(hints)

    def launched(*values: Any) -> Any:
        return launch(*taken.of(values))

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(field, kind, annotation=hint) for field, hint in taken.fields.items()]
    launched.__signature__ = inspect.Signature(parameters, return_annotation=hints["return"])
    op = torch.library.custom_op(f"{NAMESPACE}::{name}", launched, mutates_args=())
    op.register_fake(lambda *values: allocate(*taken.of(values)))
    return op


class _Arguments:
    """Builds arguments of these types from a flat list of values, one per entry of `fields`. NamedTuples are flattened, also
    inside one another."""

    def __init__(self, hints: dict[str, Any]) -> None:
        hints = {name: hint for name, hint in hints.items() if name != "return"}
        self.types = list(hints.values())
        self.fields: dict[str, Any] = {}
        self._inner: list[_Arguments | None] = []
        for name, hint in hints.items():
            inner = _Arguments(get_type_hints(hint)) if _is_many(hint) else None
            self._inner.append(inner)
            self.fields |= {name: hint} if inner is None else inner.fields

    def of(self, values: Sequence[Any]) -> list[Any]:
        found, at = [], 0
        for hint, inner in zip(self.types, self._inner, strict=True):
            size = 1 if inner is None else len(inner.fields)
            found.append(values[at] if inner is None else hint(*inner.of(values[at : at + size])))
            at += size
        return found


def _is_many(hint: Any) -> bool:
    return hasattr(hint, "_fields")


def flat(arguments: Iterable[Any]) -> list[Any]:
    """The arguments with each NamedTuple replaced by its fields."""
    values: list[Any] = []
    for argument in arguments:
        values += flat(argument) if isinstance(argument, tuple) else (argument,)
    return values
