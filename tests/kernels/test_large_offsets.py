"""Offsets past 2**31 elements: rows so far apart in one tensor that a 32-bit product would come back round."""

import pytest
import torch

from .ops import DEVICE, OPS, check, make_inputs

pytestmark = pytest.mark.long

WIDTH, ROW_STRIDE = 40, 2**30 + 24  # row 2 begins past 2**31


@pytest.fixture(autouse=True)
def storages_stay_where_they_are(monkeypatch):
    """After a launch the interpreter copies each storage back, also onto itself: here 4 GiB that nobody touched."""
    copy = torch.UntypedStorage.copy_

    def copy_elsewhere(self, source, *rest):
        return self if self.data_ptr() == source.data_ptr() else copy(self, source, *rest)

    monkeypatch.setattr(torch.UntypedStorage, "copy_", copy_elsewhere)


def far_apart(rows):
    """float16 rows 2**30 elements apart. Only the pages they stand on take memory; the rest is address space."""
    storage = torch.empty(2 * ROW_STRIDE + WIDTH, dtype=torch.float16, device=DEVICE)
    assert storage.numel() > 2**31
    return storage.as_strided((3, WIDTH), (ROW_STRIDE, 1)).copy_(rows)


@pytest.mark.parametrize("name", ["x", "residual", "dy"])
@pytest.mark.parametrize("op", OPS, ids=str)
def test_rows_far_apart(op, name):
    if name not in (*op.rows, "dy"):
        pytest.skip(f"{op} has no {name}")
    inputs, dy = make_inputs(op, (3, WIDTH), torch.float16), torch.randn(3, WIDTH).to(DEVICE, torch.float16)
    if name == "dy":
        dy = far_apart(dy)
    else:
        inputs[name] = far_apart(inputs[name])
    check(op, inputs, dy)


@pytest.mark.parametrize("op", OPS, ids=str)
def test_columns_far_apart(op):
    """The same through the column stride: a transposed view of three very long rows."""
    storage = torch.empty(2 * ROW_STRIDE + WIDTH, dtype=torch.float16, device=DEVICE)
    inputs = make_inputs(op, (WIDTH, 3), torch.float16)
    inputs["x"] = storage.as_strided((WIDTH, 3), (1, ROW_STRIDE)).copy_(inputs["x"])
    check(op, inputs)
