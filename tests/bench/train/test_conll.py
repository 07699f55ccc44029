"""Words with labels, in columns and in rows, as the data sets of named entities have them."""

import pytest

from bench.train import data
from fastbert.errors import InputError
from tests.bench.train.training import DATA, FILES, written


def read(folder, content, name="file.txt", columns=""):
    """Words and labels of each row, as text, and what was said."""
    said = []
    rows = data.read("ner", written(folder, content, name), columns=columns, say=said.append)
    return [(row["words"], " ".join(row["tags"])) for row in rows], said


def test_columns_and_rows_of_labels_are_the_same_sentences():
    columns = data.read("ner", DATA / "ner.conll")
    in_rows = data.read("ner", FILES["ner"])[:12]
    assert [(row["words"], row["tags"]) for row in columns] == [(row["words"], row["tags"]) for row in in_rows]
    assert columns[1]["row"] == 11, "after -DOCSTART-, an empty line, seven words and an empty line"


def test_characters_with_a_label_each():
    assert data.read("ner", FILES["ner"])[-1]["words"] == list("安娜在奥斯陆")


def test_positions_behind_characters_go(tmp_path):
    said = []
    rows = data.read("ner", DATA / "positions.conll", say=said.append)
    assert ["".join(row["words"]) for row in rows] == ["安娜在奥斯陆", "彼得走了"]
    assert said == ["--data: each character is followed by its position in its word: left out"]
    long = "".join(f"哈{place}\tO\n" for place in range(12))
    assert read(tmp_path, long)[0] == [(["哈"] * 12, " ".join("O" * 12))], "places have two digits from the eleventh on"


@pytest.mark.parametrize("words", [("A1", "B2", "C30"), ("A0", "B0", "C1"), ("王1", "李2", "赵30"), ("in", "1357", "90")])
def test_digits_that_are_part_of_words_stay(words, tmp_path):
    rows, _ = read(tmp_path, f"{words[0]} B-PART\n{words[1]} I-PART\n\n{words[2]} O\n")
    assert rows == [(list(words[:2]), "B-PART I-PART"), ([words[2]], "O")]


SENTENCES = [(["Ann", "lives"], "B-PER O"), (["Oslo"], "B-LOC")]


@pytest.mark.parametrize(
    "content",
    [
        "Ann\tB-PER\nlives\tO\n\nOslo\tB-LOC\n",
        "Ann B-PER\r\nlives O\r\n\r\n\r\nOslo B-LOC\r\n",
        "Ann NNP I-NP B-PER\nlives VBZ I-VP O\n\nOslo NNP I-NP B-LOC\n",
        "-DOCSTART- -X- O O\n\nAnn NNP I-NP B-PER\nlives VBZ I-VP O\n\nOslo NNP I-NP B-LOC\n",
        "1 Ann NNP B-PER\n2 lives VBZ O\n\n1 Oslo NNP B-LOC\n",
        "0\tAnn\tB-PER\n1\tlives\tO\n\n0\tOslo\tB-LOC\n",
        "7\tAnn\tB-PER\n8\tlives\tO\n\n9\tOslo\tB-LOC\n",
        "# sent_id = 1\n# text = Ann lives\n1\tAnn\t_\tB-PER\n2-3\tlives\t_\t_\n2\tlives\t_\tO\n\n# id 2\n1\tOslo\t_\tB-LOC\n",
        "# id 4f\tdomain=en\nAnn _ _ B-PER\nlives _ _ O\n\n# id 50\tdomain=en\nOslo _ _ B-LOC\n",
        "Word\tTag\nAnn\tB-PER\nlives\tO\n\nOslo\tB-LOC\n",
        "wort\tmarke\nAnn\tB-PER\nlives\tO\n\nOslo\tB-LOC\n",
        "ner\ttoken\tpos\nB-PER\tAnn\tNNP\nO\tlives\tVBZ\n\nB-LOC\tOslo\tNNP\n",
        "en:Ann\tB-PER\nen:lives\tO\n\nen:Oslo\tB-LOC\n",
        "text\tlabels\nAnn lives\tB-PER O\nOslo\tB-LOC\n",
    ],
)
def test_two_sentences(content, tmp_path):
    assert read(tmp_path, content)[0] == SENTENCES


@pytest.mark.parametrize("tags", ["B-PER I-PER E-PER", "B-PER M-PER E-PER", "I-PER I-PER O", "B-PER L-PER U-LOC", "NN VB X"])
def test_other_schemes(tags, tmp_path):
    content = "".join(f"{word}\t{tag}\n" for word, tag in zip("abc", tags.split(), strict=True))
    assert read(tmp_path, f"{content}\n{content}")[0] == [(["a", "b", "c"], tags)] * 2


