"""The public API is the one that public_api.txt lists, so that no name, signature or option changes by accident."""

import difflib
from collections.abc import Sequence

import pytest
from torch import nn

import fastbert

from .public_api import LISTING, listing

COMMAND = "python -m tests.packaging.public_api"


def test_public_api_is_as_listed() -> None:
    listed, found = LISTING.read_text(encoding="utf-8").splitlines(), listing().splitlines()
    changes = difflib.unified_diff(listed, found, LISTING.name, "the code", n=0, lineterm="")
    assert listed == found, "\n".join(["the public API changed; if that is meant, CHANGELOG.md and", COMMAND, *changes])


def test_a_changed_signature_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def warmup(model: nn.Module, shapes: Sequence[tuple[int, int]], *, choices: int = 3) -> None: ...

    before = listing()
    monkeypatch.setattr(fastbert, "warmup", warmup)
    changed = [line for line in difflib.ndiff(before.splitlines(), listing().splitlines()) if line[0] in "+-"]
    assert len(changed) == 2 and all("fastbert.warmup" in line for line in changed)


def test_a_missing_name_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastbert, "__all__", [name for name in fastbert.__all__ if name != "graphed"])
    assert "fastbert.graphed(" not in listing()


def test_all_is_sorted_and_complete() -> None:
    assert fastbert.__all__ == sorted(fastbert.__all__)
    own = {name for name, value in vars(fastbert).items() if callable(value) and not name.startswith("_")}
    assert own == set(fastbert.__all__)
