"""The folder kernels/ in the root does not hide Hugging Face's `kernels` package, which transformers imports.

A regular package anywhere on the path wins over a folder without __init__.py. With an __init__.py, `import kernels` in the
checkout would give transformers this folder, and importing BERT would fail.
"""

import json
from collections.abc import Callable
from pathlib import Path

from .environments import Environment

# Runs in the root, so that sys.path starts with the checkout, as in `python -m bench` or a notebook started there.
PROBE = """
import json, sys
from importlib import metadata

# transformers imports the releases of it that it knows, the oldest of which may not be out yet.
import transformers.utils.import_utils as known
true_version = metadata.version
metadata.version = lambda name: (true_version(name), known.KERNELS_MIN_VERSION)[name == "kernels"]
from transformers import BertConfig, BertForMaskedLM
imported = "kernels" in sys.modules
import kernels
import torch

import fastbert
import fastbert.kernels.core.launch

config = BertConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
model = fastbert.patch(BertForMaskedLM(config))
assert model(torch.ones(1, 3, dtype=torch.long)).logits.shape == (1, 3, 11)
print(json.dumps({"imported": imported, "paths": [*kernels.__path__], "file": kernels.__file__}))
"""


def test_installed(environment: Environment, tree: Path) -> None:
    found = json.loads(environment.run("-c", PROBE, cwd=tree))
    assert found["imported"]  # otherwise this test proves nothing
    assert found["file"].endswith("kernels/__init__.py")
    assert not [path for path in found["paths"] if Path(path).is_relative_to(tree)]


def test_not_installed(environment_without: Callable[[str], Environment], tree: Path) -> None:
    found = json.loads(environment_without("kernels").run("-c", PROBE, cwd=tree))
    # Only this folder has that name then, a namespace package, which transformers does not take for the package.
    assert found["file"] is None
