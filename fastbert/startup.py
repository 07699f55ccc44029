"""The side effect of `import fastbert`: registers the attention implementations with transformers, under two names.

It is skipped if fastbert itself is the program. transformers imports triton, which reads TRITON_INTERPRET at that moment,
before the command line has decided whether to set it; there, `patch` registers the one without "flash" in its name.
The program is imported for seconds before it can catch Ctrl-C; from here on, it stops without a traceback.
"""

import sys
from pathlib import Path
from types import TracebackType


def is_the_program(argv: list[str], original: list[str]) -> bool:
    """Whether the interpreter was started as `fastbert ...` or `python -m fastbert ...`.

    Args:
        argv: sys.argv, which starts with "-m" while the parent packages of the module to run are imported.
        original: sys.orig_argv, which names that module.
    """
    if argv[:1] != ["-m"]:
        return bool(argv) and Path(argv[0]).name == "fastbert"
    given = original.index("-m") + 1 if "-m" in original else None
    return (original[given] if given and given < len(original) else "") == "fastbert" or "-mfastbert" in original


def silent_when_interrupted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A `sys.excepthook` that prints nothing for KeyboardInterrupt. Python then ends by SIGINT, which a shell shows as 130."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


if is_the_program(sys.argv, sys.orig_argv):
    sys.excepthook = silent_when_interrupted
else:
    import fastbert.integrations.flash  # noqa: F401  registers itself, and fastbert.integrations.attention
