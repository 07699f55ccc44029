"""docs/embedding.md: its snippets run and pack."""

import re
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments, __version__
from sentence_transformers.sentence_transformer import losses

import fastbert
from tests.embedders.test_training import columns
from tests.embedders.tiny import MODES, TEXTS, assert_packs, features_of, make, row_of

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/embedding.md").read_text()
ENCODE, BUDGET, TRAIN = re.findall(r"```python\n(.*?)```", PAGE, re.S)


def test_encode(folder, capsys):
    names = {"embedder": make(folder), "texts": TEXTS}
    exec(ENCODE, names)
    torch.testing.assert_close(torch.from_numpy(names["embeddings"]), torch.from_numpy(make(folder).encode(TEXTS)))
    assert_packs(names["embedder"])
    assert "pool_rows" in capsys.readouterr().out


def test_budget(folder):
    embedder = fastbert.patch(make(folder))
    names = {"fastbert": fastbert, "embedder": embedder, "features": features_of(embedder)}
    exec(BUDGET, names)
    assert names["embedding"].shape == (len(TEXTS), 32)
    assert_packs(embedder)


def test_train(folder, tmp_path):
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    names = {"fastbert": fastbert, "losses": losses, "SentenceTransformerTrainer": SentenceTransformerTrainer}
    exec(TRAIN, names | {"embedder": make(folder), "arguments": arguments, "dataset": columns(4)} | names)


def test_words():
    assert all(f"`{mode}`" in PAGE for mode in MODES)
    assert __version__.startswith(re.search(r"the tested (\d+\.\d+)", PAGE)[1])
    assert "docs/embedding.md" in (ROOT / "README.md").read_text()


def test_reasons(folder):
    model = fastbert.patch(make(folder))
    model(features_of(model))["token_embeddings"][0]
    model(features_of(model))
    (reason,) = row_of(model).fallback_calls
    assert f'"{reason}"' in PAGE
