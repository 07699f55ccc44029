"""The readers of `python -m bench train`: each format as users have it, and each fault as one line with its row."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bench.train import data, labels, tasks
from fastbert.errors import InputError
from tests.bench.train.training import FILES, written


@pytest.mark.parametrize(
    ("task", "count", "first"),
    [
        ("classification", 16, {"text": "The soup was hot and the bread was fresh", "label": "good"}),
        ("matching", 14, {"second": "At dawn the boat left the harbour", "label": "1", "row": 2}),
        ("ner", 13, {"tags": ["B-PER", "I-PER", "O", "O", "B-LOC", "O", "O"]}),
        ("qa", 12, {"question": "When was the bridge built?", "answers": ["1357"], "starts": [38]}),
        ("multiple-choice", 12, {"text": "The rain began, so she", "choice": 0, "row": 2}),
        ("mlm", 6, {"row": 1}),
        ("clm", 6, {"row": 1}),
        ("pretraining", 6, {"row": 1}),
    ],
)
def test_every_format(task, count, first):
    rows = data.read(task, FILES[task])
    assert len(rows) == count
    assert rows[0] | first == rows[0]
    assert len({row["row"] for row in rows}) == count, "each row has a number of its own"


def test_documents_or_lines(tmp_path):
    assert [row["row"] for row in data.read("mlm", FILES["mlm"])] == [1, 6, 11, 16, 21, 26]
    lines = data.read("mlm", written(tmp_path, "one\ntwo\n"))
    assert [row["text"] for row in lines] == ["one", "two"]
    assert data.read("pretraining", written(tmp_path, "one\ntwo\n"))[0]["sentences"] == ["one", "two"]


def test_a_cell_of_csv_may_hold_lines_and_commas(tmp_path):
    text = 'context,ending0,ending1,label\n"a,\nb",c,d,1\ne,f,g,0\n'
    rows = data.read("multiple-choice", written(tmp_path, text))
    assert [(row["row"], row["text"], row["choice"]) for row in rows] == [(2, "a,\nb", 1), (4, "e", 0)]


def test_a_byte_order_mark_and_returns_are_no_text(tmp_path):
    rows = data.read("classification", written(tmp_path, b"\xef\xbb\xbfgood food\tyes\r\nbad\tno\r\n"))
    assert [(row["text"], row["label"]) for row in rows] == [("good food", "yes"), ("bad", "no")]


@pytest.mark.parametrize(
    ("task", "content", "said"),
    [
        ("classification", b"good\tyes\nb\xffd\tno\n", "row 2: not UTF-8"),
        ("classification", "", "is empty"),
        ("classification", "\n \n", "is empty"),
        ("classification", "text\tlabel\n", "has no rows"),
        ("classification", "good\tyes\n".encode("utf-16"), "is UTF-16, expected UTF-8: iconv -f UTF-16 -t UTF-8"),
        ("mlm", "good food\n".encode("utf-16-le"), "UTF-16"),
        ("classification", b"good\tyes\nb\0d food for all\tno\n", "row 2: a NUL byte"),
        ("mlm", '{"text": "one"}\n{"text": "two"}\n', "is JSON lines; expected plain text"),
        ("pretraining", '{"text": "one"}\n', "is JSON lines; expected plain text"),
        ("multiple-choice", "context,ending0,ending1\na,b,c\n", "row 1: the column 'label' is missing"),
        ("multiple-choice", "context,ending0,label\na,b,0\n", "row 1: expected two or more columns that begin with 'ending'"),
        ("multiple-choice", "context,ending0,ending1,label\na,b,c,0\na,b,c\n", "row 3: expected 4 columns"),
        ("multiple-choice", "context,ending0,ending1,label\na,b,c,2\n", "row 2: label: expected a number from 0 to 1, got '2'"),
        ("multiple-choice", "context,ending0,ending1,label\na,,c,0\n", "row 2: the column ending0 is empty"),
        ("multiple-choice", 'context,ending0,ending1,label\n"a,b,c,0\n', "not CSV"),
        ("multiple-choice", "ctx1,ending0,ending1,label\na,b,c,0\n", "row 1: the column 'context' is missing; the first line"),
        ("multiple-choice", "premise,choice1,choice2,label\na,b,c,1\na,b,c,1\n", "has no row with the label 0"),
    ],
)
def test_a_fault_is_one_line_with_its_row(task, content, said, tmp_path):
    path = written(tmp_path, content)
    with pytest.raises(InputError) as error:
        data.read(task, path, "--eval-data")
    message = str(error.value)
    assert said in message and message.startswith("--eval-data: ") and str(path) in message and "\n" not in message


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(InputError, match="--data: cannot read .*none.tsv: No such file"):
        data.read("mlm", tmp_path / "none.tsv")


def test_lines_end_with_a_carriage_return_alone(tmp_path):
    assert [row["text"] for row in data.read("mlm", written(tmp_path, b"one\rtwo\r"))] == ["one", "two"]


def test_a_text_may_quote_json(tmp_path):
    assert len(data.read("mlm", written(tmp_path, '{"a": 1}\nis an object\n'))) == 2


@pytest.mark.parametrize(
    ("content", "columns", "context"),
    [
        (",startphrase,sent1,ending0,ending1,label\n0,She,He,ran,sat,1\n", "", "She"),
        ("premise,choice1,choice2,label\nShe,ran,sat,1\nHe,ran,sat,0\n", "", "She"),
        ("what,ending0,ending1,label\nShe,ran,sat,1\n", "context=what", "She"),
        ('{"ctx": "She", "ending0": "ran", "ending1": "sat", "label": 1}\n', "", "She"),
        ("context\tending0\tending1\tlabel\nShe\tran\tsat\t1\n", "", "She"),
    ],
)
def test_other_names_of_a_choice(content, columns, context, tmp_path):
    row = data.read("multiple-choice", written(tmp_path, content), columns=columns)[0]
    assert (row["text"], row["endings"], row["choice"]) == (context, ["ran", "sat"], 1)


def test_labels_are_counted_and_many_are_warned_about():
    rows = [{"label": label} for label in ["10"] * 9 + ["9"] * 4]
    assert labels.lines(rows) == ["--data: 13 rows, labels found: 9 (4), 10 (9)"]
    few = labels.lines([{"label": label} for label in ["a", "a", "b", "c"]])
    assert few[1:] == ["warning: 3 labels are many for 4 rows; are these the labels?"]
    tags = [{"tags": ["O", "O", "B-X"]}, {"tags": ["O"]}]
    assert labels.lines(tags) == ["--data: 4 words, labels found: B-X (1), O (3)"]
    assert labels.lines([{"text": "no labels"}]) == []
    assert ", and 5 more" in labels.lines([{"label": str(i)} for i in range(25)])[0]


PIECES = st.sampled_from(
    [
        *("\t", "\t", "\n", "\n", "\n\n", "\r\n", "\r", " ", ",", ";", '"', "#", "# ", "{", "}", "[", "]", ":", "-", "²", "1"),
        *("2-3", "4.25", "1e400", "O", "B-X", "I-X", "-DOCSTART-", "text", "label", "sentence1", "sentence2", "premise", "id"),
        *("context", "ending0", "ending1", "word", "小", "王0", "en:Ann", "\u3000", "\x0b", "\u2028", "null", "\\ud800"),
        *('{"text": "a", "label": 1}\n', '{"data": [', '{"paragraphs": [', '{"context": "a b", "qas": [', "]}]}]}", "9" * 30),
        '{"question": "a", "answers": [{"text": "b", "answer_start": 2}]}',
    ]
)
CONTENT = st.one_of(st.lists(PIECES, max_size=40).map("".join), st.text(), st.binary(max_size=60))
SUFFIX = st.sampled_from([".tsv", ".csv", ".txt", ".json", ".jsonl", ".conll", ""])
COLUMNS = st.sampled_from(["", "", "", "text=1,label=2", "label=1", "word=2,label=3", "text=text", "=", "label=9", "²=²"])


@given(st.sampled_from(sorted(data.READERS)), CONTENT, SUFFIX, COLUMNS)
@example("qa", "[" * 100_000, ".json", "")
@example("classification", "a\t" + "9" * 5000 + "\nb\t1\n", ".tsv", "")
@example("classification", "a\t--1\nb\t1\n", ".tsv", "")
@example("classification", '{"text": "\\ud800", "label": 1}\n', ".jsonl", "")
def test_any_file_is_read_or_refused_in_one_line(tmp_path, task, content, suffix, columns):
    path, said = written(tmp_path, content, f"any{suffix}"), []
    try:
        rows = data.read(task, path, columns=columns, say=said.append)
    except InputError as error:
        assert len(str(error).splitlines()) == 1 and str(error).startswith("--data: ")
        return
    assert rows and tasks.label_names(rows) is not None
    assert all(len(line.splitlines()) == 1 for line in said + labels.lines(rows))
