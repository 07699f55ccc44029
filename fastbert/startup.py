"""What `import fastbert` does besides defining names: it makes the attention known to transformers.

Not where fastbert is itself the program. transformers imports triton, which reads TRITON_INTERPRET at that moment, and
the command line has yet to decide whether to set it; `patch` registers there.
"""

import sys
from pathlib import Path


def is_the_program(argv: list[str], original: list[str]) -> bool:
    """Whether the interpreter was started as `fastbert ...` or `python -m fastbert ...`.

    `argv` is sys.argv, whose first is "-m" while the packages of a module to run are imported; `original` is
    sys.orig_argv, which names that module.
    """
    if argv[:1] != ["-m"]:
        return bool(argv) and Path(argv[0]).name == "fastbert"
    given = original.index("-m") + 1 if "-m" in original else None
    return (original[given] if given and given < len(original) else "") == "fastbert" or "-mfastbert" in original


if not is_the_program(sys.argv, sys.orig_argv):
    import fastbert.integrations.attention  # noqa: F401  registers itself
