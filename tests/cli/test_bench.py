"""What the commands of `python -m bench` have in common: exit codes, one line for wrong input, JSON, progress."""

import json
import subprocess
import sys

import pytest
import typer

from bench import __main__ as program
from bench.core import options
from tests.cli.conftest import Answer
from tests.packaging.environments import ROOT

COMMANDS = (
    *("audit", "layer", "gpu", "models", "latency", "encode", "ops", "host", "tune", "accept", "report", "scaling", "train"),
    "input",
)


@pytest.fixture
def bench_says(monkeypatch, capsys):
    """Run `python -m bench ARGUMENTS` in this process; returns the exit code and what it printed."""

    def run(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["bench", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            options.run(program.app)
        return Answer(stop.value.code, *capsys.readouterr())

    return run


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)], ids=lambda command: " ".join(command) or "bench")
def test_help_has_the_exit_codes(bench_says, command):
    code, out, _ = bench_says(*command, "--help")
    assert code == 0 and options.EXIT_CODES in " ".join(out.split())


def test_every_command_has_json():
    group = typer.main.get_command(program.app)
    assert set(group.commands) == set(COMMANDS)
    for name, command in group.commands.items():
        assert any("--json" in parameter.opts for parameter in command.params), name


@pytest.mark.parametrize(
    "arguments",
    [
        ("no-such-command",),
        ("scaling", "--model", "huge"),
        ("scaling", "--gpus", "twelve"),
        ("report", "no-such-results.json"),
        ("accept", "no-such-folder"),
        ("train", "--task", "mlm"),
        ("layer", "--json", "."),
    ],
    ids=" ".join,
)
def test_wrong_input_is_one_line_and_2(bench_says, arguments):
    code, out, err = bench_says(*arguments)
    assert (code, out) == (2, "") and len(err.splitlines()) == 1


def test_ctrl_c_is_130(bench_says, monkeypatch):
    from bench.host import layer_traffic

    def interrupted(*shape):
        raise KeyboardInterrupt

    monkeypatch.setattr(layer_traffic, "of_layer", interrupted)
    code, _, err = bench_says("layer")
    assert code == 130 and "Traceback" not in err


def test_json_to_stdout_is_alone_there(bench_says, tmp_path):
    code, out, _ = bench_says("layer", "--json", "-")
    shapes = json.loads(out)
    assert code == 0 and [(one["rows"], one["tokens"]) for one in shapes] == [(32, 128), (16, 512)]
    assert all(one["launches"].keys() == one["moved"].keys() for one in shapes)
    code, out, _ = bench_says("layer", "--json", tmp_path / "made" / "layer.json")
    assert code == 0 and "A BERT-base layer" in out, "quiet again"
    assert json.loads((tmp_path / "made" / "layer.json").read_text()) == shapes


@pytest.fixture
def without(monkeypatch):
    """Pretend that `python -m bench layer` imports a module that is not there."""
    from bench.host import layer_traffic

    def pretend(module):
        def imports(*shape):
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)

        monkeypatch.setattr(layer_traffic, "of_layer", imports)

    return pretend


def test_a_package_of_the_extra_that_is_not_installed(bench_says, without):
    without("matplotlib.pyplot")
    code, out, err = bench_says("layer")
    assert (code, out) == (2, "")
    assert err.splitlines() == ['error: matplotlib is not installed: pip install -c constraints.txt -e ".[bench]"']


def test_a_module_of_ours_that_is_gone_is_a_fault(bench_says, without):
    without("bench.gone")
    with pytest.raises(ModuleNotFoundError, match="bench.gone"):
        bench_says("layer")


def test_nothing_imports_triton_before_a_command_chose_the_interpreter():
    begin = "import sys, bench.__main__; bench.__main__.leave_stdout_to(None)"
    check = "print(sorted({'fastbert', 'torch', 'triton'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", f"{begin}; {check}"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done
