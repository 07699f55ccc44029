"""The faults of `python -m tests.mutation` fit the current tree, and it detects kills correctly. No suite runs here."""

import ast
import re
import signal
from collections import Counter
from dataclasses import replace
from functools import cache

import pytest

from tests.mutation import trees
from tests.mutation.fault import ROOT, Fault
from tests.mutation.faults import FAULTS
from tests.mutation.run import Job, Outcome, by_file, run
from tests.mutation.witness import Statement, statement
from tests.test_layout import specs

OPS = specs(ROOT)


def test_every_fault_can_be_planted():
    assert trees.problems(list(FAULTS)) == []


def test_there_are_enough_and_no_two_are_alike():
    assert len(FAULTS) >= 60
    for what in ("name", "planted"):
        counts = Counter(fault.name if what == "name" else (fault.file, fault.before, fault.after) for fault in FAULTS)
        assert max(counts.values()) == 1, counts.most_common(3)
    assert all(fault.before != fault.after and "\n" not in fault.says for fault in FAULTS)


def test_a_planted_file_still_parses():
    for fault in FAULTS:
        ast.parse(fault.planted((ROOT / fault.file).read_text()), fault.name)


def test_every_op_has_two_in_the_short_form():
    short = Counter(fault.op for fault in FAULTS if fault.short and fault.op)
    assert set(short) == OPS and all(n == 2 for n in short.values()), short
    assert {fault.op for fault in FAULTS} - {""} == OPS


def names(path):
    """The names of all functions and classes of a file, methods too."""
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def test_every_test_exists():
    tests_of = cache(names)
    for fault in FAULTS:
        named = [argument for argument in fault.tests if argument.startswith("tests/")]
        assert named, fault.name
        for argument in named:
            path, _, test = argument.partition("::")
            known = tests_of(ROOT / path)
            assert known.issuperset(filter(None, test.partition("[")[0].split("::"))), f"{fault.name}: there is no {argument}"
        if "-k" in fault.tests:
            words = re.findall(r"test_\w+", fault.tests[fault.tests.index("-k") + 1])
            assert words and any(name.startswith(words[0]) for name in known), fault.name


FAULT = Fault("x is y", "x.py", "x = 1", "x = y", ("tests/test_mutation.py",))


@pytest.mark.parametrize("text", ["", "y = 1\n", "x = 1\nx = 1\n"])
def test_a_text_that_does_not_stand_once_is_refused(text):
    with pytest.raises(ValueError, match="x.py: x is y: its text stands [02] times"):
        FAULT.planted(text)


def test_a_fault_that_fits_no_longer_is_a_problem():
    (problem,) = trees.problems([replace(FAULT, file="pyproject.toml")])
    assert "stands 0 times" in problem
    (problem,) = trees.problems([FAULT])
    assert "x.py" in problem


SAW = Statement(started=["t"], passed=["s"])


@pytest.mark.parametrize(
    ("outcome", "killer"),
    [
        (Outcome(1, replace(SAW, failed=["t"]), 0, 0, False, ""), "t"),
        (Outcome(-signal.SIGXCPU, SAW, 0, 0, True, ""), "t (hung)"),
        (Outcome(-signal.SIGSEGV, SAW, 0, 0, False, ""), "t (SIGSEGV)"),
        (Outcome(0, SAW, 0, 0, False, ""), None),
        (Outcome(1, SAW, 0, 0, False, ""), None),  # a fork that failed outside pytest
        *((Outcome(code, SAW, 0, 0, False, ""), None) for code in (2, 3, 4, 5, 70)),
        (Outcome(1, replace(SAW, failed=["t"], uncollected=["u"]), 0, 0, False, ""), None),
        (Outcome(-signal.SIGSEGV, Statement(), 0, 0, False, ""), None),  # died during imports
    ],
)
def test_what_is_a_kill(outcome, killer):
    assert outcome.killer == killer


@pytest.mark.parametrize(
    ("code", "passed", "missing"),
    [
        (0, ["a.py::t[1]", "b.py::u"], []),
        (0, ["a.py::t"], ["b.py"]),  # all tests of b.py were skipped
        (1, ["a.py::t", "b.py::u"], ["a.py::t", "b.py"]),
        (5, [], ["a.py::t", "b.py"]),
    ],
)
def test_tests_that_did_not_run_did_not_pass(code, passed, missing):
    outcome = Outcome(code, Statement(passed=passed), 0, 0, False, "")
    assert outcome.not_passed(("a.py::t", "b.py", "-k", "t or u")) == missing


def test_runs_without_faults_are_by_file():
    selections = [("a.py::t",), ("a.py", "-k", "u"), ("a.py::v", "b.py::w"), ("a.py::t",), ("a.py", "-k", "u")]
    assert by_file(selections) == [("a.py::t", "a.py::v"), ("b.py::w",), ("a.py", "-k", "u")]


ENDS = {
    "passes": "def test(): pass",
    "fails": "def test(): assert False",
    "hangs": "def test():\n    while True: pass",
    "dies": "import os\ndef test(): os.abort()",
    "does not import": "import nothing_of_this_name\ndef test(): pass",
    "has no test": "",
}


def test_how_runs_end(tmp_path):
    outcomes = {}
    for name, text in ENDS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "test_it.py").write_text(text)

    def job(name):
        seconds = 3 if name == "hangs" else 60
        return Job(lambda: tmp_path / name, ("test_it.py",), lambda ended, tree: outcomes.update({tree.name: ended}), seconds)

    run(map(job, ENDS), 2)
    assert {name for name, outcome in outcomes.items() if outcome.code == 0} == {"passes"}
    assert {name: outcome.killer for name, outcome in outcomes.items() if outcome.killer} == {
        "fails": "test_it.py::test",
        "hangs": "test_it.py::test (hung)",
        "dies": "test_it.py::test (SIGABRT)",
    }
    assert outcomes["does not import"].code == 2 and outcomes["has no test"].code == 5
    assert statement(tmp_path / "passes" / "seen.txt").passed == ["test_it.py::test"]


def test_a_copy_keeps_the_link_and_drops_what_was_compiled_of_the_planted_file(tmp_path):
    source = tmp_path / "source"
    (source / "kernels" / "__pycache__").mkdir(parents=True)
    (source / "fastbert").mkdir()
    (source / "fastbert" / "kernels").symlink_to("../kernels")
    (source / "kernels" / "x.py").write_text("x = 1\n")
    for name in ("x", "xy"):
        (source / "kernels" / "__pycache__" / f"{name}.cpython-311.pyc").touch()
    (source / ".git").mkdir()
    tree = trees.copy(source, tmp_path / "tree")
    trees.plant(replace(FAULT, file="fastbert/kernels/x.py"), tree)
    assert (tree / "kernels" / "x.py").read_text() == "x = y\n" and (source / "kernels" / "x.py").read_text() == "x = 1\n"
    assert [path.name for path in (tree / "kernels" / "__pycache__").iterdir()] == ["xy.cpython-311.pyc"]
    assert not (tree / ".git").exists()
