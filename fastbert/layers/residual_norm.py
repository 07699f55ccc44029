"""Fast classes of BertSelfOutput and BertOutput: a product, then bias, dropout, residual and LayerNorm in one kernel."""

from typing import Any

import torch
from torch import Tensor, nn

from fastbert import ops
from fastbert.dispatch import FastModule, falls_back, falls_back_after, run, tensor_reason
from fastbert.layers import stock
from fastbert.layers.parts import (
    UNKNOWN_ARGUMENTS,
    bind_arguments,
    dropout_reason,
    layernorm_dtype,
    layernorm_reason,
    linear_without_bias,
)


def unsupported(module: nn.Module) -> str | None:
    """Why `module` can never use the kernel as it stands, or None."""
    return layernorm_reason(module.LayerNorm) or dropout_reason(module.dropout)


class ResidualNorm(FastModule):
    """The output of attention or of a feed-forward on the dropout_add_layernorm kernel."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        inputs = bind_arguments(("hidden_states", "input_tensor"), args, kwargs)
        if falls_back(self, UNKNOWN_ARGUMENTS if inputs is None else self._reason(*inputs)):
            return super().forward(*args, **kwargs)
        hidden_states, input_tensor = inputs
        x, x_bias = linear_without_bias(self.dense, hidden_states)
        if falls_back_after(self, x):
            return self.LayerNorm(self.dropout(x) + input_tensor)
        dtype = torch.promote_types(x.dtype, input_tensor.dtype)
        return run(
            self,
            ops.dropout_add_layernorm,
            x,
            input_tensor,
            self.LayerNorm.weight,
            self.LayerNorm.bias,
            x_bias=x_bias,
            eps=self.LayerNorm.eps,
            p=self.dropout.p if self.dropout.training else 0.0,
            out_dtype=layernorm_dtype(dtype, x.device.type),
        )

    def _reason(self, hidden_states: Tensor, input_tensor: Tensor) -> str | None:
        reason = stock.untested(self.STOCK) or unsupported(self)
        if reason is None and hidden_states.shape[:-1] != input_tensor.shape[:-1]:
            reason = "the residual has a different shape"
        return reason or tensor_reason(hidden_states, input_tensor, self.LayerNorm.weight, self.LayerNorm.bias)


FAST = {
    name: cls for part in ("SelfOutput", "Output") for name, cls in stock.fast_classes(part, ResidualNorm, __name__).items()
}
globals().update(FAST)
