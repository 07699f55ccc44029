"""What all commands have in common: exit codes, one line for wrong input, JSON, progress, completion."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from fastbert import startup
from fastbert.cli import commands, output
from fastbert.errors import InputError

COMMANDS = ("verify", "report", "doctor", "env", "hub")


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)], ids=lambda command: " ".join(command) or "fastbert")
def test_help_has_the_exit_codes(fastbert_says, command):
    code, out, _ = fastbert_says(*command, "--help")
    assert code == 0 and output.EXIT_CODES in " ".join(out.split())


def test_without_a_command_there_is_help(fastbert_says):
    code, out, _ = fastbert_says()
    assert code == 0 and all(f"\n  {name} " in out for name in COMMANDS)


@pytest.mark.parametrize(
    "arguments",
    [
        ("no-such-command",),
        ("--no-such-option",),
        ("verify", "--no-such-option"),
        ("verify", "--task", "juggling"),
        ("verify", "--task"),
        ("verify", "one", "two"),
        ("hub",),
        ("report", "./no/such/model"),
        ("env", "--json", "no/such/folder/x.json"),
        ("env", "--json", "."),
    ],
    ids=" ".join,
)
def test_wrong_input_is_one_line_and_2(fastbert_says, arguments):
    code, out, err = fastbert_says(*arguments)
    lines = [line for line in err.splitlines() if not line.startswith("no NVIDIA GPU here")]
    assert (code, out) == (2, "") and len(lines) == 1 and lines[0].startswith("error: ")


def test_ctrl_c_is_130(fastbert_says, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "environment", interrupted)
    code, _, err = fastbert_says("env")
    assert code == 130 and "Traceback" not in err


def test_ctrl_c_during_the_imports_is_silent(tmp_path):
    """The import of torch takes seconds, before the command line can catch anything; this one is interrupted."""
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt\n")
    command = [sys.executable, "-m", "fastbert", "env"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_other_errors_keep_their_traceback(capsys):
    startup.silent_when_interrupted(ValueError, ValueError("what"), None)
    assert "ValueError: what" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [("env",), ("env", "--json", "-")], ids=" ".join)
def test_a_full_disk_is_one_line_and_2(fastbert_says, monkeypatch, arguments):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        code, _, err = fastbert_says(*arguments)
        full.buffer.raw.close()  # which drops what could not be written
    assert (code, err) == (2, "error: cannot write the output: No space left on device\n")


def test_json_to_a_file_leaves_the_output_alone(fastbert_says, tmp_path):
    file = tmp_path / "env.json"
    code, out, _ = fastbert_says("env", "--json", file)
    found = json.loads(file.read_text())
    assert code == 0 and found["torch"].startswith(torch.__version__) and f"torch:{' ' * 18}{found['torch']}" in out


@pytest.mark.parametrize("arguments", [("env",), ("report", "--task", "base")], ids=" ".join)
def test_json_to_stdout_is_alone_there(fastbert_says, arguments):
    code, out, _ = fastbert_says(*arguments, "--json", "-")
    assert code == 0 and json.loads(out)


def test_what_a_library_prints_is_not_in_the_json(fastbert_says, monkeypatch):
    """deepspeed, for one, prints a line at its import."""
    monkeypatch.setattr(commands, "environment", lambda: print("a library's line") or {"torch": "2.13"})
    code, out, err = fastbert_says("env", "--json", "-")
    assert code == 0 and json.loads(out) == {"torch": "2.13"} and "a library's line" in err


def test_every_command_has_json():
    group = typer.main.get_command(commands.app)
    assert set(group.commands) == set(COMMANDS)
    for name, command in group.commands.items():
        assert any("--json" in parameter.opts for parameter in command.params), name


def test_json_is_strict(tmp_path):
    file = tmp_path / "x.json"
    output.write_json({"error": float("inf"), "all": [float("nan"), 1.0], "name": "inf"}, file)
    assert json.loads(file.read_text()) == {"error": None, "all": [None, 1.0], "name": "inf"}


def test_json_that_cannot_be_written(tmp_path):
    with pytest.raises(InputError, match="--json: cannot write"):
        output.write_json({}, tmp_path)


@pytest.mark.parametrize(
    ("terminal", "json_file", "shown"),
    [(True, None, True), (True, "x.json", True), (True, "-", False), (False, None, False)],
)
def test_progress_is_shown_on_a_terminal_only(monkeypatch, capsys, terminal, json_file, shown):
    monkeypatch.setattr(output, "err", Console(stderr=True, force_terminal=terminal))
    with output.progress("verifying", json_file and output.Path(json_file)) as begin:
        begin("BertModel", 0, 2)
    printed = capsys.readouterr()
    assert printed.out == "" and ("BertModel" in printed.err) is shown


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_can_be_installed(shell):
    assert "--show-completion" in CliRunner().invoke(commands.app, ["--help"]).output
    done = CliRunner().invoke(commands.app, [], prog_name="fastbert", env={"_FASTBERT_COMPLETE": f"source_{shell}"})
    assert done.exit_code == 0 and "_FASTBERT_COMPLETE" in done.output


def completions(*words):
    line = " ".join(("fastbert", *words))
    env = {"_FASTBERT_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words))}
    return CliRunner().invoke(commands.app, [], prog_name="fastbert", env=env).output.split()


def test_commands_options_and_choices_are_completed():
    assert completions("ver") == ["verify"]
    assert completions("verify", "--ta") == ["--task"]
    assert completions("verify", "--task", "multi") == ["multiple-choice"]


def test_a_model_is_completed_to_folders(tmp_path):
    for name in ("bert-a", "bert-b", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "bert-file").touch()
    assert completions("report", f"{tmp_path}/bert") == [f"{tmp_path}/bert-a", f"{tmp_path}/bert-b"]
    assert commands.folders(f"{tmp_path}/none/x") == []
