"""docs/padding.md: given lengths and budgets pack, a collator counts, and unused logits are not computed."""

from pathlib import Path

import fastbert
from fastbert.testing.models import counting
from tests.docs.play import Play
from tests.models.tiny import CLASSIFICATION, MLM, make, make_batch


def play(folder: Path) -> Play:
    names = {
        "model": fastbert.patch(make(CLASSIFICATION)),
        "batch": make_batch(CLASSIFICATION),
        "collator": lambda _: make_batch(CLASSIFICATION),
        "mlm": make(MLM),
        "mlm_batch": make_batch(MLM),
    }
    names["mlm_batch"]["labels"][names["mlm_batch"]["attention_mask"] == 0] = -100
    with counting(heads=True) as launched:
        yield names
    assert launched["gather_rows_kernel"] == 2 * 2
    assert names["collator"]([])["lengths"] == [9, 6]
    with counting(heads=True) as launched:
        yield names
    assert launched["gather_rows_kernel"]
