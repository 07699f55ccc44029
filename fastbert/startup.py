"""The side effect of `import fastbert`: registers the attention implementations with transformers, under two names.

It is skipped if fastbert itself is the program. transformers imports triton, which reads TRITON_INTERPRET at that moment,
before the command line has decided whether to set it; there, `patch` registers the one without "flash" in its name.
"""

import sys
from pathlib import Path


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


if not is_the_program(sys.argv, sys.orig_argv):
    import fastbert.integrations.flash  # noqa: F401  registers itself, and fastbert.integrations.attention
