"""Triton kernels for Hugging Face BERT: `fastbert.patch(model)`, and the model computes the same, faster."""

import fastbert.startup  # noqa: F401
from fastbert.errors import UnsupportedModelError
from fastbert.patch import patch, patched, unpatch
from fastbert.report import Report, report
from fastbert.verify import VerifyResult, verify

__version__ = "0.1.0"
__all__ = [
    "Report",
    "UnsupportedModelError",
    "VerifyResult",
    "patch",
    "patched",
    "report",
    "unpatch",
    "verify",
]
