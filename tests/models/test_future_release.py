"""A transformers that never was: whatever moved in it runs stock code and says so, and nothing fails for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models.future import RELEASES

ROOT = Path(__file__).parents[2]

# What stays stock in each, and what a word of `report` names as the reason.
STOCK = {
    "added_keyword": {"BertSelfAttention": "BertSelfAttention.forward", "BertEncoder": "BertAttention.forward"},
    "renamed_keyword": {"BertEmbeddings": "BertEmbeddings.forward"},
    "renamed_argument": {"BertSelfOutput": "BertSelfOutput.forward", "BertOutput": "BertOutput.forward"},
    "removed_class": {},
    "other_arithmetic": {"BertIntermediate": "BertIntermediate.forward"},
    "masks_elsewhere": {},
    "documented": {},
}
WRONG_IF_TRUSTED = ("added_keyword", "other_arithmetic")  # the others compute what the kernels compute


def check(*names):
    command = [sys.executable, "-m", "tests.models.future", ",".join(names)]
    settings = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    states = {line.split(": ")[0]: line.split(": ")[1:] for line in lines if line.startswith("Bert")}
    expected = {cls: reason for name in names for cls, reason in STOCK[name].items()}
    for cls, (state, reason) in states.items():
        if cls in expected:
            assert state != "active" and expected[cls] in reason, (cls, state, reason)
        elif cls not in ("BertEncoder", "BertPooler"):
            assert state == "active", (cls, state, reason)
    assert expected.keys() <= states.keys()
    strict = next(line for line in lines if line.startswith("strict: "))
    assert all(cls in strict for cls in expected) if expected else strict == "strict: patched"
    assert "verify: True" in lines, lines
    assert f"verify untested: {not set(names) & set(WRONG_IF_TRUSTED)}" in lines, lines


def test_a_release_that_moves_much():
    check("added_keyword", "renamed_keyword", "removed_class", "other_arithmetic")


@pytest.mark.long
@pytest.mark.parametrize("name", RELEASES)
def test_a_release_that_moves_one_thing(name):
    check(name)
