"""docs/troubleshooting.md has a line for each reason that the sources can give, and none for others."""

import re

import pytest

from tests.docs.reasons import ROOT, find, reasons

PAGE = "docs/troubleshooting.md"


def lines(text: str) -> list[str]:
    """The reasons in the first columns of the page's tables, with {} for what is filled in."""
    return [re.sub(r"<[^<>]+>", "{}", found) for found in re.findall(r"^\| `([^`]+)` \|", text, flags=re.M)]


def test_every_reason_has_a_line_and_every_line_a_reason():
    listed = lines((ROOT / PAGE).read_text(encoding="utf-8"))
    made = reasons()
    assert {text: place for text, place in made.items() if text not in listed} == {}, f"{PAGE} lacks these"
    assert [text for text in listed if text not in made] == [], f"nothing gives these lines of {PAGE}"
    assert len(set(listed)) == len(listed)


@pytest.mark.parametrize(
    "made",
    [
        'def why(x) -> str | None:\n    return "a reason"',
        'def why(x) -> str | None:\n    return None if x else "a reason"',
        'def why(x) -> str | None:\n    found = None\n    if x:\n        found = "a reason"\n    return found or None',
        'def why(x) -> "Plan | str":\n    return (found := "a reason") and found',
        'WORDS = "a reason"\ndef why(x) -> str:\n    return WORDS',
        'def why(x) -> str | None:\n    return inner(x, "a reason")\ndef inner(x, text: str) -> str:\n    return text',
        'def why(x) -> str | None:\n    return next((text for text in ["a reason"] if x), None)',
        'def why(x) -> str | None:\n    return x.reason\nclass State:\n    def see(self):\n        self.reason = "a reason"',
        'def why(x) -> str | None:\n    return x.why\nclass Plan:\n    size: int\n    why: str\nPlan(1, "a reason")',
        'def why(x) -> str | None:\n    return CHECKS[x](x)\nCHECKS = {"x": lambda x: "a reason"}',
        'def why(x) -> str | None:\n    return known.get(x)\ndef learn(x):\n    known[x] = "a reason"\nknown = {}',
    ],
)
def test_a_reason_is_found_however_it_is_made(made):
    source = f"{made}\ndef forward(module, calls):\n    calls.fallbacks[why(module)] += 1\n"
    assert "a reason" in find({"a.py": source})


def test_what_is_filled_in_is_left_out():
    source = (
        'def count(calls, x):\n    calls.fallbacks[f"{x.name} of {len(x)} rows"] += 1\n    calls.other["not a reason"] += 1\n'
    )
    assert find({"a.py": source}) == {"{} of {} rows": "a.py:2"}


def test_a_form_that_is_not_known_is_an_error():
    with pytest.raises(NotImplementedError, match="a.py:2: a reason made by"):
        find({"a.py": "async def count(calls, x):\n    calls.fallbacks[await x] += 1\n"})
