"""Writes a folder that Hugging Face's `kernels` package loads, from the installed sources of fastbert.

The folder has one build for every platform, because Triton compiles where it runs:

    OUT/build/torch-universal/metadata.json
    OUT/build/torch-universal/fastbert/__init__.py    what a loader reads: `layers`, flash_attn_func, flash_attn_varlen_func
    OUT/build/torch-universal/fastbert/hub/           layers.py, flash_attention.py, packed.py
    OUT/build/torch-universal/fastbert/kernels/       all kernels

Every import among them is relative. A loader imports the package under the id in the metadata, which ends in a digest of the
sources: several builds and an installed fastbert can be in one process.
"""

import hashlib
import json
from pathlib import Path

import fastbert
from fastbert.errors import InputError

PACKAGE = "fastbert"
VARIANT = "torch-universal"
PARTS = ("__init__.py", "flash_attention.py", "layers.py", "packed.py")  # of fastbert/hub

INIT = '''"""Triton kernels of fastbert {version}, written by `fastbert hub`: layers by name, and FlashAttention's functions."""

from .hub import layers
from .hub.flash_attention import flash_attn_func, flash_attn_varlen_func

__version__ = "{version}"
__all__ = ["flash_attn_func", "flash_attn_varlen_func", "layers"]
'''


def write_build(out: Path) -> Path:
    """Write the folder into `out`, which may exist, but must have no folder build. Returns the path of the build.

    Raises:
        InputError: `out` is a file, or has a build already.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"--out: expected a folder, got the file {out}")
    if (out / "build").exists():
        raise InputError(f"--out: expected a folder without a build, but {out / 'build'} exists")
    sources = build_sources()
    digest = hashlib.sha256()
    for name, text in sources.items():
        digest.update(f"{name}\0{text}\0".encode())
    variant = out / "build" / VARIANT
    for name, text in sources.items():
        path = variant / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (variant / "metadata.json").write_text(json.dumps(_metadata(digest.hexdigest()[:12]), indent=2) + "\n")
    return variant


def build_sources() -> dict[str, str]:
    """The files of the package, by their paths in it, in a fixed order."""
    root = Path(fastbert.__file__).parent
    found = {"__init__.py": INIT.format(version=fastbert.__version__)}
    found |= {f"hub/{name}": (root / "hub" / name).read_text() for name in PARTS}
    kernels = root / "kernels"
    for path in sorted(kernels.rglob("*.py")):
        found[f"kernels/{path.relative_to(kernels).as_posix()}"] = path.read_text()
    return found


def _metadata(digest: str) -> dict[str, object]:
    """As kernel-builder writes it; `id` is the name of the module that a loader imports."""
    return {
        "id": f"{PACKAGE}_{digest}",
        "name": PACKAGE,
        "version": 1,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cuda"},
    }
