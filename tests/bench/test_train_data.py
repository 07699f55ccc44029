"""The readers of `python -m bench train`: each format as users have it, and each fault as one line with its row."""

import json

import pytest

from bench import train_data
from fastbert.errors import InputError
from tests.bench.training import DATA, FILES


def written(folder, content, name="file.tsv"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


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
    rows = train_data.read(task, FILES[task])
    assert len(rows) == count
    assert rows[0] | first == rows[0]
    assert len({row["row"] for row in rows}) == count, "each row has a number of its own"


def test_columns_and_rows_of_labels_are_the_same_sentences():
    columns = train_data.read("ner", DATA / "ner.conll")
    in_rows = train_data.read("ner", FILES["ner"])[:12]
    assert [(row["words"], row["tags"]) for row in columns] == [(row["words"], row["tags"]) for row in in_rows]
    assert columns[1]["row"] == 11, "after -DOCSTART-, an empty line, seven words and an empty line"


def test_characters_with_a_label_each():
    assert train_data.read("ner", FILES["ner"])[-1]["words"] == list("安娜在奥斯陆")


def test_positions_behind_characters_go():
    rows = train_data.read("ner", DATA / "positions.conll")
    assert ["".join(row["words"]) for row in rows] == ["安娜在奥斯陆", "彼得走了"]


def test_numbers_that_are_words_stay(tmp_path):
    rows = train_data.read("ner", written(tmp_path, "in O\n1357 B-YEAR\n", "years.conll"))
    assert rows[0]["words"] == ["in", "1357"]


def test_documents_or_lines(tmp_path):
    assert [row["row"] for row in train_data.read("mlm", FILES["mlm"])] == [1, 6, 11, 16, 21, 26]
    lines = train_data.read("mlm", written(tmp_path, "one\ntwo\n"))
    assert [row["text"] for row in lines] == ["one", "two"]
    assert train_data.read("pretraining", written(tmp_path, "one\ntwo\n"))[0]["sentences"] == ["one", "two"]


def test_a_cell_of_csv_may_hold_lines_and_commas(tmp_path):
    text = 'context,ending0,ending1,label\n"a,\nb",c,d,1\ne,f,g,0\n'
    rows = train_data.read("multiple-choice", written(tmp_path, text))
    assert [(row["row"], row["text"], row["choice"]) for row in rows] == [(2, "a,\nb", 1), (4, "e", 0)]


def test_a_byte_order_mark_and_returns_are_no_text(tmp_path):
    rows = train_data.read("classification", written(tmp_path, b"\xef\xbb\xbfgood food\tyes\r\nbad\tno\r\n"))
    assert [(row["text"], row["label"]) for row in rows] == [("good food", "yes"), ("bad", "no")]


QUESTION = {"question": "Who?", "answers": [{"text": "Anna", "answer_start": 0}]}


def squad(**changes):
    return json.dumps({"data": [{"paragraphs": [{"context": "Anna came.", "qas": [QUESTION, QUESTION | changes]}]}]})


@pytest.mark.parametrize(
    ("task", "content", "said"),
    [
        ("classification", "good\tyes\nbad\n", "row 2: expected 2 columns (text, label), got 1: 'bad'"),
        ("classification", "good\tyes\n\n\tno\n", "row 3: the column text is empty"),
        ("classification", "good\tyes\nbad\t\n", "row 2: the column label is empty"),
        ("classification", b"good\tyes\nb\xffd\tno\n", "row 2: not UTF-8"),
        ("classification", "", "is empty"),
        ("classification", "\n \n", "is empty"),
        ("classification", "text\tlabel\n", "has no rows"),
        ("matching", "a\tb\t1\na\t1\n", "row 2: expected 3 columns (text_a, text_b, label), got 2"),
        ("ner", "Anna came\tB-PER O\nAnna\n", "row 2: expected 2 columns"),
        ("ner", "Anna came\tB-PER O\nAnna went\tB-PER O O\n", "row 2: 3 labels do not fit 2 words or 8 characters"),
        ("ner", "Anna B-PER\ncame\n", "row 2: expected a word and a label, got 'came'"),
        ("qa", "{", "row 1: not JSON"),
        ("qa", "[]", "row 1: the file has no list 'data'"),
        ("qa", '{"data": [{}]}', "row 1: data[0] has no list 'paragraphs'"),
        ("qa", '{"data": []}', "has no questions"),
        ("qa", squad(question=""), "row 2: data[0].paragraphs[0].qas[1] has no field 'question'"),
        ("qa", squad(answers=[{"text": "Anna"}]), "row 2: data[0].paragraphs[0].qas[1]: an answer needs the fields"),
        ("qa", squad(answers=[{"text": "came", "answer_start": 4}]), "row 2: data[0].paragraphs[0].qas[1]: the answer 'came'"),
        ("qa", squad().replace("context", "text", 1), "row 1: data[0].paragraphs[0] has no field 'context'"),
        ("multiple-choice", "context,ending0,ending1\na,b,c\n", "row 1: the column 'label' is missing"),
        ("multiple-choice", "context,ending0,label\na,b,0\n", "row 1: expected two or more columns that begin with 'ending'"),
        ("multiple-choice", "context,ending0,ending1,label\na,b,c,0\na,b,c\n", "row 3: expected 4 columns"),
        ("multiple-choice", "context,ending0,ending1,label\na,b,c,2\n", "row 2: label: expected a number from 0 to 1, got '2'"),
        ("multiple-choice", "context,ending0,ending1,label\na,,c,0\n", "row 2: the column ending0 is empty"),
        ("multiple-choice", 'context,ending0,ending1,label\n"a,b,c,0\n', "not CSV"),
    ],
)
def test_a_fault_is_one_line_with_its_row(task, content, said, tmp_path):
    path = written(tmp_path, content)
    with pytest.raises(InputError) as error:
        train_data.read(task, path, "--eval-data")
    message = str(error.value)
    assert said in message and message.startswith("--eval-data: ") and str(path) in message and "\n" not in message


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(InputError, match="--data: cannot read .*none.tsv: No such file"):
        train_data.read("mlm", tmp_path / "none.tsv")
