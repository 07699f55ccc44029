"""Triton's interpreter on a machine without a GPU: pairs of releases with which it cannot run are refused, not tried."""

from importlib import metadata

import pytest
import torch

from fastbert.cli import checks, interpreter
from fastbert.cli.checks import FAILED, OK

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the interpreter is not asked for")


@pytest.fixture
def installed(monkeypatch):
    """Pretend that these releases are installed."""
    stock = metadata.version

    def pretend(**releases: str) -> None:
        monkeypatch.setattr(metadata, "version", lambda name: releases.get(name) or stock(name))

    return pretend


@pytest.mark.parametrize(
    ("triton", "numpy", "fits"),
    [
        ("3.5.1", "2.4.0", False),
        ("3.6.0", "2.10.0", False),
        ("3.6.0", "2.3.5", True),
        ("3.7.0", "2.4.6", True),
        ("3.10.0+git", "3.0.0", True),
    ],
)
def test_which_numpy_fits(installed, triton, numpy, fits):
    installed(triton=triton, numpy=numpy)
    assert (interpreter.numpy_misfit() is None) is fits
    assert checks.check_triton().state == (OK if fits else FAILED)


def test_a_triton_of_unknown_release_is_tried(monkeypatch):
    def unknown(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", unknown)
    assert interpreter.numpy_misfit() is None


def test_a_numpy_that_does_not_fit_is_one_line_and_2(fastbert_says, installed):
    installed(triton="3.6.0", numpy="2.4.6")
    code, out, err = fastbert_says("verify", "--task", "base")
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
    assert err.startswith("error: ") and "triton 3.6.0" in err and "numpy 2.4.6" in err and "numpy<2.4" in err


def test_the_doctor_names_it_and_goes_on(fastbert_says, installed):
    installed(triton="3.6.0", numpy="2.4.6")
    code, out, err = fastbert_says("doctor")
    said = " ".join(out.split())
    assert code == 1 and "error" not in err
    assert "numpy 2.4.6 -> install triton 3.7 or newer, or numpy<2.4" in said and "self-test" in said
