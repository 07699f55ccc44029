"""Parses the compiler's output: SASS from nvdisasm, PTX, and cuobjdump's resource line. Text in, numbers out."""

import re
import struct
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

# "        /*0520*/              @!P0 LDG.E.128 R8, desc[UR4][R4.64+0x200] ;"
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*(?:\.\w+)*)\s*([^;]*);", re.M)
_RESOURCE = re.compile(r"\b(REG|STACK|SHARED|LOCAL):(\d+)")
_PTX_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', re.M)
_PTX_EVENT = re.compile(
    r"^\s*// (?P<inline>begin|end) inline asm"
    r"|^\s*\.loc\s+(?P<file>\d+)\s+(?P<line>\d+)"
    r"|(?P<kind>ld|st)\.global(?:\.[a-z]\w*(?:::\w+)*)*?(?:\.v(?P<vector>\d))?\.[bfsu](?P<bits>\d+)\b"
    r"|(?P<copy>cp\.async)\.c[ag]\.shared\.global\s*\[[^]]*\],\s*\[[^]]*\],\s*(?P<bytes>0x[0-9a-f]+|\d+)",
    re.M,
)
_POINTER = re.compile(r"tl\.(?:load|store)\(\s*(\w+)")

_KERNELS = Path(__file__).parents[2] / "kernels"

MATRIX_KINDS = {"HMMA": "mma.sync", "IMMA": "mma.sync", "DMMA": "mma.sync", "HGMMA": "wgmma", "UTCHMMA": "tcgen05"}
Widths = dict[tuple[str, str], list[int]]


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.split(".", 1)[0]

    @property
    def target(self) -> int | None:
        """The target address of a branch; None for any other instruction."""
        address = re.search(r"\b0x[0-9a-f]+\s*$", self.operands) if self.name == "BRA" else None
        return int(address.group(), 16) if address else None


def parse(sass: str) -> list[Instruction]:
    return [Instruction(int(a, 16), opcode, operands.strip()) for a, opcode, operands in _INSTRUCTION.findall(sass)]


