"""Fast classes of the transforms before an MLM decoder: a product, then bias, activation and LayerNorm in one kernel.

BERT's is a module of its own, PredictionHeadTransform, and ELECTRA's is GeneratorPredictions. RoBERTa's is the first half of
LMHead, which also holds the decoder; `transform_of` runs that half alone, for heads that compute their loss from some rows.
"""

from typing import Any

from torch import Tensor, nn

from fastbert import ops
from fastbert.dispatch import FastModule, falls_back, falls_back_after, run, tensor_reason
from fastbert.layers import stock
from fastbert.layers.family import ELECTRA, LIKE_ROBERTA
from fastbert.layers.parts import (
    UNKNOWN_ARGUMENTS,
    activation_reason,
    bind_arguments,
    kernel_activation,
    layernorm_dtype,
    layernorm_reason,
    linear_without_bias,
)

# Per part: the attribute of its activation, and that of its LayerNorm.
_ATTRIBUTES = {
    "PredictionHeadTransform": ("transform_act_fn", "LayerNorm"),
    "GeneratorPredictions": ("activation", "LayerNorm"),
    "LMHead": (None, "layer_norm"),  # its forward calls the function gelu of its family's module
}


def unsupported(module: nn.Module) -> str | None:
    """Why `module` can never use the kernel as it stands, or None."""
    return _unsupported(*_parts(module, stock.part_of(type(module))))


def _unsupported(activation: object, norm: nn.Module) -> str | None:
    return layernorm_reason(norm) or activation_reason(activation)


def _parts(module: nn.Module, part: stock.Part) -> tuple[object, nn.Module]:
    """The activation and the LayerNorm of a transform."""
    activation, norm = _ATTRIBUTES[part.part]
    return getattr(part.family.module, "gelu", None) if activation is None else getattr(module, activation), getattr(
        module, norm
    )


def transformed(module: nn.Module, dense: nn.Module, activation: object, norm: nn.Module, hidden_states: Tensor) -> Tensor:
    """norm(activation(dense(hidden_states))) [..., H], on the kernel if it takes the call; `module` counts it."""
    if _unsupported(activation, norm) or tensor_reason(hidden_states, norm.weight, norm.bias):
        return norm(activation(dense(hidden_states)))
    x, x_bias = linear_without_bias(dense, hidden_states)
    if falls_back_after(module, x):
        return norm(activation(x))
    return run(
        module,
        ops.gelu_layernorm,
        x,
        norm.weight,
        norm.bias,
        x_bias=x_bias,
        activation=kernel_activation(activation),
        eps=norm.eps,
        out_dtype=layernorm_dtype(x.dtype, x.device.type),
    )


def distil_parts(module: nn.Module) -> tuple[nn.Module, object, nn.Module]:
    """The product, activation and LayerNorm of DistilBERT's MLM head, which are parts of DistilBertForMaskedLM."""
    return module.vocab_transform, module.activation, module.vocab_layer_norm


class _Transform(FastModule):
    def _reason(self, hidden_states: Tensor) -> str | None:
        activation, norm = _parts(self, self.PART)
        reason = stock.untested(self.STOCK) or _unsupported(activation, norm)
        return reason or tensor_reason(hidden_states, norm.weight, norm.bias)

    def _run(self, hidden_states: Tensor) -> Tensor:
        return transformed(self, self.dense, *_parts(self, self.PART), hidden_states)


class HeadTransform(_Transform):
    """The transform of an MLM head on the gelu_layernorm kernel."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        inputs = bind_arguments((self.ARGUMENT,), args, kwargs)
        if falls_back(self, UNKNOWN_ARGUMENTS if inputs is None else self._reason(*inputs)):
            return super().forward(*args, **kwargs)
        return self._run(*inputs)


class LMHead(_Transform):
    """RoBERTa's MLM head: its transform on the gelu_layernorm kernel, and its decoder."""

    def forward(self, features: Tensor, **kwargs: Any) -> Tensor:  # stock ignores other keywords
        if falls_back(self, self._reason(features)):
            return super().forward(features, **kwargs)
        return self.decoder(self._run(features))

    def transform(self, hidden_states: Tensor) -> Tensor:
        """The rows before the decoder: [..., H]."""
        if falls_back(self, self._reason(hidden_states)):
            activation, norm = _parts(self, self.PART)
            return norm(activation(self.dense(hidden_states)))
        return self._run(hidden_states)


def transform_of(head: nn.Module, hidden_states: Tensor) -> Tensor:
    """The rows before the decoder in an LMHead, stock or fast: [..., H]."""
    if isinstance(head, LMHead):
        return head.transform(hidden_states)
    activation, norm = _parts(head, stock.part_of(type(head)))
    return norm(activation(head.dense(hidden_states)))


FAST = {
    **stock.fast_classes("PredictionHeadTransform", HeadTransform, __name__, ARGUMENT="hidden_states"),
    **stock.fast_classes(
        "GeneratorPredictions", HeadTransform, __name__, families=[ELECTRA], ARGUMENT="generator_hidden_states"
    ),
    **stock.fast_classes("LMHead", LMHead, __name__, families=LIKE_ROBERTA),
}
globals().update(FAST)
