"""What `import fastbert` does beside giving names: transformers learns of the attention implementation."""

import sys
from pathlib import Path


def register_attention() -> None:
    """Register "fastbert" with transformers, so that `model.set_attn_implementation("fastbert")` works.

    Not where fastbert is the program itself: importing transformers imports triton, which reads TRITON_INTERPRET only
    then, and the command line may have to set it first. While runpy looks for `python -m fastbert`, argv[0] is "-m".
    """
    program = sys.argv[0] if getattr(sys, "argv", None) else ""
    if program == "-m" or Path(program).name == "fastbert":
        return
    import fastbert.integrations.attention  # noqa: F401  (registers itself)
