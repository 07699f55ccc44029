"""The exceptions that fastbert defines."""


class UnsupportedModelError(ValueError):
    """The model has no module with a fast class, or, with strict=True, one of them would stay on stock code."""


class InputError(Exception):
    """An error that the user of the command line can fix. Only its text is printed, and the exit code is 2.

    The text is one line of characters that can be seen, whatever names of files or contents went into it.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


def one_line(text: str) -> str:
    """Text as one line, in which control characters and others that cannot be seen are escaped, such as \\n and \\x1b.

    A terminal obeys such characters: in the name of a file or a label they could hide or repaint what a command says.
    """
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
