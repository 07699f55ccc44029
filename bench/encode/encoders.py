"""Builds SentenceTransformers with random weights and the lanes' ways to call them."""

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PretrainedConfig

import fastbert
from bench.core.peers import Absent, adapt, require, without_downloads
from bench.encode import texts
from bench.encode.cases import BERT, MODELS, EncodeCase, EncodeLane

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOKEN_BUDGET = 16384  # tokens of a batch by tokens: 32 texts of 512
_folders: list[tempfile.TemporaryDirectory] = []  # kept until the process ends
Encode = Callable[[list[str]], Tensor]


def config(name: str) -> PretrainedConfig:
    kind, sizes = MODELS[name]
    special = {} if kind == BERT else {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    return AutoConfig.for_model(kind, **sizes | special)


@cache
def folder(name: str) -> Path:
    """A folder with the model of this name and its tokenizer, from which SentenceTransformers are loaded as usual."""
    kind, _ = MODELS[name]
    made = config(name)
    kept = tempfile.TemporaryDirectory(prefix="fastbert-embedder-")
    _folders.append(kept)
    torch.manual_seed(0)
    AutoModel.from_config(made).save_pretrained(kept.name)
    longest = made.max_position_embeddings - (0 if kind == BERT else made.pad_token_id + 1)
    texts.tokenizer(longest, roberta=kind != BERT).save_pretrained(kept.name)
    return Path(kept.name)


def make(case: EncodeCase, lane: EncodeLane, device: str) -> Any:
    """The lane's SentenceTransformer, with the same weights as every other lane.

    Raises:
        Absent: something that the lane needs is not available here.
    """
    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    except ImportError as error:
        raise Absent(f"needs sentence-transformers 6 ({error})") from None
    if lane.model.peer:
        require(lane.model.peer)
    loading = {"attn_implementation": lane.model.attention, "dtype": DTYPES[case.precision]}
    with without_downloads():
        first = Transformer(str(folder(case.model)), model_kwargs=loading)
        made = SentenceTransformer(modules=[first, Pooling(first.get_embedding_dimension(), case.pooling)], device=device)
    adapt(lane.model.peer, made)
    if lane.model.fast:
        try:
            fastbert.patch(made)
        except fastbert.UnsupportedModelError as error:
            raise Absent(f"fastbert: {error}") from None
    if lane.model.graphed:
        fastbert.graphed(made)
    return made.eval()


def encoder(model: Any, case: EncodeCase, lane: EncodeLane) -> Encode:
    """The call that the lane measures: texts to embeddings [texts, H] on the model's device."""
    if lane.by_tokens:
        return lambda chosen: by_tokens(model, chosen, TOKEN_BUDGET)
    return lambda chosen: model.encode(chosen, batch_size=case.batch, convert_to_tensor=True, show_progress_bar=False)


def by_tokens(model: Any, chosen: Sequence[str], budget: int) -> Tensor:
    """Embeddings of texts in batches of at most `budget` tokens, in the order of the texts: where padding costs nothing,
    nothing has to be sorted by length. A longer text is a batch of its own."""
    with torch.inference_mode():
        ids = tokenized(model, chosen)
        found = []
        for part in groups([len(one) for one in ids["input_ids"]], budget):
            features = padded(model, {name: rows[part] for name, rows in ids.items()})
            on_device = {name: x.to(model.device) for name, x in features.items()}
            found.append(model(on_device)["sentence_embedding"])
        return torch.cat(found)


def tokenized(model: Any, chosen: Sequence[str]) -> dict[str, list[list[int]]]:
    """The model's inputs of each text, without padding."""
    return dict(model.tokenizer(list(chosen), padding=False, truncation=True, return_attention_mask=False))


def padded(model: Any, rows: dict[str, list[list[int]]]) -> dict[str, Tensor]:
    """A batch of these rows on the host, in two calls for all of them: the tokenizer's own `pad` takes them one at a time."""
    lengths = torch.tensor([len(ids) for ids in rows["input_ids"]])
    real = torch.arange(int(lengths.max()))[None, :] < lengths[:, None]
    filled = {"input_ids": model.tokenizer.pad_token_id}
    features = {"attention_mask": real.long()}
    for name, values in rows.items():
        padding = torch.full(real.shape, filled.get(name, 0))
        features[name] = padding.masked_scatter(real, torch.tensor(list(chain.from_iterable(values))))
    return features


def made_on_the_host(model: Any) -> list[tuple[Any, str]]:
    """The functions, by owner and name, that make batches on the host: the model's own, and those of `by_tokens`."""
    here = sys.modules[__name__]
    return [(model, "preprocess"), (here, "tokenized"), (here, "padded")]


def groups(lengths: Sequence[int], budget: int) -> Iterator[slice]:
    """Consecutive parts of `lengths`, each as long as its sum stays within `budget`."""
    start, total = 0, 0
    for i, length in enumerate(lengths):
        if i > start and total + length > budget:
            yield slice(start, i)
            start, total = i, 0
        total += length
    if lengths:
        yield slice(start, len(lengths))
