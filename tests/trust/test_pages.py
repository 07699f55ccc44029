"""Names, reasons and labels of results files are shown as they are: nothing in them is obeyed by a browser or a terminal."""

import dataclasses
import io

import pytest
from rich.console import Console

from bench.core import options, schema
from bench.core.records import StageRecord
from bench.report import files, page, tables
from bench.report.table import Table, literal
from tests.bench.report.test_report import SAMPLE

HOSTILE = "<script>x()</script> ![p](http://x/y) <!-- /bench:ops --> [red]r[/red] $\\frac{$ a|b \x1b[2J\r\n# heading \u202e"


@pytest.fixture(scope="module")
def hostile():
    """The sample results with such a text wherever a text may be chosen freely."""
    sample = schema.read(SAMPLE)
    here = dataclasses.replace(sample.environment, gpu=HOSTILE, commit=HOSTILE)
    models = [dataclasses.replace(record, model=f"{record.model} {HOSTILE}") for record in sample.models]
    ops = [dataclasses.replace(record, op=f"{record.op} {HOSTILE}") for record in sample.ops]
    stages = [StageRecord(HOSTILE, "error", 1.0, HOSTILE)]
    return dataclasses.replace(sample, environment=here, models=models, ops=ops, stages=stages)


def test_the_page_of_html(hostile):
    made = page.render(hostile, [])
    assert "<script" not in made and "<!--" not in made
    assert "&lt;script&gt;" in made, "it is shown"


def test_the_page_of_markdown(hostile, tmp_path):
    made = files.write_markdown(hostile, tmp_path).read_text()
    assert "<script" not in made and "<!--" not in made and "](" not in made
    assert "\x1b" not in made and "\r" not in made and "\u202e" not in made
    assert not [line for line in made.splitlines() if line.startswith("# heading")]
    assert "&lt;script>" in made, "it is shown"


@pytest.mark.parametrize("name", tables.TABLES)
def test_a_marked_table_keeps_its_marker(name, hostile):
    """A marker in a name would end a document's block early, and the next run would leave the rest behind."""
    assert "<!--" not in tables.named(name, hostile)


def test_pictures_draw_it(hostile, tmp_path):
    """Text between dollar signs would be a formula, and this one is not."""
    assert len(files.write(hostile, tmp_path)) > 2


def test_a_cell_is_one_line():
    assert len(Table(("a",), [("x\ny",)]).markdown().splitlines()) == 3
    assert literal("a\n<b> [c](d)") == "a\\n&lt;b> [c]\\(d)"


@pytest.mark.parametrize("name", ["errors", "console"])
def test_the_terminal(name, monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(options, name, Console(file=shown, width=500))
    options.fail(HOSTILE) if name == "errors" else options.print_plainly(HOSTILE)
    text = shown.getvalue().removesuffix("\n")
    assert text.isprintable() and "[red]r[/red]" in text and "\\x1b[2J" in text
