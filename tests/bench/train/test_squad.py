"""SQuAD's JSON: what is left out is counted, and what is no such file is one line."""

import json

import pytest

from bench.train import data
from fastbert.errors import InputError
from tests.bench.train.training import written

CONTEXT = "Anna came."
QUESTION = {"question": "Who?", "answers": [{"text": "Anna", "answer_start": 0}]}
MISPLACED = [{"text": "came", "answer_start": 4}]


def squad(*changes, context=CONTEXT, **top):
    """A file of QUESTION and of a changed one for each of `changes`."""
    questions = [QUESTION, *(QUESTION | change for change in changes)]
    return json.dumps({"data": [{"paragraphs": [{"context": context, "qas": questions}]}]} | top)


def read(folder, content):
    said = []
    return data.read("qa", written(folder, content, "file.json"), say=said.append), said


@pytest.mark.parametrize(("text", "start"), [("came", 4), ("came", -1), ("came", 500), ("", 0)])
def test_an_answer_that_is_not_where_it_says_is_left_out_and_counted(text, start, tmp_path):
    rows, said = read(tmp_path, squad({"answers": [{"text": text, "answer_start": start}]}, {}))
    assert [row["row"] for row in rows] == [1, 3] and rows[0]["answers"] == ["Anna"]
    assert said == [
        "--data: 1 of 3 questions with no answer at the stated position: left out; "
        "the first is row 2, data[0].paragraphs[0].qas[1]"
    ]


def test_the_answers_that_fit_stay(tmp_path):
    rows, said = read(tmp_path, squad({"answers": MISPLACED + [{"text": "came", "answer_start": 5}]}))
    assert (rows[1]["answers"], rows[1]["starts"]) == (["came"], [5]) and not said


def test_no_answer_is_one_in_version_2_only(tmp_path):
    rows, said = read(tmp_path, squad({"answers": []}, version="1.1"))
    assert len(rows) == 1 and "1 of 2 questions without an answer, in a file that is not version 2" in said[0]
    for content in (
        squad({"answers": []}, version="v2.0"),
        squad({"answers": [], "is_impossible": True}),
        squad({"is_impossible": True}),
    ):
        rows, said = read(tmp_path, content)
        assert [len(row["answers"]) for row in rows] == [1, 0] and not said


def test_an_empty_context_has_no_answers(tmp_path):
    two = json.loads(squad())
    two["data"] += json.loads(squad({}, context=" "))["data"]
    rows, said = read(tmp_path, json.dumps(two))
    assert len(rows) == 1 and "2 of 3 questions about an empty context" in said[0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "row 1: not JSON"),
        ("[]", "row 1: the file has no list 'data'; expected SQuAD's {"),
        ('{"data": [{}]}', "row 1: data[0] has no list 'paragraphs'"),
        ('{"data": []}', "has no questions"),
        ('{"question": "a"}\n{"question": "b"}\n', "is JSON lines; expected SQuAD's {"),
        (squad({"question": ""}), "row 2: data[0].paragraphs[0].qas[1] has no field 'question'"),
        (squad({"answers": [{"text": "Anna"}]}), "row 2: data[0].paragraphs[0].qas[1]: an answer needs the fields"),
        (squad({"answers": {"text": ["Anna"]}}), "row 2: data[0].paragraphs[0].qas[1]: expected a list of answers"),
        (squad().replace("context", "text", 1), "row 1: data[0].paragraphs[0] has no field 'context'"),
        (squad().replace('"answer_start": 0', '"answer_start": 3'), "1 of 1 questions with no answer at the stated position"),
        (squad(context=""), "has no usable question: 1 of 1 questions about an empty context"),
        (squad().replace("Anna", "\\ud800"), "half of a character"),
    ],
)
def test_a_file_that_is_refused(content, said, tmp_path):
    with pytest.raises(InputError) as error:
        read(tmp_path, content)
    assert said in str(error.value) and len(str(error.value).splitlines()) == 1
