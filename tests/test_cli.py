"""The command line, in separate processes, with valid and invalid input."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertForTokenClassification,
    BertModel,
    DistilBertConfig,
    MPNetConfig,
    XLMRobertaConfig,
)

import fastbert
from fastbert.cli.commands import main
from fastbert.cli.source import Source
from fastbert.cli.tasks import TASKS
from fastbert.cli.verify import _verdict as verdict

ROOT = Path(__file__).resolve().parent.parent


def fastbert_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs `python -m fastbert …` in a process without TRITON_INTERPRET."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTBERT_DISABLE")} | environment
    command = [sys.executable, "-m", "fastbert", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def answered(monkeypatch, capsys):
    """Run the command line in this process, which saves ten seconds of imports.

    Returns the exit code, and the output or the errors.
    """

    def run(*arguments: str, errors: bool = False) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["fastbert", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr()
        return stop.value.code, printed.err if errors else printed.out

    return run


@pytest.fixture
def input_error(answered):
    """Run the command line in this process; check that it prints one error line and exits with code 2, and return the line."""

    def run(*arguments: str) -> str:
        code, text = answered(*arguments, errors=True)
        assert code == 2
        lines = text.splitlines()
        errors = [line for line in lines if line.lower().startswith("error:")]
        assert len(errors) == 1, lines
        return errors[0]

    return run


@pytest.fixture(scope="module")
def small_model(tmp_path_factory) -> Path:
    """A two-layer BERT with its tokenizer, saved as a token classifier."""
    source = _small_source()
    path = tmp_path_factory.mktemp("model")
    config = BertConfig(**{k: v for k, v in source.config.to_dict().items() if "label" not in k}, num_labels=5)
    torch.manual_seed(0)  # for a deterministic verdict
    BertForTokenClassification(config).save_pretrained(path)
    source.tokenizer.save_pretrained(path)
    return path


def _small_source() -> Source:
    from fastbert.cli import source as module

    lines = module._read_lines(None)
    tokenizer = module.word_tokenizer(lines)
    return Source("small", None, BertConfig(vocab_size=len(tokenizer), **module._SMALL), tokenizer, lines)


def test_verify_all_nine_tasks(small_model, tmp_path):
    data = tmp_path / "result.json"
    done = fastbert_command("verify", str(small_model), "--json", str(data))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "EQUAL: 9 of 9 models" in done.stdout
    if not torch.cuda.is_available():
        assert "interpreter" in done.stderr
    results = json.loads(data.read_text())
    assert list(results) == list(TASKS)
    assert all(result["kernel_calls"] >= 3 for result in results.values())  # embeddings and two layers


def test_verify_trained_model_on_own_text(tmp_path, answered):
    text = tmp_path / "text.txt"
    text.write_text("Zwei Zeilen Text.\n\nUnd eine, die länger ist als die andere: 1234 (mit Klammern).\n", "utf-8")
    code, printed = answered("verify", "--text", str(text), "--task", "mlm", "--dtype", "fp16")
    assert code == 0, printed
    assert "a trained BERT" in printed and "EQUAL: 1 of 1 models" in printed


def test_verify_without_the_trained_model_says_so(monkeypatch):
    monkeypatch.setattr("fastbert.cli.source._TRAINED", "no_such_package")
    source = Source.open(None, None)
    assert "small random" in source.name
    model, batch = source.load("mlm", torch.float32, torch.device("cpu"), 2, 24)
    assert fastbert.verify(model, batch).ok


def test_verify_exits_1_when_anything_differs(small_model, answered, monkeypatch):
    monkeypatch.setenv("FASTBERT_DISABLE", "1")
    code, text = answered("verify", str(small_model), "--task", "base")
    assert code == 1, text
    assert "NOTHING VERIFIED: no kernel ran in 1 of 1 models" in text and "no kernel\n" in text and "DIFFER" not in text


def test_verify_counts_the_models_that_differ():
    right, wrong = (SimpleNamespace(outputs=[SimpleNamespace(ok=ok)], gradients=[], kernel_calls=1) for ok in (True, False))
    idle = SimpleNamespace(outputs=[SimpleNamespace(ok=True)], gradients=[], kernel_calls=0)
    assert verdict([right, right, wrong, idle]) == "DIFFERENT: 1 of 4 models"
    assert verdict([right, idle]) == "NOTHING VERIFIED: no kernel ran in 1 of 2 models"
    assert verdict([right, right]) == "EQUAL: 2 of 2 models"


def test_report_prints_the_table(small_model, tmp_path, answered):
    data = tmp_path / "rows.json"
    code, text = answered("report", str(small_model), "--json", str(data))
    assert code == 0, text
    assert "fastbert on BertForTokenClassification: 3 of 3" in text
    assert {row["kernel"] for row in json.loads(data.read_text())} == {
        None,
        "attention, dropout_add_layernorm, bias_gelu",
        "embedding_layernorm",
    }


def test_env_prints_versions(answered):
    code, text = answered("env")
    assert code == 0, text
    for name in ("fastbert", "torch", "triton", "transformers", "GPU"):
        assert name in text


def test_wrong_arguments(input_error):
    assert "--task" in (error := input_error("verify", "--task", "juggling")) and "juggling" in error
    assert "--dtype" in (error := input_error("verify", "--dtype", "int4")) and "int4" in error


@pytest.mark.parametrize("command", ["verify", "report"])
def test_missing_model_directory(input_error, command):
    assert input_error(command, "./no/such/model") == "error: MODEL: there is no directory ./no/such/model"


@pytest.mark.long  # `input_error` checks this in this process
def test_an_error_is_no_traceback():
    done = fastbert_command("verify", "./no/such/model")
    assert done.returncode == 2 and "Traceback" not in done.stderr and "error: MODEL" in done.stderr


def test_directory_that_is_no_model(input_error, tmp_path):
    assert "config.json" in input_error("verify", str(tmp_path))


def test_model_of_another_family(input_error, tmp_path):
    MPNetConfig().save_pretrained(tmp_path)
    message = input_error("verify", str(tmp_path))
    assert "is a 'mpnet' model; supported are 'bert', 'roberta', 'xlm-roberta', 'camembert'" in message


@pytest.mark.parametrize("config", [XLMRobertaConfig, DistilBertConfig], ids=lambda config: config.model_type)
def test_verify_other_families(config, answered, tmp_path):
    source = _small_source()
    size = {"vocab_size": len(source.tokenizer), "pad_token_id": source.tokenizer.pad_token_id, "max_position_embeddings": 26}
    layers = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "type_vocab_size": 2,
    }
    if config is DistilBertConfig:
        layers = {"dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2}
    torch.manual_seed(0)
    AutoModelForTokenClassification.from_config(config(**size, **layers)).save_pretrained(tmp_path)
    source.tokenizer.save_pretrained(tmp_path)
    code, printed = answered("verify", str(tmp_path))
    assert code == 0, printed
    tasks = 6 if config is DistilBertConfig else 7
    assert f"EQUAL: {tasks} of {tasks} models" in printed and f"{config.__name__.removesuffix('Config')}ForMaskedLM" in printed
    code, printed = answered("report", str(tmp_path))
    assert code == 0 and "ForTokenClassification" in printed


def test_positions_of_roberta_start_behind_the_padding(input_error, tmp_path):
    source = _small_source()
    size = {"vocab_size": len(source.tokenizer), "hidden_size": 16, "num_attention_heads": 2, "pad_token_id": 1}
    source.tokenizer.save_pretrained(tmp_path)
    XLMRobertaConfig(**size, max_position_embeddings=9).save_pretrained(tmp_path)
    assert "takes texts of 7 tokens" in input_error("verify", str(tmp_path))
    XLMRobertaConfig(**size, max_position_embeddings=10).save_pretrained(tmp_path)
    assert Source.open(str(tmp_path), None).positions == 8


def test_a_task_that_a_family_lacks(input_error, tmp_path):
    source = _small_source()
    config = DistilBertConfig(vocab_size=len(source.tokenizer), dim=16, hidden_dim=32, n_layers=1, n_heads=2)
    config.save_pretrained(tmp_path)
    source.tokenizer.save_pretrained(tmp_path)
    message = input_error("verify", str(tmp_path), "--task", "nsp")
    assert message == "error: --task nsp: DistilBERT has no class for it"


def test_model_without_a_tokenizer(input_error, tmp_path):
    BertConfig().save_pretrained(tmp_path)
    assert "has no tokenizer" in input_error("verify", str(tmp_path))


def test_model_without_weights(input_error, tmp_path):
    BertConfig().save_pretrained(tmp_path)
    _small_source().tokenizer.save_pretrained(tmp_path)
    assert "has no weights" in input_error("verify", str(tmp_path))


@pytest.fixture
def saved(tmp_path):
    """Save a tiny model with `config` and the trained model's tokenizer, or another one; returns the folder."""

    def save(tokenizer=None, **config) -> str:
        found = tokenizer or AutoTokenizer.from_pretrained(Source.open(None, None).path)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        BertModel(BertConfig(**sizes | {"vocab_size": len(found)} | config)).save_pretrained(tmp_path)
        found.save_pretrained(tmp_path)
        return str(tmp_path)

    return save


