"""One table of calls, at least one of every op: what test_gpu_calls.py repeats, captures and delays for all of them."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastbert.kernels.adamw import adamw
from fastbert.kernels.adamw.tables import Hyperparameters, Parameter, Tables
from fastbert.kernels.encoder_layer import Settings, encoder_layer
from fastbert.kernels.feed_forward import feed_forward
from fastbert.kernels.feed_forward.products import decided
from fastbert.kernels.linear_cross_entropy import linear_cross_entropy

from . import encoder_layer as layer_inputs
from . import feed_forward as feed_forward_inputs
from . import linear_cross_entropy as cross_entropy
from .rows import DEVICE, run
from .spec import Draw, OpSpec
from .specs import SPECS

Tensors = dict[str, Tensor]
Step = Callable[[Tensors], Tensors]
Make = Callable[[bool, torch.dtype, int | None], tuple[Tensors, Step]]


@dataclass(frozen=True)
class Call:
    """`make(small, dtype, width)`: inputs by name, and a step of them: outputs and gradients by name, inputs left alone.

    All tensors that a step reads are among the inputs, the seed of dropout too: without it, one is drawn. `width` is that
    of the configurations' tables: a row's, attention's head size, the vocabulary's; None where it does not matter.
    """

    op: str
    variant: str
    make: Make

    def __str__(self) -> str:
        return f"{self.op} {self.variant}".strip()


def _present(results: dict[str, Tensor | None]) -> Tensors:
    return {name: tensor for name, tensor in results.items() if tensor is not None}


def _of(spec: OpSpec, form: str) -> Make:
    def make(small: bool, dtype: torch.dtype, width: int | None = None) -> tuple[Tensors, Step]:
        size = spec.small if small else spec.large
        if width:
            size = replace(size, **{spec.width: width})
        given = spec.inputs(size, Draw(DEVICE), dtype, **spec.forms[form])
        return given.tensors(), lambda tensors: spec.run(given.with_tensors(tensors))

    return make


def _encoder_layer(variant: str) -> Make:
    """`width` is the feed-forward's."""

    def make(small: bool, dtype: torch.dtype, width: int | None = None) -> tuple[Tensors, Step]:
        batch, length, heads, hidden = (2, 5, 3, 24) if small else (8, 512, 12, 768)
        shape = (batch, length, hidden) if variant != "packed, dropped" else (batch * length, hidden)
        inputs = layer_inputs.make_inputs(shape, width or (40 if small else 3072), dtype)
        names = [name for name, x in inputs.items() if x is not None]
        inputs = {name: inputs[name] for name in names} | {"dy": torch.randn(shape).to(DEVICE, dtype)}
        options: dict[str, object] = {"queries": None, "settings": Settings(heads, causal=variant == "causal")}
        if "dropped" in variant:
            inputs["seed"] = layer_inputs.seeds()
            options["settings"] = Settings(heads, attention_p=0.1, attention_output_p=0.1, output_p=0.1)
        if variant == "padded, dropped":
            lengths = torch.randint(1, length + 1, (batch, 1), device=DEVICE)
            inputs["key_mask"] = torch.arange(length, device=DEVICE) < lengths
        elif variant == "packed, dropped":
            inputs["cu_seqlens"] = torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=DEVICE)
            options["max_seqlen"] = length

        def step(given: Tensors) -> Tensors:
            tensors = {name: x for name, x in given.items() if name not in (*names, "dy")}
            call = layer_inputs.flat(encoder_layer)
            return _present(run(call, {name: given[name] for name in names}, given["dy"], **tensors, **options))

        return inputs, step

    return make


def _feed_forward(small: bool, dtype: torch.dtype, width: int | None = None) -> tuple[Tensors, Step]:
    """With epilogues where the dtype allows it: sizes are filled by whole tiles."""
    rows, hidden, inner = (5, 128 if width else 32, 64) if small else (4099, 768, 3072)
    if width:
        inner = -(-width // 128) * 128
    inputs = feed_forward_inputs.make_inputs(rows, hidden, inner, hidden, dtype)
    names = tuple(inputs)
    inputs["dy"] = torch.randn(rows, hidden, dtype=torch.float64).to(DEVICE, dtype)

    def step(given: Tensors) -> Tensors:
        with decided(True, True):
            return _present(run(feed_forward, {name: given[name] for name in names}, given["dy"]))

    return inputs, step


def _linear_cross_entropy(variant: str) -> Make:
    def make(small: bool, dtype: torch.dtype, width: int | None = None) -> tuple[Tensors, Step]:
        n_rows, n_cols, hidden = (5, width or 11, 24) if small else (1500, width or 30522, 128)
        inputs, labels = cross_entropy.make_inputs(n_rows, n_cols, hidden, dtype)
        rows = -(-n_rows // 3) if variant == "formed" else None
        options = {"reduction": "none"} if variant == "none" else {}

        def step(given: Tensors) -> Tensors:
            tensors = {name: given[name] for name in cross_entropy.NAMES}
            with cross_entropy.chunks_of(rows):
                return _present(cross_entropy.run(linear_cross_entropy, tensors, given["labels"], **options))

        return inputs | {"labels": labels}, step

    return make


def _adamw(amsgrad: bool) -> Make:
    def make(small: bool, dtype: torch.dtype, width: int | None = None) -> tuple[Tensors, Step]:
        shape = (37,) if small else (4099, 769)
        names = ("param", "grad", "exp_avg", *(("max_exp_avg_sq",) if amsgrad else ()))
        inputs = {name: torch.randn(shape).to(DEVICE, dtype) for name in names}
        inputs |= {"exp_avg_sq": torch.rand(shape).to(DEVICE, dtype), "step": torch.tensor(3.0, device=DEVICE)}

        def step(given: Tensors) -> Tensors:
            state = {name: x.clone() for name, x in given.items()}
            tables = Tables(captured=DEVICE.type == "cuda" and torch.cuda.is_current_stream_capturing())
            adamw([Parameter(**state)], [Hyperparameters()], tables=tables)
            return state

        return inputs, step

    return make


CALLS = (
    *(Call(spec.name, form, _of(spec, form)) for spec in SPECS.values() for form in spec.forms),
    Call("feed_forward", "", _feed_forward),
    *(Call("encoder_layer", variant, _encoder_layer(variant)) for variant in ("padded, dropped", "causal", "packed, dropped")),
    *(Call("linear_cross_entropy", way, _linear_cross_entropy(way)) for way in (*cross_entropy.WAYS, "none")),
    Call("adamw", "", _adamw(False)),
    Call("adamw", "amsgrad", _adamw(True)),
)
