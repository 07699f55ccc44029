"""BertIntermediate: a product, then bias and activation in one kernel."""

from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertIntermediate

from fastbert import ops
from fastbert.dispatch import refused, run, tensor_reason
from fastbert.layers.parts import activation_reason, kernel_activation, product


def unsupported(module: nn.Module) -> str | None:
    """Why `module` can never use the kernel as it stands, or None."""
    return activation_reason(module.intermediate_act_fn)


class FastBertIntermediate(BertIntermediate):
    """BertIntermediate on the bias_gelu kernel."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if refused(self, unsupported(self) or tensor_reason(hidden_states)):
            return super().forward(hidden_states)
        x, bias = product(self.dense, hidden_states)
        return run(self, ops.bias_gelu, x, bias, activation=kernel_activation(self.intermediate_act_fn))
