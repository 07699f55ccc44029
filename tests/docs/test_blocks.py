"""Every fenced block of README.md and docs/ is run, checked as a command, compared as output, or marked as text."""

import pytest

from tests.docs import play
from tests.docs.blocks import LANGUAGES, Block, blocks, pages

EVERY = [block for page in pages() for block in blocks(page)]
WITH_PYTHON = list(dict.fromkeys(block.page for block in EVERY if block.language == "python"))


def test_languages_are_known():
    assert {str(block): block.language for block in EVERY if block.language not in LANGUAGES} == {}


def test_output_follows_python():
    alone = [str(b) for a, b in zip([None, *EVERY], EVERY, strict=False) if b.language == "output" and not before(a, b)]
    assert alone == []


def before(block: Block | None, output: Block) -> bool:
    return block is not None and block.page == output.page and block.language == "python"


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_blocks(page, tmp_path):
    play.run_page(page, tmp_path)


PAGE = """
```python
print(x)
```

```output
1
```

- in a list

    ```python
    y = x
    ```
"""


def play_with(*steps):
    for step in steps:
        _ = yield step


def test_a_page_and_its_play_have_the_same_steps():
    found = blocks("docs/index.md", PAGE)
    assert [(b.line, b.language, b.text) for b in found] == [
        (2, "python", "print(x)\n"),
        (6, "output", "1\n"),
        (12, "python", "y = x\n"),
    ]
    names = {"x": 1}
    play.run(found, play_with(names, (names, {"x": "2 * x"})))
    assert names["y"] == 2
    for steps, said in (
        ((names,), "docs/index.md:12: the play"),
        ((names,) * 3, "more steps"),
        (({"x": 3},) * 2, "index.md:6"),
    ):
        with pytest.raises((AssertionError, pytest.fail.Exception), match=said):
            play.run(found, play_with(*steps))
    with pytest.raises(AssertionError, match="index.md:2: there is no 'z' to replace"):
        play.run(found, play_with((names, {"z": ""}), names))


def test_a_page_without_a_play_fails():
    with pytest.raises(
        pytest.fail.Exception, match="docs/other-page.md has Python blocks .* write tests.docs.plays.other_page"
    ):
        play.module_of("docs/other-page.md")


def test_errors_name_the_line_of_the_page():
    with pytest.raises(ZeroDivisionError) as caught:
        Block("docs/index.md", 7, "python", "a = 1\na / 0\n").run({})
    assert caught.traceback[-1].lineno + 1 == 9 and str(caught.traceback[-1].path).endswith("docs/index.md")