@pytest.mark.parametrize("command", ["verify", "report"])
def test_tokenizer_with_more_words_than_the_model(input_error, saved, command):
    error = input_error(command, path := saved(vocab_size=2000))
    assert f"MODEL: in {path} the tokenizer has 30522 tokens and the model 2000 embeddings" in error
    assert "resize_token_embeddings(30522)" in error


def test_words_that_were_added_to_the_tokenizer_alone(input_error, saved):
    tokenizer = _small_source().tokenizer
    words = len(tokenizer)
    tokenizer.add_tokens(["mitochondrion", "ribosome"])
    assert f"{words + 2} tokens and the model {words} embeddings" in input_error("report", saved(tokenizer, vocab_size=words))


def test_fewer_words_than_embeddings_are_fine(answered, saved):
    assert answered("report", saved(vocab_size=30528))[0] == 0


def test_model_with_fewer_token_types_than_its_tokenizer(input_error, answered, saved):
    """Only tasks with pairs of texts fail; the others run."""
    path = saved(type_vocab_size=1)
    error = input_error("verify", path)
    assert "2 token types and the model has 1 (type_vocab_size)" in error and "the task pretraining" in error
    assert answered("verify", path, "--task", "base")[0] == 0


@pytest.mark.parametrize("command", ["verify", "report"])
def test_model_for_very_short_texts(input_error, answered, saved, command):
    path = saved(max_position_embeddings=7)
    assert "takes texts of 7 tokens (max_position_embeddings); 8 or more are needed" in input_error(command, path)