def disassemble(codes: list[bytes], target: str, nvdisasm: str) -> list[list[Instruction]]:
    """One list of instructions per piece of machine code.

    One call of nvdisasm handles all pieces: it takes half a second to start and a few milliseconds per kernel.
    """
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        command = [nvdisasm, "-ndf", "-b", target, file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return split(parse(text), [len(code) for code in codes])


def split(instructions: list[Instruction], sizes: list[int]) -> list[list[Instruction]]:
    """Cut a joint disassembly into pieces of `sizes` bytes, each with addresses and targets from 0."""
    pieces, start = [], 0
    for size in sizes:
        inside = [i for i in instructions if start <= i.address < start + size]
        pieces.append([_moved(instruction, -start) for instruction in inside])
        start += size
    return pieces


def _moved(instruction: Instruction, offset: int) -> Instruction:
    operands = instruction.operands
    if instruction.target is not None:
        operands = re.sub(r"0x[0-9a-f]+\s*$", hex(instruction.target + offset), operands)
    return Instruction(instruction.address + offset, instruction.opcode, operands)


def code(cubin: bytes) -> bytes:
    """The machine code of a cubin with one kernel: its .text section (64-bit little-endian ELF)."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    count, names = struct.unpack_from("<HH", cubin, 0x3C)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + 64 * i) for i in range(count)]
    strings = sections[names][4]
    for name, _, _, _, offset, size in sections:
        if cubin.startswith(b".text.", strings + name):
            return cubin[offset : offset + size]
    raise ValueError("a cubin without a .text section")


def resources(cuobjdump_output: str) -> dict[str, int]:
    """REG, STACK, SHARED and LOCAL of the one function that `cuobjdump -res-usage` lists."""
    line = next(line for line in cuobjdump_output.splitlines() if "REG:" in line)
    return {name: int(value) for name, value in _RESOURCE.findall(line)}


def hot_loop(instructions: list[Instruction]) -> tuple[list[Instruction], bool]:
    """The hot loop and True; for a kernel without a loop the whole kernel and False.

    It is the innermost loop with the most matrix instructions. Of several the shortest is taken, because attention's
    kernels repeat the loop for the few tiles that need a mask. Without matrix instructions it is the longest loop.
    """
    spans = [(i.target, i.address) for i in instructions if i.target is not None and i.target < i.address]
    innermost = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    loops = [[i for i in instructions if first <= i.address <= last] for first, last in innermost]
    if not loops:
        return _without_padding(instructions), False
    products = [sum(matrix_instructions(loop).values()) for loop in loops]
    if not max(products):
        return max(loops, key=len), True
    return min((loop for loop, n in zip(loops, products, strict=True) if n == max(products)), key=len), True


def _without_padding(instructions: list[Instruction]) -> list[Instruction]:
    # A kernel ends in a branch to itself and NOPs up to the next 128 bytes.
    return [i for i in instructions if i.name != "NOP" and i.target != i.address]


def matrix_instructions(instructions: list[Instruction]) -> Counter[str]:
    """Matrix instructions by kind. tf32 also counts under its own name, so that an unintended one shows."""
    kinds = Counter(MATRIX_KINDS[i.name] for i in instructions if i.name in MATRIX_KINDS)
    tf32 = sum("TF32" in i.opcode for i in instructions)
    return kinds + Counter({"tf32": tf32})


def spills(instructions: list[Instruction]) -> int:
    """Loads and stores of local memory: spilled registers."""
    return sum(i.name in ("LDL", "STL") for i in instructions)


def access_bytes(instruction: Instruction) -> int:
    """Bytes per lane of one load or store."""
    width = re.search(r"\.(?:[US])?(128|64|16|8)(?:\.|$)", instruction.opcode)
    return int(width[1]) // 8 if width else 4


def access_widths(ptx: str) -> Widths:
    """Bytes per lane of each global access in PTX, by "ld" or "st" and the pointer's name in the source line.

    Triton writes an access as inline assembly. Within the assembly triton 3.8 numbers lines onward from the source line,
    so only the line number before the assembly belongs to the access.
    """
    files = {number: _lines(Path(path)) for number, path in _PTX_FILE.findall(ptx)}
    widths: Widths = {}
    source: tuple[str, int] | None = None
    inline = False
    for event in _PTX_EVENT.finditer(ptx):
        if event["inline"]:
            inline = event["inline"] == "begin"
        elif event["file"]:
            source = source if inline else (event["file"], int(event["line"]))
        elif source:
            size = int(event["bytes"], 0) if event["copy"] else int(event["vector"] or 1) * int(event["bits"]) // 8
            name = _pointer_name(files[source[0]], source[1])
            widths.setdefault((event["kind"] or "ld", name), []).append(size)
    return widths


def _lines(path: Path) -> list[str]:
    """The lines of this checkout's copy of a kernel file: Triton's cache may hold PTX from a checkout that was deleted.

    The cache key holds a kernel's text and line but not the path of its file. Any other missing file (Triton's own library
    beside that checkout) yields no lines; it loads and stores no kernel tensor by name.
    """
    ours = _ours(path)
    source = path if ours is None or not ours.exists() else ours
    return source.read_text().splitlines() if source.exists() else []


def _ours(path: Path) -> Path | None:
    """The path in this checkout of a file below a folder kernels/; None for any other file."""
    _, found, inside = str(path).rpartition("/kernels/")
    return _KERNELS / inside if found else None


def has_moved(ptx: str) -> bool:
    """Whether the PTX names a kernel file that does not exist here because it was compiled before the file moved."""
    ours = (_ours(Path(path)) for _, path in _PTX_FILE.findall(ptx))
    return any(path is not None and not path.exists() for path in ours)


def _pointer_name(lines: list[str], number: int) -> str:
    found = _POINTER.search(" ".join(lines[number - 1 : number + 2]))
    return found[1].removesuffix("_ptr") if found else "?"
