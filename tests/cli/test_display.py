"""Reports and results in 80 columns, in wide ones, and as HTML in which what a user named is escaped."""

from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO

import pytest
import torch
from rich.console import Console

from fastbert import display
from fastbert.numerics import Comparison
from fastbert.report import Report, Row
from fastbert.verify import VerifyResult

LAYER = "attention, dropout_add_layernorm, bias_gelu"
LONG = "bert.encoder.layer.11.attention.output.LayerNorm.weight"
HOSTILE = "<script>alert('&')</script>"
WHY = "tensors on cpu: the kernels need an NVIDIA GPU"
ROWS = (
    Row("bert.embeddings", "BertEmbeddings", "embedding_layernorm", "fell back", WHY, 0, {WHY: 3}),
    Row("bert.encoder.layer.0", "BertLayer", LAYER, "active", "", 7, {}),
    Row("bert.encoder.layer.1", "BertLayer", LAYER, "module by module", WHY, 0, {WHY: 3}),
    Row("bert.pooler", "BertPooler", None, "untouched", "no kernel for it in this version", 0, {}),
)
REPORT = Report("XLMRobertaForSequenceClassification", ROWS)
COMPARED = (Comparison("loss", 1e-7, 1e-7, 3e-7, True, None), Comparison(LONG, 2e-3, 1e-5, 3e-5, False, "error 0.002 is over"))
RESULT = VerifyResult(
    *("BertForMaskedLM", torch.float32, torch.device("cpu"), torch.float64),
    *(COMPARED[:1], COMPARED[1:], "bert.encoder.layer.11", 9, REPORT, ("dropout was off for the comparison",)),
)


def printed(result, width):
    out = StringIO()
    Console(file=out, width=width, color_system=None).print(result)
    return [line.rstrip() for line in out.getvalue().splitlines()]


@pytest.mark.parametrize("result", [REPORT, RESULT], ids=["report", "verify"])
@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_line_is_wider_than_the_terminal(result, width):
    assert max(map(len, printed(result, width))) <= width


@pytest.mark.parametrize("result", [REPORT, RESULT], ids=["report", "verify"])
def test_text_is_what_80_columns_show(result):
    assert str(result).splitlines() == printed(result, display.WIDTH)


def test_a_report_in_80_columns_has_classes_and_kernels_below_the_module():
    lines = printed(REPORT, 80)
    at = next(at for at, line in enumerate(lines) if line.startswith("bert.encoder.layer.0"))
    assert lines[at].split() == ["bert.encoder.layer.0", "active", "7", "0"]
    assert lines[at + 1 : at + 3] == ["  BertLayer: attention,", "  dropout_add_layernorm, bias_gelu"]


def test_a_reason_stands_once_below_the_table():
    lines = printed(REPORT, 80)
    assert lines[-2:] == [f"[1] {WHY}", "[2] no kernel for it in this version"]
    assert [line.split()[-1] for line in lines if " 0     3 " in line] == ["[1]", "[1]"]


def test_a_wide_terminal_shows_a_module_in_a_line():
    (line,) = [line for line in printed(REPORT, 200) if line.startswith("bert.encoder.layer.0")]
    assert line.split() == ["bert.encoder.layer.0", "BertLayer", *LAYER.split(), "active", "7", "0"]


def test_a_long_name_is_broken_before_a_dot():
    assert LONG not in str(RESULT)
    text = "".join(line.split("  ")[0].strip() for line in str(RESULT).splitlines() if line.startswith(("bert.enc", " .")))
    assert text == LONG
    assert any(line.startswith(LONG) and line.endswith("DIFFERS") for line in printed(RESULT, 120))


@pytest.mark.parametrize("width", [10, 23, 80])
def test_folding_loses_nothing(width):
    lines = display.fold_name(LONG, width).split("\n")
    assert "".join(line.strip() for line in lines) == LONG
    assert all(len(line) <= width for line in lines if line.count(".") > 1)


def test_the_reason_of_a_difference_is_shown_unless_the_numbers_say_it():
    assert "is over" not in str(RESULT)
    wrong = replace(COMPARED[1], reason="only the eager model has it")
    text = str(replace(RESULT, gradients=(wrong, replace(wrong, name="cls.bias"))))
    assert text.count("DIFFERS [1]") == 2 and text.count("[1] only the eager model has it") == 1


class Tags(HTMLParser):
    """Collects tags and text; a tag that is not closed in order fails."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.text = [], set(), ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert not attrs, "nothing is loaded from elsewhere"
        self.open.append(tag)
        self.seen.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_pages_of_a_notebook_escape_what_a_user_named():
    row = Row(HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE, 1, {HOSTILE: 1})
    wrong = Comparison(HOSTILE, 1.0, 0.0, 0.0, False, HOSTILE)
    shown = Tags(Report(HOSTILE, (row,))._repr_html_())
    assert shown.seen == {"table", "caption", "tr", "th", "td"} and shown.text.count(HOSTILE) == 6
    result = replace(RESULT, model=HOSTILE, outputs=(wrong,), gradients=(), first_divergence=HOSTILE, notes=(HOSTILE,))
    shown = Tags(result._repr_html_())
    assert shown.seen == {"div", "table", "caption", "tr", "th", "td", "p"} and shown.text.count(HOSTILE) == 5


def test_a_page_of_a_result_has_verdict_and_numbers():
    text = Tags(RESULT._repr_html_()).text
    assert "DIFFERENT: 1 tensors" in text and "2.00e-03" in text and "dropout was off" in text


def test_a_result_without_kernels_says_why():
    """The reason that most modules have; that no kernel exists for a pooler is none."""
    idle = replace(RESULT, kernel_calls=0)
    assert f"NOTHING VERIFIED: no call went through a kernel: {WHY}" in " ".join(printed(idle, 80))
    without = printed(replace(idle, report=Report("Model", ROWS[-1:])), 80)
    assert "NOTHING VERIFIED: no call went through a kernel" in without


def test_rich_markup_in_a_name_is_text():
    text = str(Report("[red]M", (replace(ROWS[0], module="[bold]x", reason="[blink]why"),)))
    assert "[red]M" in text and "[bold]x" in text and "[blink]why" in text
