"""Fast classes of BertIntermediate and of ELECTRA's discriminator: a product, then bias and activation in one kernel."""

from typing import Any

from torch import Tensor, nn

from fastbert import ops
from fastbert.dispatch import FastModule, falls_back, falls_back_after, run, tensor_reason
from fastbert.layers import stock
from fastbert.layers.family import ELECTRA
from fastbert.layers.parts import UNKNOWN_ARGUMENTS, activation_reason, bind_arguments, kernel_activation, linear_without_bias


def unsupported(module: nn.Module) -> str | None:
    """Why `module` can never use the kernel as it stands, or None."""
    return activation_reason(module.intermediate_act_fn)


class Intermediate(FastModule):
    """The intermediate layer of a feed-forward on the bias_gelu kernel."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        inputs = bind_arguments(("hidden_states",), args, kwargs)
        if falls_back(self, UNKNOWN_ARGUMENTS if inputs is None else self._reason(*inputs)):
            return super().forward(*args, **kwargs)
        x, bias = linear_without_bias(self.dense, *inputs)
        if falls_back_after(self, x):
            return self.intermediate_act_fn(x)
        return run(self, ops.bias_gelu, x, bias, activation=kernel_activation(self.intermediate_act_fn))

    def _reason(self, hidden_states: Tensor) -> str | None:
        return stock.untested(self.STOCK) or unsupported(self) or tensor_reason(hidden_states)


class DiscriminatorPredictions(FastModule):
    """ELECTRA's discriminator, its first product and activation on the bias_gelu kernel."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        inputs = bind_arguments(("discriminator_hidden_states",), args, kwargs)
        if falls_back(self, UNKNOWN_ARGUMENTS if inputs is None else self._reason(*inputs)):
            return super().forward(*args, **kwargs)
        x, bias = linear_without_bias(self.dense, *inputs)
        if falls_back_after(self, x):
            return self.dense_prediction(self.activation(x)).squeeze(-1)
        hidden_states = run(self, ops.bias_gelu, x, bias, activation=kernel_activation(self.activation))
        return self.dense_prediction(hidden_states).squeeze(-1)

    def _reason(self, hidden_states: Tensor) -> str | None:
        return stock.untested(self.STOCK) or discriminator_unsupported(self) or tensor_reason(hidden_states)


def discriminator_unsupported(module: nn.Module) -> str | None:
    """Why ELECTRA's discriminator `module` can never use the kernel as it stands, or None."""
    return activation_reason(module.activation)


FAST = stock.fast_classes("Intermediate", Intermediate, __name__)
FAST |= stock.fast_classes("DiscriminatorPredictions", DiscriminatorPredictions, __name__, families=[ELECTRA])
globals().update(FAST)
