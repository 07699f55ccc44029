"""Loads the config, tokenizer and weights of a model, from a folder or by its name on the hub, and runs no code of it.

A model is data that somebody else may have written. Three of its files can make transformers run code or ask to: a config
that names Python files (`auto_map`) or a kernel on the hub (`attn_implementation`), a tokenizer's config that names Python
files, and weights in pickles. All are refused with the reason. Weights are read from safetensors alone, and a list of shards
may name only safetensors beside it. Numbers in a config are limited, so that a small file cannot ask for all memory.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME, cached_file

from fastbert.errors import InputError

_PICKLES = (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
_CONVERT = "if you trust it, load it with transformers and save it again: save_pretrained writes safetensors"
_ATTENTION = (None, "eager", "sdpa", "flex_attention")  # other names are packages, or repositories with kernels
_TRUSTED = "fastbert runs no code from a model"
# The largest number of each kind that a config may have, far above any model of these families.
_MOST = {
    "vocab_size": 1 << 24,
    "embedding_size": 1 << 16,
    "hidden_size": 1 << 16,
    "intermediate_size": 1 << 18,
    "hidden_dim": 1 << 18,  # DistilBERT's intermediate size
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 10,
    "max_position_embeddings": 1 << 20,
    "type_vocab_size": 1 << 10,
    "num_labels": 1 << 20,
}
_UNSAVED = 1 << 24  # parameters that a model may have beyond those in its files: heads, and tiny models
_PER_BYTE = 2  # parameters: the smallest types have half a byte each


def read_config(model: str) -> Any:
    """The config of a model.

    Raises:
        InputError: it cannot be read, or it needs code that is not transformers'.
    """
    failed = "config.json cannot be read" if Path(model).is_dir() else "no such directory, and no model of that name on the hub"
    with _reading(f"MODEL: {model}: {failed}"):
        found, _ = transformers.PretrainedConfig.get_config_dict(model)
        if not isinstance(found, dict):
            raise InputError(f"MODEL: {model}: expected an object in config.json, got {type(found).__name__}")
        _refuse_code(model, "config.json", found)
        for name in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
            if found.get(name) not in _ATTENTION:
                allowed = ", ".join(filter(None, _ATTENTION))
                raise InputError(
                    f"MODEL: {model}: config.json asks for the attention {found[name]!r} ({name}), which may be code from the "
                    f"hub; expected {allowed}: {_TRUSTED}"
                )
        if "transformers_weights" in found:
            raise InputError(f"MODEL: {model}: config.json names its own file of weights; expected {SAFE_WEIGHTS_NAME}")
        return transformers.AutoConfig.from_pretrained(model, trust_remote_code=False)


def check_sizes(model: str, config: Any) -> None:
    """Raise InputError unless the sizes in a config of a supported family are those of a model."""
    for name, most in _MOST.items():
        value = getattr(config, name, 1)
        if type(value) is not int or not 0 < value <= most:
            raise InputError(f"MODEL: {model}: {name} in config.json: expected 1 to {most}, got {value!r}")


def read_tokenizer(model: str) -> Any:
    """The tokenizer of a model.

    Raises:
        InputError: there is none that can be read, or it needs code that is not transformers'.
    """
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    with _reading(f"MODEL: {model} has no tokenizer that can be read"):
        found = get_tokenizer_config(model)
        if not isinstance(found, dict):
            raise InputError(f"MODEL: {model}: expected an object in tokenizer_config.json, got {type(found).__name__}")
        _refuse_code(model, "tokenizer_config.json", found)
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        if len(tokenizer) <= len(tokenizer.all_special_tokens):  # one made without a vocabulary
            raise InputError(f"MODEL: {model} has no tokenizer: no vocabulary was found in it")
    return tokenizer


def read_model(model_class: Any, model: str, config: Any, **options: Any) -> nn.Module:
    """A model with the weights in safetensors of `model`, and new ones where they do not fit.

    Args:
        config: what `read_config` returned.
        options: for `from_pretrained`, and settings of the config that differ.

    Raises:
        InputError: there are no such weights, or they cannot be read.
    """
    # A head saved for another task may have a different number of labels; it is initialised anew, like a missing one.
    with _reading(f"MODEL: {model} has no weights that can be read, or a config that makes no model"):
        size = sum(path.stat().st_size for path in _weights(model))
        described = _parameters(config)
        if described > _PER_BYTE * size + _UNSAVED:
            raise InputError(f"MODEL: {model}: config.json describes {described} parameters, and its weights have {size} bytes")
        return model_class.from_pretrained(
            model, ignore_mismatched_sizes=True, use_safetensors=True, weights_only=True, trust_remote_code=False, **options
        )


@contextmanager
def _reading(failed: str) -> Iterator[None]:
    """Make one line out of whatever transformers, tokenizers, safetensors or torch raise on damaged content."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        first, *others = str(error).splitlines() or [""]
        said = f"{first} {others[0].strip()}" if first.endswith(":") and others else first
        known = said and isinstance(error, OSError | ValueError)
        raise InputError(f"{failed}: {said if known else f'{type(error).__name__}: {said}'}") from None


def _refuse_code(model: str, file: str, found: dict[str, Any]) -> None:
    if found.get("auto_map"):
        raise InputError(f"MODEL: {model} needs Python code of its own (auto_map in {file}), which is not run: {_TRUSTED}")


def _file(model: str, name: str) -> Path | None:
    """A file of the model, downloaded if necessary; None if there is none."""
    if Path(model).is_dir():
        return path if (path := Path(model, name)).is_file() else None
    found = cached_file(model, name, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def _weights(model: str) -> list[Path]:
    """The files of the weights that are at hand: of a sharded model on the hub the list alone."""
    if (single := _file(model, SAFE_WEIGHTS_NAME)) is not None:
        return [single]
    index = _file(model, SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        if any(_file(model, name) for name in _PICKLES):
            raise InputError(
                f"MODEL: {model} has its weights in {WEIGHTS_NAME} alone, a pickle, which can run code when it is loaded; "
                f"{_CONVERT}"
            )
        raise InputError(f"MODEL: {model} has no weights that can be read: there is no {SAFE_WEIGHTS_NAME}")
    listed = json.loads(index.read_text(encoding="utf-8"))
    shards = listed.get("weight_map") if isinstance(listed, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise InputError(f"MODEL: {model}: expected a weight_map with shards in {SAFE_WEIGHTS_INDEX_NAME}")
    names = list(dict.fromkeys(map(str, shards.values())))
    for name in names:
        if Path(name).name != name or Path(name).suffix != ".safetensors":
            raise InputError(
                f"MODEL: {model}: {SAFE_WEIGHTS_INDEX_NAME} names the shard {name!r}; expected .safetensors in the same folder"
            )
    return [path for name in names if (path := index.parent / name).is_file()]


def _parameters(config: Any) -> int:
    """Parameters of the embeddings and layers that a config describes, without biases and heads."""
    width = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or getattr(config, "hidden_dim", 0)
    layers = config.num_hidden_layers * (4 * width * width + 2 * width * inner)
    embedded = getattr(config, "embedding_size", width)
    return layers + (config.vocab_size + config.max_position_embeddings) * embedded
