"""Loading a model runs no code of it, and a damaged or absurd model is refused in one line."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from bench.__main__ import app
from fastbert.cli.commands import main
from fastbert.cli.source import Source
from fastbert.errors import InputError
from tests.bench.train.training import FILES
from tests.trust.hostile import changed, code, pickled, refused

SAFETENSORS, INDEX = "model.safetensors", "model.safetensors.index.json"


def loaded(model: Path, task: str = "mlm") -> None:
    Source.open(str(model), None).load(task, torch.float32, torch.device("cpu"), 2, 24)


def pickle_alone(model, marker):
    (model / SAFETENSORS).unlink()
    (model / "pytorch_model.bin").write_bytes(pickled(marker))


def pickle_in_shards(model, marker):
    (model / SAFETENSORS).unlink()
    (model / "part.bin").write_bytes(pickled(marker))
    changed(model / "pytorch_model.bin.index.json", weight_map={"weight": "part.bin"})


def pickle_in_the_list_of_safetensors(model, marker):
    (model / SAFETENSORS).unlink()
    (model / "part.bin").write_bytes(pickled(marker))
    changed(model / INDEX, weight_map={"weight": "part.bin"})


def pickle_named_by_the_config(model, marker):
    (model / "part.bin").write_bytes(pickled(marker))
    changed(model / "config.json", transformers_weights="part.bin")


def code_for_the_model(model, marker):
    (model / "own.py").write_text(code(marker))
    changed(model / "config.json", auto_map={"AutoConfig": "own.Config", "AutoModelForMaskedLM": "own.Model"})


def code_for_another_type(model, marker):
    code_for_the_model(model, marker)
    changed(model / "config.json", model_type="own")


def code_for_the_tokenizer(model, marker):
    (model / "own.py").write_text(code(marker))
    tokenizer = {"AutoTokenizer": ["own.Tokens", "own.Tokens"]}
    changed(model / "tokenizer_config.json", auto_map=tokenizer, tokenizer_class="OwnTokens")


def attention_from_the_hub(model, marker):
    changed(model / "config.json", attn_implementation="somebody/kernel")


REFUSED = {
    pickle_alone: "pytorch_model.bin alone, a pickle, which can run code when it is loaded; if you trust it, load it",
    pickle_in_shards: "a pickle, which can run code",
    pickle_in_the_list_of_safetensors: "names the shard 'part.bin'; expected .safetensors",
    pickle_named_by_the_config: "config.json names its own file of weights",
    code_for_the_model: "needs Python code of its own (auto_map in config.json), which is not run",
    code_for_another_type: "needs Python code of its own (auto_map in config.json), which is not run",
    code_for_the_tokenizer: "needs Python code of its own (auto_map in tokenizer_config.json), which is not run",
    attention_from_the_hub: "asks for the attention 'somebody/kernel'",
}


@pytest.mark.parametrize("attack", REFUSED, ids=lambda attack: attack.__name__)
def test_a_model_that_would_run_code_is_refused(attack, model, tmp_path):
    marker = tmp_path / "marker"
    attack(model, marker)
    line = refused(main, "report", model)
    assert line.startswith("error: MODEL: ") and REFUSED[attack] in line
    of_training = refused(app, "train", "--task", "mlm", "--data", FILES["mlm"], "--model", model, "--out", tmp_path / "out")
    assert of_training.startswith("error: --model: ") and REFUSED[attack] in of_training
    assert not marker.exists() and not (tmp_path / "out").exists()


def test_the_attacks_are_real(model, tmp_path):
    """What is refused above does run code elsewhere."""
    marker = tmp_path / "marker"
    pickle.loads(pickled(marker))
    assert marker.exists()
    marker.unlink()
    exec(compile(code(marker), "own.py", "exec"), {})
    assert marker.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth"])
def test_a_pickle_beside_safetensors_is_not_read(model, name, tmp_path):
    (model / name).write_bytes(pickled(tmp_path / "marker"))
    loaded(model)
    assert not (tmp_path / "marker").exists()


def test_code_beside_a_model_is_not_run(model, tmp_path):
    """modules.json is for sentence-transformers, custom_generate for generation: neither is asked."""
    marker = tmp_path / "marker"
    for name in ("own.py", "modeling_bert.py", "tokenization_bert.py", "custom_generate/generate.py"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(code(marker))
    (model / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": "own.Model"}]))
    for task in ("mlm", "clm"):
        loaded(model, task)
    assert not marker.exists()


def test_an_adapter_beside_a_model(model, tmp_path):
    """Its weights in a pickle are not read, and no base model that it names."""
    other = tmp_path / "other"
    other.mkdir()
    pickle_alone_in = {"peft_type": "LORA", "base_model_name_or_path": str(other), "target_modules": ["query"]}
    (other / "pytorch_model.bin").write_bytes(pickled(tmp_path / "marker"))
    (model / "adapter_model.bin").write_bytes(pickled(tmp_path / "marker"))
    changed(model / "adapter_config.json", **pickle_alone_in)
    with pytest.raises(InputError, match="has no weights that can be read"):
        loaded(model)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/outside.safetensors", "..", "a/b.safetensors", "a\\..\\b"])
def test_shards_lie_in_the_folder_of_the_model(model, shard, tmp_path):
    (model / SAFETENSORS).rename(tmp_path / "outside.safetensors")
    changed(model / INDEX, weight_map={"weight": shard})
    with pytest.raises(InputError, match=r"names the shard .*; expected \.safetensors in the same folder"):
        loaded(model)


def test_a_model_in_shards_is_read(model):
    (model / SAFETENSORS).rename(model / "part-1.safetensors")
    with safe_open(model / "part-1.safetensors", "pt") as file:
        changed(model / INDEX, metadata={}, weight_map=dict.fromkeys(file.keys(), "part-1.safetensors"))
    loaded(model)


DAMAGED = [
    *[("config.json", content) for content in ("", "null", "[]", "{", '"text"', "[" * 100_000, "\0", "{}")],
    *[("tokenizer_config.json", content) for content in ("null", "[]", "{", "7")],
    *[("tokenizer.json", content) for content in ("", "null", "[]", "{", "{}", '{"model": {"type": "BPE"}}')],
    *[(INDEX, content) for content in ("", "[]", "{", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}')],
    *[(SAFETENSORS, content) for content in ("", "\x08\0\0\0\0\0\0\0{}", "\0\0\0\0\0\x01\0\0{}")],
]


@pytest.mark.parametrize(("name", "content"), DAMAGED, ids=lambda value: value[:20])
def test_a_damaged_file(model, name, content):
    if name == INDEX:
        (model / SAFETENSORS).unlink()
    (model / name).write_text(content)
    with pytest.raises(InputError, match=r"^MODEL: ") as refusal:
        loaded(model)
    assert str(refusal.value).isprintable()


ABSURD = [
    *[{"hidden_size": value} for value in (-1, 0, 1 << 40, 1 << 16, "16", None, 16.5, True)],
    *[{"num_hidden_layers": value} for value in (0, 10**9)],
    *[{"vocab_size": value} for value in (1 << 60, 1 << 24)],
    {"num_attention_heads": 0},
    {"intermediate_size": 1 << 60},
    {"max_position_embeddings": 1 << 60},
    {"type_vocab_size": 1 << 60},
    {"hidden_act": "nothing"},
    {"hidden_dropout_prob": 7},
    {"model_type": ["bert"]},
]


@pytest.mark.parametrize("values", ABSURD, ids=str)
def test_absurd_numbers_are_refused_before_anything_is_allocated(model, values):
    changed(model / "config.json", **values)
    with pytest.raises(InputError, match=r"^MODEL: .*(config\.json|config)") as refusal:
        loaded(model)
    assert str(refusal.value).isprintable()


@pytest.mark.parametrize("name", ["a\x1b[2Jb", "two\nlines", "[red]x[/green]", "\u202egnp"])
def test_names_are_shown_harmlessly(name, tmp_path):
    line = refused(main, "report", tmp_path / name)
    assert name.encode("unicode_escape").decode().replace("\\\\", "\\") in line
