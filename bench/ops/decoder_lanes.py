"""The lanes of linear_cross_entropy: BERT's decoder over labelled rows and the mean of its loss, bias included."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.core.floors import vocabulary
from bench.core.peers import require
from bench.ops.grid import Case, Function, Inputs, Lane, Op
from fastbert.kernels import reference
from fastbert.kernels.linear_cross_entropy import linear_cross_entropy


def _make(case: Case, generator: torch.Generator, device: str) -> Inputs:
    """A row a token, each with a label: a head that skips the other rows has left them out before."""
    n_rows, n_cols = case.batch * case.seqlen, vocabulary(case.hidden)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    leaves = {
        "hidden": normal(n_rows, case.hidden),
        "weight": normal(n_cols, case.hidden) / case.hidden**0.5,
        "bias": normal(n_cols),
    }
    labels = torch.randint(0, n_cols, (n_rows,), generator=generator, device=device)
    return Inputs(leaves, {"labels": labels}, torch.ones((), device=device))


def _eager(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    """As BertForMaskedLM computes it."""
    return F.cross_entropy(F.linear(hidden, weight, bias), labels)


def _compiled(case: Case) -> Function:
    backend = "inductor" if torch.cuda.is_available() else "aot_eager"
    call = torch.compile(_eager, dynamic=False, backend=backend)
    return lambda inputs, p: call(**inputs.leaves, **inputs.context)


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


OP = Op(
    _make,
    lambda inputs, p: reference.linear_cross_entropy(**inputs.leaves, **inputs.context),
    {
        "eager": Lane(lambda case: lambda inputs, p: _eager(**inputs.leaves, **inputs.context)),
        "compile": Lane(_compiled),
        "liger": Lane(_liger),
        "fastbert": Lane(lambda case: lambda inputs, p: linear_cross_entropy(**inputs.leaves, **inputs.context)),
    },
)
