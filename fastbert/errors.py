"""The exceptions that fastbert defines."""


class UnsupportedModelError(ValueError):
    """The model has no module with a fast class, or, with strict=True, one of them would stay on stock code."""


class InputError(Exception):
    """An error that the user of the command line can fix. Only its text is printed, and the exit code is 2."""