@pytest.mark.parametrize("blank", [" \tO\n", "\tO\n", "\u3000\tO\n"])
def test_a_blank_is_a_character(blank, tmp_path):
    rows, _ = read(tmp_path, f"小\tB-PER\n王\tI-PER\n{blank}在\tO\n")
    assert rows == [(["小", "王", " ", "在"], "B-PER I-PER O O")]


def test_a_blank_between_blanks(tmp_path):
    assert read(tmp_path, "小 B-PER\n王 I-PER\n  O\n在 O\n\n她 O\n")[0][0] == (["小", "王", " ", "在"], "B-PER I-PER O O")


def test_a_hash_may_be_a_word(tmp_path):
    rows, _ = read(tmp_path, "# a comment\nAnn B-PER\n# O\n#lake O\n\n#oslo B-PER\n")
    assert rows == [(["Ann", "#", "#lake"], "B-PER O O"), (["#oslo"], "B-PER")]


def test_rows_of_one_word(tmp_path):
    rows, said = read(tmp_path, "Oslo\tB-LOC\nlamp\tO\n", "rows.tsv")
    assert rows == [(["Oslo"], "B-LOC"), (["lamp"], "O")] and "each line is a row of its own" in said[0]
    assert len(read(tmp_path, "Oslo\tB-LOC\nFjord\tI-LOC\n", "sentence.tsv")[0]) == 1, "a label that goes on"
    assert len(read(tmp_path, "Oslo\tB-LOC\nlamp\tO\n", "sentence.conll")[0]) == 1
    assert len(read(tmp_path, "Oslo\tB-LOC\nlamp\tO\nNew York\tB-LOC I-LOC\n", "rows.tsv")[0]) == 3


def test_columns_by_number(tmp_path):
    nested = "1\tAnn\tB-PER\tO\n2\tlives\tO\tO\n\n1\tOslo\tB-LOC\tO\n"
    rows, said = read(tmp_path, nested)
    assert rows[0] == (["Ann", "lives"], "O O") and said[0].startswith("--data: of 4 columns, 2 is the word and 4 the label")
    assert read(tmp_path, nested, columns="word=2,label=3")[0] == SENTENCES


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.tsv", "Anna came\tB-PER O\nAnna\n", "row 2: expected 2 columns"),
        ("a.tsv", "Anna came\tB-PER O\nAnna went\tB-PER O O\n", "row 2: 3 labels do not fit 2 words or 8 characters"),
        ("a.txt", "Anna B-PER\ncame\n", "row 2: expected a word and a label, got 'came'"),
        ("a.txt", "Ann B-PER\nNew York B-LOC\nOslo B-LOC\n", "row 2: 3 columns, but most rows have 2: 'New York B-LOC'"),
        ("a.jsonl", '{"text": "小王", "label": {"name": {"小王": [[0, 1]]}}}\n{"text": "她", "label": {}}\n', "JSON lines;"),
        ("a.txt", '{"tokens": ["a"], "ner_tags": [0]}\n', "is JSON or JSON lines; expected CoNLL's columns"),
        ("a.csv", "word,tag\nAnn,B-PER\n", "is comma-separated; expected CoNLL's columns"),
        ("a.txt", "Sentence #,Word,Tag\nSentence: 1,Ann,B-PER\n,lives,O\n", "is comma-separated"),
        ("a.txt", "bc/x 0 In O\nbc/x 1 May B-DATE\n\nbc/x 0 In O\n", "has 'bc/x' in column 1 of each row: --columns word="),
        ("a.txt", "1 Ann NNP B-PER\n3 lives VBZ O\n\n1 Oslo NNP B-LOC\n", "has numbers in column 1, no words: --columns word="),
        ("a.tsv", "1-1\t0-3\tAnn\tB-PER\n1-2\t4-9\tlives\tO\n", "has numbers in column 1, no words"),
        ("a.txt", "B-PER\tAnn\nO\tlives\n\nB-LOC\tOslo\n", "has labels before the words; expected CoNLL's columns"),
        ("a.tsv", "B-PER O\tAnn lives\nB-LOC\tOslo\n", "has labels before the words"),
        (
            "a.txt",
            "Ann B-PER NNP\nlives O VBZ\n\nOslo B-LOC NNP\n",
            "seems to have its labels in column 2: --columns word=1",
        ),
        ("a.txt", "Ann/B-PER lives/O\nOslo/B-LOC ./O\n", "has words and labels with a slash between"),
        ("a.tsv", "The soup was hot\tgood\nThe tea was cold\tbad\n", "has one label for several words"),
        ("a.conllu", "1\ta\ta\tX\t_\t_\t0\troot\t_\tA=No\n2\tb\tb\tX\t_\t_\t1\tdep\t_\t_\n", "is CoNLL-U, whose last column"),
    ],
)
def test_a_file_that_is_refused(name, content, said, tmp_path):
    with pytest.raises(InputError) as error:
        read(tmp_path, content, name)
    assert said in str(error.value) and len(str(error.value).splitlines()) == 1
