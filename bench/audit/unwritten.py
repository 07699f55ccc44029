"""Finds uniform registers that machine code reads before anything has written them: a fault of the assembler.

Seen on an H100: ptxas 12.8 (triton 3.6) took the address of a wgmma operand from such a register, in a tile that no table for
sm_90 has, and the product had whatever the register held (bench/LOG.md, "a register that nothing wrote").
"""

import re
from bisect import bisect_left

from bench.audit.sass import Instruction

_REGISTER = re.compile(r"\bUR(\d+)\b")
_FIRST = re.compile(r"UR(\d+)\b")


def unwritten(instructions: list[Instruction]) -> list[str]:
    """The reads of uniform registers that no write reaches, as text.

    A write reaches what stands after it, and what stands before it within a loop around both. Of a 64-bit or wider source the
    first register alone is looked at, so that no register counts as read which is not.
    """
    loops = [(i.target, i.address) for i in instructions if i.target is not None and i.target < i.address]
    written: dict[int, list[int]] = {}
    for instruction in instructions:
        for register in _writes(instruction):
            written.setdefault(register, []).append(instruction.address)
    return [
        f"{instruction.opcode} {instruction.operands} at {instruction.address:#x} reads UR{register}"
        for instruction in instructions
        for register in _reads(instruction)
        if not _reached(instruction.address, written.get(register, []), loops)
    ]


def _reached(address: int, writes: list[int], loops: list[tuple[int, int]]) -> bool:
    if writes and writes[0] < address:
        return True
    around = [(first, last) for first, last in loops if first <= address <= last]
    return any(bisect_left(writes, first) < bisect_left(writes, last + 1) for first, last in around)


def _writes(instruction: Instruction) -> range:
    """The uniform registers that an instruction writes: the first operand's, as many as its name says."""
    first = _FIRST.match(instruction.operands)
    if not first:
        return range(0)
    size = 4 if ".128" in instruction.opcode else 2 if re.search(r"\.(64|WIDE)\b", instruction.opcode) else 1
    return range(int(first[1]), int(first[1]) + size)


def _reads(instruction: Instruction) -> set[int]:
    first = _FIRST.match(instruction.operands)
    return {int(number) for number in _REGISTER.findall(instruction.operands[first.end() if first else 0 :])}
