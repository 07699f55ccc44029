"""How long a text may be: as many tokens as the model has positions for."""

from torch import nn

from fastbert.dispatch import kind_of
from fastbert.layers.family import LIKE_ROBERTA
from fastbert.layers.stock import part_of


def longest_text(model: nn.Module) -> int | None:
    """The number of tokens for which `model`, or the first model inside it, has positions; None if it does not say.

    RoBERTa's positions start after the id of its padding token, so it has fewer than rows in the table.
    """
    body = next((module for module in model.modules() if part_of(kind_of(module)).part == "Model"), model)
    embeddings = getattr(body, "embeddings", None)
    table = getattr(embeddings, "position_embeddings", None)
    sizes = (getattr(getattr(body, "config", None), "max_position_embeddings", None), getattr(table, "num_embeddings", None))
    rows = min((n for n in sizes if n is not None), default=None)
    if rows is None or part_of(kind_of(body)).family not in LIKE_ROBERTA:
        return rows
    padding = getattr(embeddings, "padding_idx", None)
    return rows if padding is None else max(rows - padding - 1, 0)
