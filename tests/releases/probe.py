"""Prints the releases that this process runs on, and the digests of their forwards, as JSON."""

import json
import platform
from importlib import metadata

import numpy
import torch
import transformers
import triton

from tests.releases import digests

if __name__ == "__main__":
    releases = {module.__name__: module.__version__ for module in (transformers, triton, torch, numpy)}
    about = {"python": platform.python_version(), "tokenizers": metadata.version("tokenizers")}
    print(json.dumps({"releases": releases | about, "digests": digests.of_this_release()}))
