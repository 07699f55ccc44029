"""Integration with transformers' Trainer: fastbert.AdamW as its optimizer, and the report in its log."""

from typing import TYPE_CHECKING, Any

from fastbert.optim import AdamW

if TYPE_CHECKING:
    from transformers import TrainingArguments


def trainer_optimizer(training_args: "TrainingArguments") -> tuple[type[AdamW], dict[str, Any]]:
    """Return fastbert.AdamW and its arguments, for `Trainer(optimizer_cls_and_kwargs=...)`.

    Trainer makes the parameter groups (no decay for biases and LayerNorm, `weight_decay` for the rest) and the schedule.

    Args:
        training_args: a transformers.TrainingArguments; its learning_rate, adam_beta1, adam_beta2 and adam_epsilon are
            used.

    Returns:
        The optimizer class, and its keyword arguments.

    Raises:
        TypeError: `training_args` lacks one of these attributes.
    """
    names = {"lr": "learning_rate", "eps": "adam_epsilon", "beta1": "adam_beta1", "beta2": "adam_beta2"}
    missing = [name for name in names.values() if not hasattr(training_args, name)]
    if missing:
        found = type(training_args).__name__
        raise TypeError(f"training_args: expected a transformers.TrainingArguments, got {found} without {missing[0]}")
    numbers = {keyword: getattr(training_args, name) for keyword, name in names.items()}
    betas = (numbers.pop("beta1"), numbers.pop("beta2"))
    return AdamW, numbers | {"betas": betas}


def __getattr__(name: str) -> Any:
    # Its base class is in transformers, which `import fastbert` must not import (see fastbert/startup.py).
    if name == "ReportCallback":
        from fastbert.integrations.report_callback import ReportCallback

        return ReportCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
