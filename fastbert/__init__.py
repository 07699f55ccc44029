"""Triton kernels for Hugging Face BERT. After `fastbert.patch(model)` the model computes the same results faster."""

import fastbert.startup  # noqa: F401
from fastbert.errors import UnsupportedModelError
from fastbert.graphed import graphed, warmup
from fastbert.graphs.training import graphed_step
from fastbert.groups import param_groups
from fastbert.integrations.trainer import trainer_optimizer
from fastbert.lengths import LengthsCollator, lengths
from fastbert.optim import AdamW
from fastbert.patch import patch, patched, unpatch
from fastbert.report import Report, report
from fastbert.verify import VerifyResult, verify
from fastbert.windows import Windows

__version__ = "0.2.0"
__all__ = [
    "AdamW",
    "LengthsCollator",
    "Report",
    "UnsupportedModelError",
    "VerifyResult",
    "Windows",
    "graphed",
    "graphed_step",
    "lengths",
    "param_groups",
    "patch",
    "patched",
    "report",
    "trainer_optimizer",
    "unpatch",
    "verify",
    "warmup",
]
