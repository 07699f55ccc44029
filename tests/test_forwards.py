"""Digests of stock forwards: what changes them and what does not, and which code counts as transformers'."""

import ast
import functools
import importlib.util
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.bert import modeling_bert

import fastbert
from fastbert import forwards
from fastbert.layers import stock

PLAIN = """
def forward(self, x, scale=1.0, *args, **kwargs):
    y = self.dense(x) * scale
    return f"{y!r:>4} of" "x", y
"""
FORWARD = modeling_bert.BertIntermediate, "forward"
numbers = itertools.count()


@pytest.fixture
def released(tmp_path, monkeypatch):
    """Makes a module of an invented transformers release in a separate folder."""
    folder = tmp_path / "transformers"
    folder.mkdir()
    monkeypatch.setattr(transformers, "__file__", str(folder / "__init__.py"))
    monkeypatch.setattr(transformers, "__version__", "5.99.0")
    return lambda text: load(folder, text)


def load(folder, text):
    path = folder / f"modeling_{next(numbers)}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def put(monkeypatch):
    """Replaces the stock forward of BertIntermediate until the test ends."""
    return lambda function: monkeypatch.setattr(*FORWARD, function)


@pytest.fixture(autouse=True)
def nothing_accepted(monkeypatch):
    monkeypatch.setattr(forwards, "_accepted", {})


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("):\n", '):\n    """What it does."""\n'),
        ("):\n", ") -> tuple[int]:\n"),
        ("x, scale", "x: int, scale: float"),
        ("*args, **kwargs", "*args: int, **kwargs: str"),
        ("y =", "y: int ="),
        ("    y =", "    z: int\n    y ="),
        ("    y =", "\n    # a comment\n    y ="),
        ("self.dense(x) * scale", "(\n        self.dense(x)\n        * scale\n    )"),
        ('"x"', "'x'"),
        ("scale=1.0", "scale=1.00"),
    ],
)
def test_documentation_changes_no_digest(released, old, new):
    plain, other = released(PLAIN).forward, released(PLAIN.replace(old, new, 1)).forward
    assert forwards.digest(plain) == forwards.digest(other) is not None


def test_words_of_auto_docstring_change_no_digest(released):
    text = "def auto_docstring(function):\n    return function\n\n@auto_docstring\n" + PLAIN.lstrip()
    worded = text.replace("return function", "return lambda f: f").replace("@auto_docstring", "@auto_docstring('words')")
    assert forwards.digest(released(text).forward) == forwards.digest(released(worded).forward) is not None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("x) * scale", "x) + scale"),
        ("1.0", "1"),
        ("1.0", "2.0"),
        ("scale=1.0", "scale"),
        ("scale", "factor"),
        ("scale=1.0", "factor=1.0"),
        ("self.dense(x)", "self.dense(scale)"),
        ("*args, ", ""),
        ("*args, **kwargs", "*, args, **kwargs"),
        ("!r", "!s"),
        (">4", ">5"),
        (" of", " by"),
        ("    return", "    y = y\n    return"),
        (PLAIN, "import functools\n\n@functools.cache\n" + PLAIN.lstrip()),
        ("def forward", "async def forward"),
    ],
)
def test_code_changes_the_digest(released, old, new):
    plain, other = released(PLAIN).forward, released(PLAIN.replace(old, new)).forward
    assert forwards.digest(plain) != forwards.digest(getattr(other, "__wrapped__", other))


def test_arguments_of_a_decorator_count(released):
    text = "def known(name):\n    return lambda f: f\n\n@known('a')\n" + PLAIN.lstrip()
    digests = [forwards.digest(released(text.replace("'a'", name)).forward) for name in ("'a'", '"a"', "'b'")]
    assert digests[0] == digests[1] != digests[2]


def test_a_method_with_lines_at_the_margin(released):
    text = 'class A:\n    def forward(self):\n        """Of\nthree\nlines."""\n        return """\nx"""\n'
    assert forwards.digest(released(text).A.forward) == forwards.digest(released('def forward(self): return "\\nx"').forward)


def test_another_python_gives_the_same_digest(released, monkeypatch):
    """A Python whose AST has an additional field per function, like the type parameters of 3.12."""
    before = forwards.digest(released(PLAIN).forward)
    monkeypatch.setattr(ast.FunctionDef, "_fields", (*ast.FunctionDef._fields, "type_params", "news", "more"))
    monkeypatch.setattr(ast.FunctionDef, "news", None, raising=False)
    monkeypatch.setattr(ast.FunctionDef, "more", [], raising=False)
    monkeypatch.setattr(ast.FunctionDef, "type_params", ["T"], raising=False)
    assert forwards.digest(released(PLAIN).forward) == before


