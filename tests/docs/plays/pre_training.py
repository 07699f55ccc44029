"""docs/pre-training.md: a tokenizer and a model made from raw text, then steps without logits, packed and counted ahead."""

from pathlib import Path

import torch
from transformers import BertForMaskedLM

from fastbert.testing.models import counting
from tests.docs.play import Play

TINY = "hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, max_position_embeddings=64"
LINES = (
    "a cat sat on the mat and looked at the dog\nthe dog slept and saw no cat at all\n\nit rained all day on the road home\n"
)


def play(folder: Path) -> Play:
    (folder / "shards").mkdir()
    (folder / "shards" / "0.txt").write_text(LINES)
    names = {}
    places = {'"shards"': repr(str(folder / "shards")), '"start"': repr(str(folder / "start"))}
    yield names, places | {"30_522": "128", "vocab_size=len(tokenizer)": f"vocab_size=len(tokenizer), {TINY}"}
    tokenizer = names["tokenizer"]
    assert tokenizer.tokenize("The cat") == ["the", "cat"]

    torch.manual_seed(0)
    texts = [line for line in LINES.splitlines() if line]
    model = BertForMaskedLM.from_pretrained(folder / "start")
    before = model.bert.embeddings.word_embeddings.weight.detach().clone()
    names = {"model": model, "tokenizer": tokenizer, "texts": texts}
    with counting(heads=True) as launched:
        yield names
    assert names["batch"]["lengths"] == names["batch"]["attention_mask"].sum(1).tolist()
    assert launched["packed_rows_kernel"] and launched["adamw_kernel"]
    assert not torch.equal(before, model.bert.embeddings.word_embeddings.weight)

    names["labels"] = names["collator"].collator([tokenizer(text) for text in texts])["labels"]
    with counting(heads=True) as launched:
        yield names
    assert names["loss"].isfinite() and launched["packed_rows_kernel"]

    printed = yield names
    assert names["loss"].isfinite() and "of 2 steps replayed" in printed
