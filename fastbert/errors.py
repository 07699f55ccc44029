"""The package's own exceptions."""


class UnsupportedModelError(ValueError):
    """The model holds no module that has a fast class, or (strict) one that would stay on stock code."""


class InputError(Exception):
    """What the user of the command line can mend; its text is all that is shown, with exit code 2."""