def test_the_table_has_all_of_the_installed_release():
    pairs = stock.covered()
    assert {forwards.reason(*pair) for pair in pairs} == {None}
    assert sorted(forwards.table()) == sorted({forwards.label(*pair) for pair in pairs})
    assert all(hasattr(*pair) for code in stock.CODE.values() for pair in code.pairs)


def test_importing_it_imports_nothing_that_brings_triton():
    code = (
        "import importlib.util as u, sys; spec = u.spec_from_file_location('forwards', sys.argv[1]);"
        "spec.loader.exec_module(u.module_from_spec(spec)); print({'triton', 'transformers', 'torch'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code, forwards.__file__], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def mine(self, hidden_states):
    return hidden_states


class Callable:
    def __call__(self, hidden_states):
        return hidden_states


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (mine, "mine"),
        (functools.wraps(modeling_bert.BertIntermediate.forward)(lambda self, x: x), "<lambda>"),
        (functools.partialmethod(mine), "_method"),
        (functools.partial(mine), "a partial"),
        (Callable(), "a Callable"),
        (torch.nn.Linear.forward, "Linear.forward"),
        (torch.no_grad()(modeling_bert.BertIntermediate.forward), "decorate_context"),
        (transformers.utils.can_return_tuple(mine), "wrapper"),
    ],
)
def test_what_is_not_transformers_code_is_replaced(put, function, name):
    put(function)
    assert forwards.digest(getattr(*FORWARD)) is None
    assert forwards.reason(*FORWARD) == f"BertIntermediate.forward was replaced by {name}"


def test_replaced_and_put_back(put):
    stock, code = getattr(*FORWARD), forwards.Code((modeling_bert.BertOutput, "forward"), FORWARD)
    assert code.untested() is None
    put(mine)
    assert "mine" in code.untested() and "mine" in forwards.reason(*FORWARD)
    put(stock)
    assert code.untested() is None and forwards.reason(*FORWARD) is None


def test_one_that_is_gone_and_back(monkeypatch):
    pair = modeling_bert, "eager_attention_forward"
    code = forwards.Code(FORWARD, pair)
    assert code.untested() is None
    with monkeypatch.context() as without:
        without.delattr(*pair)
        assert code.untested() == f"eager_attention_forward does not exist (transformers {transformers.__version__})"
    assert code.untested() is None


def test_a_function_of_a_module(monkeypatch):
    pair = modeling_bert, "eager_attention_forward"
    assert forwards.reason(*pair) is None
    monkeypatch.setattr(*pair, mine)
    assert forwards.reason(*pair) == "eager_attention_forward was replaced by mine"


def test_another_function_of_transformers(put):
    put(modeling_bert.BertOutput.forward)
    expected = "BertIntermediate.forward is not one that fastbert was tested against"
    assert forwards.reason(*FORWARD) == f"{expected} (transformers {transformers.__version__})"


def test_a_release_to_come(released, monkeypatch):
    release = released("class BertIntermediate:\n    def forward(self, x, news=None):\n        return x\n")
    name = "BertIntermediate.forward"
    assert forwards.reason(release.BertIntermediate, "forward") == (
        f"{name} is not one that fastbert was tested against (transformers 5.99.0)"
    )
    assert forwards.reason(release.BertIntermediate, "other") == "BertIntermediate.other does not exist (transformers 5.99.0)"


def test_without_a_source_nothing_is_vouched_for(released):
    release = released("class BertIntermediate:\n    def forward(self, x):\n        return x\n")
    Path(release.__file__).write_text("")
    assert "has no source" in forwards.reason(release.BertIntermediate, "forward")


def test_accepted_for_this_process(put):
    code = forwards.Code(FORWARD)
    put(mine)
    assert code.untested() is not None
    forwards.accept(code)
    assert code.untested() is None and forwards.reason(*FORWARD) is None
    assert "mine" in code.untested(strict=True) and "mine" in forwards.reason(*FORWARD, strict=True)
    put(lambda self, x: x)
    assert "<lambda>" in code.untested(), "what came after was not vouched for"


def test_nothing_is_read_twice(monkeypatch):
    code = forwards.Code(*stock.covered())
    assert code.untested() is None
    monkeypatch.setattr(forwards, "_judge", None)
    monkeypatch.setattr(forwards, "reason", None)
    assert code.untested() is None


def test_answers_while_compiling_take_constants():
    """torch up to 2.11 passes no object but these to a function marked `assume_constant_result`."""
    sources = sorted(Path(fastbert.__file__).parent.rglob("*.py"))
    marked = [
        function
        for source in sources
        for function in ast.walk(ast.parse(source.read_text()))
        if isinstance(function, ast.FunctionDef)
        and any("assume_constant_result" in ast.unparse(decorator) for decorator in function.decorator_list)
    ]
    taken = {ast.unparse(argument.annotation) for function in marked for argument in function.args.args}
    assert marked and taken <= {"str", "str | None", "tuple[str, ...]", "type", "torch.device", "torch.dtype"}, taken
