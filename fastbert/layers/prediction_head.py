"""BertPredictionHeadTransform: a product, then bias, activation and LayerNorm in one kernel."""

from typing import Any

from torch import Tensor, nn

from fastbert import ops
from fastbert.dispatch import Replicated, refused, run, tensor_reason
from fastbert.layers import stock
from fastbert.layers.parts import (
    activation_reason,
    kernel_activation,
    layernorm_dtype,
    layernorm_reason,
    more_arguments,
    product,
)


def unsupported(module: nn.Module) -> str | None:
    """Why `module` can never use the kernel as it stands, or None."""
    return layernorm_reason(module.LayerNorm) or activation_reason(module.transform_act_fn)


class BertPredictionHeadTransform(Replicated, stock.BertPredictionHeadTransform):
    """BertPredictionHeadTransform on the gelu_layernorm kernel."""

    @stock.with_signature_of(stock.BertPredictionHeadTransform)
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        norm = self.LayerNorm
        reason = more_arguments(args, kwargs) or stock.untested("BertPredictionHeadTransform") or unsupported(self)
        if refused(self, reason or tensor_reason(hidden_states, norm.weight, norm.bias)):
            return super().forward(hidden_states, *args, **kwargs)
        x, x_bias = product(self.dense, hidden_states)
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
