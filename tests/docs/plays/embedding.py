"""docs/embedding.md: encode, a token budget and training, all of them packed."""

from pathlib import Path

import torch
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses

import fastbert
from tests.docs.play import Play
from tests.embedders.test_training import columns
from tests.embedders.tiny import TEXTS, assert_packs, features_of, make, save


def play(folder: Path) -> Play:
    bert = save(folder / "bert")

    names = {"embedder": make(bert), "texts": TEXTS}
    printed = yield names
    torch.testing.assert_close(torch.from_numpy(names["embeddings"]), torch.from_numpy(make(bert).encode(TEXTS)))
    assert_packs(names["embedder"])
    assert "pool_rows" in printed

    embedder = fastbert.patch(make(bert))
    names = {"fastbert": fastbert, "embedder": embedder, "features": features_of(embedder)}
    yield names
    assert names["embedding"].shape == (len(TEXTS), 32)
    assert_packs(embedder)

    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder / "training"),
        max_steps=1,
        per_device_train_batch_size=4,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    names = {"fastbert": fastbert, "losses": losses, "SentenceTransformerTrainer": SentenceTransformerTrainer}
    yield names | {"embedder": make(bert), "arguments": arguments, "dataset": columns(4)}
