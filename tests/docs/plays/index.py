"""docs/index.md: patch, report, verify, unpatch; one kernel left out."""

from pathlib import Path

from fastbert.testing.models import counting
from tests.docs.play import Play
from tests.models.tiny import MLM, make, make_batch


def play(folder: Path) -> Play:
    names = {"model": make(MLM), "batch": make_batch(MLM)}
    stock = type(names["model"])
    with counting() as launched:
        printed = yield names
    assert launched["attention_fwd_kernel"] and "linear_cross_entropy" in printed
    assert type(names["model"]) is stock and names["result"].ok
    with counting() as launched:
        yield names
    assert launched["attention_fwd_kernel"] and not launched["bias_gelu_fwd_kernel"]
    assert type(names["model"]) is stock
