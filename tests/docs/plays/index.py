"""docs/index.md: patch, report, verify, unpatch; one kernel left out; the report of the trained BERT as printed there."""

from pathlib import Path

import torch

from fastbert.cli.source import Source
from fastbert.testing.models import counting
from fastbert.testing.rows import DEVICE
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
    trained, labelled = Source.open(None, None).load("mlm", torch.float32, DEVICE, batch_size=2, max_length=24)
    yield names | {"trained": trained, "labelled": labelled}
