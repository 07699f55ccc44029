"""Fast class of BertPredictionHeadTransform: a product, then bias, activation and LayerNorm in one kernel."""

from typing import Any

from torch import Tensor, nn

from fastbert import ops
from fastbert.dispatch import FastModule, falls_back, run, tensor_reason
from fastbert.layers import stock
from fastbert.layers.parts import (
    UNKNOWN_ARGUMENTS,
    activation_reason,
    bind_arguments,
    kernel_activation,
    layernorm_dtype,
    layernorm_reason,
    linear_without_bias,
)


def unsupported(module: nn.Module) -> str | None:
    """Why `module` can never use the kernel as it stands, or None."""
    return layernorm_reason(module.LayerNorm) or activation_reason(module.transform_act_fn)


class BertPredictionHeadTransform(FastModule, stock.BertPredictionHeadTransform):
    """BertPredictionHeadTransform on the gelu_layernorm kernel."""

    @stock.fast_forward_of(stock.BertPredictionHeadTransform)
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        inputs = bind_arguments(("hidden_states",), args, kwargs)
        if falls_back(self, UNKNOWN_ARGUMENTS if inputs is None else self._reason(*inputs)):
            return super().forward(*args, **kwargs)
        norm = self.LayerNorm
        x, x_bias = linear_without_bias(self.dense, *inputs)
        return run(
            self,
            ops.gelu_layernorm,
            x,
            norm.weight,
            norm.bias,
            x_bias=x_bias,
            activation=kernel_activation(self.transform_act_fn),
            eps=norm.eps,
            out_dtype=layernorm_dtype(x.dtype, x.device.type),
        )

    def _reason(self, hidden_states: Tensor) -> str | None:
        reason = stock.untested("BertPredictionHeadTransform") or unsupported(self)
        return reason or tensor_reason(hidden_states, self.LayerNorm.weight, self.LayerNorm.bias)
