"""Lists column names of common data sets, normalised without case, blanks and signs: `Gold_Label` is `goldlabel`."""

from collections.abc import Iterator, Sequence


def _group(names: str) -> frozenset[str]:
    return frozenset(names.split())


# Of several matching columns, one in an earlier group wins; two in the same group are ambiguous.
NAMES = {
    "label": (
        _group("label labels goldlabel labeltext 标签"),
        _group("annotation category class classindex classification classlabel coarselabel duplicate emotion")
        | _group("entailmentjudgment entailmentlabel feeling gold intent isduplicate isparaphrase judgement judgment labelid")
        | _group("paraphrase polarity quality rating relevance score sentiment airlinesentiment similarity spam stance star")
        | _group("stars tag target topic toxic y 类别 情感 分类"),
    ),
    "text": (
        _group("text texta sentence 文本"),
        _group("body cleantext comment commenttext content document email input message phrase post review reviewbody")
        | _group("reviewcontent reviewtext sms summary tweet tweettext utterance x 内容 句子 评论 正文 微博"),
        _group("description headline query question string title 标题"),
    ),
    "word": (_group("word words token tokens character characters char chars form text 字"),),
    "tag": (_group("ner nertag nertags entity entities ne"), _group("label labels tag tags bio iob 标签")),
    "context": (_group("context"), _group("startphrase premise ctx article passage"), _group("question prompt sentence")),
    "choice": (_group("label goldlabel"), _group("answer answerkey correct gold")),
}
VALUES = _group("pos neg positive negative neutral mixed yes no true false good bad fair spam ham entailment contradiction")
PAIRS = (
    *(("texta", "textb"), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2")),
    *(("1string", "2string"), ("text", "textb"), ("text", "hypothesis"), ("question", "sentence"), ("question", "answer")),
    *(("question", "passage"), ("query", "passage"), ("query", "document"), ("query", "title"), ("query", "text")),
    *(("first", "second"), ("left", "right"), ("anchor", "candidate")),
)
TWINS = (("1", "2"), ("a", "b"), ("one", "two"), ("first", "second"), ("left", "right"))
NO_TEXTS = ("id", "label", "parse", "source")  # what pairs have in two columns in addition to their texts


def normal(name: str | None) -> str:
    """A name without case, blanks, quotes and signs."""
    return "".join(letter for letter in (name or "").casefold() if letter.isalnum())


def counts_rows(name: str) -> bool:
    """Whether a column with this name holds a row number or key and is never a label."""
    return normal(name) in ("", "index", "idx", "no", "nr", "number", "row", "unnamed0", "key") or normal(name).endswith("id")


def by_name(kind: str, names: Sequence[str]) -> list[int]:
    """The columns that may be of this kind by their names: none, one, or several ambiguous ones."""
    for group in NAMES[kind]:
        places = [i for i, name in enumerate(names) if normal(name) in group]
        if places:
            return places
    return []


def pair(names: Sequence[str]) -> tuple[int, int] | None:
    """The columns of two texts: by known names, or by two names that differ only in a number or letter."""
    plain = [normal(name) for name in names]
    for first, second in PAIRS:
        if plain.count(first) == plain.count(second) == 1:
            return plain.index(first), plain.index(second)
    twins = {
        (plain.index(name), plain.index(other))
        for name in plain
        for other in _twins(name)
        if plain.count(name) == plain.count(other) == 1
    }
    return twins.pop() if len(twins) == 1 else None


def _twins(name: str) -> Iterator[str]:
    for one, two in TWINS:
        if name.endswith(one) and len(name) > len(one) and not name.removesuffix(one).endswith(NO_TEXTS):
            yield name.removesuffix(one) + two
        if name.startswith(one) and len(name) > len(one) and not name.endswith(NO_TEXTS):
            yield two + name.removeprefix(one)
