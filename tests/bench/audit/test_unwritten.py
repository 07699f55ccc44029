"""Reads of uniform registers that nothing has written."""

import pytest

from bench.audit import sass
from bench.audit.unwritten import unwritten

pytestmark = pytest.mark.no_launch

# What ptxas 12.8 made of the backward of short sequences with a 64 x 32 tile on sm_90: UR38 was meant.
FOUND = """
        /*1120*/                   UIADD3 UR14, UR4, 0x5000, URZ ;
        /*12a0*/                   UIADD3 UR46, UP0, UR46, 0x40, URZ ;
        /*1300*/                   USGXT.U32 UR38, UR14, 0xe ;
        /*3f90*/                   HGMMA.64x32x16.F32.BF16 R56, gdesc[UR44].tnspA.tnspB, R56 ;
"""


def read(text):
    return [found.rpartition(" ")[2] for found in unwritten(sass.parse(text))]


def test_what_was_found():
    written = "        /*0010*/ ULDC.64 UR4, c[0x0][0x118] ;\n        /*0020*/ UIADD3.64 UR44, UR4, 0x2, URZ ;\n"
    assert read(written + FOUND) == ["UR46"]


@pytest.mark.parametrize(
    "operands",
    ["UIADD3 UR8, UR7, 0x1, URZ", "LDG.E R0, desc[UR7][R2.64]", "HGMMA.64x8x16.F32 R24, gdesc[UR7], R24", "@UP0 UMOV UR8, UR7"],
)
def test_each_kind_of_read(operands):
    assert read(f"        /*0000*/ {operands} ;\n") == ["UR7"]


@pytest.mark.parametrize(
    "write", ["UMOV UR7, 0x1", "ULDC.64 UR6, c[0x0][0x118]", "UIMAD.WIDE UR6, UR3, 0x4, URZ", "R2UR UR7, R5"]
)
def test_each_kind_of_write(write):
    before = f"        /*0000*/ UMOV UR3, 0x0 ;\n        /*0010*/ {write} ;\n"
    assert read(before + "        /*0020*/ UIADD3 UR8, UR7, 0x1, URZ ;\n") == []


def test_a_write_later_in_a_loop():
    """It reaches the next iteration; one after the loop does not."""
    text = """
        /*0000*/ UIADD3 UR8, UR7, 0x1, URZ ;
        /*0010*/ UMOV UR7, 0x1 ;
        /*0020*/ BRA 0x0 ;
    """
    assert read(text) == []
    assert read(text.replace("/*0010*/", "/*0030*/")) == ["UR7"]
