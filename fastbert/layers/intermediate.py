"""BertIntermediate: a product, then bias and activation in one kernel."""

from typing import Any

from torch import Tensor, nn

from fastbert import ops
from fastbert.dispatch import Replicated, refused, run, tensor_reason
from fastbert.layers import stock
from fastbert.layers.parts import activation_reason, kernel_activation, more_arguments, product


def unsupported(module: nn.Module) -> str | None:
    """Why `module` can never use the kernel as it stands, or None."""
    return activation_reason(module.intermediate_act_fn)


class BertIntermediate(Replicated, stock.BertIntermediate):
    """BertIntermediate on the bias_gelu kernel."""

    @stock.with_signature_of(stock.BertIntermediate)
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        reason = more_arguments(args, kwargs) or stock.untested("BertIntermediate")
        if refused(self, reason or unsupported(self) or tensor_reason(hidden_states)):
            return super().forward(hidden_states, *args, **kwargs)
        x, bias = product(self.dense, hidden_states)
        return run(self, ops.bias_gelu, x, bias, activation=kernel_activation(self.intermediate_act_fn))
