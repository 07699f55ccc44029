"""What `bench tune` tries, and in which order."""

from dataclasses import replace

import pytest

from bench.tune.candidates import ENTRIES, candidates, present
from fastbert.kernels.core.configs import ARCHITECTURES


@pytest.mark.parametrize("kernel", ENTRIES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_present_one_then_the_promising_ones_and_each_once(architecture, kernel):
    entry = ENTRIES[kernel]
    now = present(kernel, architecture, "bf16", entry.widths[0])
    found = candidates(kernel, architecture, "bf16", entry.widths[0])
    first = list(dict.fromkeys([now, *(replace(now, **changes) for changes in entry.promising)]))
    assert found[: len(first)] == first and len(set(found)) == len(found)
    for changes in entry.promising:
        assert all(value in entry.choices[name] for name, value in changes.items()), changes
