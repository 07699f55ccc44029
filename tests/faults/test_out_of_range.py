"""Ids and labels out of range: an error as in torch, never a read outside the table.

On the CPU the error is an IndexError. On a GPU it is a failed device assertion, after which the process cannot use it, so
those tests run in separate processes.
"""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastbert
from tests.models.tiny import CLASSIFICATION, MLM, VOCABULARY, make, make_batch

from .cases import cases

ROOT = Path(__file__).parents[2]
# Per model: the argument that is wrong, and by how much.
STRAYS = {
    "input_ids": (VOCABULARY, -1),
    "token_type_ids": (2, -1),
    "position_ids": (24, -1),
    "labels": (VOCABULARY, -1, -101),
}
# Per op: the argument, the rows of its table, and the largest number of its dtype.
ARGUMENTS = {
    "embedding_layernorm": {"ids": 7, "token_type_ids": 2, "position_ids": 6},
    "linear_cross_entropy mean": {"labels": 7},
    "linear_cross_entropy none": {"labels": 7},
}
CALLS = [(name, argument) for name, arguments in ARGUMENTS.items() for argument in arguments]
on_the_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's own assertion ends this process's use of it")


def with_a_stray(name, argument, value):
    case = cases()[name]
    options = dict(case.options)
    if argument == "position_ids":
        options["position_ids"] = torch.zeros_like(options["ids"])
    options[argument] = options[argument].clone()
    options[argument].flatten()[-1] = value
    return lambda: case.call(**case.inputs, **options)


@on_the_cpu
@pytest.mark.parametrize("value", ["one too many", -1, 2**40], ids=str)
@pytest.mark.parametrize(("name", "argument"), CALLS)
def test_an_op_raises(name, argument, value):
    call = with_a_stray(name, argument, ARGUMENTS[name][argument] if value == "one too many" else value)
    with pytest.raises(IndexError, match="out of (range|bounds)"):
        call()


@on_the_cpu
@pytest.mark.parametrize("options", [{}, {"unpad": True, "mlm_logits": "none"}], ids=["padded", "packed"])
@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in STRAYS.items() for value in values])
@pytest.mark.one_in(2)
def test_a_model_raises_what_stock_does(name, value, options):
    model, batch = make(MLM).train(), make_batch(MLM)
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"]).clone()
    batch[name][1, 2] = value  # a token, not padding
    assert batch["attention_mask"][1, 2]
    for tried in (model, fastbert.patch(copy.deepcopy(model), **options)):
        with pytest.raises(IndexError, match="out of (range|bounds)"):
            tried(**batch)


@on_the_cpu
def test_a_class_that_a_head_does_not_have_raises():
    model, batch = make(CLASSIFICATION).train(), make_batch(CLASSIFICATION)
    batch["labels"][0] = 3
    for tried in (model, fastbert.patch(copy.deepcopy(model))):
        with pytest.raises(IndexError, match="out of bounds"):
            tried(**batch)


PROGRAM = """
import sys, torch
from tests.faults.test_out_of_range import with_a_stray
name, argument, value = sys.argv[1:]
with_a_stray(name, argument, int(value))()
torch.cuda.synchronize()
"""


@pytest.mark.gpu
@pytest.mark.parametrize("past", [0, 2**40], ids=["one too many", "far too many"])
@pytest.mark.parametrize(("name", "argument"), CALLS)
def test_the_device_stops(name, argument, past):
    value = str(ARGUMENTS[name][argument] + past)
    command = [sys.executable, "-c", PROGRAM, name, argument, value]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "device-side assert" in done.stderr, done.stderr[-2000:]
