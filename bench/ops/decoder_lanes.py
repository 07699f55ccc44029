"""Peers of linear_cross_entropy: Liger's fused kernel."""

from torch import Tensor

from bench.core.peers import require
from bench.ops.grid import Case, Function, Inputs, Lane


def _liger(case: Case) -> Function:
    require("liger")
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def call(inputs: Inputs, p: float) -> Tensor:
        leaves = inputs.leaves
        loss = LigerFusedLinearCrossEntropyFunction.apply(
            leaves["hidden"], leaves["weight"], inputs.context["labels"], leaves["bias"]
        )[0]
        return loss.to(inputs.dy.dtype)

    return call


PEERS = {"liger": Lane(_liger)}
