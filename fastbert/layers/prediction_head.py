"""BertPredictionHeadTransform: a product, then bias, activation and LayerNorm in one kernel."""

from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertPredictionHeadTransform

from fastbert import ops
from fastbert.dispatch import refused, run, tensor_reason
from fastbert.layers.parts import (
    activation_reason,
    kernel_activation,
    layernorm_dtype,
    layernorm_reason,
    product,
)


def unsupported(module: nn.Module) -> str | None:
    """Why `module` can never use the kernel as it stands, or None."""
    return layernorm_reason(module.LayerNorm) or activation_reason(module.transform_act_fn)


class FastBertPredictionHeadTransform(BertPredictionHeadTransform):
    """BertPredictionHeadTransform on the gelu_layernorm kernel."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        norm = self.LayerNorm
        if refused(self, unsupported(self) or tensor_reason(hidden_states, norm.weight, norm.bias)):
            return super().forward(hidden_states)
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
