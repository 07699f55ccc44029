"""Tables of texts and labels as data sets and programs write them: read right, or refused in a line that mends it."""

import pytest

from bench.train import data, tasks
from fastbert.errors import InputError
from tests.bench.train.training import written

MRPC = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
SNLI = "gold_label\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1\tsentence2\tpairID\tlabel1\tlabel2\n"
SIX = "fine thing here\tpos\n" * 3 + "bad thing here\tneg\n" * 3


def read(folder, task, content, name="file.tsv", columns=""):
    """Texts and label of each row, and what was said."""
    said = []
    rows = data.read(task, written(folder, content, name), columns=columns, say=said.append)
    return [tuple(row[name] for name in ("text", "second", "label") if name in row) for row in rows], said


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ("fine thing\tpos\nbad\tneg\n", "plain.tsv"),
        ("fine thing\tpos\r\nbad\tneg\r\n", "returns.tsv"),
        ("review\tsentiment\nfine thing\tpos\nbad\tneg\n", "names.tsv"),
        ("sentence\tlabel\nfine thing \tpos\nbad \tneg\n", "sst2.tsv"),
        ("LABEL\tTEXT_A\npos\tfine thing\nneg\tbad\n", "label_first.tsv"),
        ("id\tClass Index\tReview Text\n1\tpos\tfine thing\n2\tneg\tbad\n", "more.tsv"),
        ("utterance\tverdict\nfine thing\tpos\nbad\tneg\n", "one_name.tsv"),
        ('"id"\t"sentiment"\t"review"\n"5_8"\t"pos"\t"fine thing"\n"5_9"\t"neg"\t"bad"\n', "quoted.tsv"),
        ("title\ttext\tlabel\tcategory\nx\tfine thing\tpos\ta\nx\tbad\tneg\ta\n", "closest_names.tsv"),
        ("text,label\nfine thing,pos\nbad,neg\n", "commas.csv"),
        ("label;review\npos;fine thing\nneg;bad\n", "semicolons.csv"),
        (",text,label\n0,fine thing,pos\n1,bad,neg\n", "index_of_pandas.csv"),
        ("text,label\nfine thing,pos\nbad,neg\n", "commas.txt"),
        ('{"text": "fine thing", "label": "pos"}\n\n{"label": "neg", "text": "bad", "more": []}\n', "lines.jsonl"),
        ('[{"review": "fine thing", "stars": "pos"}, {"review": "bad", "stars": "neg"}]', "list.json"),
        ("text\tlabel\nfine thing\tpos\ntext\tlabel\nbad\tneg\n", "two_files_in_one.tsv"),
    ],
)
def test_texts_and_labels(content, name, tmp_path):
    rows, said = read(tmp_path, "classification", content, name)
    assert rows == [("fine thing", "pos"), ("bad", "neg")]
    if name in ("names.tsv", "one_name.tsv", "label_first.tsv"):
        assert said[0].startswith("--data: columns used: ")


@pytest.mark.parametrize(
    "content",
    [
        "a b\tc\t1\nd\te\t0\n",
        MRPC + "1\t70\t71\ta b\tc\n0\t72\t73\td\te\n",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\ta b\tc\t1\n1\t3\t4\td\te\t0\n",
        SNLI + "1\t(\t(\ta b\tc\t7\t1\t\n-\t(\t(\tx\ty\t8\t\t\n0\t(\t(\td\te\t9\t0\t\n",
        "index\tquestion\tsentence\tlabel\n0\ta b\tc\t1\n1\td\te\t0\n",
        "PREMISE\tHYPOTHESIS\tVERDICT\na b\tc\t1\nd\te\t0\n",
        "label\ttweet_a\ttweet_b\n1\ta b\tc\n0\td\te\n",
        "one,other,label\na b,c,1\nd,e,0\n",
        '{"sentence1": "a b", "sentence2": "c", "label": 1}\n{"sentence1": "d", "sentence2": "e", "label": 0}\n',
    ],
)
def test_pairs(content, tmp_path):
    assert read(tmp_path, "matching", content)[0] == [("a b", "c", "1"), ("d", "e", "0")]


def test_quotes_stand_unless_all_cells_have_them(tmp_path):
    rows, _ = read(tmp_path, "classification", '"Yes," he said.\tpos\n"No"\tneg\n')
    assert rows == [('"Yes," he said.', "pos"), ('"No"', "neg")]
    rows, _ = read(tmp_path, "classification", '"text"\t"label"\n"a ""b""\tc\nd"\t1\n"e"\t0\n')
    assert rows == [('a "b"\tc\nd', "1"), ("e", "0")]


def test_a_header_that_nobody_knows_is_found_by_the_rows_below(tmp_path):
    rows, said = read(tmp_path, "classification", "doc\tverdict\n" + SIX)
    assert len(rows) == 6 and "row 1 (doc, verdict) is taken for a header: 'verdict' occurs once as a label" in said[0]
    rows, said = read(tmp_path, "classification", "doc\tverdict\nfine thing\t1\nbad thing\t0\n")
    assert len(rows) == 2 and "all labels but 'verdict' are numbers" in said[0]
    rows, said = read(tmp_path, "classification", "customer remark\tverdict\n" + SIX + "odd thing here\tmixed\n")
    assert len(rows) == 8 and "row 1 (customer remark, verdict) is read as a row; --columns text=customer remark,l" in said[0]
    rows, said = read(tmp_path, "classification", "doc\tverdict\n" + SIX, columns="text=1,label=2")
    assert rows[0] == ("doc", "verdict") and len(rows) == 7, "the option makes it a row again"
    assert said == ["--data: row 1 (doc, verdict) is read as a row; --columns text=doc,label=verdict makes it a header"]


