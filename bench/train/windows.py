"""Windows over the texts of a task (`--windows`): made from the settings, described, and the loss of their pooled logits."""

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fastbert
from bench.train.records import Settings
from fastbert.errors import InputError

_OPTIONS = {"size": "--max-length", "texts": "--data"}  # Windows' names for other options


def windows_of(settings: Settings, tokenizer: Any, limit: int) -> fastbert.Windows | None:
    """The windows of at most `limit` tokens that the settings ask for, or None.

    Raises:
        InputError: the options do not go together.
    """
    if not settings.windows:
        return None
    try:
        return fastbert.Windows(
            tokenizer,
            limit,
            how=settings.windows,
            stride=settings.stride,
            pooling=settings.pooling or "mean",
            max_windows=settings.max_windows or None,
        )
    except ValueError as error:
        raise as_input_error(error) from None


def as_input_error(error: ValueError) -> InputError:
    """The error of a Windows under the name of the option that led to it."""
    name, colon, said = str(error).partition(":")
    return InputError(f"{_OPTIONS.get(name, f'--{name}')}{colon}{said}")


def described(windows: fastbert.Windows) -> str:
    """What the model reads of a text, for the report."""
    size = f"{windows.size} tokens"
    if windows.how != "overlap":
        ends = {"head": "beginning", "tail": "end", "head+tail": "beginning and end"}[windows.how]
        return f"{windows.how}: one window of {size} with a text's {ends}"
    most = f", at most {windows.max_windows} of a text" if windows.max_windows else ""
    return f"overlap: windows of {size} that share {windows.stride}{most}; pooling of their logits: {windows.pooling}"


def loss_and_logits(windows: fastbert.Windows, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The cross-entropy of the pooled logits, as the head computes it of its own, and these logits: [texts, labels]."""
    logits = windows.run(model, batch)
    return cross_entropy(logits, batch["labels"]), logits
