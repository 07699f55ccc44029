"""The commands of README.md and docs/: the programs that they name take their words, and quick ones run."""

import shlex

import pytest
import torch

from bench.train import report
from tests.bench.train.training import FILES, invoke, save_model
from tests.docs.blocks import Block, blocks, pages
from tests.docs.commands import Refused, check, commands

COMMANDS = {shlex.join(words): words for page in pages() for b in blocks(page) if b.language == "sh" for words in commands(b)}


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_command_is_taken(command):
    check(COMMANDS[command])


def test_words_of_a_block():
    text = "A=1 pip install . && fastbert env  # why\n\npython -m bench ops \\\n  --op 'a b'\n"
    words = list(commands(Block("page", 1, "sh", text)))
    assert words == [["pip", "install", "."], ["fastbert", "env"], ["python", "-m", "bench", "ops", "--op", "a b"]]


@pytest.mark.parametrize(
    "command",
    [
        "fastbert verify --txt FILE",
        "fastbert verify --dtype fp7",
        "fastbert prove",
        "python -m fastbert hub",
        "python -m bench train --task mlm",
        "python -m bench train --task other --data FILE",
        "python -m bench gpu --budget much",
        "python -m tests.releases run --release 5.0.0",
        "python -m pytest -n 2 tests/nowhere",
        "python -m pytest --numproc 2",
        "pip install -c constraint.txt .",
        "pip install -e '.[docs,other]'",
        "pip install something",
        "torchrun --nproc 8 --no-such-option -m bench train --task mlm --data FILE",
        "torchrun --nproc-per-node 8 -m bench train --task mlm --data FILE --no-such-option",
        "accelerate launch --num_gpus 8 train.py",
        "accelerate launch --num_processes 8 -m bench train --task mlm",
        "rm -r bench-out",
    ],
)
def test_a_wrong_command_is_noticed(command):
    with pytest.raises(Refused):
        check(shlex.split(command))


def test_windows_are_trained_by_the_command_of_the_page(tmp_path):
    """docs/long-texts.md, on a small file and model, in smaller windows."""
    (words,) = [words for words in COMMANDS.values() if "--windows" in words]
    torch.manual_seed(0)
    said = {"reviews.tsv": str(FILES["classification"]), "path/to/bert": str(save_model(tmp_path / "model")), "128": "4"}
    arguments = [said.get(word, word) for word in words[4:]]
    code, text = invoke(*arguments, "--steps", 1, "--max-length", 16, "--lane", "stock", "--out", tmp_path / "out")
    assert code == 0, text
    data = report.read(tmp_path / "out" / report.RESULTS).data
    assert data.windows == "overlap: windows of 16 tokens that share 4, at most 8 of a text; pooling of their logits: mean"