@pytest.mark.parametrize(
    "first",
    [
        "fine\tpos\n",
        "fine\tmixed\n",
        "fine\t5\n",
        "a longer text than any header has\tmixed\n",
        "a thing of some quality\tquality\nb\tquality\n",
    ],
)
def test_a_first_row_that_is_none_stays(first, tmp_path):
    rows, _ = read(tmp_path, "classification", first + SIX)
    assert len(rows) == 6 + first.count("\n")


@pytest.mark.parametrize(
    ("columns", "expected"),
    [("text=what,label=how", ("a b", "pos")), ("text=4,label=2", ("extra", "pos")), ("label=how", ("a b", "pos"))],
)
def test_columns_by_name_or_number(columns, expected, tmp_path):
    header = "text\thow\tcategory\tmore\n" if columns == "label=how" else "what\thow\tcategory\tmore\n"
    header = "" if "4" in columns else header
    rows, _ = read(tmp_path, "classification", header + "a b\tpos\t1\textra\nc\tneg\t2\textra\n", columns=columns)
    assert rows[0] == expected and len(rows) == 2


@pytest.mark.parametrize(
    ("task", "content", "said"),
    [
        ("classification", "good\tyes\nbad\n", "row 2: expected 2 columns (text, label), got 1: 'bad'"),
        ("classification", "good\tyes\n\n\tno\n", "row 3: the column text is empty"),
        ("classification", "good\tyes\nbad\t\n", "row 2: the column label is empty"),
        ("classification", "a text without a label\n", "row 1: expected 2 columns (text, label), got 1"),
        ("classification", "well, fine\noh, dear\n", "separated by tabs"),
        ("classification", "1\tfine thing\n0\tbad\n", "labels in column 1 ('0') and texts in the last: say"),
        ("classification", "pos\tone\nneg\ttwo\npos\tthree\nneg\tfour\n", "--columns text=2,label=1"),
        ("classification", "pos\tfine thing\nneg\tbad thing\n", "--columns text=2,label=1"),
        ("classification", "verdict\tdoc\n1\tfine\n0\tbad\n", "--columns text=2,label=1"),
        ("classification", "doc\tverdict\nfine thing\tpos\nbad thing\tneg\n", "a header or a row? call its columns"),
        ("classification", "gj04\t1\t\tFriends came.\n", "got 4: 'gj04 1  Friends came.'; --columns text=NAME,label=NAME (or"),
        ("classification", "index\tsentence\n0\tfine\n1\tbad\n", "and none is known to be the label"),
        ("classification", "text_a\ttext_b\tlabel\na\tb\t1\n", "two texts, text_a and text_b: --task matching reads pairs"),
        ("classification", "topic\tsentiment\ttext\na\tb\tc\n", "topic and sentiment could both be the label"),
        ("classification", "fine thing\t4.25\nbad thing\t1.5\nso so\t2\n", "(1.5, 4.25): scores, not classes"),
        ("classification", "fine thing\t4,25\nbad thing\tnan\nso so\t.5\n", "scores, not classes"),
        ("classification", "".join(f"text {i}\tlabel {i}\n" for i in range(12)), "has 12 labels in 12 rows"),
        ("classification", '"a"\t"b"\n"c\t"d"\n', "row 2: not tab-separated cells in quotes"),
        ("classification", '{"text": "a", "label": 1}\n{"text": "b"}\n', "row 2: there is no field 'label'"),
        ("classification", '{"text": "a", "label": [1, 2]}\n', "row 1: label: expected one text or number"),
        ("classification", '{"text": "a", "label": 1}\nb\t1\n', "row 2: not JSON, unlike the rows before it"),
        ("classification", '{"text": "a"}\n', "the columns are text, and none is known to be the label: call it 'label'"),
        ("matching", "a\tb\t1\na\t1\n", "row 2: expected 3 columns (text_a, text_b, label), got 2"),
        ("matching", "1\ta\tb\n0\tc\td\n", "--columns text_a=2,text_b=3,label=1"),
        ("matching", "index\tsentence1\tsentence2\tscore\n0\ta\tb\t5.0\n1\tc\td\t3.2\n", "scores, not classes"),
        ("matching", "text,label\na,1\n", "none is known to be the text_a"),
    ],
)
def test_a_table_that_is_refused(task, content, said, tmp_path):
    with pytest.raises(InputError) as error:
        read(tmp_path, task, content)
    assert said in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ("text", "expected text=NAME,label=NAME, each a column's name or number"),
        ("text=none,label=2", "has no column 'none' for --columns; its first row is one, two"),
        ("text=1,label=3", "has no column '3'"),
        ("text=1,label=one", "has the same column for two"),
        ("label=2", "add text=NAME to --columns"),
    ],
)
def test_columns_that_are_not_there(columns, said, tmp_path):
    with pytest.raises(InputError) as error:
        read(tmp_path, "classification", "one\ttwo\na\tb\n", columns=columns)
    assert said in str(error.value)


def test_digits_that_int_does_not_read_are_words(tmp_path):
    rows, _ = read(tmp_path, "classification", "fine thing\t1\nbad thing\t²\nno thing\t٣\n")
    assert tasks.label_names([{"label": label} for _, label in rows]) == ["1", "²", "٣"]
    assert tasks.label_names([{"label": label} for label in ("10.0", "9.0", "-1")]) == ["-1", "9.0", "10.0"]
