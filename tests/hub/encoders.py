"""Tiny encoders of several families, and texts as batches: one by one, flattened by transformers' collator, and padded."""

import copy
import importlib
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import DataCollatorWithFlattening

from fastbert.testing.models import gradients
from fastbert.testing.rows import DEVICE

LENGTHS = (9, 3, 17, 1)
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
_TOKENS = {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2, "mask_token_id": 3}
# By model class: the settings of its config, and the first position id.
FAMILIES: dict[str, tuple[dict[str, Any], int]] = {
    "Bert": (SIZES, 0),
    "Roberta": (SIZES | {"pad_token_id": 1}, 2),
    "DistilBert": (
        {"vocab_size": 61, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 64},
        0,
    ),
    # Its second layer is local: a query sees four keys on each side.
    "ModernBert": (SIZES | _TOKENS | {"global_attn_every_n_layers": 2, "local_attention": 8}, 0),
    "EuroBert": (SIZES | _TOKENS | {"num_key_value_heads": 1}, 0),
}


def make(family: str, attention: str = "sdpa", **settings: Any) -> nn.Module:
    """The model without its head, in evaluation. Skips the test where the installed transformers has no such model, or one
    with attention functions of its own."""
    module = (
        importlib.import_module(f"transformers.models.{family.lower()}") if hasattr(transformers, f"{family}Model") else None
    )
    if module is None or not getattr(module, f"{family}PreTrainedModel")._supports_attention_backend:
        pytest.skip(f"transformers {transformers.__version__} has no {family} that uses its attention interface")
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family][0] | settings)
    model = getattr(transformers, f"{family}Model")(config).eval().to(DEVICE)
    model.set_attn_implementation(attention)
    return model


def texts(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(4, 61, (n,), generator=generator).tolist() for n in lengths]


def flattened(family: str, given: list[list[int]]) -> dict[str, Any]:
    """All texts as one row, with the bounds of each, as sentence-transformers and padding-free trainers make it."""
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_position_ids=True, return_seq_idx=True)
    batch = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in collate(_features(given)).items()}
    batch.pop("labels")
    return batch | {"position_ids": batch["position_ids"] + FAMILIES[family][1]}


def _features(given: list[list[int]]) -> list[dict[str, list[int]]]:
    return [{"input_ids": text} for text in given]


def padded(given: list[list[int]]) -> dict[str, Tensor]:
    longest = max(map(len, given))
    ids = torch.full((len(given), longest), 1, device=DEVICE)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(given):
        ids[row, : len(text)] = torch.tensor(text)
        mask[row, : len(text)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def one_by_one(model: nn.Module, given: list[list[int]]) -> Tensor:
    """The last hidden states of all texts, [tokens, H], each computed alone."""
    return torch.cat([model(input_ids=torch.tensor([text], device=DEVICE))[0][0] for text in given])


def with_gradients(model: nn.Module, hidden_states: Tensor) -> dict[str, Tensor]:
    """The hidden states [tokens, H], and the gradient of every parameter from a projection in which each element matters."""
    model.zero_grad()
    weights = torch.linspace(-1, 1, hidden_states.numel(), dtype=torch.float64).view(hidden_states.shape)
    (hidden_states * weights.to(hidden_states)).mean().backward()
    return {"hidden states": hidden_states.detach()} | gradients(model.named_parameters())


def expected(model: nn.Module, given: list[list[int]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Stock SDPA's results for texts one by one: in the model's dtype, and in float64."""
    exact = copy.deepcopy(model).double()
    return with_gradients(model, one_by_one(model, given)), with_gradients(exact, one_by_one(exact, given))
