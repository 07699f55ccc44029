"""A simulated future transformers: modules whose code changed run stock code with a reason, and nothing fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models.future import RELEASES

ROOT = Path(__file__).parents[2]

# What stays stock in each release, and part of the reason in `report`.
STOCK = {
    "added_keyword": {
        "BertSelfAttention": "BertSelfAttention.forward",
        "BertEncoder": "BertAttention.forward",
        "BertLayer": "BertSelfAttention.forward",
    },
    "renamed_keyword": {"BertEmbeddings": "BertEmbeddings.forward"},
    "renamed_argument": {
        "BertSelfOutput": "BertSelfOutput.forward",
        "BertOutput": "BertOutput.forward",
        "BertLayer": "BertSelfOutput.forward",
    },
    "removed_class": {},
    "other_arithmetic": {"BertIntermediate": "BertIntermediate.forward", "BertLayer": "BertIntermediate.forward"},
    "masks_elsewhere": {},
    "documented": {},
}
# If the model's own code changed, it passes no KernelMask, without which a layer runs module by module.
BY_MODULE = ("renamed_keyword", "masks_elsewhere")
WRONG_IF_TRUSTED = ("added_keyword", "other_arithmetic")  # the others compute what the kernels compute


def check(*names):
    command = [sys.executable, "-m", "tests.models.future", ",".join(names)]
    settings = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    states = {line.split(": ")[0]: line.split(": ")[1:] for line in lines if line.startswith("Bert")}
    expected = {}
    for name in names:
        for cls, reason in STOCK[name].items():
            expected.setdefault(cls, []).append(reason)
    for cls, (state, reason) in states.items():
        if cls in expected:
            assert state != "active" and any(word in reason for word in expected[cls]), (cls, state, reason)
        elif cls == "BertLayer" and set(names) & set(BY_MODULE):
            assert state == "module by module" and "mask" in reason, (cls, state, reason)
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
