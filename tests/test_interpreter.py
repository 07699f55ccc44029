"""The accelerated interpreter equals Triton's; all replacements are made or none, and never for a user."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from triton.runtime import interpreter

from fastbert.testing import interpreter as accelerator
from tests.interpreter_cases import table

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU nothing is interpreted")
def test_every_operation_gives_what_tritons_gives():
    """Bitwise, with types, shapes and errors, compared with a process in which nothing is replaced."""
    command = [sys.executable, "-m", "tests.interpreter_cases"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=True)
    expected = json.loads(done.stdout)
    found = json.loads(json.dumps(table()))
    assert len(expected) > 10_000
    assert {name: found[name] for name in expected if found[name] != expected[name]} == {}


LISTED = ".".join(triton.__version__.split(".")[:2]) in accelerator.RELEASES


def test_a_release_is_listed_only_if_it_is_accelerated():
    """Otherwise the test above would compare the interpreter with itself."""
    assert (interpreter._patch_lang.__module__ == accelerator.__name__) == (LISTED and not torch.cuda.is_available())


@pytest.fixture
def says_why(monkeypatch, caplog):
    """Accelerate again; returns the log lines, and the interpreter's functions before and after."""

    def run():
        def stand():
            return {name: value for name, value in vars(interpreter).items() if callable(value)}

        before = stand()
        with caplog.at_level(logging.INFO, accelerator.__name__):
            accelerator.accelerate.__wrapped__()
        assert stand() == before
        return caplog.text

    return run


@pytest.mark.parametrize("release", ["3.5.1", "3.9.0", "4.0.0", "3.60.0"])
def test_on_another_release_nothing_is_replaced(monkeypatch, says_why, release):
    monkeypatch.setattr(triton, "__version__", release)
    assert f"triton {release} is not one of" in says_why()


@pytest.mark.skipif(not LISTED, reason="this release of triton lacks more than what the test takes away")
@pytest.mark.parametrize(("name", "other"), [("np_erf_fp64", None), ("_patch_attr", lambda obj, name: None)])
def test_what_is_missing_or_takes_other_arguments_leaves_all_as_it_is(monkeypatch, says_why, name, other):
    if other is None:
        monkeypatch.delattr(interpreter, name)
    else:
        monkeypatch.setattr(interpreter, name, other)
    assert name in says_why()


def test_a_failure_half_way_restores_what_was_there():
    class Owner:
        def kept(self, value):
            return value

        def inherited(self):
            return 1

    class Refusing(type):
        def __setattr__(cls, name, value):
            raise OSError("no such replacement")

    class Heir(Owner):
        pass

    class Stubborn(metaclass=Refusing):
        def last(self):
            return 2

    replacements = [
        (Owner, "kept", lambda self, value: None),
        (Heir, "inherited", lambda self: None),
        (Heir, "added", property(lambda self: None)),
        (Stubborn, "last", lambda self: None),
    ]
    before = dict(vars(Owner)), dict(vars(Heir))
    with pytest.raises(OSError, match="no such replacement"):
        accelerator.replace_all(replacements)
    assert (dict(vars(Owner)), dict(vars(Heir))) == before
    accelerator.replace_all(replacements[:-1])
    assert Heir().kept(1) is None and Heir().inherited() is None and Heir().added is None


def test_users_do_not_load_it():
    """Neither importing fastbert nor a patched model, its report and verify load it."""
    program = """
import sys, torch, transformers, fastbert
sizes = dict(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
model = fastbert.patch(transformers.BertForMaskedLM(transformers.BertConfig(**sizes)))
batch = {"input_ids": torch.ones(1, 4, dtype=torch.long)}
batch["labels"] = batch["input_ids"]
model(**batch).loss.backward()
print(fastbert.report(model))
assert not [name for name in sys.modules if name.startswith("fastbert.testing")]
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "BertLayer" in done.stdout
