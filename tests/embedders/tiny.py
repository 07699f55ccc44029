"""Tiny SentenceTransformers, and the comparison of a patched one with stock."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, BertTokenizerFast

import fastbert
from fastbert.testing.models import assert_equal, gradients
from fastbert.testing.rows import DEVICE

WIDTH = 32
WORDS = [f"w{i}" for i in range(60)]
TEXTS = ["w1 w2 w3 w4 w5 w6", "w7", "w8 w9 w10 w11"]
TOKENS = [8, 3, 6]  # with [CLS] and [SEP]
SETTINGS = {"vocab_size": 70, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
MODES = Pooling.POOLING_MODES


def save(folder: Any, family: str = "bert", **settings: Any) -> str:
    """Save a tiny model of this family with random weights and a tokenizer of whole words."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    BertTokenizerFast(vocab=vocabulary, model_max_length=32).save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **(SETTINGS | {"max_position_embeddings": 34} | settings))
        model = AutoModel.from_config(config)
        for parameter in model.parameters():  # biases and norms that stand out
            nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.2)
    model.save_pretrained(folder)
    return str(folder)


def make(folder: str, mode: str | tuple[str, ...] = "mean", *more: nn.Module, dropout: float = 0.0, **pooling: Any) -> Any:
    """A SentenceTransformer around the model in `folder`, in evaluation mode."""
    transformer = Transformer(folder)
    for module in transformer.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    model = SentenceTransformer(modules=[transformer, Pooling(WIDTH, mode, **pooling), *more], device=str(DEVICE))
    return model.eval()


def features_of(model: Any, texts: list[str] = TEXTS, **keywords: Any) -> dict[str, Any]:
    return {
        name: value.to(DEVICE) if isinstance(value, Tensor) else value
        for name, value in model.preprocess(texts, **keywords).items()
    }


def embed(model: Any, features: Mapping[str, Any], backward: bool = True, read: Callable[[dict], Tensor] | None = None) -> dict:
    """The sentence embeddings (or what `read` takes of the output), and with `backward` the gradients of a projection."""
    with torch.set_grad_enabled(backward):
        output = model(dict(features))
        result = output["sentence_embedding"] if read is None else read(output)
    results = {"output": result.detach().clone()}
    if backward:
        weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        model.zero_grad()
        (result * weights.to(result)).mean().backward()
        results |= gradients(model.named_parameters())
    return results


def check(model: Any, features: Mapping[str, Any], backward: bool = True, read: Any = None, **switches: Any) -> Any:
    """Compare a patched copy with stock, both measured against float64; returns the patched copy."""
    patched = fastbert.patch(copy.deepcopy(model), **switches)
    results = embed(patched, features, backward, read)
    exact = embed(copy.deepcopy(model).double(), features, backward, read)
    assert_equal(results, embed(copy.deepcopy(model), features, backward, read), exact)
    return patched


def row_of(model: Any, kind: str = "Pooling") -> Any:
    (row,) = [row for row in fastbert.report(model).rows if row.hf_class == kind]
    return row


def assert_packs(model: Any, calls: int = 1, encoder: str = "BertEncoder") -> None:
    """Check that all calls were packed, and pooled from the packed rows."""
    for kind in (encoder, "Pooling"):
        row = row_of(model, kind)
        assert (row.state, row.kernel_calls, row.fallback_calls) == ("active", calls, {}), row


def assert_padded(model: Any, reason: str) -> None:
    """Check that no call was packed, with this reason at the pooling."""
    row = row_of(model)
    assert row.kernel_calls == 0 and list(row.fallback_calls) == [reason], row
    assert row_of(model, "BertEncoder").kernel_calls == 0


def close(found: Any, expected: Any) -> None:
    """Equal but for the order of sums: products and kernels split the rows of a packed batch otherwise, and values are about 1.
    `check` holds outputs and gradients to the rule against float64."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def close_in_half(found: Any, expected: Any) -> None:
    """Equal but for some roundings of float16, at values up to 4."""
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
