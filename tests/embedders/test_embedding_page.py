"""docs/embedding.md: its words say what the code does; tests/docs runs its blocks."""

import re
from pathlib import Path

from sentence_transformers import __version__

import fastbert
from tests.embedders.tiny import MODES, features_of, make, row_of

PAGE = (Path(__file__).parents[2] / "docs" / "embedding.md").read_text()


def test_words():
    assert all(f"`{mode}`" in PAGE for mode in MODES)
    assert __version__.startswith(re.search(r"the tested (\d+\.\d+)", PAGE)[1])


def test_reasons(folder):
    model = fastbert.patch(make(folder))
    model(features_of(model))["token_embeddings"][0]
    model(features_of(model))
    (reason,) = row_of(model).fallback_calls
    assert f'"{reason}"' in PAGE
