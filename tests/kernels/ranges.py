"""Finds offsets of loads and stores that may have wrapped in 32 bits, by interval analysis of Triton's IR.

The text is read once from top to bottom. Every integer gets the interval of its possible values. A result that a 32-bit
operation may wrap is marked, and the mark propagates with the number. A marked offset of a pointer is a finding. What is not
known (an operation that is not listed, a loop-carried number) may be anything.

Numbers that are loaded (row numbers, labels, lengths) are taken to be at most LOADED: they fit, their products do not.
"""

import math
import re
from dataclasses import dataclass

LOADED = 2**30

_NAME = re.compile(r"%[\w$.#]+")
_DEFINITION = re.compile(r'^\s*(?:(%[\w$.]+)(?::\d+)? = )?"?([a-z]\w*\.\w+)"?(.*)$')
_PASSED_ON = {"splat", "broadcast", "expand_dims", "reshape", "trans", "extsi"}


@dataclass(frozen=True)
class Range:
    """From `low` to `high`; `wrapped` is the line of the IR that may have left 32 bits on the way, or None."""

    low: int
    high: int
    wrapped: str = ""


def wrapped_offsets(ir: str, arguments: dict[str, int], programs: int) -> list[str]:
    """A line per tt.addptr whose offset may have wrapped, with the operation that wrapped.

    Args:
        ir: a module with one function, after Triton's make_ttir.
        arguments: the function's integers, by name.
        programs: the number of programs on axis 0.
    """
    known = {f"%{name}": Range(value, value) for name, value in arguments.items()}
    found: list[str] = []
    regions: list[tuple[str, list[Range | None]]] = []  # each region's result, and what it yielded
    for line in (re.sub(r" loc\(.*$", "", line) for line in ir.splitlines() if "tt.func" not in line):
        if "^bb" in line or "_args" in line or "scf.while" in line:
            for name in re.findall(r"[(, ](%[\w$.]+)(?::| =)", line):
                known.pop(name, None)  # loop-carried
        definition = _DEFINITION.match(line)
        result, operation, rest = definition.groups() if definition else (None, "", line)
        given = [known.get(name) for name in _NAME.findall(rest)]
        if operation == "scf.for":
            known[_NAME.search(rest).group()] = _counter(given)
        elif operation == "scf.yield" and regions:
            _hand_out(regions[-1][0], given, rest, known)
        elif operation == "tt.addptr" and given[1] and given[1].wrapped:
            found.append(f"{result}: {given[1].wrapped}")
        opens, closes = line.rstrip().endswith("{"), line.lstrip().startswith("}")  # both: an else, or a do
        if opens and not closes:
            regions.append((result or "", given))
        elif closes and not opens and regions:
            result, given = regions.pop()
            if result and line.strip().startswith("})"):  # tt.reduce, whose types are on this line
                known[result] = _in_type(_reduced(given, line), _bits(line), line.strip())
        elif result:
            value = _value(operation, given, rest, programs)
            known[result] = _in_type(value, _bits(rest), line.strip()) if value else None
    return found


def _bits(text: str) -> int:
    """The bits of the integer type at the end of a line; 0 for another type."""
    last = re.search(r"[x<\s]i(\d+)>*(?: \{.*\})?$", text.rstrip())
    return int(last.group(1)) if last else 0


def _hand_out(result: str, given: list[Range | None], rest: str, known: dict[str, Range | None]) -> None:
    """The number that a loop or a branch yields is its result: any number, with the mark of the yielded one."""
    for place, value in enumerate(given):
        name = result if len(given) == 1 else f"{result}#{place}"
        known[name] = Range(-LOADED, LOADED, value.wrapped) if value and value.wrapped else None


def _reduced(given: list[Range | None], line: str) -> Range:
    """A sum or an extreme of all elements."""
    value = given[0] or _anything(_bits(line))
    n = math.prod(int(size) for size in re.findall(r"(\d+)x", line.partition("->")[0]))
    return Range(min(value.low, n * value.low), max(value.high, n * value.high), value.wrapped)


def _in_type(value: Range, bits: int, line: str) -> Range | None:
    """Marked if it leaves its type; numbers with another width than 32 bits are only clamped."""
    if not bits:
        return None
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if low <= value.low and value.high <= high:
        return value
    marked = value.wrapped or (line if bits == 32 and value.high > high else "")
    return Range(low, high, marked)


def _counter(given: list[Range | None]) -> Range:
    """A loop's counter, `%i = %low to %high step ...`."""
    low, high = (end or _anything(32) for end in given[1:3])
    return Range(low.low, max(low.high, high.high - 1), low.wrapped or high.wrapped)


def _anything(bits: int) -> Range:
    return Range(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _value(operation: str, given: list[Range | None], rest: str, programs: int) -> Range | None:
    """The operation's possible results before they are cut to their type; None if they are no integers."""
    dialect, _, name = operation.partition(".")
    bits = _bits(rest)
    if name == "constant":
        number = re.search(r"(?:dense<|\s)(-?\d+)>? : ", rest)
        return Range(int(number.group(1)), int(number.group(1))) if number else None
    if name == "get_program_id":
        return Range(0, programs - 1)
    if name == "get_num_programs":
        return Range(programs, programs)
    if name == "make_range":
        end, start = (int(re.search(rf"{word} = (\d+)", rest).group(1)) for word in ("end", "start"))
        return Range(start, end - 1)
    if name == "load":
        loaded = re.search(r"!tt.ptr<i(\d+)>", rest)
        return Range(-1, min(LOADED, 2 ** int(loaded.group(1)) - 1)) if loaded else None
    operands = [operand or _anything(bits or 64) for operand in given]
    if name == "select":
        operands = operands[1:]
    if name in ("addptr", "cmpi", "cmpf"):
        return None
    mark = next((operand.wrapped for operand in operands if operand.wrapped), "")
    limits = _limits(name, operands) if dialect in ("arith", "tt") and operands else None
    if name == "extui" and given[0] is None:
        limits = 0, 2 ** int(re.search(r"i(\d+)>? to ", rest).group(1)) - 1
    if limits is None:
        return Range(*_ends(_anything(bits)), mark) if bits else None
    return Range(*limits, mark)


def _ends(value: Range) -> tuple[int, int]:
    return value.low, value.high


def _limits(name: str, operands: list[Range]) -> tuple[int, int] | None:
    a, b = operands[0], operands[-1]
    if name in _PASSED_ON or name == "trunci" or (name == "extui" and a.low >= 0):
        return a.low, a.high
    if name == "addi":
        return a.low + b.low, a.high + b.high
    if name == "subi":
        return a.low - b.high, a.high - b.low
    if name in ("muli", "shli"):
        factors = _ends(b) if name == "muli" else [2 ** min(63, max(0, end)) for end in _ends(b)]
        products = [x * y for x in _ends(a) for y in factors]
        return min(products), max(products)
    if name in ("divsi", "remsi") and b.low > 0:
        if name == "divsi":
            return min(a.low // b.high, -(-a.low // b.low)), max(a.high // b.low, a.high // b.high)
        return (0 if a.low >= 0 else 1 - b.high), min(b.high - 1, max(a.high, 0))
    if name in ("minsi", "maxsi"):
        choose = min if name == "minsi" else max
        return choose(a.low, b.low), choose(a.high, b.high)
    if name == "select":
        return min(a.low, b.low), max(a.high, b.high)
    if name == "andi" and max(a.low, b.low) >= 0:
        return 0, min(x.high for x in (a, b) if x.low >= 0)
    if name in ("shrsi", "shrui") and a.low >= 0 and b.low >= 0:
        return 0, a.high >> b.low
    return None
