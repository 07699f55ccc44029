"""README.md: the four lines."""

from pathlib import Path

import torch

from fastbert.testing.models import counting
from tests.docs.play import Play
from tests.models.tiny import MLM, make, make_batch


def play(folder: Path) -> Play:
    model, batch = make(MLM), make_batch(MLM)
    stock = [type(module) for module in model.modules()]
    before = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    with counting() as launched:
        printed = yield {"model": model, "batch": batch}
    assert launched, "verify ran the kernels"
    assert printed.startswith("fastbert on BertForMaskedLM: ")
    assert [type(module) for module in model.modules()] == stock, "unpatched"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