@pytest.mark.parametrize("task", TASKS)
def test_shortest_texts_are_long_enough_for_every_task(saved, task):
    source = Source.open(saved(max_position_embeddings=8), None)
    model, batch = source.load(task, torch.float32, torch.device("cpu"), 2, 24)
    assert batch["input_ids"].shape[-1] == 8 and model(**batch)


@pytest.mark.parametrize(("token", "arguments"), [("mask", ()), ("pad", ("--task", "base"))])
def test_tokenizer_that_lacks_a_token(input_error, saved, token, arguments):
    tokenizer = _small_source().tokenizer
    setattr(tokenizer, f"{token}_token", None)
    assert f"MODEL: its tokenizer has no {token}" in input_error("verify", saved(tokenizer), *arguments)


def test_weights_that_are_damaged(input_error, saved):
    path = saved()
    Path(path, "model.safetensors").write_bytes(b"damaged")
    assert "has no weights that can be read" in input_error("verify", path, "--task", "base")


def test_a_release_without_one_of_the_classes(input_error, answered, monkeypatch):
    """Its task is left out, and requesting it names the missing class."""
    from transformers.models.bert import modeling_bert

    import fastbert.cli.tasks

    names = list(TASKS)
    with monkeypatch.context() as older:
        older.delattr(modeling_bert, "BertForNextSentencePrediction")
        reloaded = runpy.run_path(fastbert.cli.tasks.__file__)
    assert list(reloaded["TASKS"]) == [name for name in names if name != "nsp"]
    monkeypatch.delitem(TASKS, "nsp")
    assert "--task nsp: transformers" in (error := input_error("verify", "--task", "nsp"))
    assert "has no BertForNextSentencePrediction" in error


@pytest.mark.parametrize("content", ["", " \n\n"])
def test_text_file_without_text(input_error, tmp_path, content):
    text = tmp_path / "empty.txt"
    text.write_text(content)
    assert input_error("verify", "--text", str(text)) == f"error: --text: {text} has no text in it"


def test_text_file_that_is_not_text(input_error, tmp_path):
    text = tmp_path / "bytes.txt"
    text.write_bytes(b"\xff\xfe\x00bad")
    assert "--text: cannot read" in input_error("verify", "--text", str(text))


def test_missing_text_file(input_error, tmp_path):
    assert "--text: cannot read" in input_error("verify", "--text", str(tmp_path / "none.txt"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="only without a GPU is bfloat16 an input error")
def test_bf16_without_a_gpu_is_refused(input_error):
    assert "--dtype bf16" in input_error("verify", "--dtype", "bf16")
