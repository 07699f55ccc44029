"""Fast class of BertIntermediate: a product, then bias and activation in one kernel."""

from typing import Any

from torch import Tensor, nn

from fastbert import ops
from fastbert.dispatch import FastModule, falls_back, run, tensor_reason
from fastbert.layers import stock
from fastbert.layers.parts import UNKNOWN_ARGUMENTS, activation_reason, bind_arguments, kernel_activation, linear_without_bias


def unsupported(module: nn.Module) -> str | None:
    """Why `module` can never use the kernel as it stands, or None."""
    return activation_reason(module.intermediate_act_fn)


class BertIntermediate(FastModule, stock.BertIntermediate):
    """BertIntermediate on the bias_gelu kernel."""

    @stock.fast_forward_of(stock.BertIntermediate)
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        inputs = bind_arguments(("hidden_states",), args, kwargs)
        if falls_back(self, UNKNOWN_ARGUMENTS if inputs is None else self._reason(*inputs)):
            return super().forward(*args, **kwargs)
        x, bias = linear_without_bias(self.dense, *inputs)
        return run(self, ops.bias_gelu, x, bias, activation=kernel_activation(self.intermediate_act_fn))

    def _reason(self, hidden_states: Tensor) -> str | None:
        return stock.untested("BertIntermediate") or unsupported(self) or tensor_reason(hidden_states)
